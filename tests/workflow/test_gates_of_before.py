"""A finished study whose runs of FiRST trained their own gates: Snakemake finds nothing to do in it, and nothing is trained
twice when a depth is added."""

import base64
import json
import os
import shutil
from pathlib import Path

import finished
import pytest
import yaml
from checkout import planned, snakemake
from finished import STUDY

from buddy.study import manifest, results
from buddy.study.config import merge, parse
from buddy.study.jobs import Jobs

COMMAND = "{params.command} > {log:q} 2>&1"


@pytest.fixture
def before(tmp_path, monkeypatch):
    """The study, with what Snakemake noted of each of its jobs before there was a stage of gates."""
    methods = {"study": {"methods": ["dense", "buddy", "first"]}}
    small = merge(finished.SMALL, methods)
    monkeypatch.setattr(finished, "SMALL", small)
    folder = finished.finished(tmp_path)
    study = parse(merge(yaml.safe_load((folder / "config.yaml").read_text()), small))
    shutil.rmtree(folder / "results/small/gates")
    for job in results.of_study(Jobs(study, "results/small")):
        if job.stage != "adapt":
            continue
        run = folder / job.parent
        (run / "router.safetensors").write_bytes(b"gates")
        info = {"policy_settings": {"blocks": 30, "thresholds": {"4": 0.5}}, "backbone_path": "../../backbone"}
        (run / "run.json").write_text(json.dumps({**info, "digests": {"router": "x", "adapter": "y"}}, indent=1))
        manifest.write(run)
        for path in job.paths:
            os.utime(folder / path, (1e9 + 3, 1e9 + 3))
            inputs = [name for role, name in job.inputs().items() if role != "gates" and isinstance(name, str)]
            tasks = job.inputs().get("tasks", [])
            note(
                folder,
                path,
                rule="adapt",
                record_format_version=6,
                code=COMMAND,
                shellcmd=f"{job.shell(without=['gates'])} > 'x.log' 2>&1",
                params=[repr(job.shell(without=["gates"]))],
                input=sorted([*inputs, *tasks]),
            )
    return folder


def note(folder, path, **content):
    """What Snakemake notes of an output."""
    name = base64.urlsafe_b64encode(path.encode()).decode()
    longest = os.pathconf(folder, "PC_NAME_MAX") - 1
    parts = [name[at : at + longest] for at in range(0, len(name), longest)]
    place = folder.joinpath(".snakemake/metadata", *(f"@{part}" for part in parts[:-1]), parts[-1])
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(content))


def test_a_finished_study_stays_finished(before):
    said = snakemake(before, "-n", *STUDY)
    told = said.stdout + said.stderr
    assert "Nothing to be done" in told, told
    gates = "results/small/gates/backbone~smollm2-135m/seed~0/run.json"
    assert f"{gates}: taken from results/small/runs/backbone~smollm2-135m/method~first/" in told
    assert (before / gates).is_file()
    assert planned(before, *STUDY) == {}


def test_another_depth_goes_on_with_its_gates(before):
    overlay = yaml.safe_load((before / "small.yaml").read_text())
    overlay["study"]["removed"] = {"smollm2-135m": [4, 8, 11]}
    overlay["study"]["methods"] = ["dense", "first"]
    (before / "small.yaml").write_text(yaml.safe_dump(overlay))
    jobs = planned(before, *STUDY)
    assert jobs["adapt"] == 1
    assert "gates" not in jobs


def test_other_settings_of_the_gates_train_them_anew(before):
    (before / "more.yaml").write_text(yaml.safe_dump({"first": {"skip_weight": 0.5}}))
    jobs = planned(before, *STUDY, "more.yaml")
    assert (jobs["gates"], jobs["adapt"]) == (1, 2)
    assert not Path(before / "results/small/gates").exists()
