"""W&B's own client, with an end to every wait: open a run, log artifacts, close it, and know what did not arrive."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from buddy.tracking.lineage import Thing
from buddy.tracking.modes import Mode, keep_key_out_of_logs


@dataclass(frozen=True)
class Waits:
    """Seconds after which the client is left alone.

    Attributes:
        init: for the server's word that the run is open.
        artifacts: for its word on what is there already.
        finish: until everything has arrived.
    """

    init: float
    artifacts: float
    finish: float


JOB = Waits(init=8.0, artifacts=5.0, finish=12.0)
"""Of a job: with three seconds to connect (`buddy.tracking.modes`) no server costs one more than half a minute."""
SYNC = Waits(init=30.0, artifacts=60.0, finish=300.0)
"""Of who sends runs: here nothing waits behind it."""
FLUSH_S = 1.0
"""How often the client writes down what it was told; its own default is 15 s."""


class NotDelivered(Exception):
    """The server has not got all of a run."""


def open_run(
    mode: Mode, arguments: Mapping[str, Any], parent: Path, resume: Literal["allow"] | None, waits: Waits | None = None
) -> Any:
    """Open a run, as the client has it.

    Args:
        mode: online or offline.
        arguments: of ``wandb.init``.
        parent: the folder in which the client has its folder ``wandb``.
        resume: to the client an id that the server knows is either a run to go on with ("allow") or one to replace (None).
        waits: how long; as a job does by default.
    """
    import wandb

    # Artifacts wait here for who sends them; W&B's own place is in the home folder, one for all studies.
    os.environ.setdefault("WANDB_DATA_DIR", str((parent / "wandb" / "data").absolute()))
    keep_key_out_of_logs()
    options = _settings(mode, waits or JOB)
    wandb.setup(settings=options)
    try:
        # The client's service may be another process's (WANDB_SERVICE), with a folder of its own.
        return wandb.init(mode=mode, dir=str(parent.absolute()), resume=resume, settings=options, **arguments)
    except Exception:
        wandb.teardown()  # or the id counts as in use when the run is opened offline
        raise


def _settings(mode: Mode, waits: Waits) -> Any:
    """W&B's own settings for a job: quiet, quick, and with an end to every wait."""
    import wandb

    known = wandb.Settings
    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",  # the rule's log file has it
        "disable_code": True,
        "disable_git": True,  # the commit is in the config, and a remote's address may hold a password
        "init_timeout": waits.init,
        "finish_timeout": waits.finish if mode == "online" else 0.0,
        "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": FLUSH_S,
        "x_save_requirements": False,  # records name the versions
        "x_disable_stats": mode != "online",
    }
    # Not every version knows every setting, and an unknown one is an error.
    return known(**{key: value for key, value in wanted.items() if key in known.model_fields})


def log_artifacts(run: Any, reads: Sequence[Thing], makes: Sequence[Thing], wait_s: float) -> None:
    """Log what a job was made from and what it has made.

    W&B's own ``use_artifact`` waits for the server, and offline it refuses. So what the job has read is logged again, as
    it lies there: content that the server has is no new version, and the run becomes its user once it is there. The
    client asks the server about each artifact, and nobody waits long for the answer.

    Raises:
        TimeoutError: there is no answer.
        Exception: whatever the client raises.
    """
    failure: list[Exception] = []

    def log_all() -> None:
        try:
            for thing in reads:
                _log_artifact(run, thing, use_after_commit=True)
            for thing in makes:
                _log_artifact(run, thing, use_after_commit=False)
        except Exception as error:
            failure.append(error)

    # A thread that is left behind must not keep the process alive.
    worker = threading.Thread(target=log_all, daemon=True)
    worker.start()
    worker.join(wait_s)
    if failure:
        raise failure[0]
    if worker.is_alive():
        raise TimeoutError(f"no answer within {wait_s:g} s")


def _log_artifact(run: Any, thing: Thing, use_after_commit: bool) -> None:
    import wandb

    files = thing.files()
    if not files:
        return
    artifact = wandb.Artifact(thing.name, type=thing.kind, metadata=thing.metadata())
    for name, file in files.items():
        artifact.add_file(str(file), name=name)
    run._log_artifact(artifact, use_after_commit=use_after_commit)


def close_run(run: Any, failed: bool) -> None:
    """Close a run and make sure that all of it has arrived, where it goes to a server.

    Raises:
        NotDelivered: something has not; says what the client says.
        TimeoutError: it is still on its way.
    """
    log = Path(run.settings.sync_dir) / "logs" / "debug-internal.log"
    online = not run.settings._offline
    run.finish(exit_code=int(failed))
    if online and (lost := given_up(log)):
        raise NotDelivered(next(iter(lost.values())))


DROPPED = ("filestream: fatal error: ", "sender: failed to log artifact: ", "file transfer: upload: ")
"""How the client's log begins to tell of what it will not try again: points, an artifact, a file. It ends such a run as if
all was well."""


def given_up(log: Path) -> dict[str, str]:
    """What the client has given up sending, by its log: the first of each file that it synced, "" for its own run."""
    found: dict[str, str] = {}
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            told = json.loads(line)
            message, file = str(told.get("msg", "")), str(told.get("sync_path", ""))
        except (ValueError, AttributeError):
            continue
        for start in DROPPED:
            if message.startswith(start):
                found.setdefault(file, message.removeprefix(start))
    return found


def is_deleted(error: object) -> bool:
    """Whether the server refuses an id for ever, as that of a run that was deleted there."""
    text = str(error)
    return "409" in text or "previously created and deleted" in text
