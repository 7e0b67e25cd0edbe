"""What a generation holds: memory for the tokens it has, no memory for those it may come to, nothing once it is over."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, prompts, tiny, with_router
from tape import Tape

from buddy.evaluation.memory import Peak
from buddy.routing.graphs import decoders
from buddy.routing.graphs.decoders import Decoders
from buddy.routing.kv import RoutedCache
from buddy.routing.model import AHEAD, RoutedModel

KV = ("zero", "mask", "project")


@pytest.fixture
def uncollected():
    """No garbage collection: what is not gone by itself stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def made(monkeypatch):
    """Weak references to all caches made, and to their buffers."""
    caches, init = [], RoutedCache.__init__

    def spied(self, *args, **kwargs):
        init(self, *args, **kwargs)
        caches.append(weakref.ref(self))

    monkeypatch.setattr(RoutedCache, "__init__", spied)
    return caches


def alive(caches):
    return sum(cache() is not None for cache in caches)


@pytest.mark.parametrize("kv", KV)
def test_a_cache_dies_with_its_generation(kv, uncollected, made):
    model = with_router(tiny(), kv=kv)
    ids, mask = prompts()
    budgets = [4 / 7, 5 / 7, 1.0]
    for _ in range(3):
        model.generate(ids, mask, budget=budgets, max_new_tokens=4, do_sample=False)
        model(ids, mask, budget=budgets, use_cache=True)
    assert len(made) == 6
    assert alive(made) == 0
    kept = model.generate(
        ids, mask, budget=budgets, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    keys = weakref.ref(kept.blocks[0].keys)
    assert alive(made) == 1
    del kept
    assert alive(made) == 0
    assert keys() is None


def test_a_captured_generation_leaves_its_decoder(uncollected, made, monkeypatch):
    model, pool = with_router(tiny()), Decoders(lambda _: Tape(), 8)
    monkeypatch.setattr(decoders, "obstacle", lambda _: None)
    monkeypatch.setattr(decoders, "lease", pool.lease)
    ids, mask = prompts()
    for _ in range(3):
        model.generate(ids, mask, budget=5 / 7, max_new_tokens=12, do_sample=False, engine="graph")
    assert len(made) == 3
    assert alive(made) == 0
    assert len(pool._all) == 1


def test_two_hundred_generations_hold_what_one_holds(uncollected, made):
    """Tensors alive, counted: nothing may pile up, however small."""
    model = with_router(tiny(blocks=4))
    ids, mask = prompts()
    held = []
    for number in range(200):
        model.generate(ids, mask, budget=[0.75, 1.0, 0.75], max_new_tokens=3, do_sample=False)
        if number % 50 == 0:
            held.append((alive(made), sum(isinstance(found, torch.Tensor) for found in gc.get_objects())))
    assert {caches for caches, _ in held} == {0}
    assert held[1] == held[-1]


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_limit_costs_no_memory_ahead_of_use(engine, monkeypatch):
    model, pool = with_router(tiny()), Decoders(lambda _: None, 8)
    monkeypatch.setattr(decoders, "obstacle", lambda _: None)
    monkeypatch.setattr(decoders, "lease", pool.lease)
    ids, _ = prompts(batch=1)
    stop = model.generate(ids, budget=5 / 7, max_new_tokens=4, do_sample=False, engine=engine)[0, -1].item()
    out = model.generate(
        ids,
        budget=5 / 7,
        max_new_tokens=300_000,
        do_sample=False,
        engine=engine,
        eos_token_id=stop,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape[1] <= 13
    columns = out.past_key_values.blocks[0].keys.shape[2]
    assert columns <= 2 * (9 + AHEAD[engine])


def test_buffers_double_up_to_the_limit_and_beyond_it_only_when_they_must():
    model = with_router(tiny(blocks=4))
    cache, token, capacities = model.new_cache(9, limit=160), torch.tensor([[5]]), []
    with torch.no_grad():
        model(prompts(batch=1)[0], budget=0.75, past_key_values=cache)
        for _ in range(170):
            model(token, budget=0.75, past_key_values=cache)
            assert cache.blocks[0].keys.shape[2] == cache.capacity >= cache.length
            capacities.append(cache.capacity)
    assert list(dict.fromkeys(capacities)) == [9 + AHEAD["eager"], 2 * (9 + AHEAD["eager"]), 160, 320]


@torch.no_grad()
@settings(deadline=None, max_examples=20)
@given(kv=st.sampled_from(KV), capacity=st.integers(1, 30), limit=st.integers(1, 60), steps=st.integers(1, 30))
def test_how_buffers_grew_does_not_show(kv, capacity, limit, steps):
    model = with_router(tiny(blocks=5), kv=kv)
    ids, mask = prompts()
    small, large = RoutedCache(5, kv, capacity, limit), RoutedCache(5, kv, 100)
    budgets = [3 / 5, 4 / 5, 1.0]
    for cache in (small, large):
        model(ids, mask, budget=budgets, past_key_values=cache)
    for token in range(1, steps):
        mask, new = torch.nn.functional.pad(mask, (0, 1), value=1), torch.full((3, 1), token % VOCABULARY)
        logits = [model(new, mask, budget=budgets, past_key_values=cache).logits for cache in (small, large)]
        assert torch.equal(*logits)


@torch.no_grad()
def test_a_copy_of_a_cache_goes_its_own_way():
    """A prompt that many continuations share: its cache is copied, and each copy knows its own length."""
    model = with_router(tiny())
    ids, _ = prompts(batch=1)
    cache = model.new_cache(40)
    model(ids, budget=5 / 7, past_key_values=cache)
    twin = copy.deepcopy(cache)
    first = model(ids[:, :1], budget=5 / 7, past_key_values=cache).logits
    assert (cache.length, twin.length) == (10, 9)
    assert torch.equal(model(ids[:, :1], budget=5 / 7, past_key_values=twin).logits, first)
    assert isinstance(model, RoutedModel)


def test_the_peak_is_what_was_held_at_most_since_it_was_asked_for():
    first = Peak(torch.device("cpu"))
    before = first.mb()
    if before is None:
        pytest.skip("this system does not tell, or does not let it be reset")
    held = torch.ones(100 * 2**20, dtype=torch.uint8)
    del held
    assert first.mb() - before > 80
    assert Peak(torch.device("cpu")).mb() < first.mb() + 1
    assert first.mb() - before < 50  # the kernel has one peak per process: a later one begins it anew
