"""``buddy adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from buddy import runs
from buddy.commands import _arguments as arg
from buddy.commands import _given
from buddy.commands._common import backbone_folder, check_one_gpu
from buddy.commands._options import choice, with_settings
from buddy.commands._trained import claim_run, making, told_of
from buddy.errors import UserError, choices, needs
from buddy.methods import METHODS
from buddy.settings import MOST_SEED, First, Pudding, Training
from buddy.storage.files import sha256
from buddy.study.config import peer_axes
from buddy.study.records import commit
from buddy.study.settings import NOT_OF_PEERS

if TYPE_CHECKING:
    from buddy.study.records import Record
    from buddy.training import peers
    from buddy.training.job import Job

ADAPTED = tuple(name for name, method in METHODS.items() if method.trained and method.kind != "routed")


@with_settings(First, name="first", prefix="first")
@with_settings(Pudding, leave_out=("criteria", "pool_items"), name="pudding", prefix="pudding")
@with_settings(Training, leave_out=("data", *NOT_OF_PEERS))
def adapt(
    method: Annotated[str, typer.Option(help=choices(ADAPTED))],
    backbone: arg.Backbone,
    out: arg.RunOut,
    settings: Training,
    pudding: Pudding,
    first: First,
    removed: Annotated[int, typer.Option(help="number of blocks to leave out", min=0)] = 0,
    calibration: Annotated[
        Path | None, typer.Option(help="record of `buddy calibrate`: the removal order, or PuDDing's pool")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="instruction data set that LoRA and FiRST's gates learn from, from `buddy data`")
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(
            help="folder of data sets that PuDDing's router learns from, and on whose contexts FiRST's threshold is chosen "
            "(instruction prompts without)"
        ),
    ] = None,
    gates: Annotated[
        Path | None, typer.Option(help="FiRST's gates, from `buddy gates`; trained here without, the same")
    ] = None,
    lora: Annotated[str, typer.Option(help="trained: with LoRA, by BUDDY's recipe; none: without")] = "trained",
    record: arg.TrainingRecord = None,
    seed: Annotated[int, typer.Option(help="seed of weights and of the order of examples", min=0, max=MOST_SEED)] = 0,
    study: arg.Study = "adhoc",
    name: arg.Name = "",
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Make a run of a peer at one depth: its choice of blocks, and LoRA trained by the same recipe as BUDDY's.

    Killed, it goes on from its last checkpoint when run again.

    \b
    Examples:
      buddy calibrate --backbone DIR --corpus results/demo/data/wikitext2 --method sleb --removed 8 --out sleb.json
      buddy adapt --method sleb --backbone DIR --removed 8 --calibration sleb.json --data results/demo/data/alpaca \\
          --epochs 1 --out sleb-8
      buddy adapt --method shortgpt --backbone DIR --removed 4 --calibration shortgpt.json --lora none --out shortgpt-4
      buddy adapt --method dense_lora --backbone DIR --data results/demo/data/alpaca --out dense-lora
      buddy adapt --method first --backbone DIR --removed 4 --gates gates --data DIR --tasks results/demo/data --out first-4
    """
    from buddy.backbones.fingerprint import of_backbone
    from buddy.data import inputs
    from buddy.training.job import Job

    claim_run(out, record)
    choice("--method", method, ADAPTED)
    choice("--lora", lora, ("trained", "none"))
    learns = lora == "trained" or method == "first"
    if method == "pudding" and tasks is None:
        raise UserError("--tasks: the folder of data sets that PuDDing's router learns from is missing")
    if learns and data is None:
        raise UserError("--data: an instruction data set to train on is missing; make one with `buddy data`")
    if learns:
        needs("trl", "datasets")
    pairs = inputs.training(data)[: settings.examples] if learns and data is not None else []
    backbone = backbone_folder(backbone)
    found = _given.calibration(method, calibration, removed, backbone)
    trained = _given.gates(method, gates, backbone, settings, first, seed)
    model, tokenizer = runs.load_backbone(backbone, device, dtype)
    check_one_gpu(model.device.type)
    _check_depth(method, found, removed, model.config.num_hidden_layers)
    if lora == "none":
        settings = settings.model_copy(update={"lora_rank": 0})
    criterion = found.metrics["criterion"] if found and METHODS[method].kind == "static" else None
    dynamic = {"pudding": pudding, "first": first}.get(method)
    info = runs.RunInfo(
        method=method,
        policy="static" if dynamic is None else method,
        policy_settings={},
        backbone=name or backbone.name,
        backbone_path=runs.relative(backbone, out),
        variant={} if METHODS[method].kind == "whole" else dict(peer_axes(criterion, removed, lora)),
        seed=seed,
        study=study,
        kv=settings.kv,
        training={
            **settings.model_dump(exclude={"data", *NOT_OF_PEERS}),
            **({} if dynamic is None else {method: dynamic.model_dump()}),
            **(told_of(data) if data and learns else {"data": None}),
        },
        digests={
            "backbone": of_backbone(backbone),
            **({"calibration": sha256(calibration)} if calibration and found else {}),
            **trained.digests,
        },
        commit=commit(),
    )
    with making("adapt", model, info, out, record, [backbone, data, calibration, gates]) as job:
        training = Job(model, tokenizer, pairs, settings, removed, out, seed, job.log)
        made = _make(method, training, found, pudding, first, tasks, trained.weights)
        info.policy_settings = made.policy.settings()
        job.keep(made.policy, made.trained, len(pairs), {**made.facts, **trained.facts})


def _make(
    method: str,
    job: Job,
    found: Record | None,
    pudding: Pudding,
    first: First,
    tasks: Path | None,
    gates: Path | None,
) -> peers.Peer:
    """Make the peer that was asked for."""
    from buddy.baselines.pudding import Omission
    from buddy.training import peers

    if method == "first":
        return peers.first(job, first, tasks, gates)
    if method != "pudding":
        return peers.static(job, found.metrics["removed"] if found else [])
    assert found is not None
    assert tasks is not None
    return peers.pudding(job, [Omission.of(one) for one in found.metrics["omissions"]], pudding, tasks)


def _check_depth(method: str, found: Record | None, removed: int, blocks: int) -> None:
    """Refuse a depth that the method or the backbone has not.

    Raises:
        UserError: a dense model with blocks removed, a peer without, too many, or a record of another backbone.
    """
    if METHODS[method].kind == "whole":
        if removed:
            raise UserError(f"--removed: {removed} blocks asked for, {method} removes none")
    elif not 1 <= removed <= blocks - 2:
        raise UserError(f"--removed: {removed} is not between 1 and {blocks - 2}, of {blocks} blocks")
    if found is not None and found.metrics["blocks"] != blocks:
        raise UserError(f"--calibration: it is of a model of {found.metrics['blocks']} blocks, this one has {blocks}")
