"""Captured decode steps against the eager engine: the same routes, the same logits, on static buffers."""

import copy
import gc
import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, VOCABULARY, prompts, tiny
from models import with_router as routed
from tape import Tape, check
from torch.utils._python_dispatch import TorchDispatchMode

from buddy.errors import UserError
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.graphs import decoder, decoders
from buddy.routing.graphs.decoders import Decoders
from buddy.routing.graphs.kernels import lean
from buddy.routing.graphs.steps import ALL, NONE, SOME, Pieces
from buddy.routing.kv import RoutedCache
from buddy.routing.model import RoutedModel

KV = ("zero", "mask", "project")
CUDA = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
FIXTURES = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
DECODE = ("recompute", "reuse", 3)


def taped(late=False, first_window=8):
    """Decoders that record on a tape: what they replay is what was recorded."""
    return Decoders(lambda _: Tape(late), first_window)


def uncaptured(first_window=8):
    """Decoders that do the work anew at every step."""
    return Decoders(lambda _: None, first_window)


def decode(model, cache, ids, mask, steps, budgets, how):
    """Logits and routes of a prefill and of decode steps over given tokens, padding in the mask going on."""
    found, tokens = [], torch.randint(1, VOCABULARY, (len(ids), steps), generator=torch.Generator().manual_seed(1))
    tokens, ids, mask = (tensor.to(model.device) for tensor in (tokens, ids, mask))
    for step in range(steps + 1):
        new = ids if step == 0 else tokens[:, step - 1 : step]
        mask = mask if step == 0 else torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out = model(new, mask, budget=budgets, decode=how, past_key_values=cache, position_ids=positions)
        found.append((out.logits[:, -1], model.trace.steps[-1]))
    return found


def same(found, expected, tolerance=1e-4):
    for step, ((logits, route), (other, reference)) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(route, reference), f"step {step} takes another route"
        torch.testing.assert_close(logits, other, atol=tolerance, rtol=tolerance)


def kinds(decoder):
    return [key[0] for key in decoder._graphs]


@torch.no_grad()
@settings(max_examples=60, **FIXTURES)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    kv=st.sampled_from(KV),
    how=st.sampled_from(DECODE),
    source=st.integers(1, 3),
    executed=st.lists(st.integers(4, 7), min_size=1, max_size=4),
    make=st.sampled_from([uncaptured, taped, lambda: taped(late=True)]),
    padded=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_steps_are_those_of_the_eager_engine(architecture, kv, how, source, executed, make, padded, seed):
    model = routed(tiny(architecture, seed=seed % 3), "value", source, kv, seed)
    ids = torch.randint(1, VOCABULARY, (len(executed), 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    budgets = [max(count, source + 1) / 7 for count in executed]
    cache = make().lease(model, 32, len(executed))
    found = decode(model, cache, ids, mask, 14, budgets, how)  # windows 8, 16 and 32
    same(found, decode(model, RoutedCache(7, kv), ids, mask, 14, budgets, how))
    assert cache.graph is not None
    assert cache.length == 7 + 14


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("make", [uncaptured, taped])
def test_a_static_path_is_one_graph(backbone, kv, make):
    model = RoutedModel(backbone, StaticPolicy(7, [5, 2, 6]), kv).eval()
    ids, mask = prompts()
    for budgets in (1.0, 4 / 7, [1.0, 5 / 7, 4 / 7]):
        cache = make().lease(model, 32, 3)
        found = decode(model, cache, ids, mask, 12, budgets, "recompute")
        same(found, decode(model, RoutedCache(7, kv), ids, mask, 12, budgets, "recompute"))
        assert set(kinds(cache.graph)) <= {"path"}
        assert cache.graph.graphs == (2 if make is taped else 0)  # windows 16 and 32


@torch.no_grad()
def test_the_router_changes_its_mind_on_the_way():
    """What makes the comparisons above worth something."""
    model = routed(tiny(blocks=12))
    ids, mask = prompts(batch=1)
    found = decode(model, taped().lease(model, 64, 1), ids, mask, 30, 0.5, "recompute")
    assert len({tuple(route[0].tolist()) for _, route in found}) > 3


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("make", [uncaptured, taped])
def test_nothing_of_a_generation_is_left_for_the_next(kv, make):
    model = routed(tiny(seed=2), kv=kv)
    pool = make()
    first, second = pool.lease(model, 32, 3), None
    storage = first.graph.pieces.storage
    decode(model, first, *prompts(seed=5, length=15), 9, [4 / 7, 1.0, 5 / 7], "recompute")
    captured = first.graph.graphs
    for block in storage:
        block.masked_fill_(block == 0, 1e6)  # whatever would be read of it, would show
    del first
    second = pool.lease(model, 32, 3)
    assert all(new is old for new, old in zip(second.graph.pieces.storage, storage, strict=True))
    found = decode(model, second, *prompts(seed=6), 9, [5 / 7, 4 / 7, 1.0], "recompute")
    same(found, decode(model, RoutedCache(7, kv), *prompts(seed=6), 9, [5 / 7, 4 / 7, 1.0], "recompute"))
    assert make is uncaptured or second.graph.graphs < 2 * captured


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("how", DECODE)
def test_eager_passes_may_come_between(kv, how):
    """A second turn of a conversation, several tokens at once; and steps whose tokens have a route each."""
    model = routed(tiny(seed=1), kv=kv)
    mixed, eager = taped().lease(model, 64, 2), RoutedCache(7, kv)
    call, routes = {"budget": [4 / 7, 6 / 7], "decode": how}, []
    for number, length in enumerate((9, 1, 1, 1, 4, 1, 1, 1, 1, 2, 1, 1, 1)):
        new = torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(number))
        form = "causal" if number == 8 else "sequence"
        one = model(new, past_key_values=mixed, routing=form, **call)
        route = model.trace.steps[-1]
        other = model(new, past_key_values=eager, routing=form, **call)
        routes.append((route, model.trace.steps[-1]))
        torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-4)
    # Looked at last: what an eager pass reports must not change with the steps after it.
    assert all(torch.equal(*pair) for pair in routes)
    assert mixed.graph is not None
    assert mixed.complete == eager.complete
    assert mixed.routing.step == eager.routing.step
    assert mixed.routing.full == eager.routing.full


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("make", [uncaptured, taped])
def test_a_full_cache_grows_and_stays_captured(kv, make, caplog):
    model = routed(tiny(), kv=kv)
    pool = make(first_window=4)
    for seed in (0, 8):  # the second generation begins with the buffers that the first one left
        ids, mask = prompts(seed=seed)
        cache = pool.lease(model, 10, 3)
        assert cache.capacity == (16 if seed == 0 else 64)
        found = decode(model, cache, ids, mask, 30, [4 / 7, 5 / 7, 1.0], "recompute")
        same(found, decode(model, RoutedCache(7, kv), ids, mask, 30, [4 / 7, 5 / 7, 1.0], "recompute"))
        assert cache.graph is not None
        assert cache.length == 39
        assert cache.capacity == cache.graph.capacity == cache.blocks[3].keys.shape[2] == 64
        del cache
    assert caplog.records == []


@torch.no_grad()
def test_another_batch_than_the_cache_was_made_for_is_run_eagerly(caplog):
    model = routed(tiny())
    pool = taped()
    cache = pool.lease(model, 32, 1)
    found = decode(model, cache, *prompts(), 5, 5 / 7, "recompute")
    same(found, decode(model, RoutedCache(7), *prompts(), 5, 5 / 7, "recompute"))
    assert "made for 1 sequences, the input has 3" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
def test_what_cannot_be_captured_is_run_eagerly(kv, caplog):
    model = routed(tiny(), kv=kv)
    pool = taped()
    cache = pool.lease(model, 32, 3)
    cache.graph._recorder.failing = True
    found = decode(model, cache, *prompts(), 8, [4 / 7, 5 / 7, 1.0], "recompute")
    same(found, decode(model, RoutedCache(7, kv), *prompts(), 8, [4 / 7, 5 / 7, 1.0], "recompute"))
    assert cache.graph is None
    reason = "capturing failed (CUDA error: operation not permitted when stream is capturing)"
    assert [record.message for record in caplog.records] == [f"decoding goes on without CUDA graphs: {reason}"]
    pool.settle()
    assert pool.failure == reason


# ---- graphs and their number -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
def test_each_block_is_captured_once_per_window_and_nothing_at_later_steps(kv, monkeypatch):
    model = routed(tiny(blocks=12), kv=kv)
    cache = taped(first_window=16).lease(model, 64, 1)
    counts = []
    monkeypatch.setattr(model.trace.__class__, "add", lambda *_: counts.append(cache.graph.graphs))
    ids = torch.randint(1, VOCABULARY, (1, 9))
    for length in range(9, 50):
        model(ids if length == 9 else ids[:, :1], budget=0.5, past_key_values=cache)
    per_window = 2 + 11 + (2 if kv == "mask" else 0)  # the front in two, the blocks, the choice and its masks
    once = 1 + (11 if kv == "project" else 0) + (0 if kv == "mask" else 1)
    steps = [once + per_window] * 7 + [once + 2 * per_window] * 16 + [once + 3 * per_window] * 17
    assert counts == [0, *steps]


@torch.no_grad()
@pytest.mark.parametrize("how", ["recompute", "reuse"])
@pytest.mark.parametrize("kv", KV)
def test_a_path_walked_for_long_becomes_one_graph(how, kv, monkeypatch):
    monkeypatch.setattr(decoder, "PATH_STEPS", 3)
    monkeypatch.setattr(decoder, "KEPT_PATHS", 2)
    model = routed(tiny(blocks=12, seed=3), kv=kv)
    for batch, budgets in ((1, 0.5), (3, [0.5, 1.0, 0.75])):
        ids, mask = prompts(batch)
        pool = taped(first_window=64)
        for seed in range(3):
            cache = pool.lease(model, 64, batch)
            ids, mask = prompts(batch, seed=seed)
            found = decode(model, cache, ids, mask, 25, budgets, how)
            same(found, decode(model, RoutedCache(12, kv), ids, mask, 25, budgets, how))
            paths = [key for key in cache.graph._graphs if key[0] == "path"]
            assert {key[2] for key in paths} == {how == "reuse"}
            assert len(paths) <= 2
            del cache


@torch.no_grad()
def test_a_step_waits_for_the_device_once_and_only_to_choose():
    model = routed(tiny())
    for how, waits in (("recompute", 12), ("reuse", 0), (3, 4)):
        cache = taped().lease(model, 32, 2)
        decode(model, cache, *prompts(batch=2), 12, 5 / 7, how)
        assert cache.graph._recorder.waits == waits


# ---- whose decoder ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_caches_alive_at_once_do_not_share_a_decoder():
    model = routed(tiny())
    pool = taped()
    caches = [pool.lease(model, 32, 3) for _ in range(2)]
    expected = decode(model, RoutedCache(7), *prompts(), 1, 5 / 7, "recompute")
    for cache in caches:
        model(*prompts(), budget=5 / 7, past_key_values=cache)
    assert caches[0].graph is not caches[1].graph
    used = {id(cache.graph) for cache in caches}
    del caches, cache
    again = [pool.lease(model, 20, 3) for _ in range(2)]
    assert {id(cache.graph) for cache in again} == used
    same(decode(model, again[0], *prompts(), 1, 5 / 7, "recompute"), expected)


def test_a_decoder_is_free_as_soon_as_its_cache_is_gone():
    model = routed(tiny())
    pool = taped()
    gc.disable()
    try:
        with torch.no_grad():
            cache = pool.lease(model, 32, 3)
            decoder = cache.graph
            decode(model, cache, *prompts(), 3, 5 / 7, "recompute")
            assert not decoder.free
            del cache
            assert decoder.free
    finally:
        gc.enable()


def test_only_a_few_decoders_are_kept_and_the_smallest_that_fits_is_taken():
    model = routed(tiny())
    pool = uncaptured()
    for batch in (1, 2, 3, 4):
        pool.lease(model, 32, batch)
        assert len(pool._all) <= decoders.KEPT
    held = [pool.lease(model, 32, 1) for _ in range(4)]
    assert len({id(cache.graph) for cache in held}) == 4
    del held
    pool = uncaptured()
    large, small = pool.lease(model, 100, 2).graph, pool.lease(model, 100, 1).graph
    assert (large.capacity, small.capacity) == (128, 128)
    pool = uncaptured()
    both = [pool.lease(model, 100, 1), pool.lease(model, 30, 1)]
    large, small = (cache.graph for cache in both)
    del both
    assert pool.lease(model, 20, 1).graph is small
    assert pool.lease(model, 33, 1).graph is large


@torch.no_grad()
def test_graphs_are_not_used_for_weights_that_have_moved():
    model = routed(tiny())
    pool = taped()
    decode(model, pool.lease(model, 32, 3), *prompts(), 3, 5 / 7, "recompute")
    for parameter in model.backbone.parameters():
        parameter.data = parameter.data * 1.5
    found = decode(model, pool.lease(model, 32, 3), *prompts(), 3, 5 / 7, "recompute")
    same(found, decode(model, RoutedCache(7), *prompts(), 3, 5 / 7, "recompute"))
    for parameter in model.backbone.parameters():
        parameter.mul_(0.5)  # in place: the same graphs read the new values
    kept = pool.lease(model, 32, 3)
    assert kept.graph.graphs > 0
    found = decode(model, kept, *prompts(), 3, 5 / 7, "recompute")
    same(found, decode(model, RoutedCache(7), *prompts(), 3, 5 / 7, "recompute"))


def test_generations_with_gradients_and_in_inference_mode_may_follow_each_other():
    model = routed(tiny())
    pool = taped()
    expected = None
    for context in (torch.enable_grad(), torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with context:
            found = decode(model, pool.lease(model, 32, 3), *prompts(), 4, 5 / 7, "recompute")
        found = [(logits.detach().clone(), route) for logits, route in found]
        expected = expected or found
        same(found, expected)
    assert len(pool._all) == 1


# ---- generate --------------------------------------------------------------------------------------------------------


def graphing(model, monkeypatch, make=taped):
    """The same model, whose caches have recorded steps although it is on a CPU."""
    twin = RoutedModel(model.backbone, model.policy, model.kv).eval()
    pool = make()
    monkeypatch.setattr(decoders, "obstacle", lambda _: None)
    monkeypatch.setattr(decoders, "lease", lambda model, capacity, batch: pool.lease(model, capacity, batch))
    return twin, pool


@pytest.mark.parametrize("kv", KV)
def test_generate_samples_stops_and_streams_as_usual(backbone, kv, monkeypatch):
    model = routed(backbone, kv=kv)
    twin, pool = graphing(model, monkeypatch)
    ids, mask = prompts()

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    greedy = {"budget": [4 / 7, 5 / 7, 1.0], "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, mask, engine="eager", **greedy)
    trace = model.trace.steps
    assert torch.equal(twin.generate(ids, mask, engine="graph", **greedy), plain)
    assert all(torch.equal(*pair) for pair in zip(twin.trace.steps, trace, strict=True))
    stop = int(plain[0, -3])
    stopped = {**greedy, "eos_token_id": stop, "pad_token_id": 0}
    assert torch.equal(
        twin.generate(ids, mask, engine="graph", **stopped), model.generate(ids, mask, engine="eager", **stopped)
    )
    sampled = {**greedy, "do_sample": True, "top_k": 20, "temperature": 1.5}
    torch.manual_seed(4)
    one = twin.generate(ids, mask, engine="graph", **sampled)
    torch.manual_seed(4)
    assert torch.equal(one, model.generate(ids, mask, engine="eager", **sampled))
    several = {**greedy, "budget": 5 / 7, "do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(5)
    one = twin.generate(ids, mask, engine="graph", **several)
    torch.manual_seed(5)
    assert torch.equal(one, model.generate(ids, mask, engine="eager", **several))
    streamer = Streamer()
    alone = twin.generate(ids[:1], engine="graph", streamer=streamer, **{**greedy, "budget": 5 / 7})
    assert streamer.tokens == [*alone[0].tolist(), "end"]
    assert len(pool._all) <= decoders.KEPT + 1
    assert sum(decoder.graphs for _, decoder in pool._all) > 0


def test_auto_takes_graphs_where_they_pay(monkeypatch, caplog):
    model, pool = graphing(routed(tiny()), monkeypatch)
    ids, _ = prompts(batch=1)
    call = {"budget": 5 / 7, "do_sample": False}
    model.generate(ids, max_new_tokens=8, **call)
    assert pool._all == []
    auto = model.generate(ids, max_new_tokens=40, **call)
    assert pool._all[0][1].graphs > 0
    assert torch.equal(auto, model.generate(ids, max_new_tokens=40, engine="eager", **call))
    model.generate(ids, max_length=49, **call)
    assert len(pool._all) == 1
    with pytest.raises(UserError, match="engine: 'fast' is not one of"):
        model.generate(ids, max_new_tokens=40, engine="fast", **call)


def test_what_stands_in_the_way_of_graphs_is_named(backbone, caplog):
    model = routed(backbone)
    with caplog.at_level(logging.INFO):
        assert type(model.new_cache(16, engine="graph")) is RoutedCache
        assert type(model.new_cache(16, engine="auto")) is RoutedCache
        assert type(model.new_cache(16)) is RoutedCache
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "no CUDA graphs: the model is not on a GPU"),
        ("INFO", "no CUDA graphs: the model is not on a GPU"),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.backbone.train(), "the backbone is in training mode"),
        (
            lambda model: setattr(model.policy, "capturable", False),
            "BuddyPolicy decides in a way that cannot be captured",
        ),
        (
            lambda model: setattr(model.backbone.model.rotary_emb, "rope_type", "dynamic"),
            "the rotary embedding 'dynamic' changes with the length",
        ),
        (lambda model: None, None),
    ],
)
def test_obstacles(change, reason, monkeypatch):
    model = routed(tiny())
    monkeypatch.setattr(RoutedModel, "device", torch.device("cuda"))
    change(model)
    assert decoders.obstacle(model) == reason


# ---- what a capture may hold -----------------------------------------------------------------------------------------


class OnlyCapturable(TorchDispatchMode):
    """Fails on what a CUDA graph cannot hold; counts the operations that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        check(func, args)
        self.kernels += not any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_pieces_ask_the_device_for_nothing(architecture, kv, batch, monkeypatch):
    """On tensors that have no values: what needs one fails, and so does a tensor of the host among them."""
    with torch.device("meta"):
        model, policy = tiny(architecture), BuddyPolicy(7, 16, "key+value", 2)
        pieces = Pieces(model, policy, kv, batch, 512)
        pieces.state = policy.begin(5 / 7, batch, torch.device("meta"))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no such device
    some = (ALL, ALL, ALL if batch == 1 else SOME, NONE, ALL, NONE, ALL)
    keys = [("front", 256), ("choose", 256, None), ("observe", 0), ("block", 256, 3), ("block", 256, 6), ("tail", 0)]
    keys += [("path", 512, True, some), ("path", 512, False, some)]
    keys += [("hold", 256)] if kv == "mask" else [("project", 0, 3)]
    for key in keys:
        with OnlyCapturable() as counted:
            pieces.do(key)
        assert counted.kernels > 0


@torch.no_grad()
def test_lean_modules_compute_what_the_usual_ones_do(backbone):
    ids, mask = prompts()
    usual = backbone(ids, mask, output_hidden_states=True)
    names = {name: dict(vars(module)) for name, module in backbone.named_modules()}
    calls = []
    with lean(backbone.model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "rms_norm", lambda *args: calls.append(1) or torch.rms_norm(*args))
        found = backbone(ids, mask, output_hidden_states=True)
    assert len(calls) == 7 * (4 if backbone.config.model_type == "qwen3" else 2) + 1
    for one, other in zip(found.hidden_states, usual.hidden_states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert {name: dict(vars(module)) for name, module in backbone.named_modules()} == names  # nothing is left behind
    assert torch.equal(backbone(ids, mask).logits, usual.logits)


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
def test_in_bfloat16_captured_steps_are_no_further_from_the_truth(backbone, kv):
    ids, mask = prompts()
    exact = RoutedModel(backbone, StaticPolicy(7, [2, 5]), kv).eval()
    model = RoutedModel(copy.deepcopy(backbone).bfloat16(), StaticPolicy(7, [2, 5]), kv).eval()
    call = (ids, mask, 20, [1.0, 5 / 7, 6 / 7], "recompute")
    truth = decode(exact, RoutedCache(7, kv), *call)
    eager, captured = decode(model, RoutedCache(7, kv), *call), decode(model, taped().lease(model, 32, 3), *call)

    def error(found):
        return torch.stack(
            [(ours - true).norm() / true.norm() for (ours, _), (true, _) in zip(found, truth, strict=True)]
        ).mean()

    assert 0 < error(captured) < 1.2 * error(eager)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_model(request):
    architecture, kv = request.param
    return routed(tiny(architecture, blocks=12), kv=kv).to("cuda")


every_model = pytest.mark.parametrize(
    "gpu_model", [(architecture, kv) for architecture in sorted(ARCHITECTURES) for kv in KV], indirect=True
)


@pytest.mark.gpu
@on_gpu
@torch.no_grad()
@every_model
@pytest.mark.parametrize("how", DECODE)
@pytest.mark.parametrize("batch", [1, 3])
def test_on_a_gpu_captured_steps_are_those_of_the_eager_engine(gpu_model, how, batch):
    budgets = [0.5, 1.0, 0.75][:batch]
    pool = Decoders(first_window=16)
    for seed in range(3):
        ids, mask = prompts(batch, seed=seed)
        cache = pool.lease(gpu_model, 64, batch)
        found = decode(gpu_model, cache, ids, mask, 40, budgets, how)
        same(found, decode(gpu_model, RoutedCache(12, gpu_model.kv), ids, mask, 40, budgets, how), 1e-3)
        decoder = cache.graph
        assert decoder is not None
        if seed == 0:
            graphs = decoder.graphs
        del cache
    assert decoder.graphs == graphs
    assert 3 * 13 <= graphs <= 3 * 2 * 15 + 13
    assert decoder.capture_seconds > 0


@pytest.mark.gpu
@on_gpu
@torch.no_grad()
@every_model
def test_on_a_gpu_greedy_tokens_are_the_same(gpu_model):
    ids, mask = (tensor.cuda() for tensor in prompts())
    call = {"budget": [0.5, 1.0, 0.75], "max_new_tokens": 64, "do_sample": False}
    eager = gpu_model.generate(ids, mask, engine="eager", **call)
    for _ in range(2):
        assert torch.equal(gpu_model.generate(ids, mask, engine="graph", **call), eager)
    static = RoutedModel(gpu_model.backbone, StaticPolicy(12, [3, 7]), gpu_model.kv).eval()
    call["budget"] = 10 / 12
    eager = static.generate(ids, mask, engine="eager", **call)
    assert torch.equal(static.generate(ids, mask, engine="graph", **call), eager)


@pytest.mark.gpu
@on_gpu
@torch.no_grad()
@every_model
def test_on_a_gpu_a_step_does_not_synchronise(gpu_model):
    """The host waits for one event in a step; no operation makes it wait for the device."""
    cache = gpu_model.new_cache(64, engine="graph", batch=1)
    ids = prompts(batch=1)[0].cuda()
    for new in (ids, ids[:, :1], ids[:, :1]):
        gpu_model(new, budget=0.5, past_key_values=cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            gpu_model(ids[:, :1], budget=0.5, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.graph is not None


@pytest.mark.gpu
@on_gpu
@torch.no_grad()
def test_on_a_gpu_many_generations_do_not_take_more_memory():
    model = routed(tiny(blocks=12)).to("cuda").bfloat16()
    ids = prompts(batch=1)[0].cuda()
    used = []
    for _ in range(6):
        model.generate(ids, budget=0.5, max_new_tokens=300, do_sample=False, engine="graph")
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[1]
