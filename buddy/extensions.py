"""What a method and a task are, and those that other packages bring by their entry points.

A package that declares, in its ``pyproject.toml``, ::

    [project.entry-points."buddy.methods"]
    mine = "my_package:METHOD"

adds what stands there to a table of this project: wherever it is installed, every command and the workflow know it. The
module of an entry imports nothing of this project but this file, as it is read before settings are; what ranks blocks is
named there, and imported when it is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

Kind = Literal["whole", "routed", "static", "dynamic"]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in settings, paths and records.
        label: as its authors write it.
        kind: ``whole``: no block is left out. ``routed``: one run for all depths, BUDDY. ``static``: the same blocks are left
            out for every input, a run for each depth and criterion. ``dynamic``: by the prompt or at every block, a run for
            each depth.
        row: its place in tables, from above.
        mark: colour, marker and dashes of its line in figures, none of them for a solid one; None for grey.
        criteria: of a static method, what may rank its blocks; the first is its paper's main one.
        ranking: ``module:NAME`` of its `buddy.baselines.removal.Peer` by criterion.
        trained: it has a run of its own; the backbone as it is has none.
    """

    name: str
    label: str
    kind: Kind
    row: int = 50
    mark: tuple[str, str, tuple[float, ...]] | None = None
    criteria: tuple[str, ...] = ()
    ranking: str = ""
    trained: bool = True


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: in settings, paths and records.
        label: in tables.
        headline: what tables show, accuracy or length-normalised accuracy: the paper's choice. Its dense Llama-2-7B stands at
            76.30 on ARC-e, where the harness has 76.35 (acc) and 74.66 (acc_norm), and at 46.33 on ARC-c, where acc is 43.52.
        choices: number of answers that a blind guess is among.
        harness: the file that defines it, below ``lm_eval/tasks`` or with its whole path.
        repository, config: where its rows are published on the Hugging Face Hub; no repository for rows of one's own.
        columns: of its rows.
        evaluation: the split that is scored.
        train: the other one: for training and for solved examples in prompts, or for these alone (MMLU's ``dev``).
        group: of a task of many subjects the column that names a row's: its solved examples are the subject's own, the first
            N items are spread over all of them, and records have the scores of each.
        description: what stands before the prompt, a template of the row's columns, where the file that defines the task
            leaves that to one file per subject.
    """

    name: str
    label: str
    headline: Literal["acc", "acc_norm"]
    choices: int
    harness: str
    repository: str
    columns: tuple[str, ...]
    evaluation: str = "validation"
    config: str | None = None
    train: str = "train"
    group: str | None = None
    description: str | None = None


T = TypeVar("T", Method, Task)


def table(group: str, own: Iterable[T]) -> dict[str, T]:
    """The entries of a table by name: the project's own, then those of other packages.

    Args:
        group: of the entry points.
        own: the project's entries.

    Raises:
        ValueError: another package's entry has a name that is taken.
    """
    found = {entry.name: entry for entry in own}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        entry = point.load()
        if entry.name in found:
            raise ValueError(f"{point.value}: {group} has a {entry.name} already")
        found[entry.name] = entry
    return found


def named(place: str) -> Any:
    """What stands at ``module:NAME``."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
