"""A run on disk: what `buddy train` leaves and `buddy.load` reads.

A run folder holds ``run.json`` (settings and where the backbone is), ``router.safetensors`` (the policy's state) and
``adapter/`` (LoRA in PEFT's format). The backbone is not copied. A plain backbone folder loads as the dense model.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy import adapters
from buddy.errors import UserError
from buddy.storage import folders, gpus
from buddy.storage.files import sha256, write_json

if TYPE_CHECKING:
    import torch

    from buddy.routing.model import RoutedModel
    from buddy.routing.policy import Policy
    from buddy.routing.types import CausalLM

logger = logging.getLogger(__name__)

SCHEMA = 1
RUN_FILE = "run.json"
ROUTER_FILE = "router.safetensors"
ADAPTER_FOLDER = "adapter"
CHECKPOINTS = "checkpoints"
HOLDS = "a run"


@dataclass
class RunInfo:
    """Contents of ``run.json``.

    Attributes:
        method: method of the study (``buddy``, ``dense``).
        policy: name of the policy, and ``policy_settings`` that build it.
        backbone: name, and ``backbone_path``: its folder, relative to the run's where it can be.
        variant: the run's axes (feature, prior, omega, source_block, recipe).
        kv: K/V policy used unless another is asked for.
        backbone_source: where that came from, as another machine can have it (`buddy.backbones.portable`); None where
            nobody else can.
        training: settings it was trained with.
        digests: of what it was made with and consists of: ``backbone`` (`buddy.backbones.fingerprint`), ``router`` and
            ``adapter`` (SHA-256, absent where the run has none), ``prior`` or ``calibration`` (of the record's file).
            Empty for a run from before there were any.
        probes: distinct ``paths`` that a trained router took over some ``prompts`` of its training data with some blocks
            ``removed``; empty without a router.
    """

    method: str
    policy: str
    policy_settings: dict[str, Any]
    backbone: str
    backbone_path: str
    variant: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    study: str = ""
    kv: str = "zero"
    training: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    probes: dict[str, int] = field(default_factory=dict)
    backbone_source: dict[str, Any] | None = None
    commit: str = ""
    schema: int = SCHEMA

    @classmethod
    def read(cls, folder: str | Path) -> RunInfo:
        """Read ``run.json``.

        Raises:
            UserError: the file is absent, damaged or of a newer schema.
        """
        path = Path(folder) / RUN_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] > SCHEMA:
                raise UserError(f"{path}: run schema {content['schema']} is newer than {SCHEMA}; update buddy")
            return cls(**content)
        except OSError:
            raise UserError(f"{folder}: not a run (no {RUN_FILE}); `buddy runs` lists the trained runs") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error})") from None

    def backbone_folder(self, folder: str | Path) -> Path:
        """Where the backbone of a run in this folder is meant to be."""
        return (Path(folder) / self.backbone_path).resolve()


def found(results: str | Path) -> list[Path]:
    """The folders of all runs below a folder, by path; not of those that are just being written, which are hidden."""
    files = (path.relative_to(results) for path in Path(results).rglob(RUN_FILE))
    return sorted(Path(results) / file.parent for file in files if not any(part[0] == "." for part in file.parts))


@dataclass
class Origin:
    """Where a loaded model came from: its run's settings, its backbone's folder, its adapter's (None without)."""

    info: RunInfo
    backbone: Path
    adapter: Path | None = None

    def save(self, folder: str | Path, policy: Any) -> Path:
        """Write the run again, with this policy's state."""
        info = replace(self.info, backbone_path=relative(self.backbone, folder))
        return save(folder, info, policy, self.adapter)


def load(
    path: str | Path,
    *,
    backbone: str | Path | None = None,
    kv: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    merge: bool = True,
) -> RoutedModel:
    """Load a run, or a plain backbone as the dense model.

    Args:
        path: folder of a run (``run.json``) or of a backbone (``config.json``).
        backbone: folder of the backbone, where it has moved since the run was trained.
        kv: K/V policy of skipped blocks; the run's own by default.
        device: ``auto`` (the GPU if there is one), ``cpu``, ``cuda`` ...
        dtype: ``float32``, ``bfloat16`` or ``auto`` (bfloat16 on a GPU, float32 on a CPU).
        merge: add LoRA into the backbone's weights (no cost per token); False keeps it beside them.

    Returns:
        The model in evaluation mode, with ``tokenizer``.

    Raises:
        UserError: nothing loadable at ``path``; the backbone is missing, or not the one that the run was trained on; a
            part is missing, damaged or does not fit.
    """
    path = Path(path)
    if not (path / RUN_FILE).exists() and (path / "config.json").exists():
        return _load_dense(path, kv, device, dtype)
    info = RunInfo.read(path)
    folder = Path(backbone) if backbone is not None else info.backbone_folder(path)
    if not (folder / "config.json").exists():
        raise _no_backbone(path, folder, info)

    from buddy.routing.model import RoutedModel
    from buddy.storage import tensors

    check(path, info)
    check_backbone(folder, info.digests.get("backbone"), str(path))
    policy = _policy(path, info)
    model, tokenizer = load_backbone(folder, device, dtype)
    if policy.blocks != model.config.num_hidden_layers:
        raise UserError(
            f"{path}: it is of a model of {policy.blocks} blocks, {folder} has {model.config.num_hidden_layers}"
        )
    if policy.state_dict():
        tensors.fill(policy, path / ROUTER_FILE)
    adapter = None
    if (path / ADAPTER_FOLDER).is_dir():
        adapter = path / ADAPTER_FOLDER
        adapted = adapters.attach(model, adapter)
        model = adapted.merge_and_unload() if merge else adapted.get_base_model()
    origin = Origin(info, folder, adapter)
    return RoutedModel(model, policy.to(model.device), kv or info.kv, tokenizer, origin).eval()


def take_router(policy: Policy, path: str | Path, backbone: str | Path) -> None:
    """Fill a policy with the router of a finished run.

    Args:
        policy: built, not trained.
        path: folder of the run.
        backbone: folder of the backbone that the policy is for.

    Raises:
        UserError: no run there, one of another backbone or of another policy, or a damaged one.
    """
    from buddy.storage import tensors

    path = Path(path)
    info = RunInfo.read(path)
    check(path, info)
    check_backbone(Path(backbone), info.digests.get("backbone"), str(path))
    ours, theirs = policy.settings(), _policy(path, info).settings()
    if differing := [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]:
        told = ", ".join(f"{name} {theirs.get(name)} and not {ours.get(name)}" for name in differing)
        raise UserError(f"{path}: its router is of another variant: {told}")
    tensors.fill(policy, path / ROUTER_FILE)


def untouched(model: RoutedModel) -> CausalLM:
    """The backbone of a loaded run as it was before training, in evaluation mode: the very model where the run has no
    adapter; else loaded afresh beside it, on the same device and in the same dtype, because LoRA is in its weights.

    Args:
        model: from `load`.

    Raises:
        UserError: the model was not loaded, so its backbone is not known.
    """
    if model.origin is None:
        raise UserError("untouched: this model was not loaded from a run or a backbone")
    if model.origin.adapter is None:
        return model.backbone
    backbone, _ = load_backbone(model.origin.backbone, str(model.device), str(model.dtype).removeprefix("torch."))
    return backbone


def check(path: Path, info: RunInfo) -> None:
    """Make sure that a run folder holds what its ``run.json`` says, unchanged. No torch is needed.

    Raises:
        UserError: the router or the adapter is missing, changed, or not of this run.
    """
    if not info.digests:
        logger.info("%s: made before runs had digests; whether it is whole is known only as far as its files fit", path)
        if info.training.get("lora_rank") and not (path / ADAPTER_FOLDER).is_dir():
            raise UserError(f"{path}: no {ADAPTER_FOLDER}/, though the run was trained with LoRA; train it again")
        return
    found = _part_digests(path)
    for name, place in _PARTS.items():
        expected, there = info.digests.get(name), found.get(name)
        if expected != there:
            state = "missing" if there is None else "changed" if expected else "put there"
            raise UserError(f"{path / place}: {state} since the run was saved; train it again, or restore the folder")


def check_backbone(folder: Path, expected: str | None, of: str) -> None:
    """Make sure that a backbone is the one that something was made with.

    Args:
        folder: the backbone.
        expected: the digest that was recorded then; None where there is none, which is noted.
        of: what was made with it, for the message.

    Raises:
        UserError: it is another one.
    """
    from buddy.backbones import fingerprint

    if expected is None:
        logger.info("%s: does not say which backbone it was made with; taken to be %s", of, folder)
    elif (found := fingerprint.of_backbone(folder)) != expected:
        raise UserError(f"{of}: was made with another backbone (digest {expected}) than {folder} (digest {found})")


_PARTS = {"router": ROUTER_FILE, "adapter": f"{ADAPTER_FOLDER}/{adapters.WEIGHTS}"}
"""Parts of a run folder, by their names in `RunInfo.digests`."""


_OWN = (RUN_FILE, ROUTER_FILE, ADAPTER_FOLDER, folders.MARK)
"""All that belongs to a run; what else its folder holds (checkpoints, logs) stays there when the run is saved again."""


def _part_digests(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / place) for name, place in _PARTS.items() if (folder / place).is_file()}


def _policy(path: Path, info: RunInfo) -> Policy:
    """The policy of a run, not filled yet."""
    from buddy import policies

    try:
        return policies.create(info.policy, **info.policy_settings)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path / RUN_FILE}: policy_settings: not those of a policy {info.policy} ({reason})"
        ) from error


def _no_backbone(run: Path, folder: Path, info: RunInfo) -> UserError:
    from buddy import backbones

    made = f", or make it: {backbones.command(info.backbone_source, folder)}" if info.backbone_source else ""
    return UserError(f"{run}: its backbone is not at {folder}; say where it is with backbone= (--backbone){made}")


def _load_dense(folder: Path, kv: str | None, device: str, dtype: str) -> RoutedModel:
    from buddy.backbones import fingerprint
    from buddy.policies.static import StaticPolicy
    from buddy.routing.model import RoutedModel

    model, tokenizer = load_backbone(folder, device, dtype)
    policy = StaticPolicy(model.config.num_hidden_layers)
    info = RunInfo("dense", "static", policy.settings(), folder.name, str(folder.resolve()))
    info.digests = {"backbone": fingerprint.of_backbone(folder)}
    return RoutedModel(model, policy, kv or "zero", tokenizer, Origin(info, folder)).eval()


def load_backbone(folder: str | Path, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """The untouched Hugging Face model and its tokenizer, in evaluation mode.

    Args:
        folder: a folder as `buddy backbone` leaves it.
        device, dtype: as in `load`.

    Raises:
        UserError: it is no backbone, a tensor is missing, too many, of another shape or not finite, or it has no
            tokenizer that can be read.
    """
    from transformers import AutoModelForCausalLM

    from buddy.backbones import inspect, linked, pad_token, weights
    from buddy.storage import tensors

    device, kind = pick(device, dtype)
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"{folder}: not a backbone (no config.json); make one with `buddy backbone`")
    inspect(Path(folder), str(folder))
    weights.check_complete(Path(folder), str(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=kind, use_safetensors=True, **linked.LOCAL)
    tokenizer = linked.tokenizer(folder, str(folder))
    tokenizer.padding_side = "left"
    pad_token.settle(model, tokenizer)
    model = model.to(device).eval()
    tensors.check_finite(model.state_dict().items(), str(folder))
    return model, tokenizer


def pick(device: str = "auto", dtype: str = "auto") -> tuple[str, torch.dtype]:
    """Resolve ``auto``: the GPU if there is one; bfloat16 there, float32 on a CPU (where bfloat16 is slower).

    Raises:
        UserError: an unknown dtype, or a GPU that is not there.
    """
    import torch

    if device in ("auto", "cuda"):
        gpus.take()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch("cpu|cuda(:[0-9]{1,3})?", device):
        raise UserError(f"--device: {device!r} is not auto, cpu, cuda or cuda:N")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"--device: {device} asked for, but no GPU is visible")
        if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise UserError(f"--device: {device} asked for, but {torch.cuda.device_count()} GPUs are visible")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        return device, torch.bfloat16 if device.startswith("cuda") else torch.float32
    if dtype not in kinds:
        raise UserError(f"--dtype: {dtype!r} is not auto, float32 or bfloat16")
    return device, kinds[dtype]


def save(folder: str | Path, info: RunInfo, policy: Any, adapter: Any = None) -> Path:
    """Write a run folder, whole or not at all.

    Args:
        folder: where; an existing run there is replaced.
        info: its ``run.json``.
        policy: its state dict becomes ``router.safetensors``, unless empty.
        adapter: a ``PeftModel`` whose adapter is saved, the folder of a saved one, or None.

    Raises:
        UserError: the folder holds something else than a run.
    """
    from safetensors.torch import save_file

    with folders.fresh(folder, HOLDS, _unmarked, keeps=lambda entry: entry.name not in _OWN) as draft:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}
        if state:
            save_file(state, draft / ROUTER_FILE)
        if isinstance(adapter, str | Path):
            shutil.copytree(adapter, draft / ADAPTER_FOLDER)
        elif adapter is not None:
            adapter.save_pretrained(str(draft / ADAPTER_FOLDER))
            (draft / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)
        parts = _part_digests(draft)
        kept = {name: value for name, value in info.digests.items() if name not in _PARTS}
        write_json(draft / RUN_FILE, asdict(replace(info, digests={**kept, **parts})))
    return Path(folder)


def claim(folder: str | Path) -> None:
    """Make sure, before any work, that a run may be written into a folder: absent, empty, or a run, finished or not.

    Raises:
        UserError: it holds something else, which stays as it is, or cannot be written.
    """
    folders.claim(folder, HOLDS, _unmarked)


def begin(folder: str | Path) -> None:
    """Make a run's folder and mark it, so that what a killed training leaves there counts as this run's.

    Raises:
        UserError: as `claim`.
    """
    claim(folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    folders.mark(Path(folder), HOLDS)


def _unmarked(folder: Path) -> bool:
    """Whether a folder is a run, or a training cut short, that was made before folders had marks."""
    try:
        RunInfo.read(folder)
    except UserError:
        begun = any((folder / CHECKPOINTS).glob(f"checkpoint-*/{ROUTER_FILE}"))
        return begun and [entry.name for entry in folder.iterdir()] == [CHECKPOINTS]
    return True


def relative(backbone: str | Path, run: str | Path) -> str:
    """The backbone's path as a run stores it: relative, so that a study's folder can be moved as one."""
    return os.path.relpath(Path(backbone).resolve(), Path(run).resolve())
