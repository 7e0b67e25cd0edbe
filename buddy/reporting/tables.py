"""The paper's tables and the likelihoods, rebuilt from a study's records: a function per kind of table."""

from __future__ import annotations

from collections.abc import Callable

from buddy.errors import unknown
from buddy.reporting.ablation import ablation
from buddy.reporting.accuracy import accuracy
from buddy.reporting.breakdown import breakdown
from buddy.reporting.generation import generation
from buddy.reporting.grid import Grid, add_notes
from buddy.reporting.latency import latency
from buddy.reporting.likelihood import likelihood
from buddy.reporting.paths import properties
from buddy.reporting.peer_latency import peer_latency
from buddy.reporting.study import Study
from buddy.reporting.training_cost import training_cost
from buddy.study.settings import Table


def names(study: Study) -> list[str]:
    """The tables that the study measures, in the order of their numbers, those without one last."""
    return list(study.config.measured_tables())


def resolve(study: Study, asked: str) -> str:
    """The table meant by ``2`` or ``table2``.

    Raises:
        UserError: the study does not measure it.
    """
    measured = names(study)
    for name in (asked, f"table{asked}"):
        if name in measured:
            return name
    raise unknown(f"--table of study {study.name}", asked, measured or ["(it measures none)"])


def build(study: Study, name: str) -> Grid:
    """Build one table of the study.

    Args:
        study: settings and records.
        name: a name from `names`; cells without a record are marked and explained, never an error.
    """
    table = study.config.measured_tables()[name]
    builders: dict[str, Callable[[Study, str, Table], Grid]] = {
        "accuracy": accuracy,
        "ablation": ablation,
        "latency": latency,
        "breakdown": breakdown,
        "generation": generation,
        "peer_latency": peer_latency,
        "properties": properties,
        "training_cost": training_cost,
        "likelihood": likelihood,
    }
    return add_notes(builders[table.kind](study, name, table))
