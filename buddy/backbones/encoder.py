"""Encoders that read prompts (PuDDing's router): from the Hub, or a folder, to one local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from buddy import hub
from buddy.errors import UserError
from buddy.storage import folders
from buddy.storage.files import read_json, write_json

PROVENANCE = "encoder.json"
HOLDS = "an encoder"
FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab.txt",
    "special_tokens*",
)


def fetch(source: str, out: str | Path, revision: str = "main") -> dict[str, Any]:
    """Make the folder ``out`` of links to an encoder's files, unless it is finished and of the same source.

    Args:
        source: owner/name on the Hub, or a local folder in the Hugging Face format.
        out: folder to make.
        revision: commit, tag or branch on the Hub.

    Returns:
        The content of ``encoder.json``: source, revision asked for, commit found (null for a folder).

    Raises:
        UserError: it cannot be had; ``out`` is then as it was before.
    """
    out = folders.claim(out, HOLDS, _unmarked)
    found = read_json(out / PROVENANCE)
    if (found.get("source"), found.get("revision")) == (source, revision) and (out / "config.json").exists():
        return found
    commit = None
    if Path(source).is_dir():
        files = Path(source).absolute()
    else:
        from huggingface_hub import snapshot_download

        with hub.explained("model", source, revision):
            files = Path(
                snapshot_download(source, revision=revision, allow_patterns=list(FILES), ignore_patterns=["*/*"])
            )
        commit = files.name
    if not (files / "config.json").exists():
        raise UserError(f"encoder {source}: no config.json: not a model in the Hugging Face format")
    facts = {"source": source, "revision": revision, "commit": commit}
    with folders.fresh(out, HOLDS, _unmarked) as draft:
        for pattern in FILES:
            for file in sorted(files.glob(pattern)):
                link = draft / file.name
                if not link.exists():
                    link.symlink_to(file.resolve())
        write_json(draft / PROVENANCE, facts)
    return facts


def _unmarked(folder: Path) -> bool:
    """Whether a folder is an encoder that was made before folders had marks: links and where they come from."""
    said = {"source", "revision", "commit"} <= read_json(folder / PROVENANCE).keys()
    return said and all(file.is_symlink() or file.name == PROVENANCE for file in folder.iterdir())
