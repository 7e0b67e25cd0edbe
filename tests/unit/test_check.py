"""`buddy check`: a study read whole, what is wrong with it by kind, and what a repair removes."""

import json
import shutil
from pathlib import Path

import pytest
from records_factory import Maker, demo

from buddy.storage import checkpoints
from buddy.storage.files import write_json
from buddy.study import check, config, manifest, progress
from buddy.study.records import Record

RUN = "backbone~smollm2-135m/method~buddy/feature~value/prior~taylor/omega~0.1/source_block~1/seed~0"
ACCURACY = f"records/accuracy/{RUN}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The accuracy part of a study, finished: its run, and records of every depth."""
    content = demo()
    content["study"] |= {
        "methods": ["buddy"],
        "ablations": [],
        "tables": {"table2": content["study"]["tables"]["table2"]},
    }
    content |= {
        name: {"backbones": []} for name in ("latency", "trace", "predictor", "orders", "summaries", "breakdown")
    }
    maker = Maker(tmp_path_factory.mktemp("made"), content)
    maker.everything(items=8)
    folder = maker.records.parent
    study = config.parse(content)
    write_json(folder / "study.json", study.model_dump(mode="json"))
    shared = {"study": "demo", "backbone": "smollm2-135m", "metrics": {}, "n": 8}
    Record(kind="training", method="buddy", **shared).write(folder / f"records/training/{RUN}.json")
    importance = "records/importance/backbone~smollm2-135m/indicator~taylor.json"
    Record(kind="importance", method="", **shared).write(folder / importance)
    for output in progress.outputs(study):
        path = folder / output
        if not path.exists():
            write_json(path, {"rows": 1})
    training = study.training.model_dump(mode="json")
    write_json(folder / "runs" / RUN / "run.json", {"training": training, "seed": 0})
    (folder / "runs" / RUN / "router.safetensors").write_bytes(bytes(64))
    manifest.write(folder / "runs" / RUN)
    manifest.write(folder / ACCURACY)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "results" / made.name))


def problems(folder):
    found = list(check.study(config.read(folder / "study.json"), folder))
    return found, {(problem.kind, problem.path.relative_to(folder).as_posix()) for problem in found}


def edit(path, **values):
    content = json.loads(path.read_text())
    write_json(path, {**content, **values})


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS = {
    "a record deleted": (lambda f: (f / ACCURACY / "removed~4.json").unlink(), "missing", ACCURACY),
    "a record cut": (lambda f: cut(f / ACCURACY / "removed~4.json"), "damaged", ACCURACY),
    "a record edited by hand, same size": (
        lambda f: (f / ACCURACY / "removed~8.json").write_text(
            (f / ACCURACY / "removed~8.json").read_text().replace('"seed": 0', '"seed": 7')
        ),
        "damaged",
        ACCURACY,
    ),
    "all records of a run": (lambda f: shutil.rmtree(f / ACCURACY), "missing", ACCURACY),
    "a record of another limit": (
        lambda f: (edit(f / "study.json", evaluation={"limit": 3}), None),
        "other settings",
        None,
    ),
    "the router deleted": (lambda f: (f / "runs" / RUN / "router.safetensors").unlink(), "damaged", f"runs/{RUN}"),
    "the run cut": (lambda f: cut(f / "runs" / RUN / "run.json"), "damaged", f"runs/{RUN}"),
    "a run of another rate": (
        lambda f: (
            edit(f / "runs" / RUN / "run.json", training={"learning_rate": 7e-3}),
            manifest.write(f / "runs" / RUN),
        ),
        "other settings",
        f"runs/{RUN}",
    ),
    "a training's record cut": (
        lambda f: cut(f / f"records/training/{RUN}.json"),
        "damaged",
        f"records/training/{RUN}.json",
    ),
    "a backbone's provenance cut": (
        lambda f: cut(f / "backbones/smollm2-135m/backbone.json"),
        "damaged",
        "backbones/smollm2-135m/backbone.json",
    ),
}


def test_nothing_is_wrong_with_a_finished_study(folder):
    assert problems(folder)[1] == set()
    assert list(progress.damaged(config.read(folder / "study.json"), folder)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_and_a_repair_leaves_only_what_is_missing(folder, fault):
    spoil, kind, place = FAULTS[fault]
    spoil(folder)
    found, named = problems(folder)
    if place is not None:
        assert (kind, place) in named
    assert {problem.kind for problem in found} == {kind}
    check.repair(found, folder)
    assert {kind for kind, _ in problems(folder)[1]} <= {"missing"}


def test_checkpoints_are_read_too(folder):
    place = folder / "runs" / RUN / checkpoints.FOLDER
    study = config.read(folder / "study.json")
    settings = study.training.model_dump(mode="json")
    for step, made_by in ((2, settings), (4, {**settings, "learning_rate": 1.0}), (6, settings)):
        one = place / f"checkpoint-{step}"
        one.mkdir(parents=True)
        (one / "optimizer.pt").write_bytes(bytes(100))
        checkpoints.Checkpoints(place, {"settings": made_by, "recipe": {}}).seal(one)
    cut(place / "checkpoint-6" / "optimizer.pt")
    found, named = problems(folder)
    below = f"runs/{RUN}/checkpoints"
    assert named == {("other settings", f"{below}/checkpoint-4"), ("damaged", f"{below}/checkpoint-6")}
    check.repair(found, folder)
    assert [path.name for path in place.iterdir()] == ["checkpoint-2"]


def test_planning_sees_at_a_glance_what_is_gone_or_cut(folder):
    (folder / ACCURACY / "removed~4.json").unlink()
    cut(folder / f"records/training/{RUN}.json")
    (folder / "runs" / RUN / "router.safetensors").write_bytes(b"")
    found = dict(progress.damaged(config.read(folder / "study.json"), folder))
    assert {path.relative_to(folder).as_posix(): what for path, what in found.items()} == {
        ACCURACY: "removed~4.json is missing",
        f"records/training/{RUN}.json": "cut short",
        f"runs/{RUN}/run.json": "router.safetensors is cut short or changed",
    }


def test_every_cut_of_a_json_file_is_seen(tmp_path):
    write_json(tmp_path / "whole.json", {"a": {"b": [1, 2, {"c": 3}]}, "d": []})
    whole = (tmp_path / "whole.json").read_bytes()
    assert not manifest.cut_short(tmp_path / "whole.json")
    for length in range(len(whole) - 1):  # the last byte is the end of the line
        (tmp_path / "cut.json").write_bytes(whole[:length])
        assert manifest.cut_short(tmp_path / "cut.json"), length
