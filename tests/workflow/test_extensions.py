"""A peer and a task of another package go through planning, calibration, training, scoring and a table."""

import json
import shutil

import pytest
import yaml
from checkout import clone, snakemake

ENTRIES = """
from pathlib import Path

from buddy.extensions import Method, Task

PEER = Method("evens", "Every Second", "static", criteria=("place",), ranking="outside_ranking:CRITERIA")
TASK = Task(
    "colours", "Colours", "acc", 2, str(Path(__file__).with_name("colours.yaml")), "", ("thing", "right", "wrong", "label")
)
"""
RANKING = '''
from buddy.baselines.removal import Peer, Removal


def find(backbone, ids, removed, candidates, batch_size):
    """The last blocks first, one left out between them."""
    order = [*candidates[::-2], *candidates[-2::-2]][:removed]
    return Removal(order, [{block: float(-block) for block in candidates}])


CRITERIA = {"place": Peer(find, protected=(0,), score="place, from the end")}
'''
TASK = """
task: colours
dataset_path: none
output_type: multiple_choice
training_split: null
validation_split: validation
test_split: null
doc_to_text: "The colour of {{thing}} is"
doc_to_target: label
doc_to_choice: "{{[right, wrong]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
STUDY = {
    "study": {
        "name": "outside",
        "methods": ["dense", "evens"],
        "ablations": [],
        "peers_removed": {"tiny": [1, 3]},
        "tables": {"table2": {"kind": "accuracy", "backbone": "tiny"}},
    },
    "backbones": {"tiny": {"removed": [1, 3]}},
    "data": {"source": "rows", "answers": "given"},
    "training": {"loss": "ce", "examples": 4},
    "peers": {"corpus": "ptb"},
    "evaluation": {"tasks": ["colours"]},
}
OVERLAYS = ("--configfile", "tests/tiny.yaml", "outside.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout with a study of that package's peer and task."""
    checkout = clone(tmp_path_factory.mktemp("clone"))
    (checkout / "outside.yaml").write_text(yaml.safe_dump(STUDY))
    (checkout / "rows").mkdir()
    for name, split in (("alpaca", "train"), ("ptb", "validation")):
        shutil.copy(checkout / f"buddy/data/embedded/{name}.{split}.jsonl", checkout / "rows")
    things = [("snow", " white", " green"), ("grass", " green", " red"), ("coal", " black", " white")]
    rows = [{"thing": thing, "right": right, "wrong": wrong, "label": 0} for thing, right, wrong in things]
    (checkout / "rows/colours.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return checkout


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """That package as pip would have installed it."""
    site = tmp_path_factory.mktemp("site")
    (site / "outside.py").write_text(ENTRIES)
    (site / "outside_ranking.py").write_text(RANKING)
    (site / "colours.yaml").write_text(TASK)
    facts = site / "outside-0.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 0.1\n")
    points = "[buddy.methods]\nevens = outside:PEER\n\n[buddy.tasks]\ncolours = outside:TASK\n"
    (facts / "entry_points.txt").write_text(points)
    return site


def test_without_the_package_its_names_are_unknown(folder):
    refused = snakemake(folder, "-n", *OVERLAYS)
    assert refused.returncode != 0
    assert "evens" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr


def test_a_peer_and_a_task_of_another_package_come_into_a_table(folder, package):
    environment = {"PYTHONPATH": f"{folder}:{package}", "WANDB_MODE": "disabled"}
    ran = snakemake(folder, "--cores", "2", "table2", *OVERLAYS, **environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = folder / "results/outside"
    # Of six blocks the first is protected: the last, the fourth, the second, then those between.
    order = [5, 3, 1]
    for removed in (1, 3):
        run = f"backbone~tiny/method~evens/criterion~place/removed~{removed}/lora~trained/seed~0"
        info = json.loads((results / "runs" / run / "run.json").read_text())
        assert info["policy"] == "static"
        assert sorted(info["policy_settings"]["removal_order"][:removed]) == sorted(order[:removed])
        record = json.loads((results / f"records/accuracy/{run}/removed~{removed}.json").read_text())
        assert record["metrics"]["tasks"]["colours"]["n"] == 3
        assert record["budget"]["executed"] == 6 - removed
    table = (results / "tables/table2.md").read_text()
    assert "| Every Second" in table
    assert "Colours" in table
    shown = [line for line in table.splitlines() if line.startswith("|")]
    thirds = {f"{100 * right / 3:.2f}" for right in range(4)}
    assert sum(any(score in line for score in thirds) for line in shown) == 3  # dense, and two depths
