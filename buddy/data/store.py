"""Data sets in a study's folder: fetched once, then read by every job with no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from buddy.data import mixture, sources
from buddy.data.catalogue import DataSet, entry
from buddy.data.rows import Row, read_file, write_file
from buddy.data.sources import PROVENANCE
from buddy.data.templates import questions
from buddy.errors import UserError, needs
from buddy.storage import folders
from buddy.storage.files import sha256, write_json

HOLDS = "a data set"


Answerer = Callable[[list[Row]], tuple[list[Row], dict[str, Any]]]
"""Called with rows: the rows with responses of its own, and what data.json says of them (``by``: whose they are)."""


def materialise(
    name: str, source: str, out: str | Path, answered: Answerer | None = None, of: Sequence[str] = ()
) -> dict[str, Any]:
    """Write every split of a data set that the source holds as ``out/SPLIT.jsonl``, and ``out/data.json``.

    Args:
        name: data set.
        source: "hub", "embedded" or a folder (see `sources.load`).
        out: folder to make: absent, empty or a data set made by this function, which is replaced.
        answered: answers the prompts of the training split, which alone is written then.
        of: data sets of the source whose prompts make up this one, which is then `pairs` (`buddy.data.mixture`).

    Returns:
        The content of data.json: name, source, repository, config, revision (the commit found, null for files), and
        per split its rows and the SHA-256 of its file; of a source that is itself the folder of a data set, what that
        says of where it came from. ``answers`` is what ``answered`` says, ``of`` what each set of a mixture gave.

    Raises:
        UserError: as `sources.load` and `mixture.mixed`, or a set without prompts is to be answered; ``out`` is then as
            it was before.
    """
    data = entry(name)
    if of and name != mixture.NAME:
        raise UserError(f"--of {','.join(of)}: belongs to --name {mixture.NAME}, not to --name {name}")
    folders.claim(out, HOLDS, _unmarked)
    if answered is not None and data.response is None:
        questions(name, [])
    training = data.train or data.evaluation
    rows: dict[str, list[Row]] = {}
    if of:
        mixed, facts = mixture.mixed(of, source)
        content: dict[str, Any] = {"name": name, "source": source, "of": facts, "splits": {}}
        rows[training] = mixed
    else:
        content = {"name": name, **_origin(data, source), "splits": {}}
        for split in sources.available(name, source) if answered is None else [training]:
            rows[split] = sources.load(name, source, split, content["revision"])
    if answered is not None:
        rows[training], content["answers"] = answered(rows[training])
    with folders.fresh(out, HOLDS, _unmarked) as partial:
        for split in rows:
            path = partial / f"{split}.jsonl"
            write_file(path, rows[split])
            content["splits"][split] = {"rows": len(rows[split]), "sha256": sha256(path)}
        write_json(partial / PROVENANCE, content)
    return content


def _origin(data: DataSet, source: str) -> dict[str, Any]:
    """Where the rows come from; the commit is the one that a Hub repository has at this moment."""
    found = sources.described(Path(source)) if source not in ("hub", "embedded") else {}
    if found.get("name") == data.name:
        mixed = {"of": found["of"]} if "of" in found else {}
        return {name: found.get(name) for name in ("source", "repository", "config", "revision")} | mixed
    published = source == "hub"
    if published:
        needs("datasets")
    return {
        "source": source,
        "repository": data.repository if published else None,
        "config": data.config if published else None,
        # Splits are loaded by commit, so that a repository that moves meanwhile cannot mix two states.
        "revision": sources.commit(data.name) if published else None,
    }


def read(folder: str | Path, split: str) -> list[Row]:
    """The rows of one split of a data set that `materialise` wrote.

    Raises:
        UserError: there is no such file, it is empty or damaged, or it was changed since `materialise` wrote it:
            ``data.json`` would tell of other rows then.
    """
    path = Path(folder) / f"{split}.jsonl"
    rows = read_file(path)
    try:
        expected = json.loads((Path(folder) / PROVENANCE).read_text(encoding="utf-8"))["splits"][split]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return rows
    if sha256(path) != expected:
        raise UserError(
            f"{path}: changed since `buddy data` wrote it; to use rows of your own, give their folder as --source"
        )
    return rows


def _unmarked(folder: Path) -> bool:
    """Whether a folder is a data set that was made before folders had marks, and holds nothing else."""
    try:
        splits = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["splits"]
        files = {PROVENANCE, *(f"{split}.jsonl" for split in splits)}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(path.name in files for path in folder.iterdir())
