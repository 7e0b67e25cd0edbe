"""What Snakemake notes of how an output was made, when the workflow itself has changed since.

Snakemake makes an output again when its rule is written differently, though the command may be the same word for word: an
update of this project would begin a finished study anew. It notes the command, too, so an output whose noted command is
today's is noted as made by today's rule. So is one whose command made itself what it is handed over today; that is taken
from it for the others.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from buddy.storage import folders
from buddy.storage.files import read_json, write_json
from buddy.study import manifest, sessions
from buddy.study.jobs import Job

RUN, WEIGHTS = "run.json", "router.safetensors"
"""Of a run's folder (`buddy.runs`, which loads models and is not needed here)."""


def keep(jobs: Iterable[Job], rule: str) -> list[str]:
    """Let outputs stand that another form of their rule made by the same command.

    Args:
        jobs: those of the study.
        rule: the shell command of the rules as they are written, whose one parameter is the job's own command.

    Returns:
        The outputs of which that is so.
    """
    notes = _notes()
    kept = []
    for job in jobs:
        for output in job.paths:
            content = read_json(notes[output]) if output in notes else {}
            code, noted = content.get("code"), content.get("shellcmd")
            now = {"code": rule, "params": [repr(job.shell())]}
            if code is not None and _before(job, noted):
                now |= {"shellcmd": job.shell(), "input": _inputs(job)}
            elif code in (None, rule) or not _same(noted, job.shell()):
                continue
            write_json(notes[output], {**content, **now})
            kept.append(output)
    return kept


def recover(jobs: Iterable[Job]) -> dict[str, str]:
    """Gates that are missing taken from a run of before, which trained the same.

    Args:
        jobs: those of the study.

    Returns:
        What was made, and the run that it is from.
    """
    notes = _notes()
    found = {}
    for job in jobs:
        for needed in job.needs if job.work.spared else ():
            noted = read_json(notes[job.path]).get("shellcmd") if job.path in notes else None
            if needed.stage == "gates" and not Path(needed.path).exists() and _before(job, noted):
                run = Path(job.parent)
                if read_json(run / RUN) and not manifest.lacking(run):  # else they are trained
                    _take(run, needed)
                    found[needed.path] = job.parent
    return found


def _take(run: Path, gates: Job) -> None:
    """The gates of a FiRST run, which its LoRA left as they were, in a folder of their own."""
    info, folder = read_json(run / RUN), Path(gates.parent)
    alone = {
        **info,
        "policy_settings": {**info["policy_settings"], "thresholds": {}},
        "backbone_path": os.path.relpath(run / info["backbone_path"], folder),
        "variant": {},
        "digests": {name: value for name, value in info["digests"].items() if name in ("backbone", "router")},
    }
    with folders.fresh(folder, "a run") as draft:
        shutil.copyfile(run / WEIGHTS, draft / WEIGHTS)
        write_json(draft / RUN, alone)
    manifest.write(folder)
    # As old as what it is made from, and so no newer than what is made of it.
    age = max(path.stat().st_mtime for path in map(Path, _inputs(gates)) if path.exists())
    os.utime(gates.path, (age, age))


def _notes() -> Mapping[str, Path]:
    return {output.as_posix(): note for output, note in sessions.notes("metadata").items()}


def _inputs(job: Job) -> list[str]:
    return sorted(path for given in job.inputs().values() for path in ([given] if isinstance(given, str) else given))


def _before(job: Job, noted: Any) -> bool:
    """Whether a noted command is the job's of before it was spared some of its work."""
    return bool(job.work.spared) and _same(noted, job.shell(without=job.work.spared))


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
