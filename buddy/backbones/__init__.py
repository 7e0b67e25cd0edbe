"""Backbones: from any source to one local folder in the Hugging Face format.

Four sources, one result: safetensors weights, configuration, tokenizer (with the chat template, where the source has
one) and ``backbone.json``, which says where they came from. Fetching needs the network; what reads the folder does not.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from buddy.backbones import linked, untrained, weights, wheel
from buddy.errors import UserError, unknown
from buddy.settings import FolderSource, HubSource, RandomSource, WheelSource
from buddy.storage import folders
from buddy.storage.files import read_json, write_json

log = logging.getLogger(__name__)

Source = HubSource | WheelSource | RandomSource | FolderSource
PROVENANCE = "backbone.json"
HOLDS = "a backbone"
DTYPES = ("float32", "bfloat16")


def prepare(
    source: Source, out: str | Path, *, name: str | None = None, blocks: int | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Make the folder ``out``, unless it is finished and of the same source.

    Args:
        source: where the weights come from.
        out: the folder: absent, empty or a backbone made by this function, which is replaced.
        name: the study's name of the backbone, for ``backbone.json``.
        blocks: number of blocks L that the study expects.
        dtype: of weights that are written here (wheel: float32 by default; random: bfloat16, tiny ones float32).
            Linked weights (Hub, folder) stay as they are.

    Returns:
        The content of ``backbone.json``: name, source, revision (the commit found on the Hub, else null), sha256
        (of each weight file), architecture, model_type, blocks, parameters, dtype (of the weights), chat_template.

    Raises:
        UserError: the source cannot be had or is not what was promised; ``out`` is then as it was before.
    """
    out = Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("--dtype", dtype, DTYPES)
    if isinstance(source, WheelSource):
        dtype = dtype or "float32"
    elif isinstance(source, RandomSource):
        dtype = dtype or ("float32" if source.random.startswith("tiny-") else "bfloat16")
    else:
        dtype = None
    if isinstance(source, FolderSource) and out.resolve() == Path(source.folder).expanduser().resolve():
        raise UserError(f"--out {out}: is the folder to link; name another one")
    folders.claim(out, HOLDS, _unmarked)
    if (found := _finished(out, source, dtype)) is not None:
        if blocks is not None and found["blocks"] != blocks:
            raise UserError(f"{out}: blocks: {blocks} expected, but the model has {found['blocks']}")
        log.info("%s: already there, from the same source", out)
        return found
    fetch: Any = {
        HubSource: linked.from_hub,
        FolderSource: linked.from_folder,
        WheelSource: wheel.from_wheel,
        RandomSource: untrained.from_random,
    }[type(source)]
    with folders.fresh(out, HOLDS, _unmarked) as partial:
        revision = fetch(source, partial, dtype, blocks)
        facts = inspect(partial, _origin(source), blocks)
        weights.check_complete(partial, _origin(source))
        content = {"name": name or out.name, "source": source.model_dump(), "revision": revision, **facts}
        content["sha256"] = weights.digests(weights.files(partial, _origin(source)))
        write_json(partial / PROVENANCE, content)
    return content


def read(folder: str | Path) -> dict[str, Any]:
    """The provenance of a prepared backbone (see `prepare`).

    Raises:
        UserError: the folder is not one that `prepare` finished.
    """
    path = Path(folder) / PROVENANCE
    if not (content := read_json(path)):
        raise UserError(f"{path}: not readable; make the backbone with `buddy backbone --out {folder} ...`")
    return content


def portable(folder: str | Path) -> dict[str, Any] | None:
    """Where a prepared backbone came from, as another machine can have it again: a repository at the commit that was
    found, a wheel, or a seed. None of a folder that was linked, or that `prepare` did not make.
    """
    try:
        content = read(folder)
        source: dict[str, Any] = content["source"]
    except (UserError, KeyError):
        return None
    if "folder" in source or source.get("tokenizer"):
        return None
    return {**source, "revision": content.get("revision") or source["revision"]} if "hub" in source else source


def command(source: dict[str, Any], out: str | Path) -> str:
    """The command that makes a backbone from a source such as `portable` gives."""
    words = ["buddy", "backbone", "--out", str(out)]
    for option, value in source.items():
        words += [] if value is None else [f"--{option}", str(value)]
    return shlex.join(words)


def inspect(folder: Path, origin: str, blocks: int | None = None) -> dict[str, Any]:
    """What a folder in the Hugging Face format holds, from its configuration and the headers of its weights.

    Args:
        folder: the folder.
        origin: where it came from, for messages.
        blocks: expected number of blocks; None takes what there is.

    Returns:
        architecture (class name), model_type, blocks, parameters, dtype, chat_template (whether there is one).

    Raises:
        UserError: a part is missing or damaged, or it is a model that buddy cannot route.
    """
    config = linked.check(folder, origin, blocks)
    found = weights.summarise(weights.files(folder, origin), origin)
    if found.blocks != config["num_hidden_layers"]:
        raise UserError(
            f"{origin}: config.json says {config['num_hidden_layers']} blocks, the weights hold {found.blocks}"
        )
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{origin}: no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    return {
        "architecture": (config.get("architectures") or [None])[0],
        "model_type": config["model_type"],
        "blocks": found.blocks,
        "parameters": found.parameters,
        "dtype": found.dtype,
        "chat_template": _has_chat_template(folder),
    }


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))


def _origin(source: Source) -> str:
    if isinstance(source, HubSource):
        return f"model {source.hub}"
    if isinstance(source, WheelSource):
        return f"wheel {source.wheel} {source.version}"
    return f"--folder {source.folder}" if isinstance(source, FolderSource) else f"--random {source.random}"


def _finished(out: Path, source: Source, dtype: str | None) -> dict[str, Any] | None:
    """The provenance of ``out`` if it was finished from this source and its files are still whole."""
    try:
        content = read(out)
        if content.get("source") != source.model_dump() or dtype not in (None, content.get("dtype")):
            return None
        facts = inspect(out, str(out))
    except UserError:
        return None
    if any(content.get(key) != value for key, value in facts.items()):
        return None
    if isinstance(source, FolderSource):  # a linked folder can change under us
        stamp = (out / PROVENANCE).stat().st_mtime
        same = all((out / file.name).exists() for file in Path(source.folder).iterdir() if linked.matches(file.name))
        if not same or any(file.stat().st_mtime > stamp for file in out.iterdir()):
            return None
    return content


def _unmarked(folder: Path) -> bool:
    """Whether a folder is a backbone that was made before folders had marks, and holds nothing else."""
    try:
        said = {"source", "revision", "sha256"} <= read(folder).keys()
    except UserError:
        return False
    return said and all(linked.matches(file.name) or file.name == PROVENANCE for file in folder.iterdir())
