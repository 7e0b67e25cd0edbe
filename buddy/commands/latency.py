"""``buddy latency``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from buddy.commands._options import with_settings
from buddy.settings import Latency

if TYPE_CHECKING:
    from buddy.evaluation.latency import Timing
    from buddy.tracking import Tracker


@with_settings(Latency, leave_out=("backbones", "methods", "datasets"))
def latency(
    run: Annotated[Path, typer.Option(help="run folder")],
    data: Annotated[Path, typer.Option(help="prompts: a data set folder from `buddy data` (alpaca, samsum)")],
    removed: Annotated[str, typer.Option(help="numbers of removed blocks, such as 4,8,12,16")],
    out: Annotated[
        Path,
        typer.Option(
            help="folder for the records: batch~B/engine~E/execution~X[/slack~S]/removed~N.json; written at the end"
        ),
    ],
    settings: Latency,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Time prefill and decode: the dense and the sliced model beside the routed one, taking turns of a few tokens.

    \b
    Examples:
      buddy latency --run results/demo/runs/.../seed~0 --data results/demo/data/alpaca --removed 4,8 \\
          --prompts 4 --new-tokens 32 --out records
      buddy latency --run RUN --data DIR --removed 16 --executions dense,sliced,recompute --out records
      buddy latency --run RUN --data DIR --removed 4,8,15 --batch-sizes 1,4,16 --executions mixed --out records
      buddy latency --run RUN --data DIR --removed 15 --batch-sizes 8 --executions sliced,varied --slack 0,2,4 --out records
    """
    from buddy.commands._common import provenance
    from buddy.commands._measured import open_run
    from buddy.data import inputs
    from buddy.evaluation.latency import benchmark, usable_engines
    from buddy.routing.budget import round_half_up
    from buddy.study.records import Budget, Record, Stopwatch

    prompts = inputs.prompts(data)[: settings.prompts]
    measured = open_run(run, removed, out, settings.kv, device, dtype)
    model, info = measured.model, measured.info
    # Refused or left out before W&B hears of it; the settings that are logged are those in force.
    settings = settings.model_copy(update={"engines": usable_engines(settings.engines, model.device)})
    with measured.tracked("latency", settings, out, part=data.name) as tracker:
        watch = Stopwatch(str(model.device))
        timings = benchmark(model, prompts, measured.depths, settings, data.name)
        facts = {
            "study": info.study,
            "backbone": info.backbone,
            "seed": info.seed,
            "digests": info.digests,
            **provenance(model, watch),
        }
        # Only now, so that a killed job leaves no half of a comparison; eager last, the engine that every machine has:
        # where its records are, all are.
        for timing in reversed(timings):
            execution, sequences = timing.entry.execution, timing.entry.depths
            routed = timing.entry.routed
            decode = "reuse" if execution == "reuse" else "recompute"
            removed_mean = round_half_up(sum(sequences) / len(sequences))
            Record(
                kind="latency",
                method=info.method if routed else execution,
                metrics=timing.metrics,
                n=timing.metrics["repeats"],
                variant={**info.variant, "kv": settings.kv, "decode": decode} if routed else {},
                budget=Budget.of(model.blocks - removed_mean, model.blocks),
                **facts,
            ).write(out / timing.path)
        _log(tracker, timings)


def _log(tracker: Tracker, timings: list[Timing]) -> None:
    """Rates as curves over the depth, and those of mixed batches, which have no one depth, in the summary."""
    curves: dict[int, dict[str, Any]] = {}
    mixed: dict[str, Any] = {}
    for timing in timings:
        entry = timing.entry
        point = mixed if entry.mixed else curves.setdefault(entry.depths[0], {})
        execution = entry.execution if entry.slack is None or entry.mixed else f"{entry.execution}_slack{entry.slack}"
        for phase in ("prefill", "decode"):
            name = f"b{timing.batch_size}/{timing.engine}/{execution}/{phase}_tok_s"
            point[name] = timing.metrics[f"{phase}_tok_s"]["median"]
    for depth in sorted(curves):
        tracker.log(curves[depth], step=depth)
    tracker.summary(mixed)
