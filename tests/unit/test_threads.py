"""Routing is a matter of one thread: what others do with the same backbone meanwhile is untouched."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import prompts, tiny, with_router

from buddy.policies.static import StaticPolicy
from buddy.routing.engine import Routing, routed
from buddy.routing.graphs.kernels import lean
from buddy.routing.model import RoutedModel

GREEDY = {"max_new_tokens": 12, "do_sample": False}


def in_another_thread(work):
    """What it returns there, while this thread waits."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(work).result(timeout=60)


@torch.no_grad()
@pytest.mark.parametrize("kv", ["zero", "mask", "project"])
@pytest.mark.parametrize("rows", [1, 3])  # alone; as a batch, whose sub-batches read the cache in place
def test_the_bare_backbone_in_another_thread_is_untouched(kv, rows):
    model = with_router(tiny(), kv=kv)
    ids, mask = (tensor[:rows] for tensor in prompts())
    bare = torch.no_grad()(
        lambda: (
            model.backbone(ids, mask).logits,
            model.backbone.generate(input_ids=ids, attention_mask=mask, **GREEDY),
        )
    )
    alone = bare()
    expected = model.generate(ids, mask, budget=4 / 7, **GREEDY)
    found, owner = [], threading.get_ident()

    def in_the_middle_of_a_pass(*_):
        if threading.get_ident() == owner:
            found.append(in_another_thread(bare))

    handle = model.backbone.model.layers[-1].mlp.register_forward_hook(in_the_middle_of_a_pass)
    assert torch.equal(model.generate(ids, mask, budget=4 / 7, **GREEDY), expected)
    handle.remove()
    assert len(found) == 12
    for logits, tokens in found:
        assert torch.equal(logits, alone[0])
        assert torch.equal(tokens, alone[1])


@torch.no_grad()
def test_threads_that_route_one_model_at_once_have_what_they_have_alone():
    model = with_router(tiny())
    ids, mask = prompts()
    budgets = [4 / 7, 5 / 7, 1.0, [4 / 7, 1.0, 6 / 7]]
    expected = [model.generate(ids, mask, budget=budget, **GREEDY) for budget in budgets]
    together = threading.Barrier(len(budgets) + 1)

    def repeat(work):
        together.wait()
        return [work() for _ in range(8)]

    with ThreadPoolExecutor(len(budgets) + 1) as pool:
        routed_ones = [
            pool.submit(repeat, lambda budget=budget: model.generate(ids, mask, budget=budget, **GREEDY))
            for budget in budgets
        ]
        bare = pool.submit(repeat, lambda: model.backbone.generate(input_ids=ids, attention_mask=mask, **GREEDY))
        for future, tokens in zip(routed_ones, expected, strict=True):
            assert all(torch.equal(found, tokens) for found in future.result(timeout=120))
        assert all(torch.equal(found, expected[2]) for found in bare.result(timeout=120))
    assert "forward" not in vars(model.backbone.model)


@torch.no_grad()
def test_nothing_is_left_behind_and_one_thread_routes_once():
    model = with_router(tiny())
    ids, _ = prompts()
    implementation = model.backbone.config._attn_implementation
    with routed(model.backbone, Routing(model.policy, 4 / 7)):
        with pytest.raises(RuntimeError, match="already"), routed(model.backbone, Routing(model.policy, 1.0)):
            pass
        twin = copy.deepcopy(model.backbone)
    assert vars(model.backbone.model).get("forward") is None
    assert model.backbone.config._attn_implementation == implementation
    assert torch.equal(twin(ids).logits, model.backbone(ids).logits)  # a copy made meanwhile is an ordinary model
    short = [RoutedModel(one, StaticPolicy(7, [2]))(ids).logits for one in (twin, model.backbone)]  # and can be routed
    assert torch.equal(*short)


@torch.no_grad()
def test_formulas_lent_for_a_capture_stay_in_its_thread():
    backbone = tiny("qwen3")
    ids, _ = prompts()
    expected = backbone(ids).logits
    with lean(backbone.model):
        with torch.autograd.profiler.profile() as here:
            backbone(ids)
        found = in_another_thread(torch.no_grad()(lambda: backbone(ids).logits))
    assert any("rms_norm" in event.key for event in here.key_averages())
    assert torch.equal(found, expected)
