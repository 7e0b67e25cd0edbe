"""``buddy runs``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def runs(
    results: Annotated[Path, typer.Option(help="folder searched for runs")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON: path and all settings of each run")] = False,
) -> None:
    """List the trained runs with their settings and paths.

    \b
    Examples:
      buddy runs
      buddy runs --results results/demo --json
    """
    from buddy.errors import UserError
    from buddy.runs import RUN_FILE, RunInfo

    if not results.is_dir():
        raise UserError(f"--results: {results} is not a folder")
    found = [(path.parent, RunInfo.read(path.parent)) for path in sorted(results.rglob(RUN_FILE))]
    if as_json:
        print(json.dumps([{"path": str(path), **asdict(info)} for path, info in found], indent=1))
        return
    if not found:
        print(f"no runs below {results}; `make demo` trains some, and so does `buddy train`")
    for path, info in found:
        axes = "  ".join(f"{axis}={value}" for axis, value in info.variant.items())
        print(f"{info.study}  {info.backbone}  {info.method}  {axes}  seed={info.seed}\n    {path}")
