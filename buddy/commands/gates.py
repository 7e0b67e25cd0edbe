"""``buddy gates``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buddy import runs
from buddy.commands import _arguments as arg
from buddy.commands._common import backbone_folder, check_one_gpu
from buddy.commands._given import TRAINING
from buddy.commands._options import with_settings
from buddy.commands._trained import claim_run, making, told_of
from buddy.errors import needs
from buddy.settings import MOST_SEED, READ_BY_GATES, First, Training
from buddy.study.records import commit
from buddy.study.settings import NOT_OF_GATES


@with_settings(First, leave_out=("threshold", "tasks", "calibration_prompts"), name="first", prefix="first")
@with_settings(Training, leave_out=("data", *NOT_OF_GATES))
def gates(
    backbone: arg.Backbone,
    data: Annotated[Path, typer.Option(help="instruction data set, from `buddy data`")],
    out: arg.RunOut,
    settings: Training,
    first: First,
    seed: Annotated[int, typer.Option(help="seed of the order of examples", min=0, max=MOST_SEED)] = 0,
    study: arg.Study = "adhoc",
    name: arg.Name = "",
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Train FiRST's gates on a frozen backbone: once, for every depth that `buddy adapt --method first` makes a run of.

    Killed, it goes on from its last checkpoint when run again.

    \b
    Examples:
      buddy gates --backbone DIR --data results/demo/data/alpaca --out gates
      buddy adapt --method first --backbone DIR --removed 4 --gates gates --data results/demo/data/alpaca \\
          --tasks results/demo/data --out first-4
    """
    from buddy.backbones.fingerprint import of_backbone
    from buddy.data import inputs
    from buddy.training import first as phases
    from buddy.training import peers
    from buddy.training.job import Job

    claim_run(out, None)
    needs("trl", "datasets")
    pairs = inputs.training(data)[: settings.examples]
    backbone = backbone_folder(backbone)
    model, tokenizer = runs.load_backbone(backbone, device, dtype)
    check_one_gpu(model.device.type)
    info = runs.RunInfo(
        method="first",
        policy="first",
        policy_settings={},
        backbone=name or backbone.name,
        backbone_path=runs.relative(backbone, out),
        seed=seed,
        study=study,
        training={
            **settings.model_dump(exclude={"data", *NOT_OF_GATES}),
            "first": first.model_dump(include={*READ_BY_GATES}),
            **told_of(data),
        },
        digests={"backbone": of_backbone(backbone)},
        commit=commit(),
    )
    with making("gates", model, info, out, out / TRAINING, [backbone, data]) as making_it:
        job = Job(model, tokenizer, pairs, settings, 0, out, seed, making_it.log)
        policy = peers.first_gates(job)
        trained = phases.train_gates(job, policy, first)
        info.policy_settings = policy.settings()
        making_it.keep(policy, trained, len(pairs))
