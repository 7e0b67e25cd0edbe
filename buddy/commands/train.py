"""``buddy train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from buddy import runs
from buddy.commands import _arguments as arg
from buddy.commands import _given
from buddy.commands._common import backbone_folder, check_one_gpu
from buddy.commands._options import choice, counts, with_settings, within
from buddy.commands._trained import claim_run, making, told_of
from buddy.errors import UserError, needs
from buddy.settings import FEATURES, MOST_SEED, ROUTER_RECIPES, Router, Training
from buddy.study.config import Config
from buddy.study.records import commit
from buddy.study.settings import unread_by_tuned


@with_settings(Router, name="router", prefix="router")
@with_settings(Training, leave_out=("data",))
def train(
    backbone: arg.Backbone,
    data: Annotated[Path, typer.Option(help="instruction data set, from `buddy data`")],
    most_removed: Annotated[int, typer.Option(help="deepest pruning trained for: blocks left out at most")],
    out: arg.RunOut,
    settings: Training,
    router: Router,
    recipe: Annotated[
        str,
        typer.Option(
            help="how the router is trained: paper, or tuned, which reads --depths and --router-examples etc."
        ),
    ] = "paper",
    depths: Annotated[
        str | None,
        typer.Option(
            help="tuned: numbers of removed blocks that routes are measured at, separated by commas; by default half of "
            "--most-removed, and all of it"
        ),
    ] = None,
    record: arg.TrainingRecord = None,
    feature: Annotated[str, typer.Option(help="what the router reads: key, value or key+value")] = "value",
    source_block: Annotated[int, typer.Option(help="block whose KV it reads, counted from 1", min=1)] = 1,
    prior: Annotated[Path | None, typer.Option(help="importance record fused into the scores; none without")] = None,
    omega: Annotated[float, typer.Option(help="weight of the prior")] = 0.1,
    seed: Annotated[int, typer.Option(help="seed of weights, order and depths", min=0, max=MOST_SEED)] = 0,
    study: arg.Study = "adhoc",
    name: arg.Name = "",
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Train BUDDY's router and LoRA on a backbone (stage 1). Killed, it goes on from its last checkpoint when run again.

    By the paper's recipe they learn together. The tuned one fits the router to measured losses of routes first, then trains
    LoRA along the routes that it takes (docs/method.md).

    \b
    Examples:
      buddy train --backbone results/demo/backbones/smollm2-135m --data results/demo/data/alpaca \\
          --prior results/demo/records/importance/backbone~smollm2-135m/indicator~taylor.json \\
          --most-removed 15 --epochs 1 --out my-run
      buddy train --backbone DIR --data DIR --most-removed 16 --feature key --source-block 2 --out my-run
      buddy train --backbone DIR --data DIR --recipe tuned --depths 4,8 --most-removed 8 --router-orders 4 --out my-run
    """
    import torch

    from buddy.backbones.fingerprint import of_backbone
    from buddy.data import inputs
    from buddy.policies.buddy import BuddyPolicy
    from buddy.policies.priors import fused
    from buddy.routing import kv
    from buddy.training import prompts, sft
    from buddy.training import router as routers
    from buddy.training.examples import encode
    from buddy.training.recipe import Recipe, drawn

    claim_run(out, record)
    choice("--feature", feature, FEATURES)
    within("--omega", omega, 0, 1e6)
    choice("--recipe", recipe, ROUTER_RECIPES)
    measured_at = fit_depths(depths, most_removed)
    needs("trl", "datasets", "scipy")
    pairs = inputs.training(data)[: settings.examples]
    backbone = backbone_folder(backbone)
    given = _given.prior(prior, backbone)
    model, tokenizer = runs.load_backbone(backbone, device, dtype)
    check_one_gpu(model.device.type)
    blocks = model.config.num_hidden_layers
    _check_blocks(blocks, source_block, most_removed)
    axes = {"feature": feature, "prior": given.indicator, "omega": omega, "source_block": source_block}
    lora = "trained" if settings.lora_rank else "none"
    run = Config.buddy_run(name or backbone.name, {**axes, "recipe": recipe}, seed, lora)
    torch.manual_seed(seed)
    policy = BuddyPolicy(
        blocks=blocks,
        width=kv.width(model),
        feature=feature,
        source_block=source_block,
        omega=run.variant["omega"],
        rank=settings.router_rank,
        prior=fused(given.values, given.indicator, blocks, source_block),
        prompts_noted=True,
    )
    info = runs.RunInfo(
        method="buddy",
        policy="buddy",
        policy_settings=policy.settings(),
        backbone=run.backbone,
        backbone_path=runs.relative(backbone, out),
        variant=run.variant,
        seed=seed,
        study=study,
        kv=settings.kv,
        training={**_read(recipe, settings, router, measured_at), "most_removed": most_removed, **told_of(data)},
        digests={"backbone": of_backbone(backbone), **given.digests},
        commit=commit(),
    )
    with making("train", model, info, out, record, [backbone, data, prior]) as job:
        facts: dict[str, Any] = {}
        if recipe == "tuned" and router.start:
            runs.take_router(policy, router.start, backbone)
            facts["router"] = {"start": router.start}
        elif recipe == "tuned":
            fit = routers.fit(
                model, tokenizer, policy, pairs, router, settings, depths=measured_at, seed=seed, folder=out
            )
            facts["router"] = fit.facts()
        if recipe == "tuned":
            settings = settings.model_copy(update={"pool_over": router.pool_over})
        at_measured = (router.at_measured or 0.0) if recipe == "tuned" else 0.0
        how = Recipe(
            drawn(most_removed, blocks, measured_at, at_measured),
            trains_policy=recipe == "paper",
            constants={"most_removed": most_removed, **({"at_measured": at_measured} if at_measured else {})},
            probed=most_removed,
        )
        result = sft.train(model, tokenizer, policy, pairs, settings, how, out, seed, on_log=job.log)
        rows = encode(tokenizer, pairs[: prompts.NOTED], settings.max_length, settings.pool_over)
        prompts.note(model, policy, rows, settings.batch_size)
        job.keep(policy, result, len(pairs), facts)


def _check_blocks(blocks: int, source_block: int, most_removed: int) -> None:
    """Refuse a source block that nothing follows, or a pruning that the blocks behind it do not allow.

    Raises:
        UserError: says what is allowed, of so many blocks.
    """
    if source_block > blocks - 2:
        raise UserError(f"--source-block: {source_block} is not between 1 and {blocks - 2}, of {blocks} blocks")
    if not 1 <= most_removed <= blocks - source_block - 1:
        raise UserError(
            f"--most-removed: {most_removed} is not between 1 and {blocks - source_block - 1}, of {blocks} blocks"
        )


def fit_depths(depths: str | None, most_removed: int) -> list[int]:
    """Numbers of removed blocks at which the tuned recipe measures routes, ascending.

    Args:
        depths: as the user gave them, ``4,8``; None for half of the deepest pruning, and all of it.
        most_removed: the deepest pruning trained for.

    Raises:
        UserError: one of them is not between 1 and the deepest.
    """
    if depths is None:
        return sorted({max(1, most_removed // 2), most_removed})
    found = counts(depths, "--depths")
    for removed in found:
        if not 1 <= removed <= most_removed:
            raise UserError(f"--depths: {removed} is not between 1 and --most-removed {most_removed}")
    return sorted(set(found))


def _read(recipe: str, settings: Training, router: Router, depths: list[int]) -> dict[str, Any]:
    """The settings that a recipe reads, as ``run.json`` keeps them."""
    if recipe == "paper":
        return settings.model_dump()
    training = settings.model_dump(exclude=set(unread_by_tuned(settings.lora_rank)))
    return {**training, "router": {**router.model_dump(exclude_none=True), "depths": depths}}
