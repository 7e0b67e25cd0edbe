"""A W&B Sweep for each ablation, so that W&B's page of sweeps shows what Snakemake has run.

A sweep is W&B's own way to run a grid: its agents ask the server for the next values. Here Snakemake runs the grid, as
jobs that need one another and go to a cluster. So the sweep is made afterwards, from the same grid, with the study's
evaluations as its runs; no agent ever serves it.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from buddy.reporting.study import Study
from buddy.storage.digests import digest
from buddy.storage.files import read_json, write_json
from buddy.study.settings import Ablation, Variant
from buddy.tracking.job import at_depth
from buddy.tracking.journal import Progress
from buddy.tracking.modes import warn

SWEEPS = "sweeps.json"


def save(study: Study, entity: str, project: str) -> dict[str, str]:
    """Make a sweep of each ablation that has none of these values and runs yet.

    Args:
        study: settings and records; its folder remembers the sweeps.
        entity, project: where its runs are.

    Returns:
        The sweeps' ids by ablation; those that the server refused, which a warning tells of, are absent.
    """
    import wandb

    file = study.folder / "wandb" / SWEEPS
    known = read_json(file)
    made: dict[str, str] = {}
    for ablation in study.config.study.ablations:
        grid, runs = plan(study, ablation), runs_of(study, ablation)
        key = digest(entity, project, grid, runs)
        if not runs:
            continue
        if known.get(ablation.name, {}).get("of") != key:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # the client prints; ours is the page's link
                    id = wandb.sweep(grid, entity=entity, project=project, prior_runs=runs)
            except Exception as error:  # a server without sweeps has the page all the same
                warn(f"no sweep of ablation {ablation.name}", error)
                continue
            known[ablation.name] = {"of": key, "id": id}
            write_json(file, known)
        made[ablation.name] = str(known[ablation.name]["id"])
    return made


def plan(study: Study, ablation: Ablation) -> dict[str, Any]:
    """The grid, as W&B describes a sweep."""
    runs = study.config.ablation_runs(ablation)
    deepest = study.removed(ablation.backbone)[-1]
    return {
        "name": f"{study.name}, ablation {ablation.name}",
        "description": f"Run by Snakemake: the grid `{ablation.name}` of study {study.name} on {ablation.backbone}.",
        "program": "buddy train",
        "method": "grid",
        "metric": {"name": at_depth("average", deepest), "goal": "maximize"},
        "parameters": {
            axis: {"values": list(dict.fromkeys(run.variant[axis] for run in runs))}
            for axis in (*Variant.model_fields,)
        }
        | {"seed": {"values": list(dict.fromkeys(run.seed for run in runs))}},
    }


def runs_of(study: Study, ablation: Ablation) -> list[str]:
    """Ids of the evaluations of its runs, as far as there are any, in the order of the grid."""
    found = {}
    for file in (study.folder / "wandb").glob("*.json"):
        progress = Progress.read(file)
        if progress is not None and progress.arguments.get("job_type") == "evaluate":
            found[progress.arguments["config"]["run"]] = progress.run
    paths = [run.path for run in study.config.ablation_runs(ablation)]
    return [found[path] for path in paths if path in found]
