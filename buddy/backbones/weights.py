"""Safetensors weights on disk: written shard by shard, checked and counted from their headers alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.errors import UserError
from buddy.storage import tensors
from buddy.storage.files import permitted, sha256, write_json

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
"""Largest shard, bytes: also the memory that writing needs."""

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")


def write(folder: Path, values: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as Hugging Face does, holding one shard in memory at a time.

    Args:
        folder: where model.safetensors, or its shards and their index, go.
        values: names and contiguous CPU tensors, in the order of the file.
        shard_bytes: largest shard, bytes; a larger single tensor has a shard of its own.
    """
    from safetensors.torch import save_file

    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = folder / f".shard-{len(shards):05d}"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(permitted(0o666))
        shards.append((path, list(pending)))
        pending.clear()

    for name, tensor in values:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE)
        return
    places = {}
    for number, (path, names) in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / file)
        places.update(dict.fromkeys(names, file))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def files(folder: Path, origin: str) -> list[Path]:
    """The weight files of a Hugging Face folder, in order.

    Raises:
        UserError: there is no safetensors file, or the index names one that is missing.
    """
    if (folder / INDEX).exists():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
            if not all(isinstance(name, str) and name == Path(name).name for name in names):
                raise ValueError("a weight file lies in the folder itself")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{origin}: {INDEX}: damaged; fetch the model again") from None
    else:
        names = [SINGLE]
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{origin}: no {name}: buddy reads safetensors weights only, and needs all of them")
    return [folder / name for name in names]


def header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes and shapes in one safetensors file, without its data.

    Raises:
        UserError: the file is damaged or cut short.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > 100_000_000:  # the format's own limit; a larger number is not a header
                raise ValueError("no header")
            content = json.loads(stream.read(length))
        content.pop("__metadata__", None)
        end = max(tensor["data_offsets"][1] for tensor in content.values())
        for tensor in content.values():
            first, last = tensor["data_offsets"]
            if not 0 <= first <= last or not isinstance(tensor["dtype"], str) or prod(tensor["shape"]) < 0:
                raise ValueError("no tensor")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UserError(f"{path}: not a safetensors file") from None
    if path.stat().st_size != 8 + length + end:
        raise UserError(f"{path}: cut short ({path.stat().st_size} of {8 + length + end} bytes); fetch the model again")
    return content


def data_start(path: Path) -> int:
    """Where the data of a safetensors file begin, bytes."""
    with path.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def configuration(folder: Path, origin: str) -> Any:
    """What config.json says, as transformers understands it.

    Raises:
        UserError: it does not.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise UserError(f"{origin}: config.json: not understood ({' '.join(str(error).split())[:200]})") from error


def check_complete(folder: Path, origin: str) -> None:
    """Compare the tensors that the headers name with those of the model that config.json describes.

    Raises:
        UserError: one is missing, one too many, or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = configuration(folder, origin)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{origin}: config.json describes no model ({' '.join(str(error).split())[:200]})") from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tensor["shape"] for path in files(folder, origin) for name, tensor in header(path).items()}
    if config.tie_word_embeddings:  # one tensor, which some write twice
        expected.pop("lm_head.weight", None)
        found.pop("lm_head.weight", None)
    # Older checkpoints carry the rotary frequencies, which follow from the configuration.
    found = {name: shape for name, shape in found.items() if not name.endswith("rotary_emb.inv_freq")}
    tensors.check_complete(found, expected, origin)


@dataclass(frozen=True)
class Summary:
    """What weight files hold: blocks L, parameters, and the dtype of most of them ("bfloat16")."""

    blocks: int
    parameters: int
    dtype: str


def summarise(paths: Iterable[Path], origin: str) -> Summary:
    """Count blocks and parameters in these files.

    Raises:
        UserError: a file is damaged, or the blocks are not numbered 0, 1, 2 and so on.
    """
    blocks: set[int] = set()
    sizes: Counter[str] = Counter()
    for path in paths:
        for name, tensor in header(path).items():
            sizes[tensor["dtype"]] += prod(tensor["shape"])
            if match := _BLOCK.match(name):
                blocks.add(int(match[1]))
    if not blocks or blocks != set(range(len(blocks))):
        raise UserError(f"{origin}: the weights name blocks {sorted(blocks)}, not 0 to L - 1 without a gap")
    code = sizes.most_common(1)[0][0]
    return Summary(len(blocks), sizes.total(), _DTYPES.get(code, code))


def digests(paths: list[Path]) -> dict[str, str]:
    """SHA-256 of each file, by name."""
    from tqdm import tqdm

    found = {}
    total = sum(path.stat().st_size for path in paths)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="SHA-256", leave=False, mininterval=2, disable=total < 2**30
    ) as bar:
        for path in paths:
            # The Hub's cache names a large file by its SHA-256, and has checked it.
            blob = path.resolve().name
            found[path.name] = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else sha256(path)
            bar.update(path.stat().st_size)
    return found
