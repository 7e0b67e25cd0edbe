"""The benchmark times what it says: real passes at real depths, compared within a repeat, whatever the machine does."""

import json
import statistics
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import tiny
from tape import Tape

from buddy import runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.commands.latency import latency as command
from buddy.errors import BudgetError, UserError
from buddy.evaluation import latency
from buddy.evaluation.latency import Entry, Racer, batches, benchmark, contender, heats, race, usable_engines
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.graphs.decoders import Decoders
from buddy.routing.kv import RoutedCache
from buddy.routing.model import RoutedModel
from buddy.routing.sliced import sliced
from buddy.settings import Latency
from buddy.study.records import Record, find

EXECUTIONS = ["dense", "sliced", "reuse", "recompute", "mixed"]
PROMPTS = ["one prompt", "another, longer prompt", "third"]  # 10, 22 and 5 tokens, one per byte
SETTINGS = Latency(prompts=3, new_tokens=6, batch_sizes=[1, 2], repeats=3, warmup=1, turn=4, executions=EXECUTIONS)
MORE = {"executions": [*EXECUTIONS, "full", "varied", "nested"], "slack": [0, 3]}
CPU = torch.device("cpu")


@pytest.fixture
def model():
    backbone = tiny("llama", blocks=8)
    backbone.resize_token_embeddings(300)
    return RoutedModel(backbone, BuddyPolicy(8, 16), tokenizer=byte_tokenizer()).eval()


@pytest.fixture
def ran(model):
    """Sequences that passed each block, counted by hooks on the backbone's own modules."""
    rows = []
    for layer in model.backbone.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


@pytest.fixture
def machine(model, monkeypatch):
    """A machine whose clock moves only when a sequence passes a block, by a cost that may change as it goes."""
    latency.copy_gb_s(CPU)  # kept from here on: it needs the real clock
    state = SimpleNamespace(now=0.0, passed=0, cost=lambda passed: 1.0)

    def tick(_, inputs):
        state.now += len(inputs[0]) * state.cost(state.passed)
        state.passed += 1

    for layer in model.backbone.model.layers:
        layer.mlp.register_forward_pre_hook(tick)
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: state.now))
    return state


def one_batch(model, size, new_tokens):
    return batches(model, PROMPTS[:size], size, new_tokens)[0]


# ---- what takes part -------------------------------------------------------------------------------------------------


def test_a_heat_has_one_depth_and_a_mixed_one_the_depths_of_its_ideal():
    assert heats([2, 4], EXECUTIONS, 1) == [
        [Entry(name, (0 if name == "dense" else depth,)) for name in EXECUTIONS[:4]] for depth in (2, 4)
    ]
    *by_depth, mixed = heats([2, 4], EXECUTIONS, 4)
    assert [{entry.depths for entry in heat} for heat in by_depth] == [{(0,) * 4, (n,) * 4} for n in (2, 4)]
    assert mixed == [
        Entry("dense", (0,) * 4),
        Entry("sliced", (2,) * 4),
        Entry("sliced", (4,) * 4),
        Entry("mixed", (0, 2, 4, 0)),
    ]
    assert heats([2, 4, 6], ["mixed"], 2)[0][1:] == [Entry("sliced", (2, 2)), Entry("mixed", (0, 2))]
    assert heats([2, 4], ["mixed"], 1) == heats([2, 4], ["dense"], 1) == [[Entry("dense", (0,))]]


def test_varied_routes_have_a_heat_of_their_own_and_bounds_only_where_several_sequences_could_share():
    asked = ["sliced", "recompute", "varied", "full", "nested"]
    one = [("sliced", None), ("varied", None)]
    for size, bounds in ((1, []), (4, [("varied", 0), ("varied", 2)])):
        trained, drawn, full, *nested = heats([3], asked, size, [0, 2])
        assert [entry.execution for entry in trained] == ["dense", "sliced", "recompute"]
        assert [(entry.execution, entry.slack) for entry in drawn[1:]] == one + bounds
        assert {entry.depths for entry in drawn[1:]} == {(3,) * size}
        assert full == [Entry("dense", (0,) * size), Entry("full", (0,) * size)]
        assert len(nested) == (size > 1)
    nested = heats([3, 5], ["nested"], 4)[0]
    assert nested[1:] == [Entry("sliced", (3,) * 4), Entry("nested", (3, 5, 3, 5), 0)]
    assert heats([3], ["sliced", "varied"], 1) == [
        [Entry(name, (d,)) for name, d in (("dense", 0), ("sliced", 3), ("varied", 3))]
    ]


def test_without_a_gpu_graphs_are_left_out_with_a_line_and_refused_alone(caplog):
    caplog.set_level("INFO")
    assert usable_engines(["graph", "eager"], CPU) == ["eager"]
    assert [record.message for record in caplog.records if "graph" in record.message] == [
        "engine graph is left out: it captures CUDA graphs, and the model is not on a GPU"
    ]
    with pytest.raises(UserError, match="'graph' needs a GPU"):
        usable_engines(["graph"], CPU)
    assert usable_engines(["graph", "eager"], torch.device("cuda")) == ["eager", "graph"]


def test_graphs_are_captured_in_at_least_one_untimed_repeat():
    assert latency.warmups("graph", SETTINGS.model_copy(update={"warmup": 0})) == 1
    assert latency.warmups("eager", SETTINGS.model_copy(update={"warmup": 0})) == 0


def test_a_cache_that_captures_nothing_is_not_timed_as_graph(model):
    pretending = RoutedModel(model.backbone, model.policy, tokenizer=model.tokenizer)
    pretending.new_cache = lambda *_, **__: SimpleNamespace(graph=None)
    with pytest.raises(UserError, match="graph"):
        contender(Entry("recompute", (2,)), pretending, "graph").begin(8)


def test_every_batch_is_full_and_every_prompt_comes_up(model):
    lengths = [len(prompt) for prompt in PROMPTS]

    def tokens(size):
        return [batch.mask[:, :-5].sum(-1).tolist() for batch in batches(model, PROMPTS, size, 5)]

    assert tokens(1) == [[length] for length in sorted(lengths)]
    assert tokens(2) == [[5, 10], [10, 22]]  # by length: little padding for anybody
    assert tokens(4) == [[5, 10, 10, 22]]
    batch = one_batch(model, 2, 5)
    assert batch.ids.shape == (2, 22)
    assert batch.mask[0].tolist() == [0] * 12 + [1] * 10 + [1] * 5
    assert model.tokenizer.decode(batch.ids[0, 12:]) == PROMPTS[0]


# ---- what runs -------------------------------------------------------------------------------------------------------


def test_each_contender_runs_the_depth_it_claims(model, ran):
    for entry in heats([3], EXECUTIONS, 2)[0]:
        racer = Racer(contender(entry, model, "eager"), one_batch(model, 2, 5), 27)
        ran.clear()
        race([racer], new_tokens=5, turn=2, shift=0)
        assert sum(ran) == 2 * (8 - entry.depths[0]) * 6  # two sequences, a prefill and five steps


def test_a_mixed_batch_runs_the_sum_of_its_budgets(model, ran):
    entry = heats([2, 5], EXECUTIONS, 4)[-1][-1]
    batch = batches(model, PROMPTS, 4, 5)[0]
    race([Racer(contender(entry, model, "eager"), batch, 27)], new_tokens=5, turn=2, shift=0)
    assert sum(ran) == (8 + 6 + 3 + 8) * 6


@pytest.mark.parametrize("slack", [None, 0, 1])
@torch.no_grad()
def test_varied_routes_differ_and_keep_depth_and_bound(model, slack):
    called = []
    for index, layer in enumerate(model.backbone.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, inputs, index=index: called.append((index, len(inputs[0]))))
    batch, new = batches(model, PROMPTS, 4, 12)[0], 12

    def run():
        found, racer = [], Racer(contender(Entry("varied", (4,) * 4, slack), model, "eager", new + 1), batch, 34)
        for step in range(new + 1):
            called.clear()
            racer.prefill() if step == 0 else racer.decode(1)
            assert sum(rows for _, rows in called) == 4 * 4
            found.append((len({index for index, _ in called}), racer.contender.router.trace.steps[-1]))
        assert [(ran.called, ran.executed) for ran in racer.ran] == [(blocks, 16) for blocks, _ in found[1:]]
        assert [ran.paths for ran in racer.ran] == [len(route.unique(dim=0)) for _, route in found[1:]]
        return found

    found = run()
    most = max(blocks for blocks, _ in found)
    assert most <= 8 if slack is None else most == 4 + slack
    if slack is None:
        assert most > 6
    routes = torch.stack([route for _, route in found])
    assert len(routes[:, 0].unique(dim=0)) > 3  # one sequence, step by step
    assert (routes[..., 1:-1].float().mean((0, 1)) - 2 / 6).abs().max() < 0.25  # no block is preferred
    assert torch.equal(torch.stack([route for _, route in run()]), routes)  # the same in every repeat


@pytest.mark.parametrize("slack", [None, 0])
@torch.no_grad()
def test_varied_routes_are_captured_as_any_others(model, slack):
    router = latency._varied(model, 2, 9)
    found = []
    for cache in (Decoders(lambda _: Tape(), 8).lease(router, 32, 2), RoutedCache(8)):
        for step in range(9):
            ids = one_batch(model, 2, 1).ids if step == 0 else torch.full((2, 1), 7 + step)
            logits = router(ids, budget=0.5, slack=slack, past_key_values=cache).logits[:, -1]
            found.append((router.trace.steps[-1], logits))
    for (route, logits), (other, expected) in zip(found[:9], found[9:], strict=True):
        assert torch.equal(route, other)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert len({route.numpy().tobytes() for route, _ in found}) == 9


def test_routes_are_drawn_for_a_router_only(static):
    with pytest.raises(UserError, match="not for StaticPolicy"):
        contender(Entry("varied", (2,)), static, "eager")


def test_full_is_the_engine_with_all_blocks(model, ran):
    racer = Racer(contender(Entry("full", (0, 0)), model, "eager"), one_batch(model, 2, 5), 27)
    race([racer], new_tokens=5, turn=2, shift=0)
    assert sum(ran) == 2 * 8 * 6
    assert racer.contender.router is model
    assert {(ran.executed, ran.called, ran.paths) for ran in racer.ran} == {(16, 8, 1)}


def test_everybody_has_a_cache_with_room_for_all_tokens(model):
    batch = one_batch(model, 2, 5)
    for entry in (Entry("dense", (0, 0)), Entry("sliced", (3, 3)), Entry("recompute", (3, 3))):
        racer = Racer(contender(entry, model, "eager"), batch, 27)
        racer.prefill()
        before = racer.cache.blocks[0].keys.data_ptr()
        racer.decode(5)
        assert racer.cache.length == racer.cache.capacity == 27
        assert racer.cache.blocks[0].keys.data_ptr() == before


@pytest.fixture
def static(model):
    """A static peer's run: it leaves out block 4, then block 1, then the first one."""
    return RoutedModel(model.backbone, StaticPolicy(8, [4, 1, 0]), tokenizer=model.tokenizer).eval()


@pytest.mark.parametrize("execution", ["sliced", "reuse", "recompute"])
@pytest.mark.parametrize("removed", [1, 2, 3])
@torch.no_grad()
def test_a_static_run_is_timed_without_its_own_blocks(static, execution, removed):
    called = []
    for index, layer in enumerate(static.backbone.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: called.append(index))
    each = contender(Entry(execution, (removed,) * 2), static, "eager")
    batch = one_batch(static, 2, 3)
    logits = each.step(batch.ids, batch.mask[:, :22], each.begin(25))
    kept = [index for index in range(8) if index not in [4, 1, 0][:removed]]
    assert called == kept
    expected = sliced(static.backbone, kept)(batch.ids, attention_mask=batch.mask[:, :22]).logits[:, -1]
    torch.testing.assert_close(logits, expected)


class Deeper(StaticPolicy):
    """A policy that does not keep the budget: every other sequence runs one block more."""

    def decide(self, state):
        return state | (torch.arange(len(state)) % 2 == 1).unsqueeze(1) & (torch.arange(8) == 4)


def test_depth_is_what_ran_and_a_sliced_model_of_another_depth_is_no_limit(model):
    deeper = RoutedModel(model.backbone, Deeper(8, [4, 1, 0]), tokenizer=model.tokenizer).eval()
    settings = SETTINGS.model_copy(update={"executions": ["sliced", "reuse"], "repeats": 1, "warmup": 0})
    found = {
        (timing.batch_size, timing.entry.execution): timing.metrics
        for timing in benchmark(deeper, PROMPTS, [2], settings, "alpaca")
    }
    depths = {key: metrics["executed_mean"] for key, metrics in found.items()}
    assert depths == {
        **dict.fromkeys([(1, "dense"), (2, "dense")], 8),
        **dict.fromkeys([(1, "sliced"), (2, "sliced")], 6),
    } | {
        (1, "reuse"): 6,  # alone, a sequence is the first of its batch
        (2, "reuse"): 6.5,
    }
    assert found[1, "reuse"]["decode_of_sliced"] is not None
    for phase in ("prefill", "decode"):
        assert found[2, "reuse"][f"{phase}_of_sliced"] is None
        assert found[2, "reuse"][f"{phase}_speedup"] is not None


def test_turns_decode_the_tokens_that_generate_does(model):
    batch = one_batch(model, 2, 6)
    fed = []
    real = contender(Entry("dense", (0, 0)), model, "eager")
    spy = replace(real, step=lambda ids, mask, cache: (fed.append(ids), real.step(ids, mask, cache))[1])
    race([Racer(spy, batch, 28)], new_tokens=6, turn=4, shift=0)
    expected = model.backbone.generate(
        batch.ids, attention_mask=batch.mask[:, :22], max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert torch.equal(torch.cat(fed, dim=1), expected)


def test_turns_are_short_and_their_order_rotates(model):
    steps = []

    def spied(entry):
        real = contender(entry, model, "eager")

        def step(ids, mask, cache):
            steps.append((entry.execution, ids.shape[1]))
            return real.step(ids, mask, cache)

        return replace(real, step=step)

    racing = [spied(entry) for entry in heats([2], ["sliced", "recompute"], 1)[0]]
    batch = one_batch(model, 1, 5)
    race([Racer(each, batch, 15) for each in racing], new_tokens=5, turn=2, shift=1)
    d, s, r = "dense", "sliced", "recompute"
    assert steps[:3] == [(s, 10), (r, 10), (d, 10)]
    assert [name for name, _ in steps[3:]] == [s, s, r, r, d, d, r, r, d, d, s, s, d, s, r]
    assert {length for _, length in steps[3:]} == {1}


@pytest.mark.parametrize("entry", [Entry("dense", (0, 0)), Entry("sliced", (3, 3))], ids=lambda entry: entry.execution)
@torch.no_grad()
def test_the_fixed_paths_that_are_captured_compute_what_the_plain_models_do(model, ran, entry):
    plain, fixed = (contender(entry, model, engine) for engine in ("eager", "graph"))
    batch = one_batch(model, 2, 3)
    caches = plain.begin(25), RoutedCache(plain.backbone.config.num_hidden_layers, "zero", 25)
    ids = batch.ids
    for length in (22, 23, 24):
        ran.clear()
        expected, found = (
            each.step(ids, batch.mask[:, :length], cache) for each, cache in zip((plain, fixed), caches, strict=True)
        )
        assert sum(ran) == 2 * 2 * (8 - entry.depths[0])
        torch.testing.assert_close(found, expected)
        ids = expected.argmax(-1, keepdim=True)


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_every_record_is_there_with_its_figures(model):
    found = benchmark(model, PROMPTS, [2, 4], SETTINGS, "alpaca")
    by_path = {str(timing.path): timing.metrics for timing in found}
    cells = [("dense", 0)] + [(name, depth) for name in EXECUTIONS[1:4] for depth in (2, 4)]
    paths = {f"batch~{b}/engine~eager/execution~{name}/removed~{n}.json" for b in (1, 2) for name, n in cells}
    assert set(by_path) == paths | {"batch~2/engine~eager/execution~mixed/removed~mixed.json"}
    assert len(found) == len(by_path)
    for path, metrics in by_path.items():
        size = metrics["batch_size"]
        assert path.startswith(f"batch~{size}/engine~{metrics['engine']}/execution~{metrics['execution']}/")
        assert metrics["prompt_tokens_mean"] == pytest.approx(
            (10 + 22 + 5) / 3 if size == 1 else (10 + 22 + 5 + 10) / 4
        )
        repeats = 3 * (2 if size == 1 else 3) if metrics["execution"] == "dense" else 3  # dense is in every heat
        assert metrics["repeats"] == repeats
        for phase in ("prefill", "decode"):
            rate = metrics[f"{phase}_tok_s"]
            assert len(rate["values"]) == repeats
            assert rate["median"] == statistics.median(rate["values"])
            assert min(rate["values"]) <= rate["p10"] <= rate["median"] <= rate["p90"] <= max(rate["values"])
        assert metrics["peak_memory_mb"] is None or metrics["peak_memory_mb"] > 100  # the process, PyTorch included
        assert metrics["called_mean"] == metrics["executed_mean"] or size == 2
        assert metrics["paths_mean"] == 1 or size == 2
        assert metrics["capture"] is None
        assert metrics["copy_gb_s"] > 0
    assert by_path["batch~2/engine~eager/execution~mixed/removed~mixed.json"]["removed_per_sequence"] == [0, 2]
    json.dumps([timing.metrics for timing in found], allow_nan=False)


def test_ratios_are_those_within_a_repeat(model):
    found = benchmark(model, PROMPTS, [2, 4], SETTINGS.model_copy(update={"batch_sizes": [2]}), "alpaca")
    by_cell = {(timing.entry.execution, timing.entry.removed): timing.metrics for timing in found}
    for phase in ("prefill", "decode"):

        def values(execution, depth, name="tok_s", phase=phase):
            return by_cell[execution, depth][f"{phase}_{name}"]["values"]

        for heat, depth in enumerate((2, 4)):
            dense = values("dense", 0)[3 * heat : 3 * heat + 3]  # its repeats stand in the order of the heats
            for name in ("sliced", "reuse", "recompute"):
                own = values(name, depth)
                assert values(name, depth, "speedup") == pytest.approx([a / b for a, b in zip(own, dense, strict=True)])
                if name != "sliced":
                    limit = values("sliced", depth)
                    expected = [a / b for a, b in zip(own, limit, strict=True)]
                    assert values(name, depth, "of_sliced") == pytest.approx(expected)
                    assert by_cell[name, depth][f"{phase}_of_sliced"]["median"] == pytest.approx(
                        statistics.median(expected)
                    )
        own, dense = values("mixed", "mixed"), values("dense", 0)[6:]
        assert values("mixed", "mixed", "speedup") == pytest.approx([a / b for a, b in zip(own, dense, strict=True)])
    for (execution, _), metrics in by_cell.items():
        for phase in ("prefill", "decode"):
            assert (metrics[f"{phase}_speedup"] is None) == (execution == "dense")
            assert (metrics[f"{phase}_of_sliced"] is None) == (execution not in ("reuse", "recompute"))
            assert (metrics[f"{phase}_of_ideal"] is None) == (execution != "mixed")
        assert (
            (metrics["removed_per_sequence"] is None) == (metrics["total_of_ideal"] is None) == (execution != "mixed")
        )


def test_where_only_blocks_cost_time_the_ratios_are_those_of_the_depths(model, machine):
    found = benchmark(model, PROMPTS, [2, 4], SETTINGS.model_copy(update={"batch_sizes": [4]}), "alpaca")
    for timing in found:
        execution, metrics = timing.entry.execution, timing.metrics
        executed = {"dense": 8, "mixed": (8 + 6 + 4 + 8) / 4}.get(execution, 8 - timing.entry.depths[0])
        # A repeat: one batch of four prompts (10, 22, 5 and again 10 tokens), each sequence paying 1 s for a block.
        assert metrics["decode_tok_s"]["values"] == pytest.approx([1 / executed] * metrics["repeats"])
        assert metrics["prefill_tok_s"]["median"] == pytest.approx(47 / (4 * executed))
        for phase in ("prefill", "decode"):
            if execution != "dense":
                assert metrics[f"{phase}_speedup"]["median"] == pytest.approx(8 / executed)
            if execution in ("reuse", "recompute"):
                assert metrics[f"{phase}_of_sliced"]["median"] == pytest.approx(1)
            if execution == "mixed":
                assert metrics[f"{phase}_of_ideal"]["median"] == pytest.approx(1)


def test_a_mixed_batch_that_pays_full_depth_falls_short_of_its_ideal(model, machine):
    entries = heats([2, 4], ["mixed"], 4)[0]
    pretending = Entry("mixed", (0, 2, 4, 0))
    assert entries[-1] == pretending
    racing = {entry: contender(entry, model, "eager") for entry in entries}
    racing[pretending] = replace(racing[entries[0]], entry=pretending)  # dense, under the name of mixed
    batch = batches(model, PROMPTS, 4, 6)[0]
    results = {}
    for entry, each in racing.items():
        racer = Racer(each, batch, 28)
        race([racer], 6, 4, 0)
        results[entry] = latency.Result([dict.fromkeys(latency.PHASES, 0.0)], 0.0, None)
        results[entry].add(racer, 0)
    metrics = latency._metrics([results], latency.Amount.of([batch], 6), ["mixed"])[pretending]
    assert metrics["decode_of_ideal"]["median"] == pytest.approx((8 + 6 + 4 + 8) / (4 * 8))
    assert metrics["total_of_ideal"]["median"] == pytest.approx((8 + 6 + 4 + 8) / (4 * 8))


def test_where_only_reading_blocks_costs_time_the_limit_is_that_of_the_called_ones(model, machine):
    """A pass of a block takes a second however many sequences are in it, and the head another."""
    for layer in model.backbone.model.layers:
        layer.mlp._forward_pre_hooks.clear()
        layer.mlp.register_forward_pre_hook(lambda *_: setattr(machine, "now", machine.now + 1))
    model.backbone.lm_head.register_forward_pre_hook(lambda *_: setattr(machine, "now", machine.now + 1))
    asked = {"executions": ["sliced", "varied", "nested", "recompute"], "slack": [0, 1], "batch_sizes": [4], "turn": 1}
    settings = SETTINGS.model_copy(update=asked)
    found = {
        (t.entry.execution, t.entry.slack, t.entry.removed): t.metrics
        for t in benchmark(model, PROMPTS, [2, 4], settings, "alpaca")
    }
    for depth in (2, 4):
        for slack in (0, 1):
            metrics = found["varied", slack, depth]
            assert metrics["called_mean"] == 8 - depth + slack
            assert metrics["slack"] == slack
            assert metrics["decode_speedup"]["median"] == pytest.approx(9 / (1 + 8 - depth + slack))
        for metrics in (found["varied", None, depth], found["varied", 1, depth]):
            assert metrics["decode_of_called"]["median"] == pytest.approx(1)
            assert metrics["decode_of_sliced"]["median"] < 1
        assert found["varied", None, depth]["called_mean"] > 8 - depth + 1
        assert found["varied", None, depth]["paths_mean"] > 2
        assert found["sliced", None, depth]["decode_of_called"] is None
    nested = found["nested", 0, "mixed"]
    assert nested["called_mean"] == 6
    assert nested["removed_per_sequence"] == [2, 4, 2, 4]
    assert nested["decode_of_called"]["median"] == pytest.approx(1)
    paths = {
        str(timing.path)
        for timing in benchmark(model, PROMPTS, [2], settings.model_copy(update={"repeats": 1}), "alpaca")
    }
    assert "batch~4/engine~eager/execution~varied/slack~1/removed~2.json" in paths
    assert "batch~4/engine~eager/execution~nested/removed~mixed.json" in paths


def test_a_machine_that_drifts_does_not_bias_the_ratio(model, machine, monkeypatch):
    """Every pass of a block takes longer than the one before: by its end a repeat runs at a third of its first speed."""

    monkeypatch.setattr(latency, "_peak_memory_mb", lambda *_: None)  # what it runs would be on this clock, too

    def speedup(turn):
        machine.passed = 0
        machine.cost = lambda passed: 1 + 2 * passed / (48 * (8 + 4))
        settings = Latency(new_tokens=48, repeats=1, warmup=0, turn=turn, executions=["sliced"], engines=["eager"])
        sliced = benchmark(model, PROMPTS[:1], [4], settings, "alpaca")[1]
        return sliced.metrics["decode_speedup"]["median"]

    assert speedup(turn=48) < 0.7 * 2  # one after the other: the later one looks slow
    assert speedup(turn=4) == pytest.approx(2, rel=0.02)


def test_bytes_of_a_decode_step_counted_by_hand(model):
    settings = SETTINGS.model_copy(update={"batch_sizes": [1, 4]})
    found = benchmark(model, PROMPTS, [2, 4], settings, "alpaca")
    block = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32)  # float32: q and o, k and v, the MLP, two norms
    rest = 4 * (32 + 300 * 32)  # final norm, head
    column = 4 * 2 * 16  # a key and a value of two heads of 8
    for timing in found:
        size, metrics = timing.batch_size, timing.metrics
        columns = ((10 + 22 + 5) / 3 if size == 1 else 22) + 6 / 2  # prompts padded, and half of what is decoded
        executed = [8 - depth for depth in timing.entry.depths]
        read = (
            metrics["decode_gb_s"] * 1e9 / (metrics["decode_tok_s"]["median"] / size) - sum(executed) * column * columns
        )
        if size == 1 or timing.entry.execution in ("dense", "sliced", "mixed"):  # mixed has a sequence that runs all
            assert read == pytest.approx(max(executed) * block + rest)
        else:  # a block is read once if any of the four sequences runs it
            assert max(executed) * block + rest - 1 <= read <= 8 * block + rest + 1


def test_the_bandwidth_of_a_copy_is_plausible():
    assert 0.1 < latency.copy_gb_s(CPU) < 10_000
    assert latency.copy_gb_s(CPU) == latency.copy_gb_s(CPU)  # measured once


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(model, tmp_path):
    """A run on disk and prompts, and the command's arguments for them."""
    backbone, run, data = tmp_path / "backbones/tiny", tmp_path / "run", tmp_path / "data/alpaca"
    model.backbone.save_pretrained(backbone)
    model.tokenizer.save_pretrained(backbone)
    where = runs.relative(backbone, run)
    info = runs.RunInfo("buddy", "buddy", model.policy.settings(), "tiny", where, {"feature": "value"}, 3, "small")
    runs.save(run, info, model.policy)
    data.mkdir(parents=True)
    rows = [{"id": str(n), "instruction": text, "input": "", "output": "x"} for n, text in enumerate(PROMPTS)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "data.json").write_text(json.dumps({"name": "alpaca"}))
    settings = SETTINGS.model_dump(exclude={"backbones", "methods", "datasets"}) | {
        "new_tokens": 2,
        "repeats": 1,
        "warmup": 0,
    }
    return {
        "run": run,
        "data": data,
        "removed": "2,5",
        "out": tmp_path / "out",
        "device": "cpu",
        "dtype": "auto",
    } | settings


def test_what_a_record_says_of_itself(arguments):
    command(**arguments | {"batch_sizes": "4"})
    records = [Record.read(path) for path in find(arguments["out"])]
    assert Counter(record.method for record in records) == {"dense": 1, "sliced": 2, "buddy": 5}
    for record in records:
        execution = record.metrics["execution"]
        assert (record.kind, record.study, record.backbone, record.seed) == ("latency", "small", "tiny", 3)
        assert record.n == record.metrics["repeats"] == (3 if execution == "dense" else 1)
        assert record.budget.executed == 8 - record.budget.removed
        if execution == "mixed":  # (0 + 2 + 5 + 0) / 4 = 1.75
            assert record.budget.removed == 2
        expected = {"reuse": "reuse", "recompute": "recompute", "mixed": "recompute"}.get(execution)
        assert record.variant == ({"feature": "value", "kv": "zero", "decode": expected} if expected else {})


def test_a_static_peer_is_timed_by_the_same_clock(arguments, static):
    run = arguments["run"]
    variant = {"removed": 2, "lora": "none"}
    where = runs.RunInfo.read(run).backbone_path
    info = runs.RunInfo("sleb", "static", static.policy.settings(), "tiny", where, variant, 3, "small")
    runs.save(run, info, static.policy)
    command(**arguments | {"removed": "2", "executions": "dense,sliced,reuse,mixed"})
    records = [Record.read(path) for path in find(arguments["out"])]
    depths = {(r.method, r.metrics["batch_size"], r.metrics["execution"]): r.metrics["executed_mean"] for r in records}
    assert depths == {
        **{("dense", size, "dense"): 8 for size in (1, 2)},
        **{("sliced", size, "sliced"): 6 for size in (1, 2)},
        **{("sleb", size, "reuse"): 6 for size in (1, 2)},
        ("sleb", 2, "mixed"): 7,
    }
    for record in records:
        decode = {"reuse": "reuse", "mixed": "recompute"}.get(record.metrics["execution"])
        assert record.variant == ({**variant, "kv": "zero", "decode": decode} if decode else {})
        if decode == "reuse":
            assert record.metrics["decode_of_sliced"]["median"] > 0
    with pytest.raises(BudgetError, match=r"--removed: [0-9]+ is not"):
        command(**arguments | {"removed": "2,5"})


def test_a_job_that_dies_leaves_no_record(arguments, monkeypatch):
    monkeypatch.setattr(latency, "_metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(**arguments)
    assert not arguments["out"].exists()


def test_graph_alone_is_refused_without_a_gpu(arguments):
    with pytest.raises(UserError, match="--engines"):
        command(**arguments | {"engines": "graph"})
    assert not arguments["out"].exists()
