"""Containers: one list of versions for all recipes, and with `--sdm apptainer` every job goes through the image.

The stand-in for Apptainer runs what it is told outside of any image: what is shown is that Snakemake hands every job to it.
"""

import re
import sys
from pathlib import Path

import pytest
import yaml
from checkout import ROOT, clone, snakemake

APPTAINER = """#!/bin/bash
if [ "$1" = --version ]; then echo "apptainer version 1.3.0"; exit; fi
echo "$@" >> apptainer.log
while [ "$1" != envs/buddy.sif ]; do shift; done
shift
PATH={bin}:$PATH exec "$@"
"""


@pytest.fixture
def checkout(tmp_path):
    folder = clone(tmp_path / "clone")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apptainer").write_text(APPTAINER.format(bin=Path(sys.executable).parent))
    (tools / "apptainer").chmod(0o755)
    return folder, {"PATH": f"{tools}:/usr/bin:/bin"}


ASKED = ("--sdm", "apptainer", "--cores", "1", "--configfile", "tests/tiny.yaml")
TARGETS = ("results/tiny/backbones/tiny/backbone.json", "results/tiny/data/piqa/data.json")


def test_every_job_runs_in_the_image(checkout):
    folder, environment = checkout
    (folder / "envs/buddy.sif").write_text("an image")
    done = snakemake(folder, *TARGETS, *ASKED, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((folder / target).exists() for target in TARGETS)
    calls = (folder / "apptainer.log").read_text().splitlines()
    assert sum("-m buddy backbone" in call for call in calls) == 1
    assert sum("-m buddy data" in call for call in calls) == 1
    assert all("envs/buddy.sif" in call for call in calls if call.startswith("exec"))


def test_without_the_image_nothing_is_begun_and_the_command_that_builds_it_is_named(checkout):
    folder, environment = checkout
    done = snakemake(folder, *TARGETS, *ASKED, **environment)
    assert done.returncode != 0
    assert "build it with: apptainer build envs/buddy.sif envs/buddy.def" in done.stdout + done.stderr
    assert not (folder / "results/tiny").exists()


def test_every_environment_has_the_same_packages():
    recipes = {
        name: (ROOT / name).read_text() for name in ("Dockerfile", "envs/buddy.def", "envs/buddy.post-deploy.sh")
    }
    installs = {name: re.findall(r"pip install .*", text) for name, text in recipes.items()}
    assert all(len(found) == 1 for found in installs.values()), installs
    for (found,) in installs.values():
        assert "--constraint envs/constraints.txt" in found
        assert "'.[workflow]'" in found
    python = re.search(r"python =(\S+)", yaml.safe_load((ROOT / "envs/buddy.yaml").read_text())["dependencies"][0])
    assert python
    assert f"python:{python[1]}-slim" in recipes["Dockerfile"]
    assert f"From: python:{python[1]}-slim" in recipes["envs/buddy.def"]


def test_the_recipe_copies_files_that_are_there():
    text = (ROOT / "envs/buddy.def").read_text()
    files = re.search(r"%files\n((?:    .*\n)+)", text)
    assert files
    for line in files[1].splitlines():
        source, target = line.split()
        assert (ROOT / source).exists()
        assert target == f"/opt/buddy/{source}"
