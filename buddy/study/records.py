"""The record: one measurement, one JSON file, written whole or not at all.

Tables, figures and W&B read records and nothing else, so everything a reader needs stands in them:
what was measured, under which budget and variant, on which machine, by which commit.
This module imports no torch: records are read on laptops.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from buddy.errors import UserError, unknown
from buddy.storage.files import check_writable, write_json

SCHEMA = 1
KINDS = (
    *("accuracy", "generation", "latency", "breakdown", "trace", "rouge", "likelihood"),
    *("importance", "calibration", "budget", "training"),
)


@dataclass
class Budget:
    """How deep a measurement ran: ``executed`` of ``executed + removed`` blocks; ``fraction`` is their ratio."""

    fraction: float
    executed: int
    removed: int

    @classmethod
    def of(cls, executed: int, blocks: int) -> Budget:
        """The budget that runs ``executed`` of ``blocks`` blocks."""
        return cls(fraction=executed / blocks, executed=executed, removed=blocks - executed)

    def __post_init__(self) -> None:
        counts = (self.executed, self.removed)
        whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
        if not whole or sum(counts) == 0 or abs(self.fraction - self.executed / sum(counts)) > 1e-6:
            raise ValueError(f"budget: {_short(asdict(self))} does not add up")


@dataclass
class Record:
    """One measurement (the fields are the file's keys, in this order).

    Attributes:
        kind: what was measured, one of ``KINDS``.
        study, backbone, method, seed: which cell of the study.
        variant: feature, prior, omega, source_block, recipe, kv and decode mode where they apply.
        budget: depth of the measurement; None where no depth applies (training, importance).
        metrics: the measured values; units are part of each name (``_ms``, ``_tok_s``, ``_s``).
        n: number of items, samples or repeats behind the metrics.
        digests: of what it was measured on, where that is known: those of the run (`buddy.runs.RunInfo`), or of the
            backbone alone.
        environment: device, library versions, dtype, threads (see `environment`).
        commit: git commit of the code, with "-dirty" where the tree had changes; "" outside a checkout.
        wall_s, gpu_s: seconds the measurement took, and seconds it held a GPU.
    """

    kind: str
    study: str
    backbone: str
    method: str
    metrics: dict[str, Any]
    n: int
    variant: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    budget: Budget | None = None
    digests: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    wall_s: float = 0.0
    gpu_s: float = 0.0
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("record kind", self.kind, KINDS)
        if isinstance(self.budget, dict):
            self.budget = Budget(**self.budget)
        for name, kinds in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise TypeError(f"{name}: {_short(value)} is not {_SAID[kinds]}")

    def write(self, path: str | Path) -> Path:
        """Write the record atomically: a reader sees the old file, the new file, or none.

        Raises:
            UserError: the path is a folder, or a file that is no record, which stays as it is.
        """
        claim(path)
        return write_json(path, asdict(self))

    @classmethod
    def read(cls, path: str | Path) -> Record:
        """Read one record.

        Raises:
            UserError: the file is damaged, lacks a key, or was written by a newer schema.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a readable record ({error})") from None
        if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
            raise UserError(f"{path}: not a record (no schema number)")
        if content["schema"] > SCHEMA:
            raise UserError(f"{path}: record schema {content['schema']} is newer than {SCHEMA}; update buddy")
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: not a complete record ({error})") from None


_TYPES: dict[str, Any] = {
    **dict.fromkeys(("study", "backbone", "method", "commit"), str),
    **dict.fromkeys(("metrics", "variant", "digests", "environment"), dict),
    **dict.fromkeys(("n", "seed", "schema"), int),
    **dict.fromkeys(("wall_s", "gpu_s"), int | float),
    "budget": Budget | None,
}
_SAID = {str: "text", dict: "an object", int: "a whole number", int | float: "a number", Budget | None: "a budget"}


def _no_number(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def claim(path: str | Path, option: str = "--out") -> None:
    """Make sure, before any work, that a record may be written to a path: a file that is no record is the user's.

    Args:
        path: a new file, or one that is a record, be it cut short.
        option: what names it, for the message.

    Raises:
        UserError: it is a folder or a file of another kind, or cannot be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file to write")
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except (FileNotFoundError, NotADirectoryError):
        start = b""
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror})") from None
    if start and not _RECORD.match(start):
        raise UserError(f"{option} {path}: is a file that is no record; nothing was touched: name a new file")
    check_writable(path.parent, f"{option} {path}")


def claim_folder(folder: str | Path, option: str = "--out") -> None:
    """The same for a folder of records: no file of the user's stands where a record would.

    Raises:
        UserError: it is a file, holds a file named as a record that is none, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder}: is a file; name a folder")
    for path in find(folder):
        if "~" in path.name or path.name == "auto.json":
            claim(path, option)
    check_writable(folder, f"{option} {folder}")


_RECORD = re.compile(rb'\{\s*"kind"')  # how `Record.write` begins


def find(folder: str | Path) -> list[Path]:
    """Paths of the record files below a folder, in a stable order; [] where there is none."""
    return sorted(path for path in Path(folder).rglob("*.json") if not path.name.startswith("."))


def environment(dtype: str | None = None, device: str | None = None) -> dict[str, Any]:
    """Device, versions, dtype and threads of this process, for `Record.environment`.

    Versions come from package metadata, so a process that never needed torch does not import it.
    """

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    torch = sys.modules.get("torch")
    name = device or "cpu"
    if torch is not None and name.startswith("cuda"):
        name = torch.cuda.get_device_name()
    elif name == "cpu":
        name = f"cpu ({_processor()})"
    return {
        "device": name,
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "lm_eval": version("lm_eval"),
        "dtype": dtype,
        "threads": torch.get_num_threads() if torch is not None else None,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()


@cache
def commit() -> str:
    """Commit of the checkout this package lies in, "-dirty" if it has changes.

    Outside a checkout it is what ``BUDDY_COMMIT`` says (a copy taken to a machine without its .git), or "".
    """
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", str(here))
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("BUDDY_COMMIT", "")
    return revision + ("-dirty" if dirty else "")


class Stopwatch:
    """Seconds since it was made, for ``wall_s``; equal to ``gpu_s`` when the work held a GPU."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.start = time.perf_counter()
        self.wall: float | None = None

    def stop(self) -> None:
        """From here on `seconds` says the time up to now: records of one job that are written one after the other agree."""
        self.wall = time.perf_counter() - self.start

    def seconds(self) -> dict[str, Any]:
        """``{"wall_s", "gpu_s"}`` up to now, or until it was stopped."""
        wall = time.perf_counter() - self.start if self.wall is None else self.wall
        return {"wall_s": round(wall, 3), "gpu_s": round(wall, 3) if self.device.startswith("cuda") else 0.0}
