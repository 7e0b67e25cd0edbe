"""What Snakemake notes of how an output was made, when the workflow itself has changed since.

Snakemake makes an output again when its rule is written differently, though the command may be the same word for word: an
update of this project would begin a finished study anew. It notes the command, too, so an output whose noted command is
today's is noted as made by today's rule.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from typing import Any

from buddy.storage.files import read_json, write_json
from buddy.study import sessions
from buddy.study.jobs import Job


def keep(jobs: Iterable[Job], rule: str) -> list[str]:
    """Let outputs stand that another form of their rule made by the same command.

    Args:
        jobs: those of the study.
        rule: the shell command of the rules as they are written, whose one parameter is the job's own command.

    Returns:
        The outputs of which that is so.
    """
    notes = {output.as_posix(): note for output, note in sessions.notes("metadata").items()}
    kept = []
    for job in jobs:
        for output in job.paths:
            content = read_json(notes[output]) if output in notes else {}
            if content.get("code") not in (None, rule) and _same(content.get("shellcmd"), job.shell()):
                write_json(notes[output], {**content, "code": rule, "params": [repr(job.shell())]})
                kept.append(output)
    return kept


def _same(noted: Any, command: str) -> bool:
    """Whether two commands say the same, in whatever order; what follows the redirection is where the log goes."""
    try:
        return _options(str(noted).partition(" > ")[0]) == _options(command)
    except ValueError:  # quotes that do not close
        return False


def _options(command: str) -> Counter[tuple[str, ...]]:
    """The options of a command with their values, and the words before them."""
    found: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            found.append(word.split("=", 1))
        else:
            found[-1].append(word)
    return Counter(map(tuple, found))
