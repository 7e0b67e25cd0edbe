"""What a failed job says for itself: its own last line, where the rest stands, and how to run it alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SPEAKER = "buddy: "
"""Begins the line with which the command line ends what it cannot do."""

NOT_MISTAKES = ("buddy: interrupted", "buddy: unexpected error: ", "buddy: out of memory ")
"""Such a line begins so where the status is not 2: another try may succeed. All others tell of a user's mistake."""

LOOKED_AT = 64_000
"""Bytes at the end of a log in which its last line is looked for: progress bars write long ones."""


@dataclass(frozen=True)
class Failure:
    """A job that did not succeed.

    Attributes:
        rule: its rule.
        makes: what it was to make.
        logs: its own log, then what Slurm captured around it.
        alone: the command that runs it alone.
    """

    rule: str
    makes: str
    logs: tuple[Path, ...]
    alone: str

    @property
    def said(self) -> tuple[str, Path | None]:
        """Its last line, and the log that it stands in: the latest line in which buddy says why, else any."""
        written = sorted((log for log in self.logs if log.is_file()), key=lambda log: -log.stat().st_mtime)
        found = [(line, log) for log in written if (line := last_line(log))]
        spoken = [(line, log) for line, log in found if SPEAKER in line]
        return next(iter(spoken or found), ("(it left no log)", None))

    @property
    def by_mistake(self) -> bool:
        """Whether it failed by a mistake of the user's, which another try will not mend."""
        line, _ = self.said
        return SPEAKER in line and not line.startswith(NOT_MISTAKES)

    def __str__(self) -> str:
        line, log = self.said
        parts = [
            f"{self.rule}: {line}",
            f"  makes  {self.makes}",
            f"  log    {log}" if log else "",
            f"  alone  {self.alone}",
        ]
        return "\n".join(filter(None, parts))


def last_line(log: Path) -> str:
    """The last line of a log that says something; the last in which buddy speaks, where it does. "" without one."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOOKED_AT))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    spoken = [line[line.index(SPEAKER) :] for line in lines if SPEAKER in line]
    return (spoken or lines or [""])[-1]


def summary(failures: Sequence[Failure]) -> str:
    """All failures, the last thing on the screen."""
    title = "1 job failed:" if len(failures) == 1 else f"{len(failures)} jobs failed:"
    return "\n\n".join(["", title, *map(str, failures)])
