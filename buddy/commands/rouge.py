"""``buddy rouge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from buddy.commands._options import with_settings
from buddy.settings import DECODE_MODES, Summaries


@with_settings(Summaries, leave_out=("backbones",))
def rouge(
    run: Annotated[Path, typer.Option(help="run folder, or a backbone folder for the dense model")],
    data: Annotated[Path, typer.Option(help="dialogues with summaries: the data set samsum, from `buddy data`")],
    out: Annotated[Path, typer.Option(help="folder for the records: decode~MODE/removed~N.json")],
    settings: Summaries,
    removed: Annotated[str, typer.Option(help="numbers of removed blocks, two records each, such as 4,8")] = "0",
    study: Annotated[str, typer.Option(help="study it belongs to; the run's by default")] = "",
    name: Annotated[str, typer.Option(help="the backbone's name, for a dense model")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Summarise dialogues at several budgets, with the prompt's path kept (reuse) and with a path chosen at every step
    (recompute), and compare the summaries with those that people wrote: ROUGE-1 and ROUGE-L.

    \b
    Examples:
      buddy rouge --run results/demo/runs/.../seed~0 --data results/demo/data/samsum --removed 4,8 --out records
      buddy rouge --run RUN --data results/demo/data/samsum --removed 8 --prompts 20 --new-tokens 64 --out records
    """
    from buddy.commands._measured import open_run
    from buddy.data import inputs
    from buddy.evaluation import summaries
    from buddy.study.records import Budget, Stopwatch

    pairs = inputs.pairs(data)[: settings.prompts]
    measured = open_run(run, removed, out, settings.kv, device, dtype, study, name)
    model = measured.model
    with measured.tracked("rouge", settings, out, data.name, [data]) as tracker:
        for count in measured.depths:
            budget = Budget.of(model.blocks - count, model.blocks)
            scores: dict[str, float] = {}
            for decode in DECODE_MODES:
                watch = Stopwatch(str(model.device))
                found = summaries.measure(model, pairs, budget.fraction, decode, settings)
                file = out / f"decode~{decode}" / f"removed~{count}.json"
                measured.write("rouge", file, count, {"dataset": data.name, **found}, len(pairs), watch, decode=decode)
                typer.echo(f"{count} of {model.blocks} blocks removed, {decode}: {_line(found)}")
                scores |= {f"{decode}/{measure}": found[measure]["mean"] for measure in summaries.MEASURES}
            tracker.log(scores, step=count)


def _line(metrics: dict[str, Any]) -> str:
    return (
        f"ROUGE-1 {metrics['rouge1']['mean']:.3f} [{metrics['rouge1']['low']:.3f}, {metrics['rouge1']['high']:.3f}], "
        f"ROUGE-L {metrics['rougeL']['mean']:.3f} [{metrics['rougeL']['low']:.3f}, {metrics['rougeL']['high']:.3f}], "
        f"{metrics['tokens_mean']:.1f} tokens"
    )
