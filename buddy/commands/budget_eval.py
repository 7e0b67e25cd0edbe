"""``buddy budget-eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from buddy.commands._options import with_settings
from buddy.settings import Predictor

_READ = ("max_length", "table_batch", "limit")


@with_settings(Predictor, leave_out=tuple(name for name in Predictor.model_fields if name not in _READ))
def budget_eval(
    run: Annotated[Path, typer.Option(help="run folder with a predictor, from `buddy predictor`")],
    data: Annotated[
        list[Path], typer.Option(help="data set folder, from `buddy data`; may be given several times, a record each")
    ],
    out: Annotated[Path, typer.Option(help="folder for the records: dataset~NAME.json")],
    settings: Predictor,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Hold a budget predictor against every constant budget, random ones and the best per input, on unseen inputs.

    \b
    Examples:
      buddy budget-eval --run RUN2 --data results/demo/data/alpaca --out records
      buddy budget-eval --run RUN2 --data DIR/alpaca --data DIR/boolq --limit 64 --out records
    """
    import os

    # A task's questions are read through lm-eval, whose data sets are local files here: nothing is on the Hub.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

    from buddy import runs
    from buddy.commands._common import check_one_gpu, provenance, run_of, tracked
    from buddy.errors import UserError
    from buddy.evaluation import budgets
    from buddy.policies.buddy import BuddyPolicy
    from buddy.records import Record, Stopwatch
    from buddy.training import responses
    from buddy.training.rewards import loss_table

    responses.fingerprints(data)  # refuses what is no data set, before anything is loaded
    model = runs.load(run, device=device, dtype=dtype)
    check_one_gpu(model.device.type)
    info, policy = model.origin.info, model.policy
    if not isinstance(policy, BuddyPolicy) or policy.predictor is None:
        raise UserError(f"--run: {run} has no budget predictor; train one with `buddy predictor --run {run}`")
    trained = info.training.get("predictor", {})
    for folder in data:
        rows, which = responses.held_out_rows(
            folder, model.tokenizer, settings.limit, settings.max_length, trained.get("kept_back", {})
        )
        config = {**settings.model_dump(include=set(_READ)), "dataset": folder.name, "training": trained}
        with tracked("budget-eval", info.study, run_of(info), config, folder.name) as tracker:
            watch = Stopwatch(str(model.device))
            depths = budgets.table_depths(policy.predictor, policy.blocks)
            contexts, losses = loss_table(model.backbone, policy, rows, depths, settings.table_batch)
            metrics = {
                "dataset": folder.name,
                "rows": which,
                **budgets.measure(policy.predictor.cpu(), contexts, losses, policy.blocks),
            }
            policy.to(model.device)
            Record(
                kind="budget",
                study=info.study,
                backbone=info.backbone,
                method=info.method,
                metrics=metrics,
                n=len(rows),
                variant=info.variant,
                seed=info.seed,
                **provenance(model, watch),
            ).write(out / f"dataset~{folder.name}.json")
            typer.echo(f"{folder.name}: {_line(metrics)}")
            tracker.summary({key: metrics[key] for key in ("beats_constant", "entropy", "entropy_uniform")})
            tracker.summary({f"gain/{key}": value for key, value in metrics["gain"].items()})


def _line(metrics: dict[str, Any]) -> str:
    gain, rank = metrics["gain"], metrics["spearman"]
    verdict = "beats" if metrics["beats_constant"] else "does not beat"
    harder = f"{rank['value']:.2f} [{rank['low']:.2f}, {rank['high']:.2f}]" if rank else "none, one depth for all"
    return (
        f"{verdict} the constant frontier: {gain['value']:+.4f} nats [{gain['low']:+.4f}, {gain['high']:+.4f}]; "
        f"entropy {metrics['entropy']:.4f} of {metrics['entropy_uniform']:.4f}; loss and depth: {harder}"
    )
