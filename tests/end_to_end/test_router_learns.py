"""A router learns routes that depend on the input where it can be proven: by the tuned recipe, and not by the paper's."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "router_learns.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("router_learns", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backbone(benchmark):
    task = benchmark.Task.of("easy", seed=1)
    return task, benchmark.pretrained(task, seed=1, steps=400)


def test_the_tuned_recipe_learns_routes(benchmark, backbone):
    found = benchmark.measured(*backbone, "tuned", 300, 1)
    assert found["oracle"] < found["fixed"] - 1  # there is something to learn
    assert found["closed"] >= 0.85
    assert found["paths"] >= 2


def test_the_papers_recipe_does_not_in_as_many_updates(benchmark, backbone):
    assert benchmark.measured(*backbone, "paper", 300, 1)["closed"] < 0.85
