"""Save a study's page in W&B (`buddy.pages.page`), or renew it.

Curves and axes are live, so a page that is saved once goes on showing what arrives later. Saving again renews the
tables and keeps the page's address, which a file beside the study's runs remembers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from buddy.errors import UserError, lacking
from buddy.pages import sweeps
from buddy.pages.page import Page, title
from buddy.reporting import cards
from buddy.reporting.study import Study
from buddy.storage.files import read_json, write_json
from buddy.tracking import modes
from buddy.tracking.identity import study_id

PAGE = "report.json"


def save(study: Study, entity: str | None, project: str) -> str:
    """Make the page or renew it.

    Args:
        study: settings and records; its folder has ``tables/`` and ``wandb/``.
        entity, project: where its runs are; the key's own user by default.

    Returns:
        The page's address.

    Raises:
        UserError: the package that writes pages is missing, or the server refuses.
    """
    wr = _package()
    import wandb

    os.environ["WANDB_SILENT"] = "true"  # what it would say of its login is no part of our answer
    page = study.folder / "wandb" / PAGE
    shared = {"study": study.name, "study_id": study_id(study.folder)}
    try:
        owner = str(entity or wandb.Api().default_entity)
        known = _known(page, owner, project)
        report = wr.Report(
            project=project, entity=owner, title=title(study), description=cards.describe(study), width="fluid"
        )
        report.blocks = list(Page(wr, study, owner, project, shared).blocks())
        report.id = known
        report.save()
    except Exception as error:  # the packages raise many kinds
        raise UserError(_reason(error, study, project, page)) from None
    sweeps.save(study, owner, project)
    write_json(page, {"id": report.id, "url": report.url, "entity": owner, "project": project})
    return str(report.url)


def _reason(error: Exception, study: Study, project: str, page: Path) -> str:
    """Why there is no page, and what to do, in one line."""
    text = str(error)
    if isinstance(error, ValueError) and "not found" in text:
        return (
            f"W&B: no project {project} there, so no report; are its runs there? `buddy wandb-sync --study {study.name}` "
            "sends them"
        )
    if isinstance(error, KeyError | TypeError | AttributeError) or "upsertView" in text or "Cannot query field" in text:
        return (
            f"W&B: {modes.server()} has no reports, or not this one any more ({modes.in_one_line(error)}); its runs and "
            f"tables are there all the same, and without {page} a new report is made"
        )
    return f"W&B: no report of {project}: {modes.explain(error)}"


def _package() -> Any:
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise (lacking("wandb_workspaces") or error) from None
    return wr


def _known(page: Path, entity: str, project: str) -> str:
    """Id of the page saved before in this place, "" if there is none."""
    content = read_json(page)
    return str(content.get("id", "")) if (content.get("entity"), content.get("project")) == (entity, project) else ""
