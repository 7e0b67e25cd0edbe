"""``buddy predictor``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from buddy import runs
from buddy.commands import _arguments as arg
from buddy.commands._common import check_one_gpu, keep_off_the_hub
from buddy.commands._options import choice, with_settings
from buddy.commands._trained import claim_run, making
from buddy.errors import UserError
from buddy.settings import MOST_SEED, PREDICTOR_PRESETS, READ_BY_PRESET, Predictor
from buddy.study.records import commit


@with_settings(
    Predictor, leave_out=("backbones", "presets", "data", "tuned_data", "datasets", "limit", "tasks", "problems")
)
def predictor(
    run: Annotated[Path, typer.Option(help="run folder of BUDDY, from `buddy train`")],
    data: Annotated[
        list[Path], typer.Option(help="data set folder to learn from, from `buddy data`; may be given several times")
    ],
    preset: Annotated[
        str, typer.Option(help="paper (GRPO, as published), tuned or rise (both learn, and take a price)")
    ],
    out: Annotated[Path, typer.Option(help="run folder to write: the same adapter and router, and the predictor")],
    settings: Predictor,
    record: arg.TrainingRecord = None,
    seed: Annotated[
        int | None,
        typer.Option(help="seed of weights, order and draws; the run's own by default", min=0, max=MOST_SEED),
    ] = None,
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Train a budget predictor on a finished run, whose adapter and router stay as they are.

    What it makes is a run: `buddy generate --budget auto` then leaves the budget to the predictor, and so does
    budget=None in Python. Killed, it goes on from its last checkpoint when run again.

    \b
    Examples:
      buddy predictor --run results/demo/runs/.../seed~0 --data results/demo/data/alpaca --preset tuned --out my-run
      buddy predictor --run RUN --data results/demo/data/alpaca --preset paper --steps 200 --out paper-run
      buddy predictor --run RUN --data DIR/alpaca --data DIR/boolq --preset tuned --price 0.3 --out RUN2
      buddy predictor --run RUN --data DIR/alpaca --data DIR/piqa --preset rise --depths 3 --out RUN3
    """
    keep_off_the_hub()

    from buddy.policies.buddy import BuddyPolicy
    from buddy.training import predictor as training
    from buddy.training import predictor_examples, sft

    claim_run(out, record)
    choice("--preset", preset, PREDICTOR_PRESETS)
    if run.resolve() == out.resolve():
        raise UserError(f"--out: {out} is the run itself; name another folder")
    kept_back = predictor_examples.fingerprints(data)
    model = runs.load(run, device=device, dtype=dtype)
    check_one_gpu(model.device.type)
    origin, policy = model.origin, model.policy
    if not isinstance(policy, BuddyPolicy):
        raise UserError(f"--run: {run} is a run of method {origin.info.method}; a budget predictor needs one of buddy")
    count = settings.examples or training.EXAMPLES[preset]
    rows = [
        {**row, "set": folder.name}
        for folder in data
        for row in predictor_examples.training_rows(folder, model.tokenizer, count, settings.max_length)
    ]
    read = settings.model_dump(include=set(READ_BY_PRESET[preset]))  # type: ignore[index]
    said = {**read, "preset": preset, "data": [folder.name for folder in data]}
    info = dataclasses.replace(
        origin.info,
        backbone_path=runs.relative(origin.backbone, out),
        variant={**origin.info.variant, "preset": preset},
        seed=origin.info.seed if seed is None else seed,
        training={**origin.info.training, "predictor": {**said, "kept_back": kept_back}},
        commit=commit(),
    )
    most_removed = info.training.get("most_removed", policy.blocks - policy.always)
    config = info.training["predictor"]
    part = f"preset~{preset}"  # each preset is another job on the same run
    with making("predictor", model, info, out, record, [run, *data], config, part) as job:
        fitted = training.train(
            model.backbone,
            policy,
            rows,
            preset,
            settings,
            most_removed,
            out / sft.CHECKPOINTS,
            info.seed,
            on_log=job.log,
        )
        info.policy_settings = policy.settings()
        assert policy.predictor is not None
        trained = sft.Trained(
            adapted=origin.adapter,
            curve=fitted.curve,
            steps=fitted.steps,
            tokens=sum(len(row["input_ids"]) for row in rows),
            trainable=sum(parameter.numel() for parameter in policy.predictor.parameters()),
        )
        passes = fitted.steps * settings.batch_size / len(rows) if preset == "paper" else fitted.steps
        facts = {**training.facts(policy.predictor, fitted), "epochs": passes}
        job.keep(policy, trained, len(rows), facts)
    typer.echo(
        f"{preset}: entropy {facts['final_entropy']:.4f} of {facts['entropy_uniform']:.4f} nats (uniform), "
        f"mean budget {facts['final_mean_budget']:.3f}, {len(rows)} examples"
    )
    for name, within in facts.get("within", {}).items():
        typer.echo(f"{name}, n {within['n']}, not seen by the fit: {_unseen(within)}")


def _unseen(within: dict[str, Any]) -> str:
    """What a cross-fitted predictor is worth within a data set, with 95 % intervals."""
    told = {"r2_within": "R squared of the rise", "gain": "nats per token below constants", "oracle": "an oracle"}
    shown = ((words, within[name]) for name, words in told.items())
    return "; ".join(f"{words} {one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]" for words, one in shown)
