"""The right answer of a row is one of its choices: a label that is none of them would be scored as always wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from buddy.data.rows import Row
from buddy.errors import UserError, choices


def _lettered(row: Row) -> list[str]:
    """Labels of choices given as {text: [...], label: [...]}."""
    found = row["choices"]
    texts, labels = found["text"], found["label"]
    if len(texts) != len(labels) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise TypeError
    return [str(label) for label in labels]


def _endings(row: Row) -> list[str]:
    if not isinstance(row["endings"], list) or len(row["endings"]) < 2:
        raise TypeError
    return [str(number) for number in range(len(row["endings"]))]


def _listed(row: Row) -> list[str]:
    """Places of choices given as a list of texts."""
    if not isinstance(row["choices"], list) or len(row["choices"]) < 2:
        raise TypeError
    return [str(number) for number in range(len(row["choices"]))]


def _of(*allowed: str) -> Callable[[Row], Sequence[str]]:
    return lambda row: allowed


_RIGHT: dict[str, tuple[str, Callable[[Row], Sequence[str]]]] = {
    "openbookqa": ("answerKey", _lettered),
    "arc_easy": ("answerKey", _lettered),
    "arc_challenge": ("answerKey", _lettered),
    "piqa": ("label", _of("0", "1")),
    "boolq": ("label", _of("0", "1")),
    "siqa": ("label", _of("1", "2", "3")),
    "hellaswag": ("label", _endings),
    "winogrande": ("answer", _of("1", "2")),
    "mmlu": ("answer", _listed),
}
"""Per task the column that says which choice is right, and what may stand there."""

_LEADING_BLANKS_LEFT_OUT: dict[str, Callable[[str], str]] = {"openbookqa": str.lstrip}
"""As the harness's own task reads its answers."""

_NOT_TEXT = ("choices", "endings", "label", "answerKey")


def check(name: str, rows: Sequence[Row], columns: Sequence[str], origin: str) -> None:
    """Refuse rows whose texts are no text or whose right answer is none of the choices.

    Args:
        name: data set.
        rows: with all of its columns.
        columns: those that it needs.
        origin: where the rows came from, for the message.

    Raises:
        UserError: names the first such row, counted from 1, and what is allowed.
    """
    right = _RIGHT[name][0] if name in _RIGHT else None
    texts = [column for column in columns if column not in (*_NOT_TEXT, right)]
    for number, row in enumerate(rows, 1):
        for column in texts:
            if not isinstance(row[column], str):
                raise UserError(f"{origin}: row {number}: {column}: {_short(row[column])} is not text")
        if name not in _RIGHT:
            continue
        column, allowed_in = _RIGHT[name]
        try:
            allowed = allowed_in(row)
        except (KeyError, TypeError):
            raise UserError(
                f"{origin}: row {number}: its choices are not two or more texts with their labels"
            ) from None
        answer = _LEADING_BLANKS_LEFT_OUT.get(name, str)(str(row[column]))
        if isinstance(row[column], bool) or answer not in allowed:
            raise UserError(f"{origin}: row {number}: {column}: {_short(row[column])} is not one of {choices(allowed)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
