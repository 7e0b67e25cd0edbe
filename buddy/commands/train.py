"""``buddy train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from buddy.commands._options import with_settings
from buddy.settings import FEATURES, MOST_SEED, PRIORS, ROUTER_RECIPES, Router, Training
from buddy.study.settings import unread_by_tuned


@with_settings(Router, name="router", prefix="router")
@with_settings(Training, leave_out=("data",))
def train(
    backbone: Annotated[Path, typer.Option(help="backbone folder, from `buddy backbone`, or its name in a study")],
    data: Annotated[Path, typer.Option(help="instruction data set, from `buddy data`")],
    most_removed: Annotated[int, typer.Option(help="deepest pruning trained for: blocks left out at most")],
    out: Annotated[Path, typer.Option(help="run folder to write")],
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
    record: Annotated[Path | None, typer.Option(help="training record to write (JSON)")] = None,
    feature: Annotated[str, typer.Option(help="what the router reads: key, value or key+value")] = "value",
    source_block: Annotated[int, typer.Option(help="block whose KV it reads, counted from 1", min=1)] = 1,
    prior: Annotated[Path | None, typer.Option(help="importance record fused into the scores; none without")] = None,
    omega: Annotated[float, typer.Option(help="weight of the prior")] = 0.1,
    seed: Annotated[int, typer.Option(help="seed of weights, order and depths", min=0, max=MOST_SEED)] = 0,
    study: Annotated[str, typer.Option(help="study it belongs to")] = "adhoc",
    name: Annotated[str, typer.Option(help="the backbone's name in the study; its folder's name by default")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
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

    from buddy import runs
    from buddy.backbones.fingerprint import of_backbone
    from buddy.commands._common import backbone_folder, check_one_gpu, provenance, run_of, tracked
    from buddy.commands._options import choice, within
    from buddy.commands._trained import keep, told_of
    from buddy.data import inputs
    from buddy.errors import UserError
    from buddy.policies.buddy import BuddyPolicy
    from buddy.routing import kv
    from buddy.study.records import Stopwatch, claim, commit
    from buddy.training import sft
    from buddy.training.recipe import Recipe, drawn

    runs.claim(out)
    if record:
        claim(record, "--record")
    choice("--feature", feature, FEATURES)
    within("--omega", omega, 0, 1e6)
    choice("--recipe", recipe, ROUTER_RECIPES)
    measured_at = fit_depths(depths, most_removed)
    pairs = inputs.training(data)[: settings.examples]
    backbone = backbone_folder(backbone)
    prior_name, prior_values, prior_digests = read_prior(prior, backbone)
    model, tokenizer = runs.load_backbone(backbone, device, dtype)
    check_one_gpu(model.device.type)
    blocks = model.config.num_hidden_layers
    if source_block > blocks - 2:
        raise UserError(f"--source-block: {source_block} is not between 1 and {blocks - 2}, of {blocks} blocks")
    if not 1 <= most_removed <= blocks - source_block - 1:
        raise UserError(
            f"--most-removed: {most_removed} is not between 1 and {blocks - source_block - 1}, of {blocks} blocks"
        )
    torch.manual_seed(seed)
    policy = BuddyPolicy(
        blocks=blocks,
        width=kv.width(model),
        feature=feature,
        source_block=source_block,
        omega=omega if prior else 0.0,
        rank=settings.router_rank,
        prior=fused_prior(prior_name, prior_values, blocks, source_block),
        prompts_noted=recipe == "tuned",
    )
    info = runs.RunInfo(
        method="buddy",
        policy="buddy",
        policy_settings=policy.settings(),
        backbone=name or backbone.name,
        backbone_path=runs.relative(backbone, out),
        variant={
            **{"feature": feature, "prior": prior_name, "omega": policy.omega, "source_block": source_block},
            **{"recipe": recipe, **({} if settings.lora_rank else {"lora": "none"})},
        },
        seed=seed,
        study=study,
        kv=settings.kv,
        training={
            **_read(recipe, settings, router, measured_at),
            **{"most_removed": most_removed, **told_of(data)},
        },
        digests={"backbone": of_backbone(backbone), **prior_digests},
        commit=commit(),
    )
    reads, writes = [backbone, data, prior], [out, record]
    with tracked("train", study, run_of(info), info.training, "", reads, writes) as tracker:
        watch = Stopwatch(str(model.device))
        runs.begin(out)
        facts: dict[str, Any] = {}
        if recipe == "tuned":
            from buddy.training import router as routers

            fit = routers.fit(
                model, tokenizer, policy, pairs, router, settings, depths=measured_at, seed=seed, folder=out
            )
            facts["router"] = fit.facts()
        result = sft.train(
            model,
            tokenizer,
            policy,
            pairs,
            settings,
            Recipe(
                drawn(most_removed, blocks),
                trains_policy=recipe == "paper",
                constants={"most_removed": most_removed},
                probed=most_removed,
            ),
            out,
            seed,
            on_log=lambda step, values: tracker.log(values, step=step),
        )
        keep(out, info, policy, result, len(pairs), record, tracker, provenance(model, watch), facts)


def fit_depths(depths: str | None, most_removed: int) -> list[int]:
    """Numbers of removed blocks at which the tuned recipe measures routes, ascending.

    Args:
        depths: as the user gave them, ``4,8``; None for half of the deepest pruning, and all of it.
        most_removed: the deepest pruning trained for.

    Raises:
        UserError: one of them is not between 1 and the deepest.
    """
    from buddy.commands._options import counts
    from buddy.errors import UserError

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
    return {**training, "router": {**router.model_dump(), "depths": depths}}


def read_prior(path: Path | None, backbone: Path) -> tuple[str, list[float], dict[str, str]]:
    """Name, raw values and digest of a prior from its importance record; ("none", [], {}) without one.

    Raises:
        UserError: not an importance record, one of another backbone, or an indicator that is no prior.
    """
    from buddy import runs
    from buddy.errors import UserError, unknown
    from buddy.storage.files import sha256
    from buddy.study.records import Record

    if path is None:
        return "none", [], {}
    record = Record.read(path)
    if record.kind != "importance":
        raise UserError(f"--prior: {path} is a record of kind {record.kind}, not importance")
    indicator = record.metrics["indicator"]
    if indicator not in PRIORS[1:]:
        raise unknown(f"--prior: {path}: indicator", indicator, PRIORS[1:])
    runs.check_backbone(backbone, record.digests.get("backbone"), f"--prior: {path}")
    return indicator, record.metrics["values"], {"prior": sha256(path)}


def fused_prior(indicator: str, values: list[float], blocks: int, source_block: int) -> Any:
    """Standardised prior of the candidate blocks as a tensor (candidates,), or None without a prior.

    Raises:
        UserError: the record is of a backbone with another number of blocks.
    """
    import torch

    from buddy.errors import UserError
    from buddy.policies.priors import normalise, standardise

    if indicator == "none":
        return None
    if len(values) != blocks:
        raise UserError(f"--prior: it rates {len(values)} blocks, the backbone has {blocks}")
    candidates = torch.tensor(values, dtype=torch.float64)[source_block : blocks - 1]
    return standardise(normalise(candidates, indicator)).float()
