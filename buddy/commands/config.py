"""``buddy config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from buddy.settings import Settings
from buddy.storage.files import write_json
from buddy.study import config as study
from buddy.study.config import Config


def config(
    file: Annotated[list[Path] | None, typer.Argument(help="study file and overlays; config.yaml by default")] = None,
    schema: Annotated[bool, typer.Option(help="print the JSON schema of a study file")] = False,
    docs: Annotated[bool, typer.Option(help="print the table of all knobs (Markdown)")] = False,
    out: Annotated[Path | None, typer.Option(help="write the validated study with all defaults (JSON)")] = None,
) -> None:
    """Check a study file and list the runs it spans.

    \b
    Examples:
      buddy config                                  check config.yaml
      buddy config config.yaml workflow/demo.yaml   check the demo: overlays are merged in order
      buddy config --schema > workflow/schemas/config.schema.json
      buddy config --docs > docs/configuration.md
    """

    if schema:
        print(json.dumps(study.schema(), indent=2))
        return
    if docs:
        print(reference())
        return
    checked = study.read(*(file or [Path("config.yaml")]))
    if out is not None:
        write_json(out, checked.model_dump(mode="json"))
        return
    found = checked.runs()
    print(f"study {checked.study.name}: {len(found)} runs, tables: {', '.join(checked.measured_tables()) or 'none'}")
    for run in found:
        print(f"  {run.path}")


def reference() -> str:
    """The knobs of every section as Markdown tables, from the models' own descriptions."""
    lines = ["# Configuration", "", "Every knob of a study file. This page is printed by `buddy config --docs`.", ""]
    for section, field in Config.model_fields.items():
        for model in _models(field.annotation):
            lines += [f"## `{section}`{'' if section == model.__name__.lower() else f' ({model.__name__})'}", ""]
            lines += [(model.__doc__ or "").strip().splitlines()[0], "", "| key | default | meaning |", "|---|---|---|"]
            for name, knob in model.model_fields.items():
                default = (
                    "required" if knob.is_required() else f"`{_plain(knob.get_default(call_default_factory=True))}`"
                )
                lines.append(f"| `{name}` | {default} | {(knob.description or '').replace('|', ', ')} |")
            lines.append("")
    return "\n".join(lines).rstrip()


def _plain(value: Any) -> str:
    return json.dumps(value.model_dump() if isinstance(value, Settings) else value)


def _models(annotation: Any) -> list[type[Settings]]:
    """Settings classes in an annotation, those inside them behind."""

    found: list[type[Settings]] = []
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        found.append(annotation)
        for field in annotation.model_fields.values():
            found += [model for model in _models(field.annotation) if model not in found]
        return found
    for argument in get_args(annotation):
        found += [model for model in _models(argument) if model not in found]
    return found
