"""What `buddy status` says of a study: from its files, against jobs counted by hand."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from buddy.study import config, progress
from buddy.study.config import Config

ROOT = Path(__file__).resolve().parents[2]
RUN = "backbone~tiny/method~buddy/feature~value/prior~taylor/omega~0.1/source_block~1/recipe~tuned/seed~0"
DENSE = "backbone~tiny/method~dense/seed~0"


@pytest.fixture
def plan() -> Config:
    small = {
        "study": {
            "name": "small",
            "backbones": ["tiny"],
            "methods": ["dense", "buddy"],
            "ablations": [],
            "tables": {"table2": {"kind": "accuracy", "backbone": "tiny"}},
        },
        "data": {"source": "embedded"},
        "evaluation": {"tasks": ["piqa"]},
        **{name: {"backbones": []} for name in ("latency", "trace", "predictor", "orders", "summaries", "likelihood")},
    }
    base = config.read(ROOT / "config.yaml", ROOT / "tests" / "tiny.yaml").model_dump(mode="json")
    return config.parse({**base, **small, "study": {**base["study"], **small["study"]}})


@pytest.fixture
def folder(tmp_path: Path, plan: Config) -> Path:
    folder = tmp_path / "results" / "small"
    write(folder / "study.json", plan.model_dump_json())
    return folder


def write(file: Path, text: str = "{}") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def states(plan: Config, folder: Path) -> dict[str, dict[str, int]]:
    return {
        stage.name: {state: stage.count(state) for state in progress.STATES if stage.count(state)}
        for stage in progress.read(plan, folder)
    }


def test_a_study_before_its_first_job(plan: Config, folder: Path) -> None:
    # by hand: one backbone; alpaca, the prior's corpus and one task; a BUDDY run, and a dense one that is not
    # trained; accuracy, and the prior's removal orders, as pictures
    assert states(plan, folder) == {
        "backbone": {"missing": 1},
        "data": {"missing": 3},
        "importance": {"missing": 1},
        "train": {"missing": 1},
        "evaluate": {"missing": 2},
        "table": {"missing": 1},
        "figure": {"missing": 2},
    }


def test_prompts_that_a_backbone_answers_are_a_job_of_their_own(plan: Config, folder: Path) -> None:
    own = config.parse({**plan.model_dump(mode="json"), "data": {"source": "embedded", "answers": "backbone"}})
    assert states(own, folder)["answers"] == {"missing": 1}
    write(folder / "data/answered_by~tiny/alpaca/data.json")
    assert states(own, folder)["answers"] == {"done": 1}
    assert states(own, folder)["data"] == {"missing": 3}


def mark(folder: Path, output: str, length: int = 1000) -> None:
    """As Snakemake marks the output of a job that it has started; names of markers are cut at a length."""
    name = base64.urlsafe_b64encode(f"results/small/{output}".encode()).decode()
    parts = [name[at : at + length] for at in range(0, len(name), length)]
    place = folder.parent.parent / ".snakemake" / "incomplete"
    write(place.joinpath(*[f"@{part}" for part in parts[:-1]], parts[-1]))


@pytest.mark.parametrize("length", [1000, 60])
def test_done_running_failed_missing(plan: Config, folder: Path, length: int) -> None:
    write(folder / "backbones/tiny/backbone.json")
    write(folder / "data/piqa/data.json")
    write(folder / "data/alpaca/data.json")
    write(folder / "logs/data/wikitext2.log", "Traceback\n  ...\nOSError: no network\n")
    write(folder / f"logs/train/{RUN}.log", "10 %")
    write(folder / f"runs/{RUN}/router.safetensors")  # on its way, without run.json
    mark(folder, f"runs/{RUN}/run.json", length)
    lock = write(folder.parent.parent / ".snakemake/locks/0.output.lock")
    write(folder / f"records/accuracy/{DENSE}/removed~0.json")
    assert states(plan, folder) == {
        "backbone": {"done": 1},
        "data": {"done": 2, "failed": 1},
        "importance": {"missing": 1},
        "train": {"running": 1},
        "evaluate": {"done": 1, "missing": 1},
        "table": {"missing": 1},
        "figure": {"missing": 2},
    }
    lock.unlink()  # Snakemake is gone and has not seen the job's end
    assert states(plan, folder)["train"] == {"failed": 1}


def test_hours_are_those_of_benchmarks_else_of_records(plan: Config, folder: Path) -> None:
    write(folder / f"benchmarks/train/{RUN}.tsv", "s\th:m:s\n3600.0\t1:00:00\n1800.0\t0:30:00\n")
    write(folder / f"records/training/{RUN}.json", json.dumps({"wall_s": 5.0, "gpu_s": 5400.0}))
    for removed, seconds in ((1, 720.0), (2, 360.0)):
        record = {"wall_s": seconds, "gpu_s": 0.0}
        write(folder / f"records/accuracy/{RUN}/removed~{removed}.json", json.dumps(record))
    stages = {stage.name: stage for stage in progress.read(plan, folder)}
    assert (stages["train"].hours, stages["train"].gpu_hours) == (1.5, 1.5)
    assert (stages["evaluate"].hours, stages["evaluate"].gpu_hours) == (0.3, 0.0)


def test_the_command(folder: Path) -> None:
    write(folder / "logs/data/piqa.log", "Traceback\nOSError: no network\n\n")
    code = "import sys; from buddy import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "status", "--study", "small", "--results", str(folder.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["stage", "done", "running", "failed", "missing", "hours", "GPU", "hours"]
    assert ["data", "-", "-", "1", "2", "-", "-"] in [line.split() for line in lines]
    assert "    OSError: no network" in lines
    assert lines[-1] == "False"


def test_a_study_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "buddy", "status", "--study", "nothing", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds no study" in done.stderr


def test_watching_looks_again_until_all_is_done(folder: Path, plan: Config) -> None:
    wanted = [folder / output for output in progress.outputs(plan)]
    wanted += [folder / job.outputs[0] for job in progress.jobs(plan) if job.stage in ("table", "figure")]
    command = [
        sys.executable,
        "-m",
        "buddy",
        "status",
        "--study",
        "small",
        "--results",
        str(folder.parent),
        "--watch",
        "1",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        first = next(line.split() for line in watching.stdout if line.startswith("all "))
        assert first[1:5] == ["-", "-", "-", str(len(progress.jobs(plan)))]
        for path in wanted:
            write(path / "removed~0.json" if path.suffix == "" else path)
        told = [line.split() for line in watching.stdout if line.startswith("all ")]
    assert watching.returncode == 0
    assert told[-1][1:5] == [str(len(progress.jobs(plan))), "-", "-", "-"]
