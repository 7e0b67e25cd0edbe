"""One job's W&B run: opened, fed and closed, whatever becomes of the connection."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from buddy.storage.digests import digest
from buddy.study import records
from buddy.study.settings import Tracking
from buddy.tracking import client
from buddy.tracking.identity import next_id, run_id, study_id
from buddy.tracking.journal import Progress, tell_again
from buddy.tracking.lineage import Thing, things
from buddy.tracking.modes import Mode, check_reachable, choose_mode, in_one_line, server, warn

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("buddy.tracking")

SENT = "sent.json"
"""In the folder of an attempt that was kept offline: that it was sent, and where to."""


class Tracker:
    """One job's W&B run, or nothing at all: its methods never raise because of W&B."""

    def __init__(self, run: Any = None, progress: Progress | None = None, done: int = -1, online: bool = False) -> None:
        """Wrap an open run.

        Args:
            run: what ``wandb.init`` returned; without, do nothing.
            progress: of the job.
            done: the last step that its earlier attempts have logged; the run has been told of it.
            online: whether it goes to a server.
        """
        self._run = run
        self._progress = progress
        self._done = done
        self._online = online
        self._by_depth = False
        self._failed = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point to curves; steps ascend, and one that an interrupted attempt has logged is left as it is."""
        if self._run is None or step <= self._done:
            return
        with self._shielded("log"):
            self._note("log", dict(metrics), step)
            self._run.log(dict(metrics), step=step)

    def at_depth(self, removed: int, point: Mapping[str, float], headline: Mapping[str, float] | None = None) -> None:
        """Add a point to curves over the depth, and headline values, in the summary as ``NAME_removed_N``.

        The curves stay out of the summary, where W&B would show the value of whichever depth came last.
        """
        if self._run is not None and not self._by_depth:
            with self._shielded("log"):
                self._note("by_depth", None)
                self._run.define_metric("*", summary="none")
            self._by_depth = True
        self.log(point, step=removed)
        self.summary({at_depth(name, removed): value for name, value in (headline or {}).items()})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the job's headline values; nested mappings become dotted names."""
        if self._run is not None:
            with self._shielded("summary"):
                self._note("summary", dict(values))
                self._run.summary.update(dict(values))

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Show a data frame as a table."""
        if self._run is not None:
            with self._shielded("table"):
                content = json.loads(frame.to_json(orient="split", index=False))
                self._note("table", content, name)
                self._run.log({name: _wandb().Table(dataframe=frame)})

    def image(self, name: str, file: str | Path) -> None:
        """Show a picture, PNG or JPEG; as a table it is in the history, where panels of media look for it."""
        if self._run is not None:
            with self._shielded("image"):
                self._note("image", str(Path(file).absolute()), name)
                self._run.log({name: _wandb().Image(str(file))})

    def _note(self, kind: str, content: Any, at: Any = None) -> None:
        if self._progress is not None:
            self._progress.note(kind, content, at)

    def lineage(self, reads: Sequence[Thing], makes: Sequence[Thing]) -> None:
        """Say what the job was made from and keep what it has made: artifacts, and names for who sends the run later."""
        if self._run is None:
            return
        if self._progress is not None:
            self._progress.reads = [thing.name for thing in reads]
            self._progress.makes = [thing.name for thing in makes]
            self._progress.read_from = [str(thing.place) for thing in reads]
            self._progress.made_at = [str(thing.place) for thing in makes]
        with self._shielded("artifact"):
            client.log_artifacts(self._run, reads, makes, client.JOB.artifacts)

    def finish(self, failed: bool = False) -> None:
        """Close the run; `track` calls this."""
        if self._run is not None:
            with self._shielded("finish"):
                self._keep(closed=True, finished=not failed)
                client.close_run(self._run, failed)
                if self._online and not self._failed:
                    self._keep(delivered={"server": server(), "entity": None, "project": None})
            self._run = None

    def _keep(self, **changed: Any) -> None:
        if self._progress is not None:
            for name, value in changed.items():
                setattr(self._progress, name, value)
            self._progress.write()

    @contextmanager
    def _shielded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever W&B raises, its job is to watch ours and not to end it
            if not self._failed:
                later = ""
                if self._online and self._progress is not None:
                    later = f"; `buddy wandb-sync --study {self._progress.file.parent.parent}` sends what is missing"
                log.warning("W&B: %s failed, this job goes on (%s)%s", what, in_one_line(error), later)
            self._failed = True


def at_depth(name: str, removed: int) -> str:
    """Name of a value at a depth in a run's summary, by which W&B can sort and compare runs."""
    return f"{name}_removed_{removed}"


def _wandb() -> Any:
    """The client, imported where a run is open."""
    import wandb

    return wandb


@contextmanager
def track(
    stage: str,
    *,
    study: str,
    run_path: str,
    group: str,
    config: Mapping[str, Any],
    folder: Path,
    settings: Tracking,
    tags: Sequence[str] = (),
    reads: Iterable[str | Path] = (),
    writes: Iterable[str | Path] = (),
) -> Iterator[Tracker]:
    """Open the W&B run of one job for the time of the ``with`` body.

    Args:
        stage: the job's kind (train, evaluate, ...), shown as W&B's job type.
        study, run_path: what the job works on; for a job without a run, its record's path.
        group: jobs shown together, ``{backbone} × {method}``.
        config: every setting the job reads, JSON-able. No secrets.
        folder: where W&B keeps its files, ``results/{study}/wandb``; a folder of another name gets one named wandb.
        settings: project, entity and mode; the variable WANDB_MODE goes before the mode.
        tags: further labels.
        reads, writes: paths of the study that the job is made from and makes; a failed job has made nothing.

    Yields:
        The tracker. An exception of the body marks the run as failed and goes its way.
    """
    mode = choose_mode(settings)
    if mode == "disabled":
        yield Tracker()
        return
    made_from = things(reads, study)
    arguments = {
        "project": settings.project,
        "entity": settings.entity,
        "group": group[:128],
        "job_type": stage,
        "name": f"{stage} {'/'.join(part.partition('~')[2] or part for part in run_path.split('/'))}"[:128],
        "tags": [tag[:64] for tag in dict.fromkeys((study, *tags))],
        "config": {
            **typed(config),
            **{"study": study, "stage": stage, "run": run_path, "commit": records.commit()},
            "reads": [thing.name for thing in made_from],
        },
    }
    tracker = _open(mode, arguments, folder, digest(dict(config)))
    try:
        yield tracker
    except BaseException:
        tracker.finish(failed=True)
        raise
    tracker.lineage(made_from, things(writes, study))
    tracker.finish()


LISTS = frozenset({"data"})
TEXTS = frozenset({"kv", "decode"})
"""Settings that one command takes several of and another one of."""


def typed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with one type for each key, in whatever job: W&B filters and sorts by a key's type."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found[key] = typed(value)
        elif key in LISTS and isinstance(value, str):
            found[key] = [value]
        elif key in TEXTS and isinstance(value, list | tuple):
            found[key] = ",".join(map(str, value))
        else:
            found[key] = value
    return found


def _open(mode: Mode, arguments: dict[str, Any], folder: Path, settings: str) -> Tracker:
    """Open the run, offline where online fails, and not at all where that fails too."""
    if mode == "online" and not _unreachable:
        try:
            check_reachable()
            return _init("online", arguments, folder, settings)
        except Exception as error:  # no network, no access, a server that is down: none of the job's business
            _unreachable.add(server())  # a command that opens many runs waits once
            warn(f"no run online, kept offline in {folder} for `buddy wandb-sync`", error)
    try:
        return _init("offline", arguments, folder, settings)
    except Exception as error:  # an unwritable folder, a broken installation: none of the job's business
        warn("no run, this job goes on without W&B", error)
        return Tracker()


_unreachable: set[str] = set()


def _init(mode: Mode, arguments: dict[str, Any], folder: Path, settings: str) -> Tracker:
    """Open the run, and tell it what earlier attempts of the job have told and it does not have."""
    parent, own = places(folder)
    own.mkdir(parents=True, exist_ok=True)
    if not os.access(own, os.W_OK):  # W&B would quietly write somewhere under /tmp
        raise PermissionError(f"{own} is not writable")
    whose = study_id(parent if folder.name == "wandb" else own)
    config = {**arguments["config"], "study_id": whose}
    job = run_id(whose, arguments["job_type"], config["run"])
    progress = Progress.of_attempt(own / f"{job}.json", settings)
    older = list(own.glob(f"offline-run-*-{progress.run}"))
    online = mode == "online"
    progress.arguments = {**arguments, "config": config}
    resume: Literal["allow"] | None = "allow" if online and not progress.fresh else None
    run, progress.run = _unless_deleted(mode, progress, parent, resume)
    progress.begun = progress.begun or online
    progress.write()
    done = progress.last_step()
    tell_again(run, progress.told(), run.starting_step - 1 if resume else -1)
    for attempt in older:  # all that it holds is told again
        progress.begun = progress.begun or (attempt / SENT).exists()
        shutil.rmtree(attempt, ignore_errors=True)
    progress.write()
    return Tracker(run, progress, done, online)


def _unless_deleted(mode: Mode, progress: Progress, parent: Path, resume: Literal["allow"] | None) -> tuple[Any, str]:
    """Open the run, under another id where its own was deleted on the server; and that id."""
    try:
        return client.open_run(mode, {**progress.arguments, "id": progress.run}, parent, resume), progress.run
    except Exception as error:
        if not client.is_deleted(error):
            raise
    other = next_id(progress.run)
    warn(f"run {progress.run} was deleted on the server, which takes its id no more; it goes on as {other}")
    return client.open_run(mode, {**progress.arguments, "id": other}, parent, resume), other


def places(folder: Path) -> tuple[Path, Path]:
    """The folder that W&B is given, and the folder ``wandb`` that it makes below it.

    Args:
        folder: where its files are wanted; one of another name gets a folder wandb.
    """
    parent = folder.parent if folder.name == "wandb" else folder
    return parent, parent / "wandb"
