"""How long `buddy wandb-sync` takes for many runs, against a W&B server on this machine.

    python benchmarks/wandb_sync.py --runs 404 [--points 20] [--workers 4]

Makes a study's folder of runs that jobs have kept offline, each with a curve, a summary and an artifact that it reads and
one that it makes; sends them; then sends again. Prints seconds for both, and what the server has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit"))


def make(study: Path, first: int, last: int, points: int) -> None:
    """Runs ``first`` to ``last`` of a study, kept offline."""
    from buddy import tracking
    from buddy.study.settings import Tracking

    for number in range(first, last):
        path = f"backbone~tiny/method~buddy/seed~{number}"
        made = study / "runs" / path
        made.mkdir(parents=True, exist_ok=True)
        (made / "run.json").write_text(json.dumps({"number": number}))
        told = {"study": study.name, "run_path": path, "group": "tiny × buddy", "config": {"seed": number}}
        places = {"reads": [study / "backbones" / "tiny"], "writes": [made]}
        settings = Tracking(mode="offline")
        with tracking.track("train", **told, **places, folder=study / "wandb", settings=settings) as tracker:
            for step in range(points):
                tracker.log({"loss": 1 / (step + 1)}, step=step)
            tracker.summary({"final": number})


def main() -> None:
    """Make, send, send again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=404)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4)
    given = parser.parse_args()

    from wandb_server import KEY, WandbServer

    from buddy.tracking import sync

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory() as folder, WandbServer() as server:
        study = Path(folder) / "demo"
        backbone = study / "backbones" / "tiny"
        backbone.mkdir(parents=True)
        (backbone / "backbone.json").write_text("{}")
        begun = time.monotonic()
        cores = os.cpu_count() or 1
        bounds = [round(given.runs * core / cores) for core in range(cores + 1)]
        with ProcessPoolExecutor(cores) as pool:
            work = [pool.submit(make, study, first, last, given.points) for first, last in pairwise(bounds)]
            for one in work:
                one.result()
        print(f"{given.runs} runs made offline in {time.monotonic() - begun:.1f} s")
        os.environ |= {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": KEY, "HOME": folder}
        for time_of in ("sent", "sent again"):
            begun = time.monotonic()
            outcome = sync.send(study / "wandb", workers=given.workers)
            print(
                f"{time_of}: {time.monotonic() - begun:.1f} s, {outcome.sent} sent, {outcome.already} sent before, "
                f"{len(outcome.failed)} failed"
            )
        points = sum(len(run.history("loss")) for run in server.runs.values())
        made = [one for one in server.artifacts.values() if one.made_by and one.type == "run"]
        print(f"the server has {len(server.runs)} runs, {points} points, {len(made)} artifacts that a run has made")


if __name__ == "__main__":
    main()
