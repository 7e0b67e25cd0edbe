"""FiRST's gates, trained once for all depths: by the commands, in the table of jobs, and for studies of before."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from command_line import buddy
from safetensors.torch import load_file

from buddy import runs
from buddy.errors import UserError
from buddy.study import config, manifest, provenance, results
from buddy.study.jobs import Jobs
from buddy.study.records import Record

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("--examples", 6, "--batch-size", 2, "--warmup-steps", 1, "--max-length", 512, "--device", "cpu")
GATES = ("--first-skip-weight", 0.5, "--first-learning-rate", 0.01)
LORA = ("--epochs", 1, "--lora-rank", 2, "--learning-rate", 0.02, "--first-calibration-prompts", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, instructions, and gates trained on them."""
    root = tmp_path_factory.mktemp("gates")
    assert buddy("backbone", "--random", "tiny-llama", "--layers", 6, "--out", root / "backbone").status == 0
    assert buddy("data", "--name", "alpaca", "--source", "embedded", "--out", root / "alpaca").status == 0
    given = ("--backbone", root / "backbone", "--data", root / "alpaca")
    assert buddy("gates", *given, *GATES, *TRAINING, "--out", root / "gates").status == 0
    return root


def first(folder, out, removed, *more):
    given = ("--method", "first", "--backbone", folder / "backbone", "--data", folder / "alpaca")
    return buddy(
        *("adapt", *given, "--removed", removed, *GATES, *TRAINING, *LORA, *more),
        *("--out", out, "--record", f"{out}.json"),
    )


def weights(run):
    return load_file(run / "router.safetensors")


def test_a_run_at_a_depth_begins_with_the_gates_and_ends_with_them(folder, tmp_path):
    gates = weights(folder / "gates")
    assert gates["weight"].ne(0).any(1).all(), "a gate did not learn"
    depths = {1: tmp_path / "one", 2: tmp_path / "two"}
    for removed, out in depths.items():
        assert first(folder, out, removed, "--gates", folder / "gates").status == 0
        for name, value in weights(out).items():
            assert torch.equal(value, gates[name]), name
    thresholds = [runs.RunInfo.read(out).policy_settings["thresholds"] for out in depths.values()]
    assert [list(one) for one in thresholds] == [["1"], ["2"]]
    # And with those that it trains by itself: then LoRA is the same, too.
    alone = tmp_path / "alone"
    assert first(folder, alone, 2).status == 0
    for name, value in weights(alone).items():
        assert torch.equal(value, gates[name]), name
    ours, theirs = (load_file(run / "adapter/adapter_model.safetensors") for run in (depths[2], alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shared, whole = (Record.read(f"{run}.json").metrics for run in (depths[2], alone))
    assert shared["threshold"] == whole["threshold"]
    # Three steps of gates and three of LoRA, of which the run at a depth has its own.
    assert (shared["steps"], whole["steps"]) == (3, 6)
    assert shared["curve"][-1]["loss"] == whole["curve"][-1]["loss"]
    assert shared["gates"]["wall_s"] == json.loads((folder / "gates/training.json").read_text())["wall_s"] > 0
    assert "gates" not in whole


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--first-skip-weight", 0.1), "first.skip_weight is 0.5, here 0.1"),
        (("--max-length", 256), "max_length is 512, here 256"),
        (("--seed", 1), "seed is 0, here 1"),
    ],
)
def test_gates_of_other_settings_are_refused(folder, tmp_path, more, words):
    said = first(folder, tmp_path / "run", 2, "--gates", folder / "gates", *more)
    assert said.status == 2
    assert words in said.err
    assert not (tmp_path / "run").exists()


def test_only_gates_are_taken_for_gates(folder, alone, tmp_path):
    assert "not what `buddy gates` makes" in first(folder, tmp_path / "x", 2, "--gates", alone).err
    other = ("adapt", "--method", "dense_lora", "--backbone", folder / "backbone", "--data", folder / "alpaca")
    assert "--gates: dense_lora has none" in buddy(*other, "--gates", folder / "gates", "--out", tmp_path / "x").err


# ---- in a study ------------------------------------------------------------------------------------------------------


def study(**more):
    tiny = config.read(ROOT / "config.yaml", ROOT / "tests/tiny.yaml").model_dump(mode="json")
    both = {"study": {"methods": ["first"], "ablations": [], "peers_removed": {"tiny": [1, 2]}}}
    return config.parse(config.merge(config.merge(tiny, both), more))


@pytest.mark.parametrize("seeds", [[0], [0, 3]])
def test_a_study_trains_gates_once_for_its_depths(seeds):
    planned = results.of_study(Jobs(study(study={"seeds": seeds})))
    gates = [job for job in planned if job.stage == "gates"]
    runs_of_first = [job for job in planned if job.stage == "adapt"]
    assert [job.wildcards["seed"] for job in gates] == [str(seed) for seed in seeds]
    assert len(runs_of_first) == 2 * len(seeds)
    for job in runs_of_first:
        (read,) = [needed for needed in job.needs if needed.stage == "gates"]
        assert job.wildcards["peer"].endswith(f"/seed~{read.wildcards['seed']}")
        assert job.work.told["gates"] == read.parent


def test_gates_are_told_what_they_read_and_nothing_else():
    def command(**more):
        (job,) = [job for job in results.of_study(Jobs(study(**more))) if job.stage == "gates"]
        return job.shell()

    for unread in ({"training": {"lora_rank": 4}}, {"first": {"threshold": 0.5}}, {"training": {"epochs": 3}}):
        assert command(**unread) == command()
    for read in ({"training": {"max_length": 128}}, {"first": {"epochs": 2}}, {"training": {"batch_size": 1}}):
        assert command(**read) != command()


@pytest.fixture(scope="module")
def alone(folder):
    """A run that trained its own gates."""
    assert first(folder, folder / "alone", 2, "--lora", "none").status == 0
    return folder / "alone"


@pytest.fixture
def before(alone, tmp_path, monkeypatch):
    """A study whose two runs were made before there was a stage of gates, and what Snakemake noted of them."""
    monkeypatch.chdir(tmp_path)
    jobs = results.of_study(Jobs(study(), "results/tiny"))
    for job in jobs:
        for path in map(Path, job.paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix and job.stage not in ("gates", "adapt"):
                path.write_text("{}\n")
                os.utime(path, (1e9, 1e9))
        if job.stage == "adapt":
            shutil.copytree(alone, job.parent, dirs_exist_ok=True)
            Path(job.paths[1]).write_text("{}\n")
            manifest.write(Path(job.parent))
            for path in job.paths:
                os.utime(path, (1e9 + 1, 1e9 + 1))
                note(path, shellcmd=f"{job.shell(without=['gates'])} > 'log' 2>&1", code="COMMAND", input=["old"])
    return jobs


def note(path, **content):
    import base64

    name = base64.urlsafe_b64encode(path.encode()).decode()
    longest = os.pathconf(".", "PC_NAME_MAX") - 1
    parts = [name[at : at + longest] for at in range(0, len(name), longest)]
    place = Path(".snakemake/metadata").joinpath(*(f"@{part}" for part in parts[:-1]), parts[-1])
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(content))
    return place


def test_the_runs_of_a_study_of_before_stand_and_give_their_gates(before, folder):
    (gates,) = [job for job in before if job.stage == "gates"]
    depths = [job for job in before if job.stage == "adapt"]
    assert provenance.recover(before) == {gates.path: depths[0].parent}
    assert provenance.recover(before) == {}
    for name, value in weights(Path(gates.parent)).items():
        assert torch.equal(value, weights(folder / "gates")[name])
    found = runs.RunInfo.read(gates.parent)
    assert (found.policy_settings["thresholds"], found.variant) == ({}, {})
    runs.check(Path(gates.parent), found)
    # Nothing is newer than what is made from it.
    assert all(Path(gates.path).stat().st_mtime <= Path(job.path).stat().st_mtime for job in depths)
    assert sorted(provenance.keep(before, "COMMAND")) == sorted(path for job in depths for path in job.paths)
    assert provenance.keep(before, "COMMAND") == []
    # Another depth of the study goes on with them; without LoRA nothing is left to train.
    assert first(folder, Path("more"), 1, "--gates", gates.parent, "--lora", "none").status == 0
    record = Record.read("more.json")
    assert (record.metrics["steps"], record.metrics["trainable_parameters"]) == (0, 0)
    assert record.metrics["executed_mean"] > 0


def test_a_run_that_is_damaged_gives_none(before):
    for job in before:
        if job.stage == "adapt":
            (Path(job.parent) / "router.safetensors").write_bytes(b"")
    assert provenance.recover(before) == {}


def test_a_run_of_other_settings_gives_none(before):
    changed = results.of_study(Jobs(study(first={"skip_weight": 0.3}), "results/tiny"))
    assert provenance.recover(changed) == {}
    assert provenance.keep(changed, "COMMAND") == []


def test_the_folder_of_gates_is_the_commands_own(folder, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(folder / "alpaca", mine)
    given = ("--backbone", folder / "backbone", "--data", folder / "alpaca")
    assert "nothing was touched" in buddy("gates", *given, *GATES, *TRAINING, "--out", mine).err


def test_a_user_error_is_what_wrong_gates_are(folder):
    from buddy.commands import _given
    from buddy.settings import First, Training

    with pytest.raises(UserError, match="not a run"):
        _given.gates("first", folder / "nowhere", folder / "backbone", Training(), First(), 0)
