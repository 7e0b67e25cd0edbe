"""What several commands share: where a W&B run goes, what is checked before work begins, and provenance."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.errors import BudgetError, UserError, choices
from buddy.runs import RunInfo
from buddy.storage import locks
from buddy.storage.files import read_json
from buddy.study import manifest
from buddy.study.config import UNSAID, Config, Run, parse
from buddy.study.records import Budget, Record, Stopwatch, commit, environment
from buddy.study.settings import Ablation, Tracking
from buddy.tracking import Tracker, track

if TYPE_CHECKING:
    from buddy.routing.model import RoutedModel


def tracked(
    stage: str,
    info: RunInfo,
    config: dict[str, Any],
    part: str = "",
    reads: Iterable[str | Path | None] = (),
    writes: Iterable[str | Path | None] = (),
) -> AbstractContextManager[Tracker]:
    """A W&B run for a job on one run of the study; arguments as in `tracked_job`.

    Args:
        info: of what it works on; the group is backbone × method.
        part: tells jobs of one stage on one run apart (a data set).
    """
    run = Run(info.backbone, info.method, tuple(info.variant.items()), info.seed)
    facts = axes(run)
    path = f"{run.path}/{part}" if part else run.path
    group = f"{run.backbone} × {run.method}"
    tags = (run.backbone, run.method, *roles(run))
    return tracked_job(stage, info.study, path, group, {**facts, **config}, tags, reads, writes)


def roles(run: Run) -> list[str]:
    """What a run is in its study, as tags: ``main``, ``ablation:NAME``; [] where there is no study to ask."""
    if run.method != "buddy":
        return []
    file = Path(os.environ.get("WANDB_DIR", ".")).parent / "study.json"
    try:
        plan = parse(read_json(file))
    except UserError:
        return []
    same = replace(run, seed=plan.study.seeds[0]).path
    main = ["main"] if run.backbone in plan.study.backbones and same == plan.main_run(run.backbone).path else []
    return main + [f"ablation:{one.name}" for one in plan.study.ablations if _holds(plan, one, run)]


def _holds(plan: Config, ablation: Ablation, run: Run) -> bool:
    return run.path in {other.path for other in plan.ablation_runs(ablation)}


def axes(run: Run) -> dict[str, Any]:
    """What tells a run from the others of its study, for W&B's filters: all its axes, those included that its path leaves
    unsaid."""
    lora = "none" if run.method == "dense" else "trained"
    unsaid = UNSAID if run.method == "buddy" else {}
    return {"backbone": run.backbone, "method": run.method, "seed": run.seed, "lora": lora, **unsaid, **run.variant}


@contextmanager
def tracked_job(
    stage: str,
    study: str,
    path: str,
    group: str,
    config: dict[str, Any],
    tags: tuple[str, ...] = (),
    reads: Iterable[str | Path | None] = (),
    writes: Iterable[str | Path | None] = (),
) -> Iterator[Tracker]:
    """A W&B run for any job, set up from WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and WANDB_DIR.

    While it lasts, nobody else writes what the job writes (`buddy.storage.locks`); when it has succeeded, its files are listed
    (`buddy.study.manifest`).

    Args:
        stage: job type.
        study: study it belongs to; "" is none: the job is locked, and neither shown nor listed.
        path: what the job makes, unique within its stage; with the other two it is the run's identity.
        group: runs shown together.
        config: every setting of the job.
        tags: besides the study's name.
        reads, writes: what of the study it is made from and makes, for W&B's lineage; None is nothing.

    Raises:
        UserError: another job writes there.
    """

    written = [given for given in writes if given]
    if not study:
        with locks.held(*written):
            yield Tracker()
        return
    with (
        locks.held(*written),
        track(
            stage,
            study=study,
            run_path=path,
            group=group,
            config={"study": study, **config},
            tags=(study, *tags),
            reads=[given for given in reads if given],
            writes=written,
            folder=Path(os.environ.get("WANDB_DIR", ".")),
            settings=Tracking(
                project=os.environ.get("WANDB_PROJECT", "buddy"),
                entity=os.environ.get("WANDB_ENTITY") or None,
                mode="auto",
            ),
        ) as tracker,
    ):
        for folder in map(Path, written):
            manifest.remove(folder)
        yield tracker
        for folder in map(Path, written):
            manifest.write(folder)


def backbone_folder(given: Path, results: Path = Path("results"), option: str = "--backbone") -> Path:
    """The folder of a backbone that is given as one, or by the name that a study has fetched it under.

    Args:
        given: a folder, or a name such as ``smollm2-135m``; of several studies that have it, the latest counts.
        results: folder that holds the studies.
        option: what it is given as, for the message.

    Raises:
        UserError: there is no such folder, and no study has fetched a backbone of that name.
    """
    if (given / "config.json").exists():
        return given
    fetched = sorted(results.glob("*/backbones/*/backbone.json"), key=lambda path: path.stat().st_mtime)
    found = [path.parent for path in fetched if path.parent.name == str(given)]
    if found:
        return found[-1]
    names = sorted({path.parent.name for path in fetched})
    there = f"; those that studies have fetched: {', '.join(names)}" if names else ""
    raise UserError(f"{option} {given}: not a backbone (no config.json); make one with `buddy backbone`{there}")


def keep_off_the_hub() -> None:
    """Before lm-eval or `datasets` is imported: data sets are local files here, and looking for them on the Hub would
    stall a node without network."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")


def check_one_gpu(device: str) -> None:
    """A job asks for one GPU and must see one: more would be wasted, and would change the batch size.

    Raises:
        UserError: several GPUs are visible.
    """
    if not device.startswith("cuda"):
        return
    import torch

    if torch.cuda.device_count() > 1:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible and one is used; set CUDA_VISIBLE_DEVICES to a single GPU"
        )


def check_depths(model: RoutedModel, depths: Iterable[int]) -> None:
    """Refuse a depth that the model cannot run, before anything is measured.

    Args:
        model: the run to measure.
        depths: numbers of removed blocks.

    Raises:
        BudgetError: one of them is not legal; names those that are.
    """
    legal = [removed for removed in range(model.blocks) if _runs(model, removed)]
    for removed in depths:
        if removed not in legal and legal == [0]:
            raise BudgetError(f"--removed: {removed} is not 0: the dense model runs all {model.blocks} blocks")
        if removed not in legal:
            raise BudgetError(f"--removed: {removed} is not one of {_ranges(legal)}, of {model.blocks} blocks")


def _runs(model: RoutedModel, removed: int) -> bool:
    import torch

    try:
        model.policy.begin((model.blocks - removed) / model.blocks, 1, torch.device("cpu"))
    except BudgetError:
        return False
    return True


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: ``0 to 4`` or ``0, 8``."""
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole and len(numbers) > 2 else choices(numbers)


def check_auto(model: RoutedModel, budget: str) -> None:
    """Refuse ``auto`` or ``auto:PRICE`` where it has no meaning, before anything is measured.

    Args:
        model: the run to measure.
        budget: as the user gave it.

    Raises:
        UserError: it is something else.
        BudgetError: the run has no budget predictor, or one that takes no price.
    """
    import torch

    if budget.split(":")[0] != "auto":
        raise UserError(f"--budget: {budget!r} is neither auto nor auto:PRICE; a depth is given as --removed")
    model.policy.begin(budget, 1, torch.device("cpu"))


def provenance(model: Any, watch: Stopwatch) -> dict[str, Any]:
    """What every record of a measured model says of where it came from: environment, commit, seconds.

    Args:
        model: anything with ``dtype`` and ``device``.
        watch: started when the work began.
    """
    return {
        "environment": environment(str(model.dtype).removeprefix("torch."), model.device.type),
        "commit": commit(),
        **watch.seconds(),
    }


def write_record(
    path: Path,
    kind: str,
    info: RunInfo,
    metrics: dict[str, Any],
    items: int,
    budget: Budget | None,
    model: Any,
    watch: Stopwatch,
    **other: Any,
) -> None:
    """Write one record of a run or a backbone.

    Args:
        path: its file.
        kind, metrics, budget: of the record.
        info: of what was measured.
        items: number of items behind the metrics.
        model, watch: as in `provenance`.
        other: fields of the record that are not as ``info`` has them.
    """
    own = {"method": info.method, "variant": info.variant, "digests": info.digests, **other}
    Record(
        kind=kind,
        study=info.study,
        backbone=info.backbone,
        metrics=metrics,
        n=items,
        seed=info.seed,
        budget=budget,
        **own,
        **provenance(model, watch),
    ).write(path)
