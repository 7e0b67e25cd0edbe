"""Backbones that are there already, as a folder or in the Hub's cache: linked, never copied."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy import hub
from buddy.backbones import architectures
from buddy.errors import UserError
from buddy.settings import FolderSource, HubSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "README.md",
)
"""What a backbone folder holds: weights, their configuration, the tokenizer and the card, which names the licence."""

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""How every folder is read by transformers: as it lies there, and no code in it is run (nor is anybody asked)."""


def from_hub(source: HubSource, into: Path, dtype: str | None, blocks: int | None) -> str:
    """Fetch a repository into the shared Hub cache and link its files into a folder.

    Args:
        source: repository and revision.
        into: empty folder to fill with symbolic links.
        dtype: not used; the weights stay as published.
        blocks: expected number of blocks, checked before the weights are fetched.

    Returns:
        The commit found.

    Raises:
        UserError: the repository cannot be had, or holds a model that buddy cannot route.
    """
    from huggingface_hub import snapshot_download

    with hub.explained("model", source.hub, source.revision):
        snapshot = Path(snapshot_download(source.hub, revision=source.revision, allow_patterns=["config.json"]))
        check(snapshot, f"model {source.hub}", blocks)
        # By commit, so that both calls see one state. Sub-folders hold other formats of the same weights.
        commit = snapshot.name
        snapshot_download(source.hub, revision=commit, allow_patterns=list(FILES), ignore_patterns=["*/*"])
    _link(snapshot, into)
    return commit


def from_folder(source: FolderSource, into: Path, dtype: str | None, blocks: int | None) -> None:
    """Link the files of a local folder in the Hugging Face format.

    Raises:
        UserError: it is no such folder, or holds a model that buddy cannot route.
    """
    folder = Path(source.folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"--folder {source.folder}: no such folder")
    check(folder, f"--folder {source.folder}", blocks)
    _link(folder.absolute(), into)


def check(folder: Path, origin: str, blocks: int | None = None) -> dict[str, Any]:
    """Read config.json, refusing a folder without it or a model that buddy cannot route (see `architectures.check`)."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{origin}: no config.json: not a model in the Hugging Face format") from None
    except (ValueError, RecursionError):
        raise UserError(f"{origin}: config.json is not valid JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{origin}: config.json: expected an object, found {type(config).__name__}")
    architectures.check(config, origin, blocks)
    return config


def tokenizer(folder: str | Path, origin: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Args:
        folder: in the Hugging Face format.
        origin: where it came from, for the message.

    Raises:
        UserError: there is none, or none that can be read without code of its own.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(f"{origin}: no such folder")
    try:
        return AutoTokenizer.from_pretrained(str(folder), **LOCAL)
    except Exception as error:  # the library of tokenizers raises nothing narrower for a file that it cannot read
        reason = next(iter(str(error).splitlines()), type(error).__name__).partition("You can inspect")[0].strip()
        raise UserError(f"{origin}: its tokenizer cannot be read ({reason})") from error


def matches(name: str) -> bool:
    """Whether a file of this name belongs to a backbone."""
    return any(fnmatch(name, pattern) for pattern in FILES)


def _link(folder: Path, into: Path) -> None:
    for file in sorted(folder.iterdir()):
        if matches(file.name) and file.is_file():
            (into / file.name).symlink_to(file)
