"""What Snakemake notes in ``.snakemake``, and what this workflow notes beside it: sessions, one per call of Snakemake.

Snakemake locks files without saying who locks them, and marks outputs that jobs have started. A session says which
process it is, which study, and under which name its jobs are in Slurm. So the next start can tell a lock that was left
by a killed process from that of a live one, and finds the jobs which outlived their Snakemake. Snakemake itself is not
imported: everything is read from files.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from buddy.storage import locks
from buddy.storage.files import write_json
from buddy.storage.processes import Process, query

FOLDER = Path(".snakemake")
SESSIONS = "buddy"


@dataclass(frozen=True)
class Session:
    """A call of Snakemake.

    Attributes:
        process: it.
        study: name of its study.
        command: its command line, for messages.
        slurm: name of its jobs in Slurm; "" before it has submitted one.
    """

    process: Process
    study: str
    command: str
    slurm: str = ""

    @property
    def file(self) -> Path:
        """Where it is noted."""
        start = self.process.started.split()[-1:]  # numbers of processes are given again
        return FOLDER / SESSIONS / f"{'-'.join([self.process.host, str(self.process.pid), *start])}.json"

    def write(self) -> None:
        """Note it."""
        write_json(self.file, {**self.__dict__, "process": self.process.content()})


def begin(study: str) -> Session:
    """Note this process as a session; the note goes when it ends by itself."""
    session = Session(Process.this(), study, shlex.join(["snakemake", *sys.argv[1:]]))
    session.write()
    atexit.register(session.file.unlink, missing_ok=True)
    return session


def submits(session: Session, name: str) -> Session:
    """Note the name under which a session's jobs are in Slurm."""
    session = replace(session, slurm=name)
    session.write()
    return session


def others(session: Session) -> Iterator[Session]:
    """All other sessions of the same study that are noted, dead or alive."""
    for path in sorted((FOLDER / SESSIONS).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = Session(**{**content, "process": Process.of(content["process"])})
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if found.study == session.study and found.process != session.process:
            yield found


# ---- locks ---------------------------------------------------------------------------------------------------------------


def stale_locks(session: Session, results: Path) -> list[Path]:
    """Snakemake's locks of this study's files whose process is gone; none while another session of the study lives.

    Args:
        session: this one, noted before, so that of two starts at once neither takes the other's lock for stale.
        results: the study's folder, as its files are named.
    """
    if any(other.process.alive for other in others(session)):
        return []
    return [lock for lock in sorted((FOLDER / "locks").glob("*.lock")) if _names(lock, results)]


def _names(lock: Path, results: Path) -> bool:
    try:
        lines = lock.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(line.startswith(f"{results.as_posix()}/") for line in lines)


# ---- what outlived its Snakemake -----------------------------------------------------------------------------------------


def leftovers(session: Session, results: Path) -> str | None:
    """Jobs of this study that still run or wait though their Snakemake is gone, and what to do; None where there are none.

    Sessions that ended and left nothing behind are forgotten here.
    """
    gone = [other for other in others(session) if not other.process.alive]
    for other in gone:
        jobs = query("squeue", "--me", "--noheader", "--format=%i %T", f"--name={other.slurm}") if other.slurm else []
        if jobs:
            return (
                f"{len(jobs)} jobs of study {session.study} are still in Slurm, of a Snakemake that is gone "
                f"({other.process}): {', '.join(jobs[:3])}{' ...' if len(jobs) > 3 else ''}. Cancel them "
                f"(trainings go on from their last checkpoint): scancel --name={other.slurm}; or wait until "
                f"`squeue --name={other.slurm}` lists none. Then give the same command again."
            )
        if jobs is not None:  # else Slurm did not answer: ask again at the next start
            other.file.unlink(missing_ok=True)
    if any(other.process.alive for other in others(session)):
        return None  # what is being written may be theirs
    for place in ("backbones", "data", "encoder", "runs", "predictors", "gates", "records"):
        for lock, owner in locks.owners(results / place).items():
            end = f"scancel {owner.job}" if owner.job else f"kill {owner.pid}"
            return (
                f"{lock.parent / lock.name[1:].removesuffix('.lock')} is still being written by {owner}, whose Snakemake "
                f"is gone. End it: {end}; or wait for it. Then give the same command again."
            )
    return None


# ---- outputs whose jobs have started -------------------------------------------------------------------------------------


def started(kept: Path) -> Iterator[Path]:
    """Outputs that Snakemake has marked as begun and not ended, relative to the folder that ``kept`` is in."""
    yield from notes("incomplete", kept)


def notes(kind: str, kept: Path = FOLDER) -> dict[Path, Path]:
    """By output the files in which Snakemake notes something of it: that it was begun, or how it was made."""
    found = {}
    for note in (kept / kind).rglob("*"):
        if note.is_file() and (output := _decoded(note.relative_to(kept / kind))) is not None:
            found[output] = note
    return found


def mark_incomplete(output: Path) -> None:
    """Mark an output as begun and not ended: Snakemake makes it again."""
    name = base64.urlsafe_b64encode(output.as_posix().encode()).decode()
    longest = os.pathconf(".", "PC_NAME_MAX") - 1  # longer names are cut into folders
    parts = [name[at : at + longest] for at in range(0, len(name), longest)]
    marker = FOLDER.joinpath("incomplete", *(f"@{part}" for part in parts[:-1]), parts[-1])
    if not marker.exists():
        write_json(marker, {"external_jobid": None})


def _decoded(note: Path) -> Path | None:
    """The output that a note is of: Snakemake writes its path in base 64, cut where file names would be too long."""
    text = "".join(part.removeprefix("@") for part in note.parts)
    try:
        return Path(base64.urlsafe_b64decode(text).decode())
    except ValueError:
        return None


def locked(notes: Path) -> bool:
    """Whether a Snakemake is at work, or was killed and left its lock."""
    return any((notes / "locks").glob("*.lock"))
