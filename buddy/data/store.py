"""Data sets in a study's folder: fetched once, then read by every job with no network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from buddy import folders
from buddy.data import sources
from buddy.data.catalogue import entry
from buddy.data.rows import Row, read_file, write_file
from buddy.records import write_json

PROVENANCE = "data.json"
HOLDS = "a data set"


def materialise(name: str, source: str, out: str | Path) -> dict[str, Any]:
    """Write every split of a data set that the source holds as ``out/SPLIT.jsonl``, and ``out/data.json``.

    Args:
        name: data set.
        source: "hub", "embedded" or a folder (see `sources.load`).
        out: folder to make: absent, empty or a data set made by this function, which is replaced.

    Returns:
        The content of data.json: name, source, repository, config, revision (the commit found, null for files), and
        per split its rows and the SHA-256 of its file.

    Raises:
        UserError: as `sources.load`; ``out`` is then as it was before.
    """
    data = entry(name)
    folders.claim(out, HOLDS, _unmarked)
    splits = sources.available(name, source)
    # Splits are loaded by commit, so that a repository that moves meanwhile cannot mix two states.
    revision = sources.commit(name) if source == "hub" else None
    content: dict[str, Any] = {
        "name": name,
        "source": source,
        "repository": data.repository if source == "hub" else None,
        "config": data.config if source == "hub" else None,
        "revision": revision,
        "splits": {},
    }
    with folders.fresh(out, HOLDS, _unmarked) as partial:
        for split in splits:
            path = partial / f"{split}.jsonl"
            rows = sources.load(name, source, split, revision)
            write_file(path, rows)
            content["splits"][split] = {"rows": len(rows), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        write_json(partial / PROVENANCE, content)
    return content


def read(folder: str | Path, split: str) -> list[Row]:
    """The rows of one split of a data set that `materialise` wrote.

    Raises:
        UserError: there is no such file, or it is empty or damaged.
    """
    return read_file(Path(folder) / f"{split}.jsonl")


def _unmarked(folder: Path) -> bool:
    """Whether a folder is a data set that was made before folders had marks, and holds nothing else."""
    try:
        splits = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["splits"]
        files = {PROVENANCE, *(f"{split}.jsonl" for split in splits)}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(path.name in files for path in folder.iterdir())
