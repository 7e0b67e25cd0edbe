"""One job's W&B run: opened, fed and closed, whatever becomes of the connection."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from buddy.storage.digests import digest
from buddy.storage.files import read_json, write_json
from buddy.study import records
from buddy.study.settings import Tracking
from buddy.tracking.lineage import Thing, things
from buddy.tracking.modes import Mode, check_reachable, choose_mode, in_one_line, keep_key_out_of_logs, warn

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("buddy.tracking")

INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 60.0
ARTIFACTS_TIMEOUT_S = 20.0
FLUSH_S = 1.0
"""How much of its last points a killed job may lose; W&B's own default is 15 s."""


@dataclass
class Progress:
    """How far a job's W&B run has come, kept in a file of its own.

    A killed job is run again with the settings it had: its run goes on, and steps that it has logged are not logged
    twice. A job that had finished, or has another setting, is made anew: so is its run, in place of the old one.

    Attributes:
        file: where it is kept.
        settings: digest of the job's settings.
        step: the last step logged, -1 before the first.
        finished: whether the job is done.
        closed: whether its last attempt has ended, done or failed; a killed one leaves it open.
        reads, makes: names of the artifacts it uses and logs; who sends runs later sends makers first.
    """

    file: Path
    settings: str
    step: int = -1
    finished: bool = False
    closed: bool = False
    reads: list[str] = field(default_factory=list)
    makes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path, settings: str) -> Progress:
        """What an interrupted attempt with these settings (their digest) has left, or a fresh start."""
        try:
            found = cls(file, **read_json(file))
        except TypeError:  # there is none, or one of another version
            return cls(file, settings)
        if found.finished or found.settings != settings:
            return cls(file, settings)
        found.closed = False
        return found

    @property
    def fresh(self) -> bool:
        """Whether no step is logged yet."""
        return self.step < 0

    def write(self, step: int | None = None, finished: bool = False) -> None:
        """Keep the last step logged, and whether the job is done."""
        self.step = self.step if step is None else step
        self.finished = finished
        content = {name: value for name, value in vars(self).items() if name != "file"}
        write_json(self.file, content)


class Tracker:
    """One job's W&B run, or nothing at all: its methods never raise because of W&B."""

    def __init__(self, run: Any = None, progress: Progress | None = None) -> None:
        """Wrap an open run (what ``wandb.init`` returned) and what its earlier attempts did; without, do nothing."""
        self._run = run
        self._progress = progress
        self._done = -1 if progress is None else progress.step
        self._step: int | None = None
        self._by_depth = False
        self._failed = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point to curves; steps ascend, and one that an interrupted attempt has logged is left as it is."""
        if self._run is None or step <= self._done:
            return
        with self._shielded("log"):
            self._run.log(dict(metrics), step=step)
            if step != self._step:  # W&B writes a step down when the next one begins
                if self._progress is not None and self._step is not None:
                    self._progress.write(self._step)
                self._step = step

    def at_depth(self, removed: int, point: Mapping[str, float], headline: Mapping[str, float] | None = None) -> None:
        """Add a point to curves over the depth, and headline values, in the summary as ``NAME_removed_N``.

        The curves stay out of the summary, where W&B would show the value of whichever depth came last.
        """
        if self._run is not None and not self._by_depth:
            with self._shielded("log"):
                self._run.define_metric("*", summary="none")
            self._by_depth = True
        self.log(point, step=removed)
        self.summary({at_depth(name, removed): value for name, value in (headline or {}).items()})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the job's headline values; nested mappings become dotted names."""
        if self._run is not None:
            with self._shielded("summary"):
                self._run.summary.update(dict(values))

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Show a data frame as a table."""
        self._show("table", lambda: {name: _wandb().Table(dataframe=frame)})

    def image(self, name: str, file: str | Path) -> None:
        """Show a picture, PNG or JPEG."""
        self._show("image", lambda: {name: _wandb().Image(str(file))})

    def _show(self, what: str, media: Callable[[], Mapping[str, Any]]) -> None:
        """Log media, which puts them into the history, where panels of media look for them, and into the summary; they
        are made where there is a run, and what goes wrong is told."""
        if self._run is not None:
            with self._shielded(what):
                self._run.log(dict(media()))

    def lineage(self, reads: Sequence[Thing], makes: Sequence[Thing]) -> None:
        """Say what the job was made from and keep what it has made: artifacts, and names for who sends the run later.

        W&B's own ``use_artifact`` waits for the server, and offline it refuses. So what the job has read is logged again,
        as it lies there: content that the server has is no new version, and the run becomes its user once it is there.
        The client asks the server about each artifact, and nobody waits long for the answer.
        """
        if self._run is None:
            return
        if self._progress is not None:
            self._progress.reads = [thing.name for thing in reads]
            self._progress.makes = [thing.name for thing in makes]
        run = self._run

        def log_all() -> None:
            with self._shielded("artifact"):
                for thing in reads:
                    _log_artifact(run, thing, use_after_commit=True)
                for thing in makes:
                    _log_artifact(run, thing, use_after_commit=False)

        # A thread that is left behind must not keep the process alive.
        worker = threading.Thread(target=log_all, daemon=True)
        worker.start()
        worker.join(ARTIFACTS_TIMEOUT_S)
        if worker.is_alive():
            with self._shielded("artifact"):
                raise TimeoutError(f"no answer within {ARTIFACTS_TIMEOUT_S:g} s")

    def finish(self, failed: bool = False) -> None:
        """Close the run; `track` calls this."""
        if self._run is not None:
            with self._shielded("finish"):
                self._run.finish(exit_code=int(failed))
                if self._progress is not None:
                    self._progress.closed = True
                    self._progress.write(self._step, finished=not failed)
            self._run = None

    @contextmanager
    def _shielded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever W&B raises, its job is to watch ours and not to end it
            if not self._failed:
                log.warning("W&B: %s failed, this job goes on (%s)", what, in_one_line(error))
            self._failed = True


def at_depth(name: str, removed: int) -> str:
    """Name of a value at a depth in a run's summary, by which W&B can sort and compare runs."""
    return f"{name}_removed_{removed}"


def _wandb() -> Any:
    """The client, imported where a run is open."""
    import wandb

    return wandb


def _log_artifact(run: Any, thing: Thing, use_after_commit: bool) -> None:
    files = thing.files()
    if not files:
        return
    artifact = _wandb().Artifact(thing.name, type=thing.kind, metadata=thing.metadata())
    for name, file in files.items():
        artifact.add_file(str(file), name=name)
    run._log_artifact(artifact, use_after_commit=use_after_commit)


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
        "id": run_id(study, stage, run_path),
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


def run_id(study: str, stage: str, run_path: str) -> str:
    """The id of a job's W&B run, the same for every attempt at it."""
    return digest(study, stage, run_path)


def _open(mode: Mode, arguments: dict[str, Any], folder: Path, settings: str) -> Tracker:
    """Open the run, offline where online fails, and not at all where that fails too."""
    if mode == "online":
        try:
            check_reachable()
            return _init("online", arguments, folder, settings)
        except Exception as error:  # no network, no access, a server that is down: none of the job's business
            warn(f"no run online, kept offline in {folder} for `wandb sync`", error)
    try:
        return _init("offline", arguments, folder, settings)
    except Exception as error:  # an unwritable folder, a broken installation: none of the job's business
        warn("no run, this job goes on without W&B", error)
        return Tracker()


def _init(mode: Mode, arguments: dict[str, Any], folder: Path, settings: str) -> Tracker:
    # W&B makes a folder `wandb` of its own below the one it is given.
    parent = folder.parent if folder.name == "wandb" else folder
    own = parent / "wandb"
    own.mkdir(parents=True, exist_ok=True)
    if not os.access(own, os.W_OK):  # W&B would quietly write somewhere under /tmp
        raise PermissionError(f"{own} is not writable")
    progress = Progress.read(own / f"{arguments['id']}.json", settings)
    if progress.fresh:
        for stale in own.glob(f"offline-run-*-{arguments['id']}"):
            shutil.rmtree(stale, ignore_errors=True)
    progress.write()
    # Artifacts wait here for who sends them; W&B's own place is in the home folder, one for all studies.
    os.environ.setdefault("WANDB_DATA_DIR", str((own / "data").absolute()))

    keep_key_out_of_logs()
    wandb = _wandb()
    options = _settings(mode)
    wandb.setup(settings=options)
    try:
        # To W&B an id that it has seen is either a run to go on with ("allow") or one to replace (None).
        resume: Literal["allow"] | None = None if progress.fresh else "allow"
        run = wandb.init(mode=mode, dir=str(parent), resume=resume, settings=options, **arguments)
    except Exception:
        wandb.teardown()  # or the id counts as in use when the run is opened offline
        raise
    return Tracker(run, progress)


def _settings(mode: Mode) -> Any:
    """W&B's own settings for a job: quiet, quick, and with an end to every wait."""
    known = _wandb().Settings
    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",  # the rule's log file has it
        "disable_code": True,
        "disable_git": True,  # the commit is in the config, and a remote's address may hold a password
        "init_timeout": INIT_TIMEOUT_S,
        "finish_timeout": FINISH_TIMEOUT_S if mode == "online" else 0.0,
        "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": FLUSH_S,
        "x_save_requirements": False,  # records name the versions
        "x_disable_stats": mode != "online",
    }
    # Not every version knows every setting, and an unknown one is an error.
    return known(**{key: value for key, value in wanted.items() if key in known.model_fields})
