"""Prefill and decode speed, side by side in one process.

*Dense* is the untouched model; *sliced* has the blocks physically removed and is the limit for its depth; *reuse* and
*recompute* are the routed model, and *full* is the same with all blocks: what the engine costs. A batch reads every block
that any of its sequences calls, so what a trained router saves depends on how far its sequences agree; *varied* has
routes that are drawn for each of them, the worst case, each on its own or under a bound on the blocks that a step calls
(`buddy.routing.shared`). *Mixed* is a batch whose sequences have different budgets, *nested* one of drawn routes whose
budgets share one set of blocks. Each is timed eagerly and, on a GPU, by captured graphs too.

All of them are given the same prompts, sorted by length, so that nobody carries much padding, and a cache with room for
all tokens.

A machine drifts by more than the differences that matter here. So what is compared shares a *heat*: in every repeat its
contenders take turns of a few tokens, in an order that rotates, and a ratio is taken between seconds of one repeat.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from buddy.errors import UserError
from buddy.evaluation.memory import Peak
from buddy.evaluation.varied import VariedPolicy
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.kv import RoutedCache
from buddy.routing.model import RoutedModel
from buddy.routing.quantised import stored
from buddy.routing.sliced import sliced
from buddy.routing.types import CausalLM
from buddy.settings import Engine, Latency

log = logging.getLogger(__name__)

PHASES = ("prefill", "decode")
Lap = dict[str, float]
"""Seconds of one repeat by phase, over all batches of prompts."""


class Entry(NamedTuple):
    """What is timed: an execution, the removed blocks of each sequence of the batch, and the bound on what it calls."""

    execution: str
    depths: tuple[int, ...]
    slack: int | None = None

    @property
    def mixed(self) -> bool:
        """Whether its sequences have depths of their own."""
        return self.execution in ("mixed", "nested")

    @property
    def routed(self) -> bool:
        """Whether a policy chooses its blocks."""
        return self.execution not in ("dense", "sliced")

    @property
    def removed(self) -> int | str:
        """The depth of all sequences, or "mixed"."""
        return "mixed" if self.mixed else self.depths[0]


class Batch(NamedTuple):
    """Prompts padded left: ids (B, S), and a mask (B, S + new) that has its ones for the tokens to come already."""

    ids: Tensor
    mask: Tensor


# ---- who is timed ----------------------------------------------------------------------------------------------------


def heats(
    removed: Sequence[int], executions: Sequence[str], batch_size: int, slack: Sequence[int] = ()
) -> list[list[Entry]]:
    """What is timed in turns, for one batch size and engine; dense opens every heat.

    At each depth there is a heat of the trained run, reuse and recompute, and one of varied routes, as far as they are
    asked for, each beside sliced. What has no one depth has a heat of its own: full; mixed beside the sliced models of
    its depths, which make its ideal; nested beside that of its deepest sequence. Without any of these, dense is timed
    alone.

    Args:
        removed: numbers of removed blocks.
        executions: what is asked for.
        batch_size: sequences in the batch; a single one has neither mixed budgets nor a bound to keep.
        slack: bounds for varied routes.
    """
    several = batch_size > 1

    def entry(execution: str, depth: int, bound: int | None = None) -> Entry:
        return Entry(execution, (depth,) * batch_size, bound)

    dense, found = entry("dense", 0), []
    limit = ["sliced"] if "sliced" in executions else []
    for depth in removed:
        own = [name for name in ("reuse", "recompute") if name in executions]
        if own or (limit and "varied" not in executions):
            found.append([dense, *(entry(name, depth) for name in [*limit, *own])])
        if "varied" in executions:
            varied = [entry("varied", depth, bound) for bound in (None, *(slack if several else ()))]
            found.append([dense, *(entry(name, depth) for name in limit), *varied])
    if "full" in executions:
        found.append([dense, entry("full", 0)])
    if several and "mixed" in executions:
        mixed = Entry("mixed", mixed_depths(removed, batch_size))
        found.append([dense, *(entry("sliced", depth) for depth in sorted(set(mixed.depths) - {0})), mixed])
    if several and "nested" in executions:
        depths = tuple(islice(cycle(removed), batch_size))
        found.append([dense, entry("sliced", min(depths)), Entry("nested", depths, 0)])
    return found or [[dense]]


def mixed_depths(removed: Sequence[int], batch_size: int) -> tuple[int, ...]:
    """Removed blocks of each sequence of a mixed batch: 0 and the depths in turn, over and over."""
    return tuple(islice(cycle((0, *removed)), batch_size))


def usable_engines(asked: Sequence[Engine], device: torch.device) -> list[Engine]:
    """The engines asked for that this machine has, eager first; a log line says if graph is left out for want of a GPU.

    Raises:
        UserError: it has none of them.
    """
    found = [engine for engine in get_args(Engine) if engine in asked]
    if device.type == "cuda" or "graph" not in found:
        return found
    if found == ["graph"]:
        raise UserError("--engines: 'graph' needs a GPU, and the model is not on one; eager runs anywhere")
    log.info("engine graph is left out: it captures CUDA graphs, and the model is not on a GPU")
    return ["eager"]


class Ran(NamedTuple):
    """What a decode step ran: blocks over all sequences of the batch, blocks that any of them called, different paths."""

    executed: int
    called: int
    paths: int


@dataclass(frozen=True)
class Contender:
    """An entry made ready to run.

    Attributes:
        entry: what it is.
        backbone: model whose blocks it runs; a sliced one has only those.
        begin: makes a cache with room for that many tokens.
        step: (new ids (B, S), mask (B, past + S), cache) to logits of the last position (B, V).
        router: routed model whose trace says which blocks ran; None if all blocks of ``backbone`` always run.
    """

    entry: Entry
    backbone: CausalLM
    begin: Callable[[int], Any]
    step: Callable[[Tensor, Tensor, Any], Tensor]
    router: RoutedModel | None = None

    def weight_bytes(self) -> int:
        """What the last decode step had to read of the weights: blocks that any sequence ran, final norm and head."""
        decoder = self.backbone.get_decoder()
        ran = [True] * len(decoder.layers) if self.router is None else self.router.trace.steps[-1].any(0).tolist()
        read = [layer for layer, runs in zip(decoder.layers, ran, strict=True) if runs]
        read += [decoder.norm, self.backbone.get_output_embeddings()]
        parameters = [parameter for module in read for parameter in module.parameters()]
        return sum(part.nbytes for parameter in parameters for part in stored(parameter))

    def ran(self) -> Ran:
        """What the last decode step ran."""
        blocks = self.backbone.config.num_hidden_layers
        if self.router is None:
            return Ran(blocks * len(self.entry.depths), blocks, 1)
        route = self.router.trace.steps[-1]
        return Ran(int(route.sum()), int(route.any(0).sum()), len(route.unique(dim=0)))

    def kv_bytes(self, tokens: float) -> float:
        """What a block reads of a sequence's keys and values, in a cache of that many tokens."""
        size = self.backbone.get_decoder().layers[0].self_attn.head_dim
        return 2 * self.backbone.config.num_key_value_heads * size * self.backbone.dtype.itemsize * tokens


def contender(entry: Entry, model: RoutedModel, engine: Engine, steps: int = 256) -> Contender:
    """Make an entry ready to run.

    Dense and sliced are plain Hugging Face models; under the engine graph they are routed models with a fixed path,
    which is captured whole: the strongest baseline.

    Args:
        entry: what to run.
        model: the run.
        engine: eager or graph.
        steps: passes of a generation, for as many of which varied routes are drawn.

    Raises:
        UserError: routes cannot be drawn for this policy.
    """
    if entry.routed:
        decode = "reuse" if entry.execution == "reuse" else "recompute"
        router = _varied(model, len(entry.depths), steps) if entry.execution in ("varied", "nested") else model
        return Contender(entry, model.backbone, *_routed(router, entry, decode, engine), router)
    kept = _kept(model, entry.depths[0])
    backbone = sliced(model.backbone, kept) if entry.depths[0] else model.backbone
    if engine == "eager":
        return Contender(entry, backbone, partial(RoutedCache, len(kept), model.kv), _plain(backbone))
    fixed = RoutedModel(backbone, StaticPolicy(len(kept)), model.kv).eval()
    return Contender(entry, backbone, *_routed(fixed, Entry("dense", (0,) * len(entry.depths)), "reuse", engine))


def _varied(model: RoutedModel, batch: int, steps: int) -> RoutedModel:
    """The run with routes that are drawn."""
    if not isinstance(model.policy, BuddyPolicy):
        raise UserError(
            f"--executions: varied and nested draw routes for BUDDY's router, not for {type(model.policy).__name__}"
        )
    return RoutedModel(model.backbone, VariedPolicy(model.policy, batch, steps), model.kv).eval()


def _kept(model: RoutedModel, removed: int) -> list[int]:
    """Blocks of the sliced model: those that a static run keeps.

    Where prompts differ in their blocks, the first ones and the last: which blocks go does not matter for time.
    """
    if isinstance(model.policy, StaticPolicy):
        state = model.policy.begin((model.blocks - removed) / model.blocks, 1, torch.device("cpu"))
        return model.policy.decide(state)[0].nonzero().flatten().tolist()
    return [*range(model.blocks - removed - 1), model.blocks - 1]


def _plain(backbone: CausalLM) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The model's own pass; its cache is the routed model's, whose buffers have room for all tokens from the start."""

    def step(ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        cache.reserve(*ids.shape)
        outputs = backbone(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.commit(ids.shape[1])
        return outputs.logits[:, -1]

    return step


def _routed(
    model: RoutedModel, entry: Entry, decode: str, engine: Engine
) -> tuple[Callable[[int], Any], Callable[[Tensor, Tensor, Any], Tensor]]:
    call = {"budget": [(model.blocks - depth) / model.blocks for depth in entry.depths], "slack": entry.slack}

    def begin(capacity: int) -> Any:
        return _checked(model.new_cache(capacity, engine=engine, batch=len(entry.depths)), engine)

    def step(ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        outputs = model(ids, mask, **call, decode=decode, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return outputs.logits[:, -1]

    return begin, step


def _checked(made: Any, engine: Engine) -> Any:
    """A cache that decodes by the engine it was made for: eager decoding must not be recorded under another name."""
    if engine == "graph" and made.graph is None:
        raise UserError("--engines: 'graph' cannot be had for this model; the log says why")
    return made


def batches(model: RoutedModel, prompts: Sequence[str], batch_size: int, new_tokens: int) -> list[Batch]:
    """Prompts by length, in as few full batches as hold each once; where they do not fill the last, the first ones given
    come up once more."""
    encoded = [model.tokenizer(prompt).input_ids for prompt in prompts]
    count = -(-len(encoded) // batch_size)
    rows = sorted(islice(cycle(encoded), count * batch_size), key=len)
    found = []
    for start in range(0, len(rows), batch_size):
        some = {"input_ids": rows[start : start + batch_size]}
        padded = model.tokenizer.pad(some, padding_side="left", return_tensors="pt")
        mask = torch.nn.functional.pad(padded["attention_mask"], (0, new_tokens), value=1)
        found.append(Batch(padded["input_ids"].to(model.device), mask.to(model.device)))
    return found


# ---- how it is timed -------------------------------------------------------------------------------------------------


class Racer:
    """A contender on one batch of prompts, decoding greedily.

    Args:
        contender: what decodes.
        batch: prompts, with room for the new tokens.
        capacity: tokens that its cache has room for.

    Attributes:
        seconds: spent so far, by phase.
        weight_bytes: weights that a decode step had to read, one sample per turn.
        ran: what a decode step ran, one sample per turn.
    """

    def __init__(self, contender: Contender, batch: Batch, capacity: int) -> None:
        self.contender = contender
        self.ids, self.mask = batch
        self.length = self.ids.shape[1]
        self.cache = contender.begin(capacity)
        self.seconds: Lap = dict.fromkeys(PHASES, 0.0)
        self.weight_bytes: list[int] = []
        self.ran: list[Ran] = []

    def prefill(self) -> None:
        """The pass over the prompts, which gives the first new token."""
        self._run("prefill", 1)

    def decode(self, tokens: int) -> None:
        """One turn of decoding."""
        self._run("decode", tokens)
        self.weight_bytes.append(self.contender.weight_bytes())
        self.ran.append(self.contender.ran())

    @torch.no_grad()
    def _run(self, phase: str, passes: int) -> None:
        wait(self.mask.device)
        start = time.perf_counter()
        for _ in range(passes):
            logits = self.contender.step(self.ids, self.mask[:, : self.length], self.cache)
            self.ids = logits.argmax(-1, keepdim=True)
            self.length += 1
        wait(self.mask.device)
        self.seconds[phase] += time.perf_counter() - start


def wait(device: torch.device) -> None:
    """GPU work is asynchronous: wait for it before reading the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(racers: Sequence[Racer], new_tokens: int, turn: int, shift: int) -> None:
    """Prefill with every racer, then decode in turns until each has its new tokens.

    Args:
        racers: the contenders of a heat, on the same prompts.
        new_tokens: tokens that each decodes after its prefill.
        turn: tokens it decodes before the next one goes on; who begins changes with every round.
        shift: who begins the prefill and the first round.
    """
    for racer in _rotated(racers, shift):
        racer.prefill()
    for number, done in enumerate(range(0, new_tokens, turn)):
        for racer in _rotated(racers, shift + number):
            racer.decode(min(turn, new_tokens - done))


def _rotated(racers: Sequence[Racer], shift: int) -> list[Racer]:
    first = shift % len(racers)
    return [*racers[first:], *racers[:first]]


@dataclass
class Result:
    """What was measured of an entry in a heat.

    Attributes:
        laps: seconds, repeat by repeat.
        kv_bytes: keys and values that a block reads for one sequence in a decode step, on average.
        peak_memory_mb: see `_peak_memory_mb`.
        weight_bytes: weights that a decode step had to read, samples.
        ran: what a decode step ran, samples.
        capture: cost of its captured graphs, {seconds, memory_mb, graphs}; None without.
    """

    laps: list[Lap]
    kv_bytes: float
    peak_memory_mb: float | None
    weight_bytes: list[int] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)
    capture: dict[str, float] | None = None

    def mean(self, of: str) -> float:
        """Mean of a field of `Ran`."""
        return statistics.mean(getattr(ran, of) for ran in self.ran)

    def add(self, racer: Racer, repeat: int) -> None:
        """Book what a racer needed on its batch."""
        for phase in PHASES:
            self.laps[repeat][phase] += racer.seconds[phase]
        self.weight_bytes += racer.weight_bytes
        self.ran += racer.ran
        graph = getattr(racer.cache, "graph", None)
        if graph is not None:
            self.capture = {"seconds": graph.capture_seconds, "memory_mb": graph.memory_mb, "graphs": graph.graphs}


def run(
    heat: Sequence[Entry], model: RoutedModel, engine: Engine, work: Sequence[Batch], settings: Latency, bar: Any
) -> dict[Entry, Result]:
    """Time a heat: untimed repeats first, in which graphs are captured, then those that count.

    Args:
        heat: what takes turns.
        model: the run to time.
        engine: eager or graph.
        work: prompts, in batches of the heat's size.
        settings: the section `latency` of the study.
        bar: progress, moved on by one per batch.
    """
    contenders = [contender(entry, model, engine, settings.new_tokens + 1) for entry in heat]
    capacity = max(batch.mask.shape[1] for batch in work)  # one for all batches: captured graphs serve every one
    tokens = statistics.mean(batch.ids.shape[1] for batch in work) + settings.new_tokens / 2
    untimed = warmups(engine, settings)
    results = {}
    for each in contenders:
        laps = [dict.fromkeys(PHASES, 0.0) for _ in range(untimed + settings.repeats)]
        peak = _peak_memory_mb(each, work, capacity, settings.turn)
        results[each.entry] = Result(laps, each.kv_bytes(tokens), peak)

    def once(batch: Batch, repeat: int, shift: int) -> None:  # a function, so that its caches are gone when it is done
        racers = [Racer(each, batch, capacity) for each in contenders]
        race(racers, settings.new_tokens, settings.turn, shift)
        for racer in racers:
            _checked(racer.cache, engine)  # a capture that went wrong has left it to eager decoding
            results[racer.contender.entry].add(racer, repeat)

    for repeat in range(untimed + settings.repeats):
        for number, batch in enumerate(work):
            once(batch, repeat, repeat + number)
            bar.update()
    for result in results.values():
        del result.laps[:untimed]
    return results


def warmups(engine: Engine, settings: Latency) -> int:
    """Untimed repeats of a heat; graphs are captured in them, so that engine has at least one."""
    return max(settings.warmup, 1) if engine == "graph" else settings.warmup


def _peak_memory_mb(contender: Contender, work: Sequence[Batch], capacity: int, turn: int) -> float | None:
    """Most memory held while a contender works alone on the longest batch (`buddy.evaluation.memory.Peak`).

    No other contender's cache is alive. The weights are those of the whole backbone, for sliced models as well.
    """
    longest = max(work, key=lambda batch: batch.ids.shape[1])
    peak = Peak(longest.ids.device)
    racer = Racer(contender, longest, capacity)
    racer.prefill()
    racer.decode(min(turn, longest.mask.shape[1] - longest.ids.shape[1]))
    return peak.mb()


@cache
def copy_gb_s(device: torch.device) -> float:
    """Bandwidth of a copy within the device's memory, read and write together, GB/s of 1e9 bytes; best of five.

    The buffer has 256 MB on a CPU; on a GPU 2 GiB, or a quarter of the free memory.
    """
    size = 256 * 10**6
    if device.type == "cuda":
        size = min(2 * 2**30, torch.cuda.mem_get_info(device)[0] // 4)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = []
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / min(seconds) / 1e9


# ---- what comes of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """An entry's ``metrics`` for its latency record."""

    entry: Entry
    batch_size: int
    engine: Engine
    metrics: dict[str, Any]

    @property
    def path(self) -> Path:
        """The record's place below the folder of its run and data set."""
        levels = [f"batch~{self.batch_size}", f"engine~{self.engine}", f"execution~{self.entry.execution}"]
        if self.entry.execution == "varied" and self.entry.slack is not None:
            levels.append(f"slack~{self.entry.slack}")
        return Path(*levels, f"removed~{self.entry.removed}.json")


def benchmark(
    model: RoutedModel, prompts: Sequence[str], removed: Sequence[int], settings: Latency, dataset: str
) -> list[Timing]:
    """Time everything that the settings ask for, on the same prompts.

    Args:
        model: the run to time, in evaluation mode.
        prompts: texts; every batch is full, so the last one begins again with the first prompts, and a batch larger
            than their number has some of them several times.
        removed: numbers of removed blocks.
        settings: the section `latency` of the study.
        dataset: where the prompts come from, for the record.

    Returns:
        One timing per batch size, engine, execution and depth. Dense takes part in every heat of its batch size and
        engine, and its timing has the repeats of all of them.

    Raises:
        UserError: no engine that is asked for can be had here.
    """
    engines = usable_engines(settings.engines, model.device)
    work = {size: batches(model, prompts, size, settings.new_tokens) for size in settings.batch_sizes}
    asked = settings.executions
    plan = [(size, engine, heats(removed, asked, size, settings.slack)) for size in work for engine in engines]
    races = sum(len(some) * (warmups(name, settings) + settings.repeats) * len(work[size]) for size, name, some in plan)
    facts = {"dataset": dataset, "prompts": len(prompts), "copy_gb_s": copy_gb_s(model.device)}
    found = []
    with tqdm(total=races, desc=f"latency {dataset}", unit="batch") as bar:
        for size, engine, some in plan:
            results = [run(heat, model, engine, work[size], settings, bar) for heat in some]
            amount = Amount.of(work[size], settings.new_tokens)
            found += [
                Timing(entry, size, engine, {**facts, "engine": engine, **metrics})
                for entry, metrics in _metrics(results, amount, asked).items()
            ]
    return found


@dataclass(frozen=True)
class Amount:
    """The work of one repeat: sequences, real prompt tokens of all of them, and tokens decoded after each."""

    batch_size: int
    sequences: int
    prompt_tokens: int
    new_tokens: int

    @classmethod
    def of(cls, work: Sequence[Batch], new_tokens: int) -> Amount:
        """Count these batches; padding is no token."""
        size = len(work[0].ids)
        prompt_tokens = sum(int(batch.mask[:, :-new_tokens].sum()) for batch in work)
        return cls(size, len(work) * size, prompt_tokens, new_tokens)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens by phase."""
        return {"prefill": self.prompt_tokens, "decode": self.sequences * self.new_tokens}


def _metrics(
    results: Sequence[dict[Entry, Result]], amount: Amount, asked: Sequence[str]
) -> dict[Entry, dict[str, Any]]:
    """Metrics of every entry that is asked for, from the heats of one batch size and engine: of an entry in several the
    first one's, of dense all."""
    dense = next(iter(results[0]))
    joined = replace(results[0][dense], laps=[lap for heat in results for lap in heat[dense].laps])
    found = {dense: _described(dense, joined, {}, amount)}
    for heat in results:
        for entry in heat:
            if entry.execution in asked and entry not in found:
                found[entry] = _described(entry, heat[entry], _references(entry, heat), amount)
    return found


def _references(entry: Entry, heat: dict[Entry, Result]) -> dict[str, list[Lap]]:
    """What an entry is compared with, repeat by repeat of its heat, by the name of the ratio."""
    own = heat[entry]
    dense = next(result for other, result in heat.items() if other.execution == "dense")
    limits = {other.removed: result for other, result in heat.items() if other.execution == "sliced"}
    found = {"speedup": dense.laps}
    if not entry.routed:
        return found
    if entry.removed in limits:
        limit = limits[entry.removed]
        # A policy that does not keep the budget ran another depth than the sliced model, which is no limit of it then.
        if limit.mean("executed") == own.mean("executed"):
            found["of_sliced"] = limit.laps
    if entry.execution == "mixed":
        alone = [limits[depth].laps if depth else dense.laps for depth in entry.depths]
        found["of_ideal"] = [
            {phase: statistics.mean(lap[phase] for lap in laps) for phase in PHASES}
            for laps in zip(*alone, strict=True)
        ]
    if limits:
        found["of_called"] = _of_called(own, dense, max(limits.values(), key=lambda limit: limit.mean("called")))
    return found


def _of_called(own: Result, dense: Result, limit: Result) -> list[Lap]:
    """Laps of a sliced model that has as many blocks as this one's steps call: what reading them allows.

    A sliced model's time is a constant and so much per block, so it lies on the line through the dense model and a sliced
    one.
    """
    most, fewest = dense.mean("called"), limit.mean("called")
    share = (own.mean("called") - fewest) / (most - fewest)
    return [
        {phase: low[phase] + share * (high[phase] - low[phase]) for phase in PHASES}
        for low, high in zip(limit.laps, dense.laps, strict=True)
    ]


def _described(entry: Entry, result: Result, references: dict[str, list[Lap]], amount: Amount) -> dict[str, Any]:
    """Metrics of one entry; a ratio is how many times faster it was than its reference in the same repeat."""
    metrics: dict[str, Any] = {
        "execution": entry.execution,
        "batch_size": amount.batch_size,
        "prompt_tokens_mean": amount.prompt_tokens / amount.sequences,
        "new_tokens": amount.new_tokens,
        "repeats": len(result.laps),
        "executed_mean": result.mean("executed") / amount.batch_size,
        "called_mean": result.mean("called"),
        "paths_mean": result.mean("paths"),
        "slack": entry.slack,
        "removed_per_sequence": list(entry.depths) if entry.mixed else None,
    }
    for phase in PHASES:
        metrics[f"{phase}_tok_s"] = spread([amount.tokens[phase] / lap[phase] for lap in result.laps])
        for name in ("speedup", "of_sliced", "of_ideal"):
            laps = references.get(name)
            metrics[f"{phase}_{name}"] = (
                None
                if laps is None
                else spread([other[phase] / own[phase] for other, own in zip(laps, result.laps, strict=True)])
            )
    called = references.get("of_called")
    metrics["decode_of_called"] = (
        None
        if called is None
        else spread([other["decode"] / own["decode"] for other, own in zip(called, result.laps, strict=True)])
    )
    ideal = references.get("of_ideal")
    metrics["total_of_ideal"] = (
        None
        if ideal is None
        else spread([sum(best.values()) / sum(own.values()) for best, own in zip(ideal, result.laps, strict=True)])
    )
    steps_per_s = metrics["decode_tok_s"]["median"] / amount.batch_size
    read = statistics.mean(result.weight_bytes) + result.mean("executed") * result.kv_bytes
    metrics["decode_gb_s"] = read * steps_per_s / 1e9
    metrics["peak_memory_mb"] = result.peak_memory_mb
    metrics["capture"] = result.capture
    return metrics


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile (linear interpolation), and the values themselves."""
    low, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    )
    return {"median": statistics.median(values), "p10": low, "p90": high, "values": list(values)}
