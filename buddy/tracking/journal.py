"""What a job has told W&B, kept on disk in our own words, so that whatever the server lacks can be told again.

W&B's client sends in the background: a killed job leaves points behind that were logged and never arrived, and it has no
way to send the rest of a run whose beginning the server has without sending the beginning twice. With the journal a run
goes on where the server's points end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buddy.storage.files import read_json, write_json

Entry = tuple[str, Any, Any]
"""What was told: a kind (``log``, ``by_depth``, ``summary``, ``table`` or ``image``), its content, and a step or name."""


@dataclass
class Progress:
    """How far a job's W&B run has come, kept in a file of its own.

    A killed job is run again with the settings it had: its run goes on, and steps that it has logged are not logged
    twice. A job that had finished, or has another setting, is made anew: so is its run, in place of the old one.

    Attributes:
        file: where it is kept, ``{id}.json``; the journal lies beside it.
        settings: digest of the job's settings.
        run: the run's id on the server: the file's own, unless a run of that id was deleted there.
        arguments: what the run was opened with.
        finished: whether the job is done.
        closed: whether its last attempt has ended, done or failed; a killed one leaves it open.
        begun: whether a server may have a part of it.
        delivered: where all of it has arrived: server, entity and project; {} while it has not.
        reads, makes: names of the artifacts it uses and logs; who sends runs later sends makers first.
        read_from, made_at: where these lie.
    """

    file: Path
    settings: str
    run: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    closed: bool = False
    begun: bool = False
    delivered: dict[str, Any] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    makes: list[str] = field(default_factory=list)
    read_from: list[str] = field(default_factory=list)
    made_at: list[str] = field(default_factory=list)

    @classmethod
    def of_attempt(cls, file: Path, settings: str) -> Progress:
        """What an interrupted attempt with these settings (their digest) has left, or a fresh start."""
        found = cls.read(file)
        if found is None or found.finished or found.settings != settings:
            fresh = cls(file, settings, run=(found.run if found else "") or file.stem)
            fresh.journal.unlink(missing_ok=True)
            return fresh
        found.closed = False
        found.delivered = {}
        return found

    @classmethod
    def read(cls, file: Path) -> Progress | None:
        """What a job has left; None where there is nothing."""
        content = read_json(file)
        known = {name: value for name, value in content.items() if name in cls.__dataclass_fields__ and name != "file"}
        return cls(file, **known) if "settings" in known else None

    @property
    def journal(self) -> Path:
        """The file of what was told."""
        return self.file.with_suffix(".jsonl")

    @property
    def fresh(self) -> bool:
        """Whether nothing is told yet."""
        return not self.journal.exists()

    def write(self) -> None:
        """Keep it."""
        write_json(self.file, {name: value for name, value in vars(self).items() if name != "file"})

    def note(self, kind: str, content: Any, at: Any = None) -> None:
        """Add to the journal what is about to be told."""
        line = json.dumps([kind, content, at], default=float)  # figures of other libraries are figures
        with self.journal.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")

    def told(self) -> Iterator[Entry]:
        """The journal, line by line; one that a killed job has not ended is none."""
        if not self.journal.exists():
            return
        for line in self.journal.read_text(encoding="utf-8").splitlines():
            try:
                kind, content, at = json.loads(line)
            except ValueError:
                continue
            yield kind, content, at

    def last_step(self) -> int:
        """The last step of its curves, -1 before the first."""
        return max((at for kind, _, at in self.told() if kind == "log"), default=-1)


def tell_again(run: Any, entries: Iterator[Entry], after: int) -> None:
    """Tell a run what was told before, of its curves the steps after the last one that the server has.

    Args:
        run: an open one, as the client has it.
        entries: of a journal.
        after: the last step that is there, -1 for none.
    """
    import wandb

    # Media may be there or not: in the summary they add no second point.
    show = run.log if after < 0 else run.summary.update
    for kind, content, at in entries:
        if kind == "by_depth":
            run.define_metric("*", summary="none")
        elif kind == "summary":
            run.summary.update(content)
        elif kind == "log" and at > after:
            run.log(content, step=at)
        elif kind == "table":
            show({at: wandb.Table(columns=content["columns"], data=content["data"])})
        elif kind == "image" and Path(content).is_file():
            show({at: wandb.Image(content)})
