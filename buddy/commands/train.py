"""``buddy train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from buddy.commands._options import with_settings
from buddy.settings import FEATURES, PRIORS, Training


@with_settings(Training, leave_out=("data",))
def train(
    backbone: Annotated[Path, typer.Option(help="backbone folder, from `buddy backbone`, or its name in a study")],
    data: Annotated[Path, typer.Option(help="instruction data set, from `buddy data`")],
    most_removed: Annotated[int, typer.Option(help="deepest pruning trained for: blocks left out at most")],
    out: Annotated[Path, typer.Option(help="run folder to write")],
    settings: Training,
    record: Annotated[Path | None, typer.Option(help="training record to write (JSON)")] = None,
    feature: Annotated[str, typer.Option(help="what the router reads: key, value or key+value")] = "value",
    source_block: Annotated[int, typer.Option(help="block whose KV it reads, counted from 1")] = 1,
    prior: Annotated[Path | None, typer.Option(help="importance record fused into the scores; none without")] = None,
    omega: Annotated[float, typer.Option(help="weight of the prior")] = 0.1,
    seed: Annotated[int, typer.Option(help="seed of weights, order and depths")] = 0,
    study: Annotated[str, typer.Option(help="study it belongs to")] = "adhoc",
    name: Annotated[str, typer.Option(help="the backbone's name in the study; its folder's name by default")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Train BUDDY's router and LoRA on a backbone (stage 1). Killed, it goes on from its last checkpoint when run again.

    \b
    Examples:
      buddy train --backbone results/demo/backbones/smollm2-135m --data results/demo/data/alpaca \\
          --prior results/demo/records/importance/backbone~smollm2-135m/indicator~taylor.json \\
          --most-removed 15 --epochs 1 --out my-run
      buddy train --backbone DIR --data DIR --most-removed 16 --feature key --source-block 2 --out my-run
    """
    import torch

    from buddy import runs
    from buddy.commands._common import backbone_folder, check_one_gpu, provenance, run_of, tracked
    from buddy.commands._options import choice
    from buddy.commands._trained import keep, told_of
    from buddy.data import inputs
    from buddy.errors import UserError
    from buddy.policies.buddy import BuddyPolicy
    from buddy.records import Stopwatch, claim, commit
    from buddy.routing import kv
    from buddy.training import sft
    from buddy.training.recipe import Recipe, drawn

    runs.claim(out)
    if record:
        claim(record, "--record")
    choice("--feature", feature, FEATURES)
    pairs = inputs.training(data)[: settings.examples]
    prior_name, prior_values = read_prior(prior)
    backbone = backbone_folder(backbone)
    model, tokenizer = runs.load_backbone(backbone, device, dtype)
    check_one_gpu(model.device.type)
    blocks = model.config.num_hidden_layers
    if not 1 <= most_removed <= blocks - source_block - 1:
        raise UserError(f"--most-removed: {most_removed} is not between 1 and {blocks - source_block - 1}")
    torch.manual_seed(seed)
    policy = BuddyPolicy(
        blocks=blocks,
        width=kv.width(model),
        feature=feature,
        source_block=source_block,
        omega=omega if prior else 0.0,
        rank=settings.router_rank,
        prior=fused_prior(prior_name, prior_values, blocks, source_block),
    )
    info = runs.RunInfo(
        method="buddy",
        policy="buddy",
        policy_settings=policy.settings(),
        backbone=name or backbone.name,
        backbone_path=runs.relative(backbone, out),
        variant={
            **{"feature": feature, "prior": prior_name, "omega": policy.omega, "source_block": source_block},
            **({} if settings.lora_rank else {"lora": "none"}),
        },
        seed=seed,
        study=study,
        kv=settings.kv,
        training={**settings.model_dump(), "most_removed": most_removed, **told_of(data)},
        commit=commit(),
    )
    reads, writes = [backbone, data, prior], [out, record]
    with tracked("train", study, run_of(info), info.training, "", reads, writes) as tracker:
        watch = Stopwatch(str(model.device))
        runs.begin(out)
        result = sft.train(
            model,
            tokenizer,
            policy,
            pairs,
            settings,
            Recipe(
                drawn(most_removed, blocks),
                trains_policy=True,
                constants={"most_removed": most_removed},
                probed=most_removed,
            ),
            out,
            seed,
            on_log=lambda step, values: tracker.log(values, step=step),
        )
        keep(out, info, policy, result, len(pairs), record, tracker, provenance(model, watch))


def read_prior(path: Path | None) -> tuple[str, list[float]]:
    """Name and raw values of a prior from its importance record; ("none", []) without one.

    Raises:
        UserError: not an importance record, or an indicator that is no prior.
    """
    from buddy.errors import UserError, unknown
    from buddy.records import Record

    if path is None:
        return "none", []
    record = Record.read(path)
    if record.kind != "importance":
        raise UserError(f"--prior: {path} is a record of kind {record.kind}, not importance")
    indicator = record.metrics["indicator"]
    if indicator not in PRIORS[1:]:
        raise unknown(f"--prior: {path}: indicator", indicator, PRIORS[1:])
    return indicator, record.metrics["values"]


def fused_prior(indicator: str, values: list[float], blocks: int, source_block: int) -> Any:
    """Standardised prior of the candidate blocks as a tensor (candidates,), or None without a prior.

    Raises:
        UserError: the record is of a backbone with another number of blocks.
    """
    import torch

    from buddy.errors import UserError
    from buddy.routing.priors import normalise, standardise

    if indicator == "none":
        return None
    if len(values) != blocks:
        raise UserError(f"--prior: it rates {len(values)} blocks, the backbone has {blocks}")
    candidates = torch.tensor(values, dtype=torch.float64)[source_block : blocks - 1]
    return standardise(normalise(candidates, indicator)).float()
