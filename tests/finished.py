"""A small study whose jobs have all ended, made in no time, and a command line that does not do its work."""

import os
import shutil

import yaml
from checkout import clone
from records_factory import Maker

from buddy.storage.files import write_json
from buddy.study import manifest, progress
from buddy.study.config import merge, parse
from buddy.study.records import Record

STUDY = ("--configfile", "small.yaml")
RUN = "backbone~smollm2-135m/method~buddy/feature~value/prior~taylor/omega~0.1/source_block~1/seed~0"
ACCURACY = f"results/small/records/accuracy/{RUN}"
SMALL = {
    "study": {
        "name": "small",
        "backbones": ["smollm2-135m"],
        "methods": ["dense", "buddy"],
        "removed": {"smollm2-135m": [4, 8]},
        "ablations": [],
        "tables": {"table2": {"backbone": "smollm2-135m"}},
    },
    "evaluation": {"tasks": ["piqa", "arc_easy"]},
    **{name: {"backbones": []} for name in ("latency", "trace", "predictor", "orders", "summaries", "breakdown")},
    "generation": {"backbones": []},
}


def finished(tmp_path):
    """A checkout with a study whose jobs have all ended, its tables and figures included."""
    folder = clone(tmp_path)
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    content = merge(yaml.safe_load((folder / "config.yaml").read_text()), SMALL)
    # The paper's tables are merged in: only this study's is of a backbone that it has.
    maker = Maker(folder / "results", content)
    maker.everything(items=8)
    study = parse(content)
    results = folder / "results" / "small"
    shared = {"study": "small", "backbone": "smollm2-135m", "metrics": {}, "n": 8}
    Record(kind="training", method="buddy", **shared).write(results / f"records/training/{RUN}.json")
    for output in progress.outputs(study):
        if not (results / output).exists():
            write_json(results / output, {"made": output})
    for path in (results / "records/accuracy").rglob("seed~0"):
        manifest.write(path)
    # In the order in which jobs make them, so that nothing is older than what it is made from.
    for age, place in enumerate(
        ("backbones", "data", "records/importance", "runs", "records/training", "records/accuracy")
    ):
        for path in [results / place, *(results / place).rglob("*")]:
            os.utime(path, (1e9 + age, 1e9 + age))
    for job in progress.jobs(study):
        if job.stage in ("table", "figure"):
            for kind in ("csv", "md", "tex", "html", "png", "pdf"):
                path = (results / job.outputs[0]).with_suffix(f".{kind}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("")
    return folder


FAKE = """\
import json, os, sys, time
from pathlib import Path
from buddy import cli
from buddy.storage import locks
stage = sys.argv[1]
with open("tries", "a") as tries:
    tries.write(stage + "\\n")
if stage == "evaluate" and os.path.exists("slow"):
    with locks.held("results/small/records/accuracy/x"):
        Path("started").touch()
        time.sleep(300)
if stage == "evaluate":
    print("INFO loading")
    print("buddy: --data: nothing there" if os.path.exists("mistake") else "RuntimeError: CUDA error", file=sys.stderr)
    sys.exit(2 if os.path.exists("mistake") else 1)
cli.main()
"""
"""A command line in whose hands evaluation fails, or takes for ever."""


def failing(folder):
    """Let one evaluation of a finished study be to do, and its command be none that does it."""
    shutil.rmtree(folder / ACCURACY)
    (folder / "buddy/__main__.py").write_text(FAKE)
    return folder
