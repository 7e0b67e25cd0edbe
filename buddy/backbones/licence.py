"""Under which licence a backbone is published: what the head of its card (README.md) says, as the Hub spells it."""

from __future__ import annotations

from email.message import Message
from pathlib import Path
from typing import Any

CARD = "README.md"


def of(folder: str | Path) -> str:
    """The licence that a backbone's card names; "" without a card, or where it names none."""
    from huggingface_hub import metadata_load

    try:
        found: dict[str, Any] = metadata_load(Path(folder) / CARD) or {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    name = found.get("license_name") if found.get("license") == "other" else found.get("license")
    return name if isinstance(name, str) else ""


def of_wheel(metadata: Message) -> str:
    """The licence that a wheel's metadata name, in the Hub's spelling of SPDX names; "" where they name none."""
    return str(metadata.get("License-Expression") or metadata.get("License") or "").strip().lower()


def write(folder: Path, name: str, origin: str) -> None:
    """Write the card of a backbone that came without one.

    Args:
        folder: the backbone's.
        name: its licence, as the Hub spells it; without one there is no card.
        origin: where it came from.
    """
    if name and "\n" not in name:
        (folder / CARD).write_text(f"---\nlicense: {name}\n---\n\nFrom {origin}.\n", encoding="utf-8")
