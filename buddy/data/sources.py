"""Where rows come from: the Hugging Face Hub, the sets inside this package, or a folder of files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from buddy import hub
from buddy.data import answers
from buddy.data.catalogue import DataSet, entry
from buddy.data.rows import Row, check_columns, read_file, with_ids
from buddy.errors import UserError, choices
from buddy.storage.files import read_json

log = logging.getLogger(__name__)

PROVENANCE = "data.json"
"""In the folder of a data set: its name, where it came from, and what is in it."""

EMBEDDED = Path(__file__).parent / "embedded"


def load(name: str, source: str, split: str | None = None, revision: str | None = None) -> list[Row]:
    """The rows of one split.

    Args:
        name: data set, a key of ``CATALOGUE``.
        source: "hub", "embedded", or a folder: of NAME.SPLIT.jsonl[.gz] files, or one that holds this set alone, as
            `buddy.data.store.materialise` leaves it; or a JSON Lines file, which is the set's one split.
        split: the evaluation split by default.
        revision: commit of the Hub repository (see `commit`); the other sources have none.

    Returns:
        Rows with the columns of the catalogue and ``id``, optional ones where a source has them; further columns are kept
        as they are.

    Raises:
        UserError: the name, source or split is unknown, a file is empty or damaged, a column is missing, an answer is
            none of the choices, or the Hub cannot be reached.
    """
    data = entry(name)
    split = split or data.evaluation
    if split not in data.splits:
        raise UserError(f"data set {name}: no split {split!r}; there is {choices(data.splits)}")
    _check_had(data, source)
    if source == "hub":
        rows, origin = _from_hub(data, split, revision or commit(name)), f"data set {data.repository}, split {split}"
    else:
        path = find(name, source, split)
        rows, origin = read_file(path), str(path)
    check_columns(rows, data.required, origin)
    answers.check(name, rows, data.required, origin)
    return with_ids(rows, f"{name}-{split}")


def _check_had(data: DataSet, source: str) -> None:
    """Refuse a set of rows of one's own where a published or embedded one is asked for.

    Raises:
        UserError: it is one.
    """
    if source in ("hub", "embedded") and not data.repository:
        raise UserError(
            f"data set {data.name}: rows of your own; give as source the folder that has {data.name}.{data.evaluation}.jsonl, "
            "or make it of other sets (`buddy data --of`)"
        )


def available(name: str, source: str) -> list[str]:
    """The splits of a data set that a source holds; the evaluation split comes first and is always there.

    Raises:
        UserError: the name or the source is unknown, or the evaluation split is not there.
    """
    data = entry(name)
    _check_had(data, source)
    if source == "hub":
        return list(data.splits)
    find(name, source, data.evaluation)
    if _is_file(source):
        return [data.evaluation]
    folder = _folder(source)
    return [split for split in data.splits if any(path.exists() for path in _candidates(folder, data, split))]


def find(name: str, source: str, split: str) -> Path:
    """The file of one split in the package or in a folder.

    Raises:
        UserError: there is none; the message lists the names tried.
    """
    data = entry(name)
    if _is_file(source):
        return _one_file(data, source, split)
    folder = _folder(source)
    tried = _candidates(folder, data, split)
    for path in tried:
        if path.exists():
            return path
    names = choices([str(path.relative_to(folder)) for path in tried])
    raise UserError(f"data source {source}: no {split} split of {name}; expected a file {names}")


def described(folder: Path) -> dict[str, Any]:
    """What a folder that holds one data set says of it; {} of another folder."""
    return read_json(folder / PROVENANCE)


def commit(name: str) -> str:
    """The commit that the catalogue's revision of a data set names at this moment.

    Raises:
        UserError: the repository is absent or gated, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    data = entry(name)
    with hub.explained("data set", data.repository, data.revision):
        # A gated repository shows its commit to everybody, and `datasets` hides why it then cannot read it.
        HfApi().auth_check(data.repository, repo_type="dataset")
        return str(HfApi().dataset_info(data.repository, revision=data.revision).sha)


def _is_file(source: str) -> bool:
    return source not in ("hub", "embedded") and Path(source).expanduser().is_file()


def _one_file(data: DataSet, source: str, split: str) -> Path:
    """A file that is a whole data set, and so its evaluation split.

    Raises:
        UserError: another split is asked for, or it is no JSON Lines file by its name.
    """
    path = Path(source).expanduser()
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"data source {source}: a file; its name must end in .jsonl or .jsonl.gz, an object a line")
    if split != data.evaluation:
        raise UserError(
            f"data source {source}: one file is the {data.evaluation} split of {data.name}; for its {split} split give a "
            f"folder with {data.name}.{split}.jsonl"
        )
    return path


def _folder(source: str) -> Path:
    if source == "embedded":
        return EMBEDDED
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"data source {source!r}: neither hub nor embedded, and no such folder")
    return folder


def _candidates(folder: Path, data: DataSet, split: str) -> list[Path]:
    """Paths that may hold a split, the best first: piqa.validation, piqa or train/piqa, gsm8k_test, ptb_valid; in a folder
    that holds the set alone, validation."""
    if described(folder).get("name") == data.name:
        return [folder / f"{split}.jsonl"]
    stems = [f"{data.name}.{split}"]
    if split == data.evaluation:
        stems.append(data.name)
    if split == data.train:
        stems.append(f"train/{data.name}")
    stems.append(f"{data.name}_{'valid' if split == 'validation' else split}")
    return [folder / f"{stem}{ending}" for stem in stems for ending in (".jsonl", ".jsonl.gz")]


def _from_hub(data: DataSet, split: str, revision: str) -> list[Row]:
    import datasets

    log.info("fetching %s (%s, split %s) at %s", data.repository, data.config or "default", split, revision)
    try:
        with hub.explained("data set", data.repository, revision):
            if data.files:
                files = {split: f"hf://datasets/{data.repository}@{revision.replace('/', '%2F')}/{data.files[split]}"}
                found = datasets.load_dataset("parquet", data_files=files, split=split)
            else:
                found = datasets.load_dataset(data.repository, data.config, split=split, revision=revision)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data set {data.repository}: cannot be read ({' '.join(str(error).split())})") from error
    if data.rename:
        found = found.rename_columns(dict(data.rename))
    rows: list[Row] = [dict(row) for row in found]
    # A published set may have a few rows without content (SAMSum has one dialogue that is null).
    kept = [row for row in rows if all(row.get(column, "") is not None for column in data.columns)]
    if len(kept) < len(rows):
        log.warning(
            "%s: %d of %d rows have no content and are left out", data.repository, len(rows) - len(kept), len(rows)
        )
    return kept
