"""``buddy budget-eval``."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from buddy.commands import _arguments as arg
from buddy.commands._common import keep_off_the_hub
from buddy.commands._measured import Measured, open_run
from buddy.commands._options import with_settings
from buddy.errors import UserError
from buddy.settings import Predictor
from buddy.storage.checkpoints import FOLDER

if TYPE_CHECKING:
    from torch import Tensor

    from buddy.routing.model import RoutedModel
    from buddy.study.records import Stopwatch

_READ = ("max_length", "table_batch", "limit")
ALL = "all"
"""Stands for all data sets together, where a predictor can also tell one from another."""


@with_settings(Predictor, leave_out=tuple(name for name in Predictor.model_fields if name not in _READ))
def budget_eval(
    run: Annotated[Path, typer.Option(help="run folder with a predictor, from `buddy predictor`")],
    data: Annotated[
        list[Path],
        typer.Option(help="data set folder, from `buddy data`; several make a record each, and one together"),
    ],
    out: Annotated[Path, typer.Option(help="folder for the records: dataset~NAME.json, dataset~all.json")],
    settings: Predictor,
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Hold a budget predictor against every constant budget, random ones and the best per input, on unseen inputs.

    Killed, it goes on from what it had measured when run again.

    \b
    Examples:
      buddy budget-eval --run RUN2 --data results/demo/data/alpaca --out records
      buddy budget-eval --run RUN2 --data DIR/alpaca --data DIR/boolq --limit 64 --out records
    """
    keep_off_the_hub()

    from buddy.evaluation import budgets
    from buddy.policies.buddy import BuddyPolicy
    from buddy.training import predictor_examples

    def predicts(model: RoutedModel) -> None:
        if not isinstance(model.policy, BuddyPolicy) or model.policy.predictor is None:
            raise UserError(f"--run: {run} has no budget predictor; train one with `buddy predictor --run {run}`")

    predictor_examples.fingerprints(data)  # refuses what is no data set, before anything is loaded
    measured = open_run(run, None, out, None, device, dtype, suits=predicts)
    info = measured.info
    policy: Any = measured.model.policy
    predictor = copy.deepcopy(policy.predictor).cpu()
    config = {**settings.model_dump(include=set(_READ)), "training": info.training}
    part = "/".join([run.name, *(folder.name for folder in data)])  # a predictor's folder is named by its preset
    kept = out.with_name(
        f".{out.name}.{FOLDER}"
    )  # beside the folder of the records, which Snakemake removes on failure
    with measured.tracked("budget-eval", config, [out], part, data) as tracker:
        for name, which, contexts, losses, watch in _tables(measured, data, settings, kept):
            found = budgets.measure(predictor, contexts, losses, policy.blocks)
            metrics = {"dataset": name, "rows": which, **found}
            measured.write("budget", out / f"dataset~{name}.json", None, metrics, len(contexts), watch)
            typer.echo(f"{name}: {_line(found)}")
            tracker.summary({f"{name}/{key}": found[key] for key in ("beats_constant", "entropy", "entropy_uniform")})
            tracker.summary({f"{name}/gain/{key}": value for key, value in found["gain"].items()})
    shutil.rmtree(kept, ignore_errors=True)


def _tables(
    measured: Measured, data: list[Path], settings: Predictor, kept: Path
) -> Iterator[tuple[str, str, Tensor, Tensor, Stopwatch]]:
    """Name, which rows, contexts and losses of every data set, and of all together where there are several; what is
    measured is kept in a folder of ``kept`` per data set, and a killed call's taken from there."""
    import torch

    from buddy.evaluation.budgets import table_depths
    from buddy.training import predictor_examples
    from buddy.training.depth_losses import loss_table
    from buddy.training.rises import rise_table

    model, kept_back = measured.model, measured.info.training.get("predictor", {}).get("kept_back", {})
    policy: Any = model.policy
    depths = table_depths(policy.predictor, policy.blocks)
    whole, tables = measured.watch(), {}
    for folder in data:
        watch = measured.watch()
        rows, which = predictor_examples.held_out_rows(
            folder, model.tokenizer, settings.limit, settings.max_length, kept_back
        )
        if policy.predictor.loss == "kl":
            rises = rise_table(model.backbone, policy, rows, depths, settings.table_batch, kept / folder.name)
            tables[folder.name] = rises.contexts, rises.rises
        else:
            tables[folder.name] = loss_table(
                model.backbone, policy, rows, depths, settings.table_batch, kept / folder.name
            )
        contexts, losses = tables[folder.name]
        yield folder.name, which, contexts, losses, watch
    if len(tables) > 1:
        contexts, losses = (torch.cat(part) for part in zip(*tables.values(), strict=True))
        yield ALL, "the same of " + ", ".join(tables), contexts, losses, whole


def _line(metrics: dict[str, Any]) -> str:
    gain, rank = metrics["gain"], metrics["spearman"]
    verdict = "beats" if metrics["beats_constant"] else "does not beat"
    harder = f"{rank['value']:.2f} [{rank['low']:.2f}, {rank['high']:.2f}]" if rank else "none, one depth for all"
    known, told = metrics["oracle_gain"], metrics["r2"]
    explained = f"; R squared {told['value']:+.3f} [{told['low']:+.3f}, {told['high']:+.3f}]" if told else ""
    return (
        f"{verdict} the constant frontier: {gain['value']:+.4f} nats [{gain['low']:+.4f}, {gain['high']:+.4f}]; "
        f"entropy {metrics['entropy']:.4f} of {metrics['entropy_uniform']:.4f}; loss and depth: {harder}; "
        f"an oracle: {known['value']:+.4f} nats [{known['low']:+.4f}, {known['high']:+.4f}]{explained}"
    )
