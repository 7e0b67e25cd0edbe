"""LoRA adapters on disk, read from their folder alone: no name is looked up on the Hub, no module of their choice imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def attach(model: Any, folder: Path) -> PeftModel:
    """Put a saved LoRA beside a model's weights.

    Args:
        model: the backbone it was trained on; its modules are wrapped in place.
        folder: as PEFT saves it.

    Raises:
        UserError: a file is missing or damaged, it is no plain LoRA, or does not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from buddy.storage import tensors

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():  # PEFT would ask the Hub for it
            raise UserError(f"{folder}: no {name}: the adapter is not complete; train the run again")
    _check(_read(folder / CONFIG), folder / CONFIG)
    state = tensors.read(folder / WEIGHTS)
    tensors.check_finite(state.items(), str(folder / WEIGHTS))
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: does not fit the model ({' '.join(str(error).split())[:300]})") from error
    # PEFT leaves a tensor that the file lacks as it was made, which is to say without effect.
    own = {name: value.shape for name, value in get_peft_model_state_dict(adapted).items()}
    tensors.check_complete({name: value.shape for name, value in state.items()}, own, str(folder / WEIGHTS))
    return adapted


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def _check(config: dict[str, Any], path: Path) -> None:
    """Refuse other kinds of adapters, and settings by which PEFT imports a module that the file names."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type: {config.get('peft_type')!r} is not LORA, the only kind of adapter here")
    if config.get("megatron_config"):
        raise UserError(f"{path}: megatron_config: names code to import, which buddy never does")
