"""The run that a command takes where none is named, its backbone, which a shipped run comes without, and its records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from buddy import runs
from buddy.errors import UserError
from buddy.runs import RunInfo
from buddy.settings import Source
from buddy.storage import locks

if TYPE_CHECKING:
    from buddy.reporting.measured import Measured

REFERENCE = "reference"
"""Below the results: what this repository ships; everything else there was made on this machine."""

SHIPPED = Path(REFERENCE) / "smollm2-run" / "run"


def default_run(results: Path) -> Path:
    """The newest BUDDY run of this machine whose backbone is there, else the shipped one; says which on standard error.

    Args:
        results: folder that holds the studies.

    Raises:
        UserError: there is neither.
    """

    trained = [folder for folder in runs.found(results) if _usable(folder, results)]
    if trained:
        run, why = max(trained, key=lambda folder: (folder / runs.RUN_FILE).stat().st_mtime_ns), f"newest in {results}"
    elif (results / SHIPPED / runs.RUN_FILE).exists():
        run, why = results / SHIPPED, f"shipped; none trained in {results}"
    else:
        raise UserError(
            f"--run: none given, no BUDDY run below {results} and none shipped in {results / SHIPPED}; `make demo` trains "
            "some, and so does `buddy train`"
        )
    typer.echo(f"run {run} ({why}; --run names another)", err=True)
    return run


def _usable(folder: Path, results: Path) -> bool:
    """Whether a run is BUDDY's, of this machine, and can be loaded as it stands."""

    if (results / REFERENCE) in folder.parents:
        return False
    try:
        info = RunInfo.read(folder)
    except UserError:
        return False
    return info.method == "buddy" and (info.backbone_folder(folder) / "config.json").exists()


def fetch_backbone(run: Path, results: Path) -> None:
    """Have the backbone of a shipped run in the place where the run looks for it; fetched once, with a line.

    Any other run is left alone: its backbone was on this machine, and loading it says what is missing.

    Args:
        run: folder of a run, or of a backbone.
        results: folder that holds the studies and the shipped runs.

    Raises:
        UserError: it cannot be fetched, or is not what the run says.
    """
    from buddy import backbones, runs

    shipped = (results / REFERENCE).resolve() in run.resolve().parents
    if not shipped or not (run / runs.RUN_FILE).exists():
        return
    info = RunInfo.read(run)
    folder = info.backbone_folder(run)
    if info.backbone_source is None or (folder / "config.json").exists():
        return
    source = _source(run, info)
    typer.echo(f"backbone {info.backbone}: fetched once, into {folder}", err=True)
    with locks.held(folder):
        backbones.prepare(source, folder, name=info.backbone, blocks=info.policy_settings.get("blocks"))


def _source(run: Path, info: RunInfo) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Source).validate_python(info.backbone_source)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(f"{run / runs.RUN_FILE}: backbone_source: not a source of a backbone ({reason})") from None


def measured_of(run: Path, info: RunInfo, records: Path | None = None) -> list[Measured]:
    """What was measured of a run: the records of its study, or those in a folder that have its digests.

    Args:
        run: its folder.
        info: its ``run.json``.
        records: a folder of records; those of its study by default, none for a run outside a study.
    """
    from buddy.reporting import measured

    if records is not None:
        if not records.is_dir():
            raise UserError(f"--records: {records} is not a folder")
        return measured.of_run(records, None, info.digests)
    folder = run.resolve()
    study = next((parent for parent in folder.parents if parent.name == "runs"), None)
    if study is None:
        return []
    return measured.of_run(study.parent / "records", folder.relative_to(study).as_posix(), info.digests)
