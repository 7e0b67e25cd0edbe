"""``buddy adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from buddy.commands._options import with_settings
from buddy.settings import MOST_SEED, STATIC_PEERS, First, Pudding, Training
from buddy.study.settings import METHODS, NOT_OF_PEERS

if TYPE_CHECKING:
    from buddy.study.records import Record
    from buddy.training import peers
    from buddy.training.job import Job

ADAPTED = tuple(method for method in METHODS if method not in ("dense", "buddy"))


@with_settings(First, name="first", prefix="first")
@with_settings(Pudding, leave_out=("criteria", "pool_items"), name="pudding", prefix="pudding")
@with_settings(Training, leave_out=("data", *NOT_OF_PEERS))
def adapt(
    method: Annotated[str, typer.Option(help="dense_lora, shortgpt, shortened_llama, sleb, pudding or first")],
    backbone: Annotated[Path, typer.Option(help="backbone folder, from `buddy backbone`, or its name in a study")],
    out: Annotated[Path, typer.Option(help="run folder to write")],
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
    tasks: Annotated[Path | None, typer.Option(help="folder of data sets that PuDDing's router learns from")] = None,
    lora: Annotated[str, typer.Option(help="trained: with LoRA, by BUDDY's recipe; none: without")] = "trained",
    record: Annotated[Path | None, typer.Option(help="training record to write (JSON)")] = None,
    seed: Annotated[int, typer.Option(help="seed of weights and of the order of examples", min=0, max=MOST_SEED)] = 0,
    study: Annotated[str, typer.Option(help="study it belongs to")] = "adhoc",
    name: Annotated[str, typer.Option(help="the backbone's name in the study; its folder's name by default")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
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
    """
    from buddy import runs
    from buddy.backbones.fingerprint import of_backbone
    from buddy.commands._common import backbone_folder, check_one_gpu, provenance, run_of, tracked
    from buddy.commands._options import choice
    from buddy.commands._trained import keep, told_of
    from buddy.data import inputs
    from buddy.errors import UserError
    from buddy.storage.files import sha256
    from buddy.study.records import Stopwatch, claim, commit
    from buddy.training.job import Job

    runs.claim(out)
    if record:
        claim(record, "--record")
    choice("--method", method, ADAPTED)
    choice("--lora", lora, ("trained", "none"))
    learns = lora == "trained" or method == "first"
    if method == "pudding" and tasks is None:
        raise UserError("--tasks: the folder of data sets that PuDDing's router learns from is missing")
    if learns and data is None:
        raise UserError("--data: an instruction data set to train on is missing; make one with `buddy data`")
    pairs = inputs.training(data)[: settings.examples] if learns and data is not None else []
    backbone = backbone_folder(backbone)
    found = _calibration(method, calibration, removed, backbone)
    model, tokenizer = runs.load_backbone(backbone, device, dtype)
    check_one_gpu(model.device.type)
    _check_depth(method, found, removed, model.config.num_hidden_layers)
    if lora == "none":
        settings = settings.model_copy(update={"lora_rank": 0})
    dynamic = {"pudding": pudding, "first": first}.get(method)
    info = runs.RunInfo(
        method=method,
        policy="static" if dynamic is None else method,
        policy_settings={},
        backbone=name or backbone.name,
        backbone_path=runs.relative(backbone, out),
        variant=_axes(method, found, removed, lora),
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
        },
        commit=commit(),
    )
    reads, writes = [backbone, data, calibration], [out, record]
    with tracked("adapt", study, run_of(info), info.training, "", reads, writes) as tracker:
        watch = Stopwatch(str(model.device))
        runs.begin(out)
        on_log = lambda step, values: tracker.log(values, step=step)  # noqa: E731
        job = Job(model, tokenizer, pairs, settings, removed, out, seed, on_log)
        made = _make(method, job, found, pudding, first, tasks)
        info.policy_settings = made.policy.settings()
        keep(out, info, made.policy, made.trained, len(pairs), record, tracker, provenance(model, watch), made.facts)


def _make(
    method: str, job: Job, found: Record | None, pudding: Pudding, first: First, tasks: Path | None
) -> peers.Peer:
    """Make the peer that was asked for."""
    from buddy.baselines.pudding import Omission
    from buddy.training import peers

    if method == "first":
        return peers.first(job, first)
    if method != "pudding":
        return peers.static(job, found.metrics["removed"] if found else [])
    assert found is not None
    assert tasks is not None
    return peers.pudding(job, [Omission.of(one) for one in found.metrics["omissions"]], pudding, tasks)


def _calibration(method: str, path: Path | None, removed: int, backbone: Path) -> Record | None:
    """The record that a peer's choice of blocks comes from; None for a method that needs none.

    Raises:
        UserError: it is missing, of another kind, method or backbone, or too short.
    """
    from buddy import runs
    from buddy.errors import UserError
    from buddy.study.records import Record

    if method in ("dense_lora", "first"):
        return None
    if path is None:
        raise UserError(f"--calibration: {method} needs the record of `buddy calibrate --method {method}`")
    record = Record.read(path)
    if record.kind != "calibration" or record.method != method:
        raise UserError(f"--calibration: {path} is a record of kind {record.kind} and method {record.method}")
    runs.check_backbone(backbone, record.digests.get("backbone"), f"--calibration: {path}")
    if removed > (most := record.budget.removed if record.budget else 0):
        raise UserError(f"--removed: {removed} blocks asked for, {path} removes at most {most}")
    return record


def _check_depth(method: str, found: Record | None, removed: int, blocks: int) -> None:
    """Refuse a depth that the method or the backbone has not.

    Raises:
        UserError: a dense model with blocks removed, a peer without, too many, or a record of another backbone.
    """
    from buddy.errors import UserError

    if method == "dense_lora":
        if removed:
            raise UserError(f"--removed: {removed} blocks asked for, dense_lora removes none")
    elif not 1 <= removed <= blocks - 2:
        raise UserError(f"--removed: {removed} is not between 1 and {blocks - 2}, of {blocks} blocks")
    if found is not None and found.metrics["blocks"] != blocks:
        raise UserError(f"--calibration: it is of a model of {found.metrics['blocks']} blocks, this one has {blocks}")


def _axes(method: str, found: Record | None, removed: int, lora: str) -> dict[str, Any]:
    """The run's axes, in the order of its path in a study (`buddy.study.config.Config.method_runs`)."""
    if method == "dense_lora":
        return {}
    criterion = {"criterion": found.metrics["criterion"]} if found is not None and method in STATIC_PEERS else {}
    return {**criterion, "removed": removed, "lora": lora}
