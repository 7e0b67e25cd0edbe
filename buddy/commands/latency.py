"""``buddy latency``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from buddy.commands import _arguments as arg
from buddy.commands._measured import open_run
from buddy.commands._options import with_settings
from buddy.settings import Latency

if TYPE_CHECKING:
    from buddy.evaluation.latency import Timing
    from buddy.tracking import Tracker


@with_settings(Latency, leave_out=("backbones", "methods", "datasets"))
def latency(
    run: arg.Run,
    data: arg.Prompts,
    removed: arg.RemovedAtOnce,
    out: Annotated[
        Path,
        typer.Option(
            help="folder for the records: batch~B/engine~E/execution~X[/slack~S]/removed~N.json; written at the end"
        ),
    ],
    settings: Latency,
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
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
    from buddy.data import inputs
    from buddy.evaluation.latency import benchmark, usable_engines
    from buddy.routing.budget import round_half_up

    prompts = inputs.prompts(data)[: settings.prompts]
    measured = open_run(run, removed, out, settings.kv, device, dtype)
    model = measured.model
    # Refused or left out before W&B hears of it; the settings that are logged are those in force.
    settings = settings.model_copy(update={"engines": usable_engines(settings.engines, model.device)})
    with measured.tracked("latency", measured.config(settings, dataset=data.name), [out], data.name) as tracker:
        watch = measured.watch()
        timings = benchmark(model, prompts, measured.depths, settings, data.name)
        watch.stop()
        # Only now, so that a killed job leaves no half of a comparison; eager last, the engine that every machine has:
        # where its records are, all are.
        for timing in reversed(timings):
            entry, metrics = timing.entry, timing.metrics
            decode = "reuse" if entry.execution == "reuse" else "recompute"
            variant = {**measured.info.variant, "kv": settings.kv, "decode": decode} if entry.routed else {}
            method = measured.info.method if entry.routed else entry.execution
            mean = round_half_up(sum(entry.depths) / len(entry.depths))
            path = out / timing.path
            measured.write("latency", path, mean, metrics, metrics["repeats"], watch, method=method, variant=variant)
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
        tracker.at_depth(depth, curves[depth])
    tracker.summary(mixed)
