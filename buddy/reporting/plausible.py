"""What a measured figure can be: a record edited by hand, or made wrongly, is left out and not drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from buddy.errors import UserError

FRACTION = (0.0, 1.0)
NOT_NEGATIVE = (0.0, math.inf)
LIMITS = {
    ("accuracy", None): FRACTION,
    ("generation", None): FRACTION,
    ("rouge", None): FRACTION,
    ("latency", None): NOT_NEGATIVE,
    ("breakdown", "percent"): (0.0, 100.0 + 1e-6),
    ("breakdown", None): NOT_NEGATIVE,
    ("trace", "block_frequency"): FRACTION,
    ("trace", None): NOT_NEGATIVE,
}
"""Smallest and largest value by kind of record and metric; None is every other metric of that kind."""

ITEMS_TOLERANCE = 1e-6


def check(kind: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse rows of a record that nothing measured can have given.

    Args:
        kind: of the record.
        rows: as `buddy.reporting.frame` makes them.

    Raises:
        UserError: a figure is not finite or out of range, a standard error is negative, a count is none, or a score is
            not that of its items.
    """
    for row in rows:
        name, value = row["metric"], row.get("value")
        low, high = LIMITS.get((kind, name), LIMITS.get((kind, None), (-math.inf, math.inf)))
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise UserError(f"{name}: {value:g} is not {_range(low, high)}")
        if (error := row.get("stderr")) is not None and not 0 <= error < math.inf:
            raise UserError(f"{name}: its standard error {error:g} is not {_range(*NOT_NEGATIVE)}")
        if (count := row.get("n")) is not None and count < 1:
            raise UserError(f"{name}: of {count} items")
        if items := row.get("items"):
            _check_items(name, value, items, row.get("n"))


def _check_items(name: str, value: Any, items: str, n: Any) -> None:
    if set(items) - {"0", "1"} or len(items) != n:
        raise UserError(f"{name}: its items are not {n} digits 0 or 1")
    if abs(items.count("1") / len(items) - value) > ITEMS_TOLERANCE:
        raise UserError(f"{name}: {value:g}, but {items.count('1')} of its {len(items)} items are right")


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return "a number" if math.isinf(low) else f"a number from {low:g}"
    return f"between {low:g} and {high:g}"
