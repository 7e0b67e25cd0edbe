"""The shipped run, made by its own script on a random model, and used on a machine that has nothing but the run."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from checkout import clone

pytestmark = pytest.mark.timeout(1800)


def test_the_script_makes_a_run_that_works_where_its_backbone_is_not(tmp_path):
    folder = clone(tmp_path / "clone")
    shutil.rmtree(folder / "results/reference/smollm2-run/run", ignore_errors=True)  # the one that is shipped
    command = tmp_path / "bin/buddy"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m buddy "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": f"{command.parent}:{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "MAKE_RUN_TINY": "1"}

    def said(*words):
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return done

    said("results/reference/smollm2-run/make.sh")
    run = folder / "results/reference/smollm2-run/run"
    assert (run / "adapter/adapter_model.safetensors").exists()
    assert not [path for path in run.rglob("*.json") if str(tmp_path) in path.read_text()]  # no path of this machine
    shutil.rmtree(folder / "results/cache")  # another machine
    shutil.rmtree(folder / "results/smollm2-run")
    first, second = (
        said("buddy", "generate", "--budget", "0.75", "--max-new-tokens", "4", "--json", "hello") for _ in range(2)
    )
    assert "fetched once" in first.stderr
    assert "fetched once" not in second.stderr
    answers = [json.loads(done.stdout) for done in (first, second)]
    assert answers[0]["run"] == "results/reference/smollm2-run/run"
    assert all(answer.pop("seconds") > 0 for answer in answers)
    assert answers[0] == answers[1]
