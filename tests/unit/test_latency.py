"""The benchmark times what it says: real passes, real depths, ratios of medians of the same process."""

import statistics

import pytest
import torch
from models import tiny

from buddy.backbones.untrained import byte_tokenizer
from buddy.evaluation.latency import benchmark, contenders, time_batch
from buddy.policies.buddy import BuddyPolicy
from buddy.routing.model import RoutedModel
from buddy.settings import Latency

SETTINGS = Latency(prompts=3, new_tokens=4, batch_size=2, repeats=3, warmup=1)


@pytest.fixture
def model():
    backbone = tiny("llama", blocks=8)
    backbone.resize_token_embeddings(300)
    return RoutedModel(backbone, BuddyPolicy(8, 16), tokenizer=byte_tokenizer()).eval()


def test_every_execution_at_every_depth_is_timed_with_its_ratios(model):
    found = benchmark(model, ["one prompt", "another, longer prompt", "third"], [2, 4], SETTINGS, "alpaca")
    cells = [(contender.execution, contender.removed) for contender, _ in found]
    assert cells == [("dense", 0)] + [(e, n) for n in (2, 4) for e in ("sliced", "reuse", "recompute")]
    by_cell = {(c.execution, c.removed): metrics for c, metrics in found}
    dense = by_cell["dense", 0]
    assert dense["prompt_tokens_mean"] == pytest.approx((10 + 22 + 5) / 3)  # one token per byte
    for (_, removed), metrics in by_cell.items():
        for phase in ("prefill", "decode"):
            rate = metrics[f"{phase}_tok_s"]
            assert len(rate["values"]) == 3
            assert rate["median"] == statistics.median(rate["values"])
            assert min(rate["values"]) <= rate["p10"] <= rate["median"] <= rate["p90"] <= max(rate["values"])
            assert metrics[f"{phase}_speedup"] == pytest.approx(rate["median"] / dense[f"{phase}_tok_s"]["median"])
            if removed:
                limit = by_cell["sliced", removed][f"{phase}_tok_s"]["median"]
                assert metrics[f"{phase}_of_sliced"] == pytest.approx(rate["median"] / limit)
            else:
                assert metrics[f"{phase}_of_sliced"] is None


def test_each_contender_runs_the_depth_it_claims(model):
    calls = []
    for layer in model.backbone.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.randint(3, 90, (1, 6))
    for contender in contenders(model, [3], ["dense", "sliced", "reuse", "recompute"]):
        calls.clear()
        prefill, decode = time_batch(contender, ids, torch.ones_like(ids), new_tokens=5)
        assert len(calls) == (8 - contender.removed) * 6  # a prefill and five steps
        assert prefill > 0
        assert decode > 0
