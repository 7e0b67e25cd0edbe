"""``buddy rouge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from buddy.commands import _arguments as arg
from buddy.commands._measured import open_run
from buddy.commands._options import with_settings
from buddy.settings import DECODE_MODES, Summaries


@with_settings(Summaries, leave_out=("backbones",))
def rouge(
    run: arg.RunOrBackbone,
    data: Annotated[Path, typer.Option(help="dialogues with summaries: the data set samsum, from `buddy data`")],
    out: Annotated[Path, typer.Option(help="folder for the records: decode~MODE/removed~N.json")],
    settings: Summaries,
    removed: Annotated[str, typer.Option(help="numbers of removed blocks, two records each, such as 4,8")] = "0",
    study: arg.StudyOfRun = "",
    name: arg.NameIfDense = "",
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Summarise dialogues at several budgets, with the prompt's path kept (reuse) and with a path chosen at every step
    (recompute), and compare the summaries with those that people wrote: ROUGE-1 and ROUGE-L.

    \b
    Examples:
      buddy rouge --run results/demo/runs/.../seed~0 --data results/demo/data/samsum --removed 4,8 --out records
      buddy rouge --run RUN --data results/demo/data/samsum --removed 8 --prompts 20 --new-tokens 64 --out records
    """
    from buddy.data import inputs
    from buddy.evaluation import summaries

    pairs = inputs.pairs(data)[: settings.prompts]
    measured = open_run(run, removed, out, settings.kv, device, dtype, study, name)
    with measured.tracked("rouge", measured.config(settings, dataset=data.name), [out], data.name, [data]) as tracker:
        for count in measured.depths:
            scores: dict[str, float] = {}
            for decode in DECODE_MODES:
                watch = measured.watch()
                found = summaries.measure(measured.model, pairs, measured.budget(count).fraction, decode, settings)
                file = out / f"decode~{decode}" / f"removed~{count}.json"
                measured.write("rouge", file, count, {"dataset": data.name, **found}, len(pairs), watch, decode=decode)
                measured.say(count, decode, _line(found))
                scores |= {f"{decode}/{measure}": found[measure]["mean"] for measure in summaries.MEASURES}
            tracker.at_depth(count, scores, scores)


def _line(metrics: dict[str, Any]) -> str:
    return (
        f"ROUGE-1 {metrics['rouge1']['mean']:.3f} [{metrics['rouge1']['low']:.3f}, {metrics['rouge1']['high']:.3f}], "
        f"ROUGE-L {metrics['rougeL']['mean']:.3f} [{metrics['rougeL']['low']:.3f}, {metrics['rougeL']['high']:.3f}], "
        f"{metrics['tokens_mean']:.1f} tokens"
    )
