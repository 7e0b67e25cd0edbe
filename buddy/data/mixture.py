"""Prompts and responses of several data sets in one: rows of `pairs`.

Instructions, problems and dialogues give their training split, in the words in which they are asked elsewhere
(`buddy.data.templates`). Prose, which has none, gives passages of its articles whose second part continues the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from buddy.data import sources
from buddy.data.catalogue import CATALOGUE, PROSE, entry
from buddy.data.rows import Row
from buddy.data.templates import CUT, OWN, QUESTIONS, asked
from buddy.errors import UserError, choices

NAME = "pairs"
"""The data set that a mixture is."""

WORDS = (40, 40)
"""Of a passage of prose: words in its prompt, and in its response at most."""


def mixed(names: Sequence[str], source: str) -> tuple[list[Row], dict[str, Any]]:
    """The rows of several sets, spread evenly, so that the first N are a fair part of each.

    Args:
        names: data sets that have prompts, or prose.
        source: where all of them come from, as for `sources.load`.

    Returns:
        Rows with ``id``, ``prompt``, ``own`` (where a template is around it), ``response`` (where the set has one), ``cut``
        (of prose: the response teaches no end) and ``of``, the set; and per set its rows, split and, from the Hub, repository and commit.

    Raises:
        UserError: a name occurs twice, is unknown, or has neither prompts nor prose; or as `sources.load`.
    """
    able = [name for name, data in CATALOGUE.items() if (name in QUESTIONS or data.kind == PROSE) and name != NAME]
    for name in names:
        entry(name)
        if name not in able:
            raise UserError(f"--of {name}: gives no prompts; those that do: {choices(able)}")
    if len(set(names)) < len(names):
        raise UserError(f"--of {','.join(names)}: a set occurs twice")
    parts, facts = [], {}
    for name in names:
        data = entry(name)
        split = data.train or data.evaluation
        revision = sources.commit(name) if source == "hub" else None
        rows = sources.load(name, source, split, revision)
        part = _passages(rows) if data.kind == PROSE else _asked(name, rows)
        parts.append([{**row, "of": name} for row in part])
        published = {"repository": data.repository, "revision": revision} if revision else {}
        facts[name] = {"split": split, "rows": len(part), **published}
    return _spread(parts), facts


def _asked(name: str, rows: Sequence[Row]) -> list[Row]:
    column = str(entry(name).response)
    return [
        {
            "id": row["id"],
            "prompt": prompt.text,
            **({OWN: [list(span) for span in prompt.own]} if prompt.own else {}),
            **({} if row.get(column) is None else {"response": row[column]}),
        }
        for row, prompt in zip(rows, asked(name, rows), strict=True)
    ]


def _passages(rows: Sequence[Row]) -> list[Row]:
    """Passages of prose, one after the other; what is left of an article, and is no more than a prompt, is left out."""
    found: list[Row] = []
    for row in rows:
        words = row["text"].split()
        for start in range(0, len(words) - WORDS[0], sum(WORDS)):
            middle = start + WORDS[0]
            prompt, response = words[start:middle], words[middle : middle + WORDS[1]]
            found.append(
                {
                    "id": f"{row['id']}-{start}",
                    "prompt": " ".join(prompt),
                    "response": " " + " ".join(response),
                    CUT: True,
                }
            )
    return found


def _spread(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """All rows, those of each part in their order and as evenly between the others as can be."""
    placed = [
        ((number + 0.5) / len(part), which, row) for which, part in enumerate(parts) for number, row in enumerate(part)
    ]
    return [row for _, _, row in sorted(placed, key=lambda one: one[:2])]
