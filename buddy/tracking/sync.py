"""Send what was kept offline, each attempt at a run once, with W&B's own ``wandb sync``.

The client goes on at the line that the server has reached. So a file that is sent a second time would double its
points: an attempt is sent when it has ended, and a run grows by its next attempt. Runs that make an artifact go before
those that use it, so that the one who made it is known as its maker.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from buddy.storage.files import read_json, write_json
from buddy.tracking import modes

SENT = "sent.json"
SILENT_S = 3600.0
"""An attempt that never ended and has written nothing for so long was killed."""

State = Literal["unsent", "sent", "running"]


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, kept offline in a folder of its own.

    Attributes:
        folder: ``offline-run-{time}-{id}``.
        run: id of its run; a killed job's next attempt has the same.
        state: whether it is to be sent.
        reads, makes: names of the run's artifacts.
    """

    folder: Path
    run: str
    state: State
    reads: frozenset[str] = frozenset()
    makes: frozenset[str] = frozenset()

    @property
    def file(self) -> Path:
        """What W&B wrote down of it."""
        return self.folder / f"run-{self.run}.wandb"


@dataclass
class Outcome:
    """What a sync did, in numbers of attempts, and the folders of those that failed."""

    sent: int = 0
    already: int = 0
    running: int = 0
    failed: list[Path] = field(default_factory=list)


def send(folder: Path, entity: str | None = None, project: str | None = None, workers: int = 4) -> Outcome:
    """Send a study's runs.

    Args:
        folder: where its runs are kept, ``results/{study}/wandb``.
        entity, project: where they go; by default where the runs themselves say.
        workers: number of runs sent at a time.

    Returns:
        What was sent, what the server has already, what is still being written and what failed.
    """
    target = {"server": modes.server(), "entity": entity, "project": project}
    found = attempts(folder, target)
    states = [one.state for one in found]
    outcome = Outcome(already=states.count("sent"), running=states.count("running"))
    for wave in waves([one for one in found if one.state == "unsent"]):
        _run_client(wave, entity, project, workers)
        for one in wave:
            if _marker(one.file).exists():
                write_json(one.folder / SENT, {"bytes": one.file.stat().st_size, **target})
                outcome.sent += 1
            else:
                outcome.failed.append(one.folder)
    return outcome


def attempts(folder: Path, target: dict[str, str | None]) -> list[Attempt]:
    """Every attempt in a folder, oldest first.

    Args:
        folder: where runs are kept.
        target: server, entity and project; what was sent elsewhere is unsent here.
    """
    folders = sorted(path for path in folder.glob("offline-run-*-*") if path.is_dir())
    last = {path.name.rsplit("-", 1)[1]: path for path in folders}
    found = []
    for path in folders:
        run = path.name.rsplit("-", 1)[1]
        if not (path / f"run-{run}.wandb").is_file():
            continue
        progress = read_json(folder / f"{run}.json")
        edges = {role: frozenset(progress.get(role, [])) for role in ("reads", "makes")}
        found.append(Attempt(path, run, _state(path, run, target, progress, last[run] == path), **edges))
    return found


def _state(folder: Path, run: str, target: dict[str, str | None], progress: dict, newest: bool) -> State:
    file = folder / f"run-{run}.wandb"
    sent = read_json(folder / SENT)
    by_hand = not sent and _marker(file).exists() and _marker(file).stat().st_mtime >= file.stat().st_mtime
    if by_hand or sent == {"bytes": file.stat().st_size, **target}:
        return "sent"
    ended = not newest or progress.get("closed", progress.get("finished", False))
    silent = time.time() - file.stat().st_mtime > SILENT_S
    return "unsent" if ended or silent else "running"


def waves(unsent: Sequence[Attempt]) -> list[list[Attempt]]:
    """Attempts in groups, each to be sent after the one before: a run comes after the makers of what it reads."""
    makers = {name: one.run for one in unsent for name in one.makes}
    waits_for = {one.run: {makers[name] for name in one.reads if name in makers} - {one.run} for one in unsent}
    groups: list[list[Attempt]] = []
    left = list(unsent)
    while left:
        waiting = {one.run for one in left}
        ready = [one for one in left if not waits_for[one.run] & waiting]
        groups.append(ready or left)  # two runs that read each other's results wait for nobody
        left = [one for one in left if one not in groups[-1]]
    return groups


def _run_client(wave: list[Attempt], entity: str | None, project: str | None, workers: int) -> None:
    """Let the real client send a group; what it reports goes to stderr."""
    for one in wave:
        _marker(one.file).unlink(missing_ok=True)
    options = [*(["--entity", entity] if entity else []), *(["--project", project] if project else [])]
    command = [sys.executable, "-m", "wandb", "sync", "--include-synced", "-n", str(workers), *options]
    folders = [str(one.folder) for one in wave]
    subprocess.run([*command, *folders], stdout=sys.stderr, check=False)


def _marker(file: Path) -> Path:
    """What the client leaves beside a file that it has sent."""
    return file.with_name(f"{file.name}.synced")
