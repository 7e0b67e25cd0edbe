"""Send what W&B's server has not got: runs that were kept offline, and online ones that broke off. Each once.

A run that no server has seen goes by W&B's own ``wandb sync``, several at a time. The client would append such a file to
what the server has, so a run whose beginning is there is told the rest of it from the job's journal
(`buddy.tracking.journal`). Runs that make an artifact go before those that use it, so that the one who made it is known
as its maker.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from buddy.storage.files import read_json, write_json
from buddy.tracking import client, modes
from buddy.tracking.identity import next_id
from buddy.tracking.job import SENT
from buddy.tracking.journal import Progress, tell_again
from buddy.tracking.lineage import things

SILENT_S = 3600.0
"""An attempt that never ended and has told nothing for so long was killed."""

State = Literal["unsent", "sent", "running"]
Target = dict[str, str | None]


@dataclass(frozen=True)
class Kept:
    """A run of which something is on disk.

    Attributes:
        run: its id on the server.
        state: whether it is to be sent.
        folder: of its last attempt that was kept offline, ``offline-run-{time}-{id}``; None where that went online.
        progress: of its job; None for a run that was kept before there were any.
        reads, makes: names of the run's artifacts.
    """

    run: str
    state: State
    folder: Path | None = None
    progress: Progress | None = None
    reads: frozenset[str] = frozenset()
    makes: frozenset[str] = frozenset()

    @property
    def begun(self) -> bool:
        """Whether a server may have its beginning."""
        return self.progress is not None and self.progress.begun

    @property
    def file(self) -> Path:
        """What W&B wrote down of it; there is none where it went online."""
        folder = self.folder or Path(f"absent-{self.run}")
        return folder / f"run-{folder.name.rsplit('-', 1)[1]}.wandb"  # its first id, whatever it goes on as

    @property
    def marker(self) -> Path:
        """What the client leaves beside a file that it has sent."""
        return self.file.with_name(f"{self.file.name}.synced")

    @property
    def place(self) -> Path:
        """Where it lies, for people."""
        return self.folder or (self.progress.file if self.progress else Path(self.run))


@dataclass
class Outcome:
    """What a sync did, in numbers of runs, and of those that failed where they lie and why."""

    sent: int = 0
    already: int = 0
    running: int = 0
    failed: dict[Path, str] = field(default_factory=dict)


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
    found = kept(folder, target)
    states = [one.state for one in found]
    outcome = Outcome(already=states.count("sent"), running=states.count("running"))
    for wave in waves([one for one in found if one.state == "unsent"]):
        reasons = _send_wave(wave, target, workers)
        for one in wave:
            if why := reasons[one.run]:
                outcome.failed[one.place] = why
                continue
            outcome.sent += 1
            if one.folder is not None:
                write_json(one.folder / SENT, {"bytes": one.file.stat().st_size, **target})
            if one.progress is not None:
                _now(one.progress.file, begun=True, delivered=target)
    return outcome


def _now(file: Path, **changed: Any) -> None:
    """Change what is kept of a job's progress."""
    progress = Progress.read(file)
    if progress is not None:
        for name, value in changed.items():
            setattr(progress, name, value)
        progress.write()


def kept(folder: Path, target: Target) -> list[Kept]:
    """Every run in a folder, by the time of its file.

    Args:
        folder: where runs are kept.
        target: server, entity and project; what was sent elsewhere is unsent here.
    """
    folders: dict[str, Path] = {}
    for path in sorted(path for path in folder.glob("offline-run-*-*") if path.is_dir()):
        run = path.name.rsplit("-", 1)[1]
        if (path / f"run-{run}.wandb").is_file():
            folders[run] = path
    found = []
    for file in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime):
        progress = Progress.read(file)
        if progress is None:
            continue
        first = folders.pop(file.stem, None)
        own = folders.pop(progress.run, first)
        if own is not None or progress.begun:
            edges = {"reads": frozenset(progress.reads), "makes": frozenset(progress.makes)}
            one = Kept(progress.run or file.stem, "unsent", own, progress, **edges)
            found.append(_with_state(one, target))
    return found + [_with_state(Kept(run, "unsent", path), target) for run, path in folders.items()]


def _with_state(one: Kept, target: Target) -> Kept:
    ended = one.progress is not None and (one.progress.closed or one.progress.finished)
    state: State = "unsent" if ended or time.time() - _last_told(one) > SILENT_S else "running"
    return Kept(one.run, "sent" if _is_sent(one, target) else state, one.folder, one.progress, one.reads, one.makes)


def _is_sent(one: Kept, target: Target) -> bool:
    if one.progress is not None and one.begun:
        return one.progress.delivered == target
    sent = read_json(one.file.parent / SENT)
    by_hand = not sent and one.marker.exists() and one.marker.stat().st_mtime >= one.file.stat().st_mtime
    return by_hand or sent == {"bytes": one.file.stat().st_size, **target}


def _last_told(one: Kept) -> float:
    files = [one.file, *([one.progress.journal, one.progress.file] if one.progress is not None else [])]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def waves(unsent: Sequence[Kept]) -> list[list[Kept]]:
    """Runs in groups, each to be sent after the one before: a run comes after the makers of what it reads."""
    makers = {name: one.run for one in unsent for name in one.makes}
    waits_for = {one.run: {makers[name] for name in one.reads if name in makers} - {one.run} for one in unsent}
    groups: list[list[Kept]] = []
    left = list(unsent)
    while left:
        waiting = {one.run for one in left}
        ready = [one for one in left if not waits_for[one.run] & waiting]
        groups.append(ready or left)  # two runs that read each other's results wait for nobody
        left = [one for one in left if one not in groups[-1]]
    return groups


def _send_wave(wave: Sequence[Kept], target: Target, workers: int) -> dict[str, str]:
    """Send a group; and by run why it failed, "" if it did not."""
    whole = [one for one in wave if not one.begun]
    reasons = _run_client(whole, target, workers) if whole else {}
    # A run whose id the server takes no more goes on under another one.
    refused = [one for one in whole if client.is_deleted(reasons[one.run]) and one.progress is not None]
    rest = [one for one in wave if one.begun] + refused
    if rest:
        files = [one.progress.file for one in rest if one.progress is not None]
        tell = partial(_tell_rest, entity=target["entity"], project=target["project"])
        # Each in a process of its own: the client has one run at a time.
        with ProcessPoolExecutor(min(workers, len(files)), multiprocessing.get_context("spawn")) as pool:
            told = list(pool.map(tell, files))
        reasons |= {one.run: why for one, why in zip(rest, told, strict=True)}
    return reasons


def _run_client(wave: Sequence[Kept], target: Target, workers: int) -> dict[str, str]:
    """Let the real client send a group; what it reports goes to stderr."""
    for one in wave:
        one.marker.unlink(missing_ok=True)
    options = [f"--{name}={target[name]}" for name in ("entity", "project") if target[name]]
    command = [sys.executable, "-m", "wandb", "sync", "--include-synced", "-n", str(workers), *options]
    folders = [str(one.folder) for one in wave]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # Silent it would not say why it failed.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SILENT"} | modes.PATIENCE
    with tempfile.TemporaryDirectory() as place:
        environment["WANDB_DIR"] = place  # its log, which it would leave in the folder that it is called in
        with subprocess.Popen([*command, *folders], env=environment, **pipes) as process:
            said = list(_shown(process.stdout or ()))
        lost: dict[str, str] = {}
        for log in Path(place).rglob("debug-sync*.log"):
            lost |= client.given_up(log)
    return {one.run: _problem(one, said, lost.get(str(one.file), "")) for one in wave}


def _shown(lines: Any) -> Iterator[str]:
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        yield line.strip()


def _problem(one: Kept, said: Sequence[str], lost: str) -> str:
    """What the client said of a run that it has not sent whole, "" for nothing; such a run is told the rest later.

    The client marks a run as sent also where it has given up on a part: on points aloud, on artifacts and files in its log.

    Args:
        one: the run.
        said: lines of the client's.
        lost: what its log says it has given up.
    """
    errors = [line for line in said if "ERROR" in line]
    own = [line for line in errors if one.run in line]
    if one.marker.exists():
        own = own or ([lost] if lost else [])
        if own:
            _now(one.progress.file, begun=True) if one.progress is not None else one.marker.unlink()
        return " ".join(own)
    return " ".join(own or errors or said[-1:]) or "W&B's client said nothing"


def _tell_rest(file: Path, entity: str | None, project: str | None) -> str:
    """Tell the server what it lacks of a run; and why it failed, "" if it did not.

    Args:
        file: of the job's progress.
        entity, project: where the run goes, if not where it says.
    """
    os.environ.pop("WANDB_MODE", None)  # of a study's jobs, and sending is online
    progress = Progress.read(file)
    if progress is None:
        return f"{file} is damaged"
    where = {key: value for key, value in (("entity", entity), ("project", project)) if value}
    arguments = {**progress.arguments, **where}
    study = str(arguments["config"]["study"])
    parent = file.parent.parent
    try:
        try:
            run = client.open_run("online", {**arguments, "id": progress.run}, parent, "allow", client.SYNC)
        except Exception as error:
            if not client.is_deleted(error):
                raise
            other = next_id(progress.run)
            _now(file, run=other)
            run = client.open_run("online", {**arguments, "id": other}, parent, "allow", client.SYNC)
        tell_again(run, progress.told(), run.starting_step - 1)
        lineage = things(progress.read_from, study), things(progress.made_at, study)
        client.log_artifacts(run, *lineage, client.SYNC.artifacts)
        client.close_run(run, failed=not progress.finished)
    except Exception as error:  # said by who asked
        return modes.in_one_line(error)
    return ""
