"""What Snakemake plans for the studies that ship, and what it says to wrong ones; and tables from records given."""

import csv
import json
import os
import re
import statistics
import subprocess
import sys
import time

import pytest
import yaml
from checkout import ROOT, clone, planned, snakemake
from records_factory import Maker

from buddy.study import config, planning
from buddy.study.jobs import Jobs


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return clone(tmp_path_factory.mktemp("clone"))


def test_the_papers_study_is_planned_whole_and_quickly(checkout):
    start = time.monotonic()
    jobs = planned(checkout)
    seconds = time.monotonic() - start
    # Counted by hand from the tables: on four backbones dense and BUDDY by both recipes; by the paper's on Llama2-7B
    # besides, three features without a prior (one of them is Table 6's "none"), two more priors, five more omegas, three
    # more blocks.
    routed = 4 * 2 + 3 + 2 + 5 + 3
    # On each backbone dense with LoRA, and five peers at four depths.
    peers = 4 * (1 + 5 * 4)
    assert jobs["train"] == routed
    assert jobs["adapt"] == peers
    assert jobs["calibrate"] == 4 * 3  # a static peer's order serves all its depths
    assert jobs["pool"] == 4
    assert jobs["gates"] == 4  # FiRST's serve all its depths, too
    assert jobs["encoder"] == 1
    assert jobs["evaluate"] == routed + peers + 4
    assert jobs["backbone"] == 4
    assert jobs["importance"] == 4 + 2 + 1  # block influence, for Figure 8
    assert jobs["corpus_orders"] == 4  # four indicators on PTB
    assert jobs["length_orders"] == 2  # two of them by context length
    assert jobs["latency"] == 2 * (1 + 2 * 4)  # per data set BUDDY's run, and PuDDing's and FiRST's at four depths
    assert jobs["breakdown"] == 1
    # Llama2-7B and Qwen2.5-7B: dense, dense with LoRA, BUDDY, the peers; of the others the whole models, for Figure 13.
    assert jobs["solve"] == 2 * (3 + 5 * 4) + 2 * 2
    assert jobs["evaluate_auto"] == jobs["solve_auto"] == jobs["predictor"] == 4 * 2  # two presets
    assert jobs["evaluate_whole"] == 4 * 2  # dense, with and without LoRA, on MMLU
    assert jobs["trace"] == 3 + 5 * 4 + 8  # on Alpaca; BUDDY's on the tasks
    assert jobs["rouge"] == 1
    assert jobs["score"] == 2 + 5 * 4 + 2 + 3 + 2 + 5 + 3  # Llama2-7B: every run of its accuracy table and ablations
    assert jobs["data"] == 8 + 6  # eight tasks, MMLU, Alpaca, WikiText-2, PTB, SAMSum, GSM8K
    assert jobs["table"] == 14 + 1  # and that of likelihoods
    assert seconds < 10


def test_peers_may_be_compared_at_fewer_depths(checkout):
    some = {"study": {"peers_removed": {"llama2-7b": [8, 16], "qwen2.5-7b": [12]}}}
    (checkout / "some.yaml").write_text(yaml.safe_dump(some))
    jobs, all_depths = planned(checkout, "--configfile", "some.yaml"), planned(checkout)
    fewer = 5 * (2 + 3)  # of five peers on two backbones
    assert jobs["train"] == all_depths["train"]
    for stage in ("adapt", "evaluate"):
        assert jobs[stage] == all_depths[stage] - fewer
    assert jobs["score"] == all_depths["score"] - 5 * 2
    assert jobs["latency"] == all_depths["latency"] - 2 * 2 * 2
    (checkout / "some.yaml").write_text(yaml.safe_dump({"study": {"peers_removed": {"llama2-7b": [5]}}}))
    said = snakemake(checkout, "-n", "--configfile", "some.yaml")
    assert "peers_removed: [5] is not among the [4, 8, 12, 16] of llama2-7b" in said.stdout + said.stderr


@pytest.mark.parametrize(
    ("targets", "files"),
    [
        ((), ()),
        ((), ("tests/tiny.yaml",)),
        ((), ("workflow/weekend.yaml",)),
        (("table2",), ("workflow/weekend.yaml",)),
        (("table4", "figure1"), ()),
        (("likelihood",), ()),
    ],
)
def test_a_plan_has_the_jobs_that_snakemake_would_run(checkout, targets, files):
    given = ("--configfile", *files) if files else ()
    expected = planned(checkout, *targets, *given)
    for target in ("all", *targets):  # what only collects
        expected.pop(target, None)
    study = config.read(*(checkout / file for file in ("config.yaml", *files)))
    _, found = planning.read(Jobs(study, f"results/{study.study.name}"), checkout / "nowhere", "h100", targets)
    assert {row.stage: len(row.jobs) for row in found.rows} == expected
    assert found.jobs == sum(expected.values())


def test_limits_of_time_and_memory_are_those_of_the_plan(checkout):
    said = snakemake(
        checkout, "-n", "results/weekend/tables/table4.csv", "--configfile", "workflow/weekend.yaml", "--verbose"
    )
    study = config.read(checkout / "config.yaml", checkout / "workflow/weekend.yaml")
    estimates, found = planning.read(
        Jobs(study, "results/weekend"), checkout / "nowhere", study.limits.device, ["table4"]
    )
    (job,) = [job for row in found.rows for job in row.jobs if job.stage == "train"]
    block = next(part for part in (said.stdout + said.stderr).split("\nrule ") if part.startswith("train:"))
    resources = dict(re.findall(r"(\w+)=(\d+)", block.split("resources:")[1]))
    assert int(resources["runtime"]) == estimates.minutes(job)
    assert int(resources["mem_mb"]) == estimates.host_mb(job)


@pytest.mark.parametrize("name", ["tabel2", "table99", "figure3"])
def test_a_result_that_there_is_not_is_told_with_those_that_there_are(checkout, name):
    said = snakemake(checkout, "-n", name)
    assert said.returncode != 0
    assert re.search(
        rf"result: '{name}' is not one of table1, table2, .* figure13 or ablation", said.stdout + said.stderr
    )


def test_a_figure_that_there_is_not_is_not_planned(checkout):
    said = snakemake(checkout, "-n", "results/paper/figures/nope.pdf")
    assert said.returncode != 0
    assert "No rule to produce" in said.stdout + said.stderr


TRAINED = {  # runs of BUDDY, and of peers, that a table needs
    "table1": (1, 21), "table2": (2, 21), "table4": (1, 0), "table5": (3, 0), "table6": (4, 0), "table7": (6, 0),
    "table8": (1, 0), "table9": (21, 84), "table12": (2, 42), "table13": (4, 0), "table14": (1, 8),
    "likelihood": (15, 21),
}  # fmt: skip


@pytest.mark.parametrize("table", TRAINED)
def test_the_papers_table_names_are_targets(checkout, table):
    jobs = planned(checkout, table)
    assert (jobs["train"], jobs.get("adapt", 0)) == TRAINED[table]
    assert jobs["table"] == 1
    assert jobs.get("trace", 0) == (3 + 5 * 4 if table == "table1" else 0)  # on Alpaca; the tasks are for figures


@pytest.mark.parametrize(
    ("overlay", "adapted", "calibrated"),
    [
        ({"study": {"lora": ["none"]}}, 2, 1),  # dense with LoRA has no such variant
        ({"study": {"lora": ["trained", "none"]}}, 1 + 2 * 2, 1),
        ({"study": {"seeds": [0, 1], "lora": ["trained", "none"]}}, 2 + 2 * 2 + 2, 1),  # untrained, seeds do not differ
        ({"study": {"methods": ["dense", "first"]}}, 2, 0),
        (
            {"study": {"methods": ["shortened_llama"]}, "peers": {"criteria": {"shortened_llama": ["ppl", "taylor"]}}},
            4,
            2,
        ),
    ],
)
def test_methods_lora_seeds_and_criteria_span_the_peers(checkout, overlay, adapted, calibrated):
    study = {"name": "x", "backbones": ["smollm2-135m"], "removed": {"smollm2-135m": [4, 8]}, "ablations": []}
    methods = {"methods": ["dense_lora", "sleb"], "tables": {"table2": {"backbone": "smollm2-135m"}}}
    overlay = {**overlay, "study": {**study, **methods, **overlay.get("study", {})}}
    (checkout / "peers.yaml").write_text(yaml.safe_dump(overlay))
    jobs = planned(checkout, "table2", "--configfile", "peers.yaml")
    assert (jobs.get("adapt", 0), jobs.get("calibrate", 0)) == (adapted, calibrated)
    assert jobs["evaluate"] == adapted + ("dense" in overlay["study"]["methods"])


def test_each_backbone_answers_the_prompts_that_its_own_runs_are_trained_on(checkout):
    study = {"name": "own", "backbones": ["llama2-7b", "qwen2.5-7b"], "methods": ["buddy", "sleb"], "ablations": []}
    tables = {
        "table2": {"kind": "accuracy", "backbone": "llama2-7b"},
        "table3": {"kind": "accuracy", "backbone": "qwen2.5-7b"},
    }
    overlay = {"study": {**study, "tables": tables}, "data": {"answers": "backbone"}}
    (checkout / "own.yaml").write_text(yaml.safe_dump(overlay))
    jobs = planned(checkout, "table2", "table3", "--configfile", "own.yaml")
    assert (jobs["answers"], jobs["train"], jobs["adapt"]) == (2, 2 * 2, 2 * 4)
    assert "answers" not in planned(checkout, "table2")


FIGURES = {  # what Llama2-7B's figures have measured
    "figure2": {"length_orders": 2},
    "figure5": {"train": 1, "importance": 1, "rouge": 1},
    "figure6": {"train": 1, "importance": 1, "trace": 1 + 8},
    "figure8": {"importance": 2, "corpus_orders": 2},
}


@pytest.mark.parametrize("figure", FIGURES)
def test_the_papers_figures_have_what_they_show_measured(checkout, figure):
    jobs = planned(checkout, figure)
    assert {name: jobs[name] for name in jobs if name not in ("backbone", "data", "figure", figure)} == FIGURES[figure]
    assert (jobs["backbone"], jobs["figure"]) == (1, 1)


@pytest.mark.parametrize(
    ("overlay", "again"),
    [
        ({"router": {"orders": 7}}, {"recipe~tuned"}),
        ({"training": {"router_learning_rate": 1e-3}}, {"paper"}),
        ({"training": {"learning_rate": 1e-3}}, {"recipe~tuned", "paper"}),
    ],
)
def test_a_knob_is_told_to_the_recipe_that_reads_it(checkout, overlay, again):
    """As a changed param makes a run anew: the command of a recipe that does not read the knob stays as it is."""
    (checkout / "knob.yaml").write_text(yaml.safe_dump(overlay))

    def commands(*files):
        result = snakemake(checkout, "-n", "--printshellcmds", "table2", *files)
        assert result.returncode == 0, result.stdout + result.stderr
        found = re.findall(r"python -m buddy train .*", result.stdout + result.stderr)
        return {"recipe~tuned" if "recipe~tuned" in line else "paper": line for line in found}

    before, after = commands(), commands("--configfile", "knob.yaml")
    assert set(before) == {"recipe~tuned", "paper"}
    assert {name for name in before if before[name] != after[name]} == again


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
    ({"study": {"recipes": ["tuned"]}}, "study: recipes: ['tuned']", "must name that of main, paper"),
    ({"router": {"example": 64}}, "router", "did you mean examples?"),
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
    ({"study": {"records": "results/reference/none"}}, "study.records: results/reference/none", "no such folder"),
    (
        {"peers": {"criteria": {"sleb": ["taylor"]}}},
        "peers: criteria.sleb: ['taylor']",
        "not a choice among ppl",
    ),
    ({"study": {"methods": ["slep"]}}, "study.methods", "'sleb'"),
    ({"orders": {"corpora": ["piqa"]}}, "orders.corpora: 'piqa'", "a prose set (wikitext2 or ptb)"),
    ({"study": {"records": "tests"}}, "study.records: tests", "a folder that holds accuracy, generation"),
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
    """Resources, log, retries and environment, of the two forms that all stages have."""
    fetching, on_a_model = re.split(r"\n *rule:", (checkout / "rules/jobs.smk").read_text())[1:]
    for rule in (fetching, on_a_model):
        for directive in ("log:", "resources:", "mem_mb=", "runtime=", "retries:", "conda:"):
            assert directive in rule
    assert "gpu=1" in on_a_model
    assert "benchmark:" in on_a_model
    assert "gpu=" not in fetching


# Records given: a study that measures nothing

MACHINE = "results/reference/machine"
GIVEN = ("--configfile", f"{MACHINE}/study.yaml")
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A fresh checkout with a folder of reference records in it: speed and a breakdown, no accuracy."""
    folder = clone(tmp_path_factory.mktemp("clone"))
    overlay = {
        "study": {
            "name": "reference-machine",
            "backbones": ["smollm2-135m"],
            "removed": {"smollm2-135m": [4, 8]},
            "ablations": [],
            "tables": {name: {"backbone": "smollm2-135m"} for name in ("table2", "table4", "table8")},
            "records": f"{MACHINE}/records",
        },
        "latency": {"backbones": None, "datasets": ["alpaca"], "batch_sizes": [1, 4]},
        "breakdown": {"backbones": None},
    }
    (folder / MACHINE).mkdir(parents=True)
    (folder / MACHINE / "study.yaml").write_text(yaml.safe_dump(overlay))
    study = config.merge(yaml.safe_load((folder / "config.yaml").read_text()), overlay)
    maker = Maker(tmp_path_factory.mktemp("made"), study)
    maker.records = folder / MACHINE / "records"
    maker.everything()
    for path in (maker.records / "accuracy").rglob("*.json"):
        path.unlink()
    return folder


def tree(folder):
    """Every file of a checkout with its content, without what Python and Snakemake keep for themselves."""
    files = (path for path in folder.rglob("*") if path.is_file() and not {".snakemake", "__pycache__"} & {*path.parts})
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def latency_of(folder, **wanted):
    """Figures of Table 4 in the order of its CSV."""
    with (folder / "results/reference-machine/tables/table4.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]


def test_a_table_is_built_from_records_given_and_nothing_else_is_done(given):
    before = tree(given)
    result = snakemake(given, "table4", "--cores", "1", *GIVEN, **NO_NETWORK)
    assert result.returncode == 0, result.stdout + result.stderr
    after = tree(given)
    assert {name: after.get(name) for name in before} == before
    made = {f"tables/table4.{kind}" for kind in ("csv", "md", "tex", "html")} | {"logs/table/table4.log", "study.json"}
    assert set(after) - set(before) == {f"results/reference-machine/{name}" for name in made}

    records = sorted((given / MACHINE / "records/latency").rglob("*.json"))
    # Per batch size: dense, and three executions at two depths; the batch of four has mixed budgets besides.
    assert len(records) == 2 * (1 + 3 * 2) + 1
    for path in records:
        record = json.loads(path.read_text())
        metrics = record["metrics"]
        at = {name: metrics[name] for name in ("batch_size", "engine", "execution")}
        at["removed"] = record["budget"]["removed"]
        for name in ("prefill_tok_s", "decode_speedup", "decode_of_ideal"):
            found = latency_of(given, **at, metric=name)
            if metrics[name] is None and metrics["execution"] != "dense":
                assert found == []
            elif metrics[name] is not None:
                assert [float(row["value"]) for row in found] == [
                    pytest.approx(statistics.median(metrics[name]["values"]), abs=1e-6)
                ]
    assert f"Records: {MACHINE}/records." in (given / "results/reference-machine/tables/table4.md").read_text()


def test_all_of_records_given_is_what_they_can_show(given):
    jobs = planned(given, *GIVEN, "--forceall")
    assert jobs == {"table": 2, "figure": 2, "all": 1}  # no accuracy in them, so neither its table nor its figures


def test_a_table_without_any_records_given_says_so(given):
    result = snakemake(given, "table2", "--cores", "1", *GIVEN, **NO_NETWORK)
    assert result.returncode == 0, result.stdout + result.stderr
    text = (given / "results/reference-machine/tables/table2.md").read_text()
    assert "\N{EN DASH} not measured." in text


def test_records_given_are_never_measured_again(given):
    run = "backbone~smollm2-135m/method~buddy/feature~value/prior~taylor/omega~0.1/source_block~1/seed~0"
    for target in (f"runs/{run}/run.json", f"records/latency/{run}/dataset~alpaca", f"records/breakdown/{run}"):
        result = snakemake(given, "-n", f"results/reference-machine/{target}", *GIVEN)
        assert result.returncode != 0
        assert "MissingRuleException" in result.stdout + result.stderr


def test_another_record_or_setting_builds_the_table_again(given):
    built = snakemake(given, "table4", "--cores", "1", *GIVEN, **NO_NETWORK)
    assert built.returncode == 0, built.stdout + built.stderr
    assert planned(given, "table4", *GIVEN) == {}
    (given / "knob.yaml").write_text("latency: {batch_sizes: [4]}")
    assert planned(given, "table4", *GIVEN, "knob.yaml") == {"table": 1, "table4": 1}
    path = next((given / MACHINE / "records/latency").rglob("*.json"))
    path.write_text(path.read_text() + "\n")
    assert planned(given, "table4", *GIVEN) == {"table": 1, "table4": 1}


def test_the_same_table_without_snakemake(given):
    built = snakemake(given, "table4", "--cores", "1", *GIVEN, **NO_NETWORK)
    assert built.returncode == 0, built.stdout + built.stderr
    table = given / "results/reference-machine/tables/table4.csv"
    expected = table.read_text()
    table.unlink()
    study = "results/reference-machine/study.json"
    (given / study).unlink()
    for arguments in (
        ["config", "config.yaml", f"{MACHINE}/study.yaml", "--out", study],
        ["report", "--study", "reference-machine", "--table", "4"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "buddy", *arguments],
            cwd=given,
            env={**os.environ, **NO_NETWORK, "PYTHONPATH": str(given)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert table.read_text() == expected
