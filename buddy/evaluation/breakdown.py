"""What a routed pass spends its time on (the paper's Table 8), and what a routing step costs as the context grows.

A pass is profiled with named ranges: the backbone's own modules, and the engine's `marks` for the decision, for gather
and scatter and for the cache. Ranges nest (a block writes its cache), and every instant of a pass belongs to the innermost
range around it; what lies in no range is *other*: masks, bookkeeping, waiting. So the parts add up to the whole. On a GPU
it is the device's time that is booked, to the range that launched the work, and *other* is the device being idle.

A range takes the profiler some microseconds, which weigh more on a tiny part than on a block: the small components are
upper bounds. ``unprofiled_ms`` says what the same pass takes without it.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import RecordScope, _ExperimentalConfig
from torch.autograd import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    _disable_profiler,
    _enable_profiler,
    _prepare_profiler,
)
from torch.profiler import record_function
from tqdm import tqdm

from buddy.errors import UserError
from buddy.evaluation.latency import spread, wait
from buddy.policies.predictor import BudgetPredictor
from buddy.routing.budget import Budget
from buddy.routing.model import RoutedModel
from buddy.routing.policy import Policy
from buddy.routing.profiling import CACHE, DECISION, GATHER, PREDICTOR, PREFIX, mark, marking
from buddy.routing.types import CausalLM
from buddy.settings import Breakdown

BACKBONE, OTHER = "backbone", "other"
COMPONENTS = (BACKBONE, DECISION, GATHER, CACHE, OTHER)
"""Of every pass; where a budget predictor is asked, there is one more (`buddy.routing.profiling.PREDICTOR`)."""
PHASES = ("prefill", "decode")
ITERATIONS = 50
"""Routing steps behind one timing: one alone is too short for the clock."""


# ---- attribution: from ranges and kernels to time per component ------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """A named stretch of host time, microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Kernel:
    """Work of the device, microseconds on the host's clock; ``launched`` is when the host asked for it, if known."""

    start: float
    end: float
    launched: float | None


def stretches(ranges: Iterable[Range]) -> list[Range]:
    """Cut nested ranges into stretches that do not overlap, in order, each under the name of the innermost range."""
    found: list[Range] = []
    open_ranges: list[Range] = []
    cursor = 0.0

    def advance(end: float) -> None:
        nonlocal cursor
        if end > cursor:
            found.append(Range(open_ranges[-1].name, cursor, end))
            cursor = end

    for item in sorted(ranges, key=lambda item: (item.start, -item.end)):
        while open_ranges and open_ranges[-1].end <= item.start:
            advance(open_ranges[-1].end)
            open_ranges.pop()
        if open_ranges:
            advance(item.start)
            item = replace(item, end=min(item.end, open_ranges[-1].end))  # the clock's last digit may stick out
        else:
            cursor = item.start
        open_ranges.append(item)
    while open_ranges:
        advance(open_ranges[-1].end)
        open_ranges.pop()
    return found


def _within(ranges: Iterable[Range], root: Range) -> list[Range]:
    """The stretches of a pass; what no range inside it covers is called ``other``."""
    inside = [item for item in ranges if root.start <= item.start < root.end and item.name in (*COMPONENTS, PREDICTOR)]
    return stretches([Range(OTHER, root.start, root.end), *inside])


def on_host(ranges: Iterable[Range], root: Range) -> dict[str, float]:
    """Time of each component in a pass on a CPU, where operations run as they are called.

    Args:
        ranges: of one thread, properly nested.
        root: the pass.

    Returns:
        Microseconds per component; they add up to the length of ``root``.
    """
    spent = dict.fromkeys(COMPONENTS, 0.0)
    for item in _within(ranges, root):
        spent[item.name] = spent.get(item.name, 0.0) + item.end - item.start
    return spent


def on_device(ranges: Iterable[Range], root: Range, kernels: Iterable[Kernel]) -> dict[str, float]:
    """Time of each component in a pass on a GPU, where kernels run after their call has returned.

    A kernel, or copy, is booked to the innermost range in which it was launched. Where kernels overlap, each instant
    counts once, for the one that began first. What is left of the pass, the device being idle, is ``other``, and so are
    kernels that no range launched.

    Args:
        ranges: of the launching thread, properly nested.
        root: the pass, which waits for the device before it begins and before it ends.
        kernels: the device's work; what was launched outside ``root`` is left out.

    Returns:
        Microseconds per component; they add up to the time from the beginning of ``root`` to its end, or to that of its
        last kernel, should the device's clock be a little ahead.
    """
    owners = _within(ranges, root)
    starts = [item.start for item in owners]
    spent = dict.fromkeys(COMPONENTS, 0.0)
    cursor = root.start
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        asked = kernel.start if kernel.launched is None else kernel.launched
        if not root.start <= asked < root.end:
            continue
        name = OTHER if kernel.launched is None else owners[bisect_right(starts, asked) - 1].name
        spent[name] = spent.get(name, 0.0) + max(0.0, kernel.end - max(kernel.start, cursor))
        cursor = max(cursor, kernel.end)
    spent[OTHER] += max(root.end, cursor) - root.start - sum(spent.values())
    return spent


# ---- what the profiler saw -------------------------------------------------------------------------------------------


def read_trace(path: str | Path) -> tuple[list[Range], list[Kernel]]:
    """Our named ranges (without their prefix) and the device's work in a trace that the profiler exported."""
    events = json.loads(Path(path).read_text(encoding="utf-8", errors="replace"), strict=False)["traceEvents"]
    ranges, launches = [], {}
    for event in events:
        category = event.get("cat")
        if category == "user_annotation" and event["name"].startswith(PREFIX):
            ranges.append(Range(event["name"].removeprefix(PREFIX), event["ts"], event["ts"] + event["dur"]))
        elif category in ("cuda_runtime", "cuda_driver"):
            launches[event["args"].get("correlation")] = event["ts"]
    kernels = [
        Kernel(event["ts"], event["ts"] + event["dur"], launches.get(event["args"].get("correlation")))
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return ranges, kernels


@contextmanager
def _named(backbone: CausalLM) -> Iterator[None]:
    """Within the context, the backbone's own parts run in ranges: embeddings, blocks, final norm and head."""
    decoder = backbone.get_decoder()
    parts = [decoder.embed_tokens, decoder.rotary_emb, *decoder.layers, decoder.norm, backbone.get_output_embeddings()]
    running: list[Any] = []

    def begin(*_: Any) -> None:
        running.append(mark(BACKBONE))
        running[-1].__enter__()

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for part in parts:
            hooks.callback(part.register_forward_pre_hook(begin).remove)
            hooks.callback(part.register_forward_hook(end, always_call=True).remove)
        yield


# ---- a pass, plain and profiled --------------------------------------------------------------------------------------


@torch.no_grad()
def run_pass(model: RoutedModel, ids: Tensor, budget: Budget, steps: int) -> dict[str, float]:
    """Prefill, then decode greedily, with a new path at every step.

    Args:
        model: what runs.
        ids: (B, S) prompts without padding.
        budget: fraction of blocks, one or one per sequence.
        steps: decode steps.

    Returns:
        Seconds of each phase.
    """
    batch, tokens = ids.shape
    mask = torch.ones(batch, tokens + steps, dtype=torch.long, device=ids.device)
    cache = model.new_cache(tokens + steps)
    seconds: dict[str, float] = {}

    def step(new: Tensor, seen: int) -> Tensor:
        outputs = model(
            new,
            mask[:, :seen],
            budget=budget,
            decode="recompute",
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1].argmax(-1, keepdim=True)

    with _phase("prefill", ids.device, seconds):
        token = step(ids, tokens)
    with _phase("decode", ids.device, seconds):
        for seen in range(tokens + 1, tokens + steps + 1):
            token = step(token, seen)
    return seconds


@contextmanager
def _phase(name: str, device: torch.device, seconds: dict[str, float]) -> Iterator[None]:
    """A range and the clock around a phase; the device is idle when it begins and when it ends."""
    wait(device)
    start = time.perf_counter()
    with record_function(PREFIX + name):
        yield
        wait(device)
    seconds[name] = time.perf_counter() - start


def profile_pass(model: RoutedModel, ids: Tensor, budget: Budget, steps: int) -> dict[str, dict[str, float]]:
    """Where the time of `run_pass` goes, by the profiler.

    Returns:
        For each phase, microseconds per component over the whole phase (all decode steps together).

    Raises:
        UserError: the profiler is not let to see what the GPU does.
    """
    on_gpu = ids.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with _profiler(on_gpu, trace), marking(), _named(model.backbone):
            with torch.no_grad():
                model(ids[:, :1], budget=budget)  # the first events of a session cost more
            run_pass(model, ids, budget, steps)
        ranges, kernels = read_trace(trace)
    if on_gpu and not any(kernel.launched is not None for kernel in kernels):
        raise UserError("breakdown: the profiler saw no work of the GPU; CUPTI is missing, or barred on this machine")
    roots = {item.name: item for item in ranges if item.name in PHASES}
    return {
        phase: on_device(ranges, roots[phase], kernels) if on_gpu else on_host(ranges, roots[phase]) for phase in PHASES
    }


@contextmanager
def _profiler(on_gpu: bool, trace: Path) -> Iterator[None]:
    """Record our ranges, and what the GPU does, into a trace file.

    `torch.profiler.profile` records every operation on the host besides, which makes a decode step of a small model a
    fifth longer, at the expense of its smallest parts. It has no switch for that; what it calls itself has (``scopes``).
    """
    activities = {ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])}
    # Shapes, memory, stacks, FLOPs, modules: all off.
    config = ProfilerConfig(ProfilerState.KINETO, False, False, False, False, False, _ExperimentalConfig())
    _prepare_profiler(config, activities)
    _enable_profiler(config, activities, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]  # its stub is behind
    try:
        yield
        if on_gpu:
            torch.cuda.synchronize()
    finally:
        result = _disable_profiler()
    result.save(str(trace))


def breakdown(
    model: RoutedModel, prompts: Sequence[str], removed: Sequence[int], settings: Breakdown
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Profile passes at every depth.

    Args:
        model: the run, in evaluation mode.
        prompts: texts to make prompts of one length from.
        removed: numbers of removed blocks.
        settings: the section `breakdown` of the study.

    Yields:
        A number of removed blocks and the ``metrics`` of its breakdown record. A run with a budget predictor has its
        phases at the predictor's own depths besides, as ``auto``, in every one.
    """
    ids = joined(model.tokenizer, prompts, settings.batch_size, settings.tokens).to(model.device)
    asks = isinstance(getattr(model.policy, "predictor", None), BudgetPredictor)
    turns = (len(removed) + asks) * (settings.repeats + 1) + settings.repeats
    with tqdm(total=turns, desc="breakdown", unit="pass") as bar:
        contexts = routing_cost(model, settings.contexts, settings.repeats, bar.update)
        chosen = {"auto": _of_predictor(model, ids, settings, bar.update)} if asks else {}
        for count in removed:
            phases = _phases(model, ids, (model.blocks - count) / model.blocks, settings, bar.update)
            sizes = {"batch_size": settings.batch_size, "tokens": settings.tokens, "steps": settings.steps}
            yield count, {**sizes, "phases": phases, "contexts": contexts, **chosen}


def _phases(
    model: RoutedModel, ids: Tensor, budget: Budget, settings: Breakdown, tick: Callable[[], Any]
) -> dict[str, Any]:
    """Both phases of a pass at one budget, plain and profiled in turns."""
    plain, profiled = [], []
    for repeat in range(settings.repeats + 1):  # the first one warms up
        seconds = run_pass(model, ids, budget, settings.steps)
        spent = profile_pass(model, ids, budget, settings.steps)
        if repeat:
            plain.append(seconds)
            profiled.append(spent)
        tick()
    return {
        phase: _summary([item[phase] for item in plain], [item[phase] for item in profiled], passes)
        for phase, passes in (("prefill", 1), ("decode", settings.steps))
    }


def _of_predictor(model: RoutedModel, ids: Tensor, settings: Breakdown, tick: Callable[[], Any]) -> dict[str, Any]:
    """The same where the run's predictor chooses the depths: ``executed_mean`` blocks, and its own component."""
    phases = _phases(model, ids, "auto", settings, tick)
    return {"executed_mean": float(model.trace.executed().float().mean()), "phases": phases}


def _summary(plain: Sequence[float], profiled: Sequence[dict[str, float]], passes: int) -> dict[str, Any]:
    """One phase in a record, per pass: the profiled repeat whose total is the median, so that its parts add up."""
    spent = sorted(profiled, key=lambda spent: sum(spent.values()))[(len(profiled) - 1) // 2]
    total = sum(spent.values())
    return {
        "total_ms": total / 1e3 / passes,
        "unprofiled_ms": statistics.median(plain) * 1e3 / passes,
        "components": {
            name: {"ms": part / 1e3 / passes, "percent": 100 * part / total} for name, part in spent.items()
        },
    }


def joined(tokenizer: Any, prompts: Sequence[str], rows: int, tokens: int) -> Tensor:
    """Prompts of exactly that length: (rows, tokens) int64, each row as many prompts as it takes, the last one cut."""
    texts = itertools.cycle(prompts)
    found = []
    for _ in range(rows):
        ids: list[int] = []
        while len(ids) < tokens:
            ids += tokenizer(next(texts)).input_ids
        found.append(ids[:tokens])
    return torch.tensor(found)


# ---- routing at longer contexts --------------------------------------------------------------------------------------


@torch.no_grad()
def routing_cost(
    model: RoutedModel, contexts: Sequence[int], repeats: int, tick: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Time one decode step's routing after so many tokens, beside the naive way that reads the whole cache again.

    Random keys and values of one sequence stand for the source block's. The choice is made for the full depth; how many
    blocks are chosen does not matter for time.

    Args:
        model: its policy reads keys and values.
        contexts: numbers of tokens before the step.
        repeats: timings of each.
        tick: called after each repeat.

    Returns:
        For each context ``routing_ms`` (score one token, add it to the running sum, decide) and ``reread_ms`` (score and
        pool all tokens, decide), milliseconds per step over the repeats.
    """
    config, device = model.config, model.device
    size = model.backbone.get_decoder().layers[0].self_attn.head_dim
    times: dict[str, dict[int, list[float]]] = {way: {n: [] for n in contexts} for way in ("routing_ms", "reread_ms")}
    for repeat in range(-1, repeats):  # the first one warms up
        for context in contexts:
            shape = (2, 1, config.num_key_value_heads, context, size)
            keys, values = torch.randn(shape, device=device, dtype=model.dtype)
            once = _incremental_ms(model.policy, keys, values)
            again = _reread_ms(model.policy, keys, values)
            if repeat >= 0:
                times["routing_ms"][context].append(once)
                times["reread_ms"][context].append(again)
        if repeat >= 0:
            tick()
    return [{"context": n, **{way: spread(times[way][n]) for way in times}} for n in contexts]


def _incremental_ms(policy: Policy, keys: Tensor, values: Tensor) -> float:
    """A step as the engine takes it: the state holds the sum over the context, one token is added."""
    state = policy.begin(1.0, 1, keys.device)
    policy.observe(state, keys, values, None)
    key, value = keys[:, :, -1:], values[:, :, -1:]

    def step() -> None:
        policy.observe(state, key, value, None)
        policy.decide(state)

    return _mean_ms(step, keys.device)


def _reread_ms(policy: Policy, keys: Tensor, values: Tensor) -> float:
    """A step without a running sum: an empty state takes in the whole context."""
    empty = policy.begin(1.0, 1, keys.device)
    states = iter([copy.deepcopy(empty) for _ in range(ITERATIONS + 1)])

    def step() -> None:
        state = next(states)
        policy.observe(state, keys, values, None)
        policy.decide(state)

    return _mean_ms(step, keys.device)


def _mean_ms(step: Callable[[], None], device: torch.device) -> float:
    step()
    wait(device)
    start = time.perf_counter()
    for _ in range(ITERATIONS):
        step()
    wait(device)
    return (time.perf_counter() - start) * 1e3 / ITERATIONS
