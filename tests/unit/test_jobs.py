"""The table of a study's jobs: its paths, its commands, and what needs what; that Snakemake plans the same jobs is tested
with the workflow."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from buddy import cli
from buddy.study import config, results
from buddy.study.jobs import STAGES, Job, Jobs, closure, words

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = {
    "paper": (),
    "demo": ("workflow/demo.yaml",),
    "tiny": ("tests/tiny.yaml",),
    "smollm2": ("results/reference/smollm2-study/study.yaml",),
}


@pytest.fixture(params=OVERLAYS)
def jobs(request: pytest.FixtureRequest) -> Jobs:
    study = config.read(*[ROOT / file for file in ("config.yaml", *OVERLAYS[request.param])])
    return Jobs(study, f"results/{study.study.name}")


def work(jobs: Jobs) -> list[Job]:
    return [job for job in results.of_study(jobs) if job.stage not in ("table", "figure")]


def test_every_output_has_one_maker(jobs: Jobs) -> None:
    outputs = [output for job in work(jobs) for output in job.outputs]
    assert len(outputs) == len(set(outputs))
    assert not any(other.startswith(f"{one}/") for one in outputs for other in outputs)


def test_what_a_job_reads_is_made_by_a_job_of_the_study(jobs: Jobs) -> None:
    made = {path for job in work(jobs) for path in job.paths}
    for job in work(jobs):
        for read in job.inputs().values():
            for path in [read] if isinstance(read, str) else read:
                assert path in made or not path.startswith("results/"), f"{job} reads {path}"


def test_jobs_come_after_what_they_need(jobs: Jobs) -> None:
    order = {job: place for place, job in enumerate(results.of_study(jobs))}
    for job in order:
        assert all(order[needed] < order[job] for needed in job.needs)


def test_every_command_has_the_options_that_it_is_told(jobs: Jobs) -> None:
    commands = get_command(cli.build()).commands  # type: ignore[attr-defined]
    for job in work(jobs):
        program, module, package, name, *told = shlex.split(job.shell())
        assert (program, module, package) == ("python", "-m", "buddy")
        known = {option for one in commands[name].params for option in (*one.opts, *one.secondary_opts)}
        assert {word.partition("=")[0] for word in told if word.startswith("--")} <= known, job
        needed = {one.opts[0] for one in commands[name].params if one.required}
        assert needed <= {word.partition("=")[0] for word in told}, job


def test_a_path_says_which_stage_and_wildcards_it_is_of(jobs: Jobs) -> None:
    for job in work(jobs):
        assert jobs(job.stage, **job.wildcards) is job
        for value in job.wildcards.values():
            assert all(value in output for output in job.outputs)
            assert value in job.place


def test_a_closure_holds_what_is_needed_and_nothing_else() -> None:
    study = config.read(ROOT / "config.yaml", ROOT / "tests/tiny.yaml")
    jobs = Jobs(study)
    run = study.main_run("tiny")
    found = closure([jobs("evaluate", run=run.path)])
    # by hand: the backbone, the tasks, the prompts that it answers and is trained on, and the prior with its corpus
    sets = {*study.evaluation.tasks, study.training.data, study.importance.corpus}
    assert {job.name for job in found if job.stage == "data"} == sets
    assert [job.stage for job in found if job.stage != "data"] == [
        *("backbone", "answers", "importance", "train", "evaluate"),
    ]


@pytest.mark.parametrize("methods", [["dense"], ["dense", "sleb"], ["pudding"], ["first", "dense_lora"]])
def test_a_study_without_buddy_is_planned_whole(methods: list[str]) -> None:
    tiny = config.read(ROOT / "config.yaml", ROOT / "tests/tiny.yaml").model_dump(mode="json")
    study = config.parse({**tiny, "study": {**tiny["study"], "methods": methods, "ablations": []}})
    found = results.of_study(Jobs(study))
    assert "train" not in {job.stage for job in found}
    timed = {job.wildcards["run"].split("/")[1] for job in found if job.stage == "latency"}
    assert timed == {f"method~{one}" for one in methods if one in study.latency.methods}


def test_a_variant_of_an_ablation_is_scored_in_one_mode_alone() -> None:
    study = config.read(ROOT / "config.yaml", ROOT / OVERLAYS["smollm2"][0])
    told = {job.wildcards["run"]: job.work.told for job in results.of_study(Jobs(study)) if job.stage == "score"}
    compared = {run.path for run in study.compared_runs("smollm2-135m")}
    assert len(told) > len(compared)
    for path, options in told.items():
        whole = path in compared
        assert options["kv"] == (["zero", "mask", "project"] if whole else ["zero"])
        assert options["decode"] == (["recompute", "reuse"] if whole else ["recompute"])


def test_a_backbones_own_checkpointing_is_told_to_all_that_train_it() -> None:
    study = config.read(ROOT / "config.yaml")
    assert study.backbones["llama1-13b"].gradient_checkpointing
    assert not study.training.gradient_checkpointing
    trainings = [job for job in results.of_study(Jobs(study)) if job.stage in ("train", "gates", "adapt")]
    for job in trainings:
        large = job.work.backbone == "llama1-13b"
        assert ("--gradient-checkpointing" in job.shell()) is large
        assert ("--no-gradient-checkpointing" in job.shell()) is not large


TEXT = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=12)


@given(st.dictionaries(st.sampled_from(["one_name", "other", "third"]), TEXT | st.integers(-9, 9) | st.floats(0, 1)))
def test_words_reach_a_command_as_they_were(told: dict[str, object]) -> None:
    split = shlex.split(" ".join(words(told)))
    read: dict[str, str] = {}
    while split:
        word = split.pop(0)
        name, equals, value = word.partition("=")
        read[name] = value if equals else split.pop(0)
    assert read == {f"--{name.replace('_', '-')}": str(value) for name, value in told.items()}


def test_words_of_switches_lists_and_repeated_options() -> None:
    told = {"on": True, "off_too": False, "left_out": None, "list": [1, 2], "again": ("a b", "c"), "empty": []}
    assert list(words(told)) == ["--on", "--no-off-too", "--list 1,2", "--again 'a b'", "--again c", "--empty ''"]


def test_a_shell_hands_a_command_over_as_it_was_told() -> None:
    told = {"name": "it's $HOME; `x`", "blocks": "-1,0"}
    code = "import sys; print(sys.argv[1:])"
    shell = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {' '.join(words(told))}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(["--name", told["name"], "--blocks=-1,0"])


def test_stages_that_load_a_model_say_what_it_costs() -> None:
    fetching = {"backbone", "data", "encoder", "table", "figure"}
    assert {name for name, stage in STAGES.items() if stage.cost is None} == fetching
