"""``buddy breakdown``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buddy.commands import _arguments as arg
from buddy.commands._measured import open_run
from buddy.commands._options import with_settings
from buddy.errors import UserError
from buddy.settings import Breakdown

if TYPE_CHECKING:
    from buddy.routing.model import RoutedModel


@with_settings(Breakdown, leave_out=("backbones",))
def breakdown(
    run: arg.Run,
    data: arg.Prompts,
    removed: arg.RemovedAtOnce,
    out: arg.RecordsOut,
    settings: Breakdown,
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Profile what a routed pass spends its time on, and time a routing step at longer contexts.

    \b
    Examples:
      buddy breakdown --run results/demo/runs/.../seed~0 --data results/demo/data/alpaca --removed 8 \\
          --batch-size 2 --tokens 64 --steps 4 --out records
      buddy breakdown --run RUN --data DIR --removed 4,16 --contexts 128,1024,8192 --out records
    """
    from buddy.data import inputs
    from buddy.evaluation import breakdown as profiling

    prompts = inputs.prompts(data)

    def routes(model: RoutedModel) -> None:
        if not model.policy.source_block:
            method = model.origin.info.method
            raise UserError(f"--run: {run} does not route by keys and values (method {method}); give a trained run")

    measured = open_run(run, removed, out, settings.kv, device, dtype, suits=routes)
    model = measured.model
    with measured.tracked("breakdown", measured.config(settings, dataset=data.name), [out], data.name) as tracker:
        watch = measured.watch()
        for count, metrics in profiling.breakdown(model, prompts, measured.depths, settings):
            path = out / f"removed~{count}.json"
            measured.write("breakdown", path, count, metrics, settings.repeats, watch, decode="recompute")
            shares = {
                f"{phase}/{name}_percent": part["percent"]
                for phase, found in metrics["phases"].items()
                for name, part in found["components"].items()
            }
            tracker.at_depth(count, shares)
            watch = measured.watch()
        longest = max(metrics["contexts"], key=lambda entry: entry["context"])
        tracker.summary(
            {f"{way}_at_{longest['context']}": longest[way]["median"] for way in ("routing_ms", "reread_ms")}
        )
