"""``buddy score``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from buddy import runs
from buddy.commands import _arguments as arg
from buddy.commands._measured import open_run
from buddy.commands._options import with_settings
from buddy.errors import UserError
from buddy.settings import Likelihood
from buddy.tracking import Tracker


@with_settings(Likelihood, leave_out=("backbones", "datasets"))
def score(
    run: arg.RunOrBackbone,
    data: Annotated[
        list[str],
        typer.Option(help="data set folders from `buddy data`, or text files; several by commas, or the option again"),
    ],
    out: Annotated[Path, typer.Option(help="folder for the records: kv~KV/decode~MODE/removed~N.json")],
    settings: Likelihood,
    removed: Annotated[str, typer.Option(help="numbers of removed blocks, such as 0,4,8")] = "0",
    study: arg.StudyOfRun = "",
    name: arg.NameIfDense = "",
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Score held-out text at several budgets: NLL per token, and divergence from and greedy agreement with the whole
    backbone without LoRA, item by item; a record for each depth, K/V policy and decode mode.

    \b
    Examples:
      buddy score --run results/demo/runs/.../seed~0 --data results/demo/data/alpaca,results/demo/data/wikitext2 \\
          --removed 4,8 --out records
      buddy score --run RUN --data DIR/gsm8k --data novel.txt --removed 8 --kv zero,mask,project \\
          --decode recompute,reuse --items 300 --out records
    """
    from buddy.evaluation import likelihood, passages

    folders = _folders(data)
    measured = open_run(run, removed, out, settings.kv[0], device, dtype, study, name)
    model = measured.model
    sets = [
        passages.read(folder, model.tokenizer, settings.items, settings.max_length, measured.info.training)
        for folder in folders
    ]
    items = [item for one in sets for item in one.items]
    fractions = {count: measured.budget(count).fraction for count in measured.depths}
    wanted = likelihood.modes(list(fractions.values()), settings)
    with measured.tracked("score", measured.config(settings), [out], reads=folders) as tracker:
        watch = measured.watch()
        found = likelihood.measure(model, runs.untouched(model), items, wanted, settings.batch_size)
        watch.stop()
        for count, fraction in fractions.items():
            shown: list[dict[str, Any]] = []
            for mode in [mode for mode in wanted if mode.budget == fraction]:
                metrics = likelihood.summary(sets, found[mode], mode, settings)
                file = out / f"kv~{mode.kv}" / f"decode~{mode.decode}" / f"removed~{count}.json"
                measured.write("likelihood", file, count, metrics, len(items), watch, kv=mode.kv, decode=mode.decode)
                measured.say(count, mode.kv, mode.decode, _line(metrics))
                shown.append(metrics)
            show(tracker, count, shown)


def show(tracker: Tracker, removed: int, shown: Sequence[Mapping[str, Any]]) -> None:
    """Tell W&B what was scored at a depth: a curve for each mode, and as headline values those of the first, which the table
    shows."""
    values = [
        {
            **{key: value["mean"] for key, value in metrics["average"].items()},
            "distinct_paths": metrics["distinct_paths"],
        }
        for metrics in shown
    ]
    curves = {
        f"{metrics['kv']}/{metrics['decode']}/{key}": value
        for metrics, found in zip(shown, values, strict=True)
        for key, value in found.items()
    }
    tracker.at_depth(removed, curves, values[0])


def _folders(data: list[str]) -> list[Path]:
    """The data sets that are named, each once.

    Raises:
        UserError: none, or one twice.
    """
    folders = [Path(part.strip()) for given in data for part in given.split(",") if part.strip()]
    names = [folder.name for folder in folders]
    if not names or len(set(names)) != len(names):
        raise UserError(f"--data: {','.join(data)!r} does not name one or more data sets, each once")
    return folders


def _line(metrics: dict[str, Any]) -> str:
    nll, kl, agreement = (metrics["average"][name] for name in ("nll", "kl", "agreement"))
    return (
        f"NLL {nll['mean']:.4f} [{nll['low']:.4f}, {nll['high']:.4f}], KL {kl['mean']:.4f}, agreement "
        f"{agreement['mean']:.4f}, {metrics['distinct_paths']} paths over {metrics['tokens']} tokens, "
        f"{metrics['executed_mean']:.2f} executed"
    )
