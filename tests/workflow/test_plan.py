"""What Snakemake plans for the studies that ship, and what it says to wrong ones; nothing is run."""

import json
import time

import pytest
import yaml
from checkout import ROOT, clone, planned, snakemake

from buddy import config


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return clone(tmp_path_factory.mktemp("clone"))


def test_the_papers_study_is_planned_whole_and_quickly(checkout):
    start = time.monotonic()
    jobs = planned(checkout)
    seconds = time.monotonic() - start
    # Counted by hand from the tables: on four backbones dense and the main variant; on Llama2-7B besides, three
    # features without a prior (one of them is Table 6's "none"), two more priors, five more omegas, three more blocks.
    routed = 4 + 3 + 2 + 5 + 3
    assert jobs["train"] == routed
    assert jobs["evaluate"] == routed + 4
    assert jobs["backbone"] == 4
    assert jobs["importance"] == 4 + 2
    assert jobs["latency"] == 2
    assert jobs["data"] == 8 + 3  # eight tasks, Alpaca, WikiText-2, SAMSum
    assert jobs["table"] == 9
    assert seconds < 10


@pytest.mark.parametrize("table", ["table2", "table4", "table5", "table6", "table7", "table13"])
def test_the_papers_table_names_are_targets(checkout, table):
    jobs = planned(checkout, table)
    expected = {"table2": 1, "table4": 1, "table5": 3, "table6": 4, "table7": 6, "table13": 4}
    assert jobs["train"] == expected[table]
    assert jobs["table"] == 1


def test_a_mistyped_target_fails_while_planning(checkout):
    result = snakemake(checkout, "-n", "results/paper/runs/backbone~llama2-7b/method~budy/seed~0/run.json")
    assert result.returncode != 0
    assert "MissingRuleException" in result.stdout + result.stderr


WRONG = [
    ({"study": {"backbones": ["llama2-7B"]}}, "study.backbones", "did you mean llama2-7b?"),
    ({"training": {"learningrate": 1e-4}}, "training", "did you mean learning_rate?"),
    ({"training": {"batch_size": 0}}, "training.batch_size", "greater than or equal to 1"),
    ({"evaluation": {"tasks": ["piqua"]}}, "evaluation.tasks", "'piqa'"),
    ({"study": {"main": {"feature": "query"}}}, "study.main.feature", "'key', 'value' or 'key+value'"),
    ({"study": {"removed": {"llama2-7b": [31]}}}, "removed", "not between 1 and 30"),
    (
        {"backbones": {"llama2-7b": {"source": {"hub": "a/b", "revison": "x"}}}},
        "backbones.llama2-7b.source",
        "revision",
    ),
    ({"study": {"name": "a/b"}}, "study.name", "pattern"),
    (
        {"study": {"ablations": [{"name": "x", "backbone": "llama2-7b", "source_block": [40]}]}},
        "source_block 40",
        "at most",
    ),
    ({"latency": {"executions": ["recompute", "eager"]}}, "latency.executions", "'sliced'"),
]


@pytest.mark.parametrize(("overlay", "where", "hint"), WRONG)
def test_a_wrong_study_is_one_line_that_names_file_key_and_what_is_allowed(checkout, overlay, where, hint):
    file = checkout / "wrong.yaml"
    file.write_text(yaml.safe_dump(overlay))
    result = snakemake(checkout, "-n", "--configfile", "wrong.yaml")
    said = [line for line in (result.stdout + result.stderr).splitlines() if "wrong.yaml:" in line]
    assert result.returncode != 0
    assert len(said) == 1, result.stdout + result.stderr
    assert where in said[0]
    assert hint in said[0]
    assert "Traceback" not in result.stdout + result.stderr
    assert not (checkout / "results" / "paper").exists()


def test_the_shipped_schema_and_reference_are_those_of_the_code():
    shipped = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    assert shipped == json.loads(json.dumps(config.schema())), "out of date: run `make docs`"
    from buddy.commands.config import reference

    assert (ROOT / "docs/configuration.md").read_text().strip() == reference(), "out of date: run `make docs`"


def test_every_rule_that_runs_a_job_states_what_it_needs(checkout):
    """Resources, log, retries and environment, read from the rules as Snakemake prints them."""
    text = "".join(
        (checkout / "rules" / name).read_text() for name in ("inputs.smk", "train.smk", "evaluate.smk", "latency.smk")
    )
    for rule in text.split("\nrule ")[1:]:
        name = rule.split(":")[0]
        for directive in ("log:", "resources:", "mem_mb=", "runtime=", "retries:", "conda:"):
            assert directive in rule, f"rule {name} has no {directive}"
        if name not in ("backbone", "data"):
            assert "gpu=1" in rule
            assert "benchmark:" in rule
