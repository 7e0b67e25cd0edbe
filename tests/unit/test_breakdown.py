"""Time is booked where it was spent: brute force on made-up ranges and kernels, and sleeps in known places."""

import json
import random
import time
from contextlib import contextmanager

import pytest
import torch
from models import tiny
from typer.testing import CliRunner

from buddy import runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.cli import build
from buddy.evaluation.breakdown import (
    COMPONENTS,
    Kernel,
    Range,
    breakdown,
    joined,
    on_device,
    on_host,
    profile_pass,
    read_trace,
    routing_cost,
    stretches,
)
from buddy.policies.buddy import BuddyPolicy
from buddy.routing.kv import BlockCache
from buddy.routing.model import RoutedModel
from buddy.settings import Breakdown
from buddy.study.records import Record

PARTS = COMPONENTS[:-1]
SLEEP_MS = 50
IDS = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    backbone = tiny("llama", blocks=8)
    backbone.resize_token_embeddings(300)
    return RoutedModel(backbone, BuddyPolicy(8, 16), tokenizer=byte_tokenizer()).eval()


# ---- attribution -----------------------------------------------------------------------------------------------------


def nested(generator: random.Random, start: int, end: int, depth: int = 0) -> list[Range]:
    """Random ranges with whole ends, properly nested."""
    found, cursor = [], start
    while cursor < end and depth < 4:
        first = generator.randint(cursor, end)
        last = generator.randint(first, end)
        if last > first:
            found.append(Range(generator.choice(PARTS), first, last))
            found += nested(generator, first, last, depth + 1)
        cursor = max(last, cursor + 1)
    return found


def innermost(ranges: list[Range], instant: float) -> str:
    """The shortest range around an instant; of equals the one listed last, which was opened last."""
    around = [(item.end - item.start, -place, item.name) for place, item in enumerate(ranges)]
    around = [found for found, item in zip(around, ranges, strict=True) if item.start <= instant < item.end]
    return min(around)[2] if around else "other"


@pytest.mark.parametrize("seed", range(20))
def test_host_time_is_that_of_the_innermost_range_at_every_instant(seed):
    generator = random.Random(seed)
    root = Range("decode", 10, 90)
    ranges = [*nested(generator, 0, 10), root, *nested(generator, 10, 90), *nested(generator, 90, 100)]
    expected = dict.fromkeys(COMPONENTS, 0)
    inside = [item for item in ranges if item is not root]
    for microsecond in range(10, 90):
        expected[innermost(inside, microsecond + 0.5)] += 1
    assert on_host(ranges, root) == expected
    assert sum(expected.values()) == 80


def test_a_range_that_sticks_out_of_its_parent_by_a_digit_is_cut():
    block = [Range("backbone", 0, 10), Range("cache", 8, 10.001)]
    assert stretches(block) == [Range("backbone", 0, 8), Range("cache", 8, 10)]
    assert stretches([*block, Range("decision", 10, 12)])[-1] == Range("decision", 10, 12)


@pytest.mark.parametrize("seed", range(20))
def test_device_time_is_that_of_the_range_that_launched_it(seed):
    """Kernels run late, overlap, and were launched before, in and after the pass; some nobody knows the launch of."""
    generator = random.Random(seed)
    root = Range("prefill", 10, 90)
    ranges = [root, *nested(generator, 10, 90)]
    kernels = []
    for start in sorted(generator.sample(range(5, 89), 25)):
        launched = generator.choice([None, start - generator.randint(0, 9) - 0.5, start - 0.5])
        kernels.append(Kernel(start, min(start + generator.randint(1, 6), 90), launched))
    expected = dict.fromkeys(COMPONENTS, 0)
    for microsecond in range(10, 90):
        running = [
            kernel
            for kernel in kernels
            if kernel.start <= microsecond < kernel.end
            and 10 <= (kernel.start if kernel.launched is None else kernel.launched) < 90
        ]
        launched = running[0].launched if running else None
        expected["other" if launched is None else innermost(ranges[1:], launched)] += 1
    generator.shuffle(kernels)
    assert on_device(ranges, root, kernels) == pytest.approx(expected)


def test_a_device_that_waits_for_the_host_is_idle_time_not_the_parts():
    """Two short kernels in a long pass: a decision takes long on the host and little on the device."""
    ranges = [Range("decision", 0, 80), Range("backbone", 80, 100)]
    spent = on_device(ranges, Range("decode", 0, 100), [Kernel(79, 81, 70), Kernel(85, 95, 82)])
    assert spent == {"decision": 2, "backbone": 10, "gather_scatter": 0, "cache": 0, "other": 88}


def test_a_device_clock_that_runs_ahead_lengthens_the_pass():
    spent = on_device([Range("backbone", 0, 10)], Range("decode", 0, 10), [Kernel(2, 12, 1)])
    assert spent["backbone"] == 10
    assert sum(spent.values()) == 12


def test_a_trace_of_a_gpu_is_read_by_correlation(tmp_path):
    """As the profiler writes it: its own copies of ranges on the device's timeline are no work of the device."""

    def event(category, name, start, length, **arguments):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "args": arguments}

    events = [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        event("user_annotation", "buddy.decode", 0.0, 50.0),
        event("user_annotation", "buddy.backbone", 5.5, 20.0),
        event("user_annotation", "someone else's", 5.5, 20.0),
        event("cpu_op", "aten::mm", 6.0, 5.0),
        event("cuda_runtime", "cudaLaunchKernel", 7.0, 1.0, correlation=11),
        event("cuda_driver", "cuLaunchKernelEx", 9.0, 1.0, correlation=12),
        event("cuda_runtime", "cudaMemcpyAsync", 30.0, 1.0, correlation=13),
        event("kernel", "gemm", 20.0, 4.0, correlation=11, stream=7),
        event("kernel", "softmax", 26.0, 2.0, correlation=12, stream=7),
        event("gpu_memcpy", "Memcpy DtoH", 31.0, 1.0, correlation=13),
        event("gpu_memset", "Memset", 40.0, 1.0, correlation=99),
        event("gpu_user_annotation", "buddy.backbone", 20.0, 8.0),
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    ranges, kernels = read_trace(tmp_path / "trace.json")
    assert ranges == [Range("decode", 0, 50), Range("backbone", 5.5, 25.5)]
    assert kernels == [Kernel(20, 24, 7), Kernel(26, 28, 9), Kernel(31, 32, 30), Kernel(40, 41, None)]
    spent = on_device(ranges, ranges[0], kernels)
    assert spent == {"backbone": 6, "decision": 0, "gather_scatter": 0, "cache": 0, "other": 44}


# ---- real passes -----------------------------------------------------------------------------------------------------


@contextmanager
def sleeping(owner, name, ms=SLEEP_MS):
    """Within the context, a method sleeps before it does what it does."""
    original = getattr(owner, name)

    def slow(*arguments, **keywords):
        time.sleep(ms / 1e3)
        return original(*arguments, **keywords)

    setattr(owner, name, slow)
    try:
        yield
    finally:
        if isinstance(owner, type):
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def in_policy(model):
    return sleeping(model.policy, "decide"), 1


def in_cache(model):
    """Allocating the buffers of a block is part of its first write, inside the block."""
    return sleeping(BlockCache, "lazy_initialization"), 8


def in_block(model):
    return sleeping(model.backbone.model.layers[7].mlp, "forward"), 1


def in_head(model):
    return sleeping(model.backbone.lm_head, "forward"), 1


def in_bookkeeping(model):
    return sleeping(model.policy, "begin"), 1


@pytest.mark.parametrize(
    ("where", "component", "each_step"),
    [
        (in_policy, "decision", True),
        (in_cache, "cache", False),
        (in_block, "backbone", True),
        (in_head, "backbone", True),
        (in_bookkeeping, "other", False),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_sleep_is_booked_where_it_happens(model, where, component, each_step):
    steps = 3
    context, calls = where(model)
    with context:
        spent = profile_pass(model, IDS[:1], 1.0, steps)
    asleep = {"prefill": calls * SLEEP_MS, "decode": steps * calls * SLEEP_MS if each_step else 0}
    for phase, expected in asleep.items():
        for name in COMPONENTS:
            found = spent[phase][name] / 1e3
            least = expected if name == component else 0
            assert least <= found < least + max(SLEEP_MS, expected), (phase, name, found)


def test_nothing_of_it_stays_on_the_model(model):
    expected = model(IDS, budget=0.75).logits
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    profile_pass(model, IDS, 0.75, 2)
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.equal(model(IDS, budget=0.75).logits, expected)


def test_only_a_batch_whose_paths_differ_gathers_and_scatters(model):
    alike = profile_pass(model, IDS[:1].repeat(3, 1), 0.75, 3)
    mixed = profile_pass(model, IDS[:1].repeat(3, 1), [1.0, 0.75, 0.5], 3)
    for phase in ("prefill", "decode"):
        assert alike[phase]["gather_scatter"] == 0
        assert mixed[phase]["gather_scatter"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_on_a_gpu_kernels_count_and_waiting_is_other(model):
    model, steps = model.to("cuda"), 3
    with sleeping(model.policy, "decide"):
        spent = profile_pass(model, IDS[:1].repeat(3, 1).cuda(), [1.0, 0.75, 0.5], steps)
    for phase, calls in (("prefill", 1), ("decode", steps)):
        found = spent[phase]
        assert all(found[name] > 0 for name in COMPONENTS)
        assert found["other"] >= calls * SLEEP_MS * 1e3  # the host sleeps, the device idles
        assert sum(found[name] for name in PARTS) < found["other"]


def test_the_record_of_a_depth_adds_up(model):
    settings = Breakdown(batch_size=2, tokens=12, steps=3, repeats=2, contexts=[8, 16])
    found = dict(breakdown(model, ["a prompt", "another one"], [2, 4], settings))
    assert list(found) == [2, 4]
    for metrics in found.values():
        assert {key: metrics[key] for key in ("batch_size", "tokens", "steps")} == {
            "batch_size": 2,
            "tokens": 12,
            "steps": 3,
        }
        for phase in metrics["phases"].values():
            parts = phase["components"]
            assert tuple(parts) == COMPONENTS
            assert sum(part["percent"] for part in parts.values()) == pytest.approx(100)
            assert sum(part["ms"] for part in parts.values()) == pytest.approx(phase["total_ms"])
            assert all(part["ms"] > 0 for name, part in parts.items() if name != "gather_scatter")
            assert phase["unprofiled_ms"] > 0
        assert [entry["context"] for entry in metrics["contexts"]] == [8, 16]
        for entry in metrics["contexts"]:
            for way in ("routing_ms", "reread_ms"):
                assert len(entry[way]["values"]) == 2
                assert entry[way]["p10"] <= entry[way]["median"] <= entry[way]["p90"]


def test_milliseconds_are_per_decode_step(model):
    """A policy that sleeps at every step costs as much per step, however many steps there are."""
    settings = Breakdown(batch_size=1, tokens=4, steps=5, repeats=1, contexts=[4])
    with sleeping(model.policy, "decide", 10):
        ((_, metrics),) = breakdown(model, ["a prompt"], [2], settings)
    for phase in metrics["phases"].values():
        assert 10 <= phase["components"]["decision"]["ms"] < 20
        assert 10 <= phase["unprofiled_ms"] < 40


def test_prompts_have_the_length_that_was_asked_for():
    ids = joined(byte_tokenizer(), ["abc", "defgh"], 3, 7)
    tokens = {text: byte_tokenizer()(text).input_ids for text in ("abc", "defgh")}
    assert ids.tolist() == [
        (tokens["abc"] + tokens["defgh"])[:7],
        (tokens["abc"] + tokens["defgh"])[:7],
        (tokens["abc"] + tokens["defgh"])[:7],
    ]
    assert joined(byte_tokenizer(), ["abc", "defgh"], 2, 2).tolist() == [tokens["abc"][:2], tokens["defgh"][:2]]


def test_routing_costs_the_same_at_any_context_and_reading_again_does_not():
    backbone = tiny("llama", blocks=8, kv_heads=4)
    policy = BuddyPolicy(8, 32, rank=32)
    short, long = routing_cost(RoutedModel(backbone, policy).eval(), [128, 8192], 3)
    # Minima: noise of a shared machine only ever adds.
    assert min(long["routing_ms"]["values"]) < 2 * min(short["routing_ms"]["values"])
    assert min(long["reread_ms"]["values"]) > 4 * min(short["reread_ms"]["values"])
    assert min(long["reread_ms"]["values"]) > 4 * min(long["routing_ms"]["values"])


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    """A tiny backbone, a run on it and a data set, on disk."""
    folder, run, data = tmp_path / "backbones/tiny", tmp_path / "runs/seed~0", tmp_path / "data/alpaca"
    backbone = tiny("llama")
    backbone.resize_token_embeddings(300)
    backbone.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    policy = BuddyPolicy(7, 16, rank=4)
    info = runs.RunInfo("buddy", "buddy", policy.settings(), "tiny", runs.relative(folder, run), {"feature": "value"})
    runs.save(run, info, policy)
    data.mkdir(parents=True)
    (data / "data.json").write_text('{"name": "alpaca"}')
    row = {"instruction": "Say something.", "input": "", "output": "Something."}
    (data / "train.jsonl").write_text(json.dumps(row) + "\n")
    return folder, run, data


def call(run, data, out, *more):
    options = ["--run", run, "--data", data, "--removed", "1,3", "--out", out, "--device", "cpu"]
    sizes = ["--batch-size", "2", "--tokens", "8", "--steps", "2", "--repeats", "1", "--contexts", "4,8", *more]
    return CliRunner().invoke(build(), ["breakdown", *map(str, options), *sizes])


def test_the_command_leaves_a_record_per_depth(study, tmp_path):
    _, run, data = study
    result = call(run, data, tmp_path / "records", "--kv", "project")
    assert result.exit_code == 0, result.output
    for removed in (1, 3):
        record = Record.read(tmp_path / "records" / f"removed~{removed}.json")
        assert (record.kind, record.method, record.backbone, record.n) == ("breakdown", "buddy", "tiny", 1)
        assert record.variant == {"feature": "value", "kv": "project", "decode": "recompute"}
        assert (record.budget.removed, record.budget.executed) == (removed, 7 - removed)
        assert record.wall_s > 0
        assert record.gpu_s == 0
    assert len(list((tmp_path / "records").glob("removed~*.json"))) == 2


def test_the_dense_model_is_refused_before_anything_is_written(study, tmp_path):
    folder, _, data = study
    result = call(folder, data, tmp_path / "records")
    assert result.exit_code != 0
    assert "does not route by keys and values" in str(result.exception)
    assert not (tmp_path / "records").exists()
