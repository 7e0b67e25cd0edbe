"""W&B as a view on the results: nothing waits for it, nothing fails with it, nothing reads it back.

    with track("train", study="demo", run_path=run.path, group="smollm2-135m × buddy", config=settings,
               folder=study_folder / "wandb", settings=study.tracking) as tracker:
        tracker.log({"loss": 2.3}, step=10)
        tracker.summary({"final_loss": 1.9})

Records stay the one source of truth. Whatever goes wrong between here and W&B's server is told in one warning, and
the job goes on without. W&B is imported only where a run is really opened.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import shutil
import socket
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from buddy import records
from buddy.config import digest
from buddy.settings import Tracking

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode | Literal["auto"]] = {
    "auto": "auto",
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""What WANDB_MODE and the study may say, W&B's older names included."""

CONNECT_TIMEOUT_S = 5.0
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 60.0
FLUSH_S = 1.0
"""How much of its last points a killed job may lose; W&B's own default is 15 s."""


@dataclass
class Progress:
    """How far a job's W&B run has come, kept in a file of its own.

    A killed job is run again with the settings it had: its run goes on, and steps that it has logged are not logged
    twice. A job that had finished, or has another setting, is made anew: so is its run, in place of the old one.
    """

    file: Path
    settings: str
    step: int = -1
    finished: bool = False

    @classmethod
    def read(cls, file: Path, settings: str) -> Progress:
        """What an interrupted attempt with these settings (their digest) has left, or a fresh start."""
        try:
            found = cls(file, **json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            return cls(file, settings)
        return cls(file, settings) if found.finished or found.settings != settings else found

    @property
    def fresh(self) -> bool:
        """Whether no step is logged yet."""
        return self.step < 0

    def write(self, step: int | None = None, finished: bool = False) -> None:
        """Keep the last step logged, and whether the job is done."""
        self.step = self.step if step is None else step
        self.finished = finished
        records.write_json(self.file, {"settings": self.settings, "step": self.step, "finished": self.finished})


class Tracker:
    """One job's W&B run, or nothing at all: its methods never raise because of W&B."""

    def __init__(self, run: Any = None, progress: Progress | None = None) -> None:
        """Wrap an open run (what ``wandb.init`` returned) and what its earlier attempts did; without, do nothing."""
        self._run = run
        self._progress = progress
        self._done = -1 if progress is None else progress.step
        self._step: int | None = None
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

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the job's headline values; nested mappings become dotted names."""
        if self._run is not None:
            with self._shielded("summary"):
                self._run.summary.update(dict(values))

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Show a data frame as a table."""
        if self._run is not None:
            with self._shielded("table"):
                import wandb

                self._run.summary[name] = wandb.Table(dataframe=frame)

    def finish(self, failed: bool = False) -> None:
        """Close the run; `track` calls this."""
        if self._run is not None:
            with self._shielded("finish"):
                self._run.finish(exit_code=int(failed))
                if self._progress is not None:
                    self._progress.write(self._step, finished=not failed)
            self._run = None

    @contextmanager
    def _shielded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever W&B raises, its job is to watch ours and not to end it
            if not self._failed:
                log.warning("W&B: %s failed, this job goes on (%s)", what, _in_one_line(error))
            self._failed = True


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

    Yields:
        The tracker. An exception of the body marks the run as failed and goes its way.
    """
    mode = choose_mode(settings)
    if mode == "disabled":
        yield Tracker()
        return
    arguments = {
        "id": run_id(study, stage, run_path),
        "project": settings.project,
        "entity": settings.entity,
        "group": group[:128],
        "job_type": stage,
        "name": f"{stage} {'/'.join(part.partition('~')[2] or part for part in run_path.split('/'))}"[:128],
        "tags": [tag[:64] for tag in dict.fromkeys((study, *tags))],
        "config": {**config, "study": study, "stage": stage, "run": run_path, "commit": records.commit()},
    }
    tracker = _open(mode, arguments, folder, digest(dict(config)))
    try:
        yield tracker
    except BaseException:
        tracker.finish(failed=True)
        raise
    tracker.finish()


def run_id(study: str, stage: str, run_path: str) -> str:
    """The id of a job's W&B run, the same for every attempt at it."""
    return digest(study, stage, run_path)


def choose_mode(settings: Tracking) -> Mode:
    """Where this process's runs go: WANDB_MODE, else the study's mode; auto is online if there is a key."""
    named = os.environ.get("WANDB_MODE") or settings.mode
    mode = MODES.get(named)
    if mode is None:
        _warn(f"WANDB_MODE={named} is not one of {', '.join(MODES)}; runs are kept offline")
        return "offline"
    if mode == "auto":
        return "online" if _has_key() else "offline"
    if mode == "online" and not _has_key():
        # W&B would ask for a key on the terminal, and wait.
        _warn("online, but there is no key (WANDB_API_KEY or `wandb login`); runs are kept offline")
        return "offline"
    return mode


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    for file in [named] if named else ["~/.netrc", "~/_netrc"]:
        try:
            found = netrc.netrc(os.path.expanduser(file)).authenticators(urlsplit(_server()).netloc)
        except (OSError, ValueError, netrc.NetrcParseError):  # absent, not text, not understood
            continue
        if found and found[2]:
            return True
    return False


def _server() -> str:
    """Address of the W&B server, from the environment or what ``wandb login`` wrote."""
    if named := os.environ.get("WANDB_BASE_URL"):
        return named
    import configparser

    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(os.path.join(os.path.expanduser(folder), "settings"))
    except (OSError, ValueError, configparser.Error):
        return "https://api.wandb.ai"
    return parser.get("default", "base_url", fallback="https://api.wandb.ai")


def _open(mode: Mode, arguments: dict[str, Any], folder: Path, settings: str) -> Tracker:
    """Open the run, offline where online fails, and not at all where that fails too."""
    if mode == "online":
        try:
            _check_reachable(_server())
            return _init("online", arguments, folder, settings)
        except Exception as error:  # no network, no access, a server that is down: none of the job's business
            _warn(f"no run online, kept offline in {folder} for `wandb sync`", error)
    try:
        return _init("offline", arguments, folder, settings)
    except Exception as error:  # an unwritable folder, a broken installation: none of the job's business
        _warn("no run, this job goes on without W&B", error)
        return Tracker()


def _check_reachable(server: str) -> None:
    """Fail at once where no connection can be made, as on most compute nodes; W&B would try for long."""
    address = urlsplit(server)
    host = address.hostname or ""
    if urllib.request.getproxies().get(address.scheme) and not urllib.request.proxy_bypass(host):
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()


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

    import wandb

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
    import wandb

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
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})


_warned: set[str] = set()


def _warn(message: str, error: Exception | None = None) -> None:
    """Say it once per process: a command may open many runs."""
    if message not in _warned:
        _warned.add(message)
        log.warning("W&B: %s%s", message, f" ({_in_one_line(error)})" if error is not None else "")


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
