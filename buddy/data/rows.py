"""Rows on disk: JSON Lines, read with the file, line and column named when something is wrong."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from buddy.errors import UserError, choices

Row = dict[str, Any]


def read_file(path: Path) -> list[Row]:
    """Every row of a .jsonl or .jsonl.gz file.

    Raises:
        UserError: it cannot be read, is empty, or a line is not a JSON object.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        # JSON Lines end at "\n" alone; `splitlines` would also cut at separators inside a string.
        lines = content.decode("utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number}: expected an object, found {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: empty; expected one JSON object a line")
    return rows


def write_file(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON Lines, UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def check_columns(rows: list[Row], columns: tuple[str, ...], origin: str) -> None:
    """Refuse rows that lack a column.

    Raises:
        UserError: the first row that lacks one (or has null there), counted from 1, and what it has.
    """
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) is None:
                raise UserError(
                    f"{origin}: row {number}: no column {column!r}; needed are {choices(columns)}, "
                    f"found are {choices(sorted(row)) if row else 'none'}"
                )


def with_ids(rows: list[Row], prefix: str) -> list[Row]:
    """The rows with a string ``id`` first: their own, or ``prefix-number`` (from 0) where they have none."""
    return [
        {"id": str(row["id"]) if row.get("id") is not None else f"{prefix}-{number}", **_without(row, "id")}
        for number, row in enumerate(rows)
    ]


def _without(row: Row, key: str) -> Row:
    return {name: value for name, value in row.items() if name != key}
