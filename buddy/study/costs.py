"""What the jobs of a study ask of a device: arithmetic from parameters, tokens and passes, stage by stage.

A pass of N weights over D tokens takes 2 N D operations and the attention's. Training LoRA takes the way back once more,
for the activations alone: the weights are frozen, so 4 N D and not 6 N D. Decoding reads all weights at every step. Whatever
a pass computes, each call of a block takes the host some time to launch. What a job is told (`buddy.study.jobs.Work`) is what
its cost is counted from. The figures are for planning: a job that ran says better what the next one takes
(`buddy.study.estimates`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from buddy.methods import METHODS
from buddy.study.devices import Device
from buddy.study.shapes import Shape
from buddy.study.texts import Text

if TYPE_CHECKING:
    from buddy.study.jobs import Job

START_S = 40.0
"""Importing libraries, and opening files: every job."""
LOAD_BYTES_S = 1e9
"""Weights read from a file system and moved to the device."""
CONTEXT_BYTES = 1e9
"""What a process holds on a device before it has done anything."""
SCATTERED = 1.1
"""Memory that an allocator holds against what is asked of it."""
REAL = 0.96
"""Share of a batch of training examples that is tokens and not padding (`buddy.training.batches`): the embedded Alpaca."""
LORA_CALLS, BACK_CALLS = 1.5, 2.0
"""Launches of a block with LoRA, and on the way back, against those of a plain pass."""
CAUSAL = 1.5
"""Cost of a pass in the causal form against a plain one."""


@dataclass(frozen=True)
class Passes:
    """Passes of one kind.

    Attributes:
        flops: operations of all of them.
        weights: times that a weight is read, summed over all weights.
        cache: bytes of K/V that are read.
        calls: calls of a block.
    """

    flops: float = 0.0
    weights: float = 0.0
    cache: float = 0.0
    calls: float = 0.0

    def seconds(self, device: Device) -> float:
        """Time of the passes: of their arithmetic, of reading or of launching, whichever takes longest."""
        read = self.weights * device.weight_bytes + self.cache
        return max(self.flops / device.flops, read / device.bytes_s, self.calls * device.launch_s)

    def times(self, flops: float, calls: float | None = None) -> Passes:
        """The same so many times."""
        return Passes(self.flops * flops, self.weights * flops, self.cache * flops, self.calls * (calls or flops))


@dataclass(frozen=True)
class Demand:
    """What a job asks of a device.

    Attributes:
        passes: what it computes.
        loaded: weights that it loads.
        trained: parameters that learn: in float32, with gradient and both moments of Adam.
        held: bytes of activations, caches and logits at most.
        gradients: weights that have gradients besides.
    """

    passes: Sequence[Passes]
    loaded: float
    trained: float = 0.0
    held: float = 0.0
    gradients: float = 0.0

    def seconds(self, device: Device) -> float:
        """Time on a device."""
        load = self.loaded * device.weight_bytes / LOAD_BYTES_S
        return START_S + load + sum(one.seconds(device) for one in self.passes)

    def memory(self, device: Device) -> float:
        """Bytes on a device at most."""
        weights = (self.loaded + self.gradients) * device.weight_bytes
        return CONTEXT_BYTES * device.is_gpu + weights + 16 * self.trained + SCATTERED * self.held

    def host(self, device: Device) -> float:
        """Bytes of host memory at most: libraries and data, and the weights on their way."""
        return 6e9 + 1.15 * self.loaded * device.weight_bytes + (0 if device.is_gpu else self.memory(device))


@dataclass(frozen=True)
class Sizes:
    """What costs are counted from.

    Attributes:
        shape: of the job's backbone.
        texts: a data set by name.
        checkpointed: whether the backbone's trainings keep no activations.
    """

    shape: Shape
    texts: Callable[[str], Text] = field(repr=False)

    def forward(self, items: float, tokens: float, batch: float, share: float = 1.0, predicted: float = 1.0) -> Passes:
        """Passes over items.

        Args:
            items: how many.
            tokens: of each, padding included.
            batch: items in a pass.
            share: of the blocks that run.
            predicted: share of the tokens whose logits are made.
        """
        shape, passes = self.shape, math.ceil(items / batch)
        width = shape.heads * shape.head_dim
        attention = 2 * tokens * width  # two products with half of the tokens before, 2 operations each
        each = share * shape.blocks * (2 * shape.block + attention) + 2 * predicted * shape.head
        weights = share * shape.blocks * shape.block + shape.head
        return Passes(items * tokens * each, passes * weights, 0.0, passes * share * shape.blocks)

    def decode(self, items: float, prompt: float, steps: float, batch: float, share: float = 1.0) -> list[Passes]:
        """Prompts read, and tokens decoded after them; as `forward`."""
        shape, passes = self.shape, math.ceil(items / batch) * steps
        weights = share * shape.blocks * shape.block + shape.head
        cache = 2 * 2 * shape.kv * share * shape.blocks * (prompt + steps / 2) * batch
        flops = 2 * weights * items * steps
        step = Passes(flops, passes * weights, passes * cache, passes * share * shape.blocks)
        return [self.forward(items, prompt, batch, share, 1 / max(prompt, 1)), step]

    def trained(
        self,
        told: Mapping[str, Any],
        data: str,
        epochs: float,
        share: float = 1.0,
        lora: bool = True,
        gated: bool = False,
    ) -> Demand:
        """A training of LoRA, or of something as small, on a data set.

        Args:
            told: options of the command.
            data: the data set.
            epochs: passes over it.
            share: of the blocks that run.
            lora: LoRA learns.
            gated: so does what chooses the blocks, through gates.
        """
        shape, text = self.shape, self.texts(data)
        longest = told["max_length"]
        tokens = min(text.prompt + text.response, longest) / REAL
        predicted = text.response / (text.prompt + text.response)
        examples = epochs * min(told["examples"] or text.trained, text.trained)
        plain = self.forward(examples, min(tokens, longest), told["batch_size"], share, predicted)
        whole = self.forward(examples, min(tokens, longest), told["batch_size"], 1.0, predicted)
        again = 1.0 if told["gradient_checkpointing"] else 0.0
        ahead = LORA_CALLS if lora else 1.0
        passes = [plain.times(2 + again, (1 + again) * ahead + BACK_CALLS * ahead)]
        passes += [whole] if told["loss"] == "kl" else []
        learnt = shape.lora(told["lora_rank"]) * share if lora else (shape.blocks - 2) * (shape.hidden + 1)
        held = self.activations(told["batch_size"] * longest, share, bool(again), gated) + LOGITS
        return Demand(passes, shape.parameters, learnt, held)

    def activations(self, tokens: float, share: float, checkpointed: bool, gated: bool = False) -> float:
        """Bytes that a pass keeps for the way back, in bfloat16 under autocast.

        Of each token and block: the residual stream twice and its norms in float32, what they give, queries, keys and
        values before and after rotation, what attention gives, the three wide vectors of the MLP and their product; and
        what a gate mixes. A checkpointed block keeps its input alone, and one block at a time the rest.
        """
        shape = self.shape
        width = shape.heads * shape.head_dim
        kept = 2 * 2 * shape.hidden + 2 * 4 * shape.hidden + 2 * 2 * shape.hidden
        kept += 2 * 2 * (width + 2 * shape.kv) + 2 * width + 4 * 2 * shape.intermediate
        kept += 3 * 2 * shape.hidden if gated else 0
        blocks = share * shape.blocks
        each = 2 * shape.hidden * blocks + kept if checkpointed else kept * blocks
        return tokens * each

    def read(self, batch: float, tokens: float, scored: float = 0.0) -> float:
        """Bytes of a pass without a way back: a block's activations, K/V of all, and logits of so many tokens of an item."""
        shape = self.shape
        one = 2 * (6 * shape.hidden + 3 * shape.intermediate)
        cache = 2 * 2 * shape.kv * shape.blocks
        return batch * (tokens * (one + cache) + 3 * 4 * scored * shape.vocab)


LOGITS = 5e8
"""Bytes of the logits that a training makes at a time (`buddy.training.loss`)."""
Cost: TypeAlias = "Callable[[Job, Sizes], Demand]"


def _share(shape: Shape, removed: float) -> float:
    return (shape.blocks - removed) / shape.blocks


def _reading(on: Sizes, passes: Sequence[Passes], batch: float, tokens: float, scored: float = 0.0) -> Demand:
    return Demand(passes, on.shape.parameters, held=on.read(batch, tokens, scored))


# ---- order of the blocks ---------------------------------------------------------------------------------------------


def ranking(job: Job, on: Sizes) -> Demand:
    """Blocks ranked on windows of a corpus: passes without each block, which share the blocks before it, or gradients."""
    told, shape = job.work.told, on.shape
    lengths = told["length"] if isinstance(told["length"], list) else [told["length"]]
    indicator = told.get("indicator") or told.get("criterion") or ""
    greedy = told.get("removed", 1) if told.get("method") == "sleb" else 1
    graded = indicator == "taylor"
    times = 3.0 if graded else 1.0 if indicator in ("cosine", "block_influence") else greedy * shape.blocks / 2 + 1
    passes = [on.forward(told["samples"], length, 1).times(times) for length in lengths]
    longest = max(lengths)
    held = on.activations(longest, 1.0, False) if graded else on.read(1, longest, longest)
    return Demand(passes, shape.parameters, held=held, gradients=shape.parameters if graded else 0.0)


def pool(job: Job, on: Sizes) -> Demand:
    """PuDDing's sets: for each task and criterion one block after the other, each the best of those that are left."""
    told, shape = job.work.told, on.shape
    texts = [on.texts(task) for task in told["tasks"]]
    times = len(told["criteria"]) * told["removed"] * shape.blocks / 2
    passes = [
        on.forward(told["pool_items"], text.prompt + text.choices * text.response, 16).times(times) for text in texts
    ]
    return _reading(on, passes, 16 * 4, 256, 32)


# ---- trainings -------------------------------------------------------------------------------------------------------


def training(job: Job, on: Sizes) -> Demand:
    """BUDDY's stage 1: every block is computed at every depth, so that gates have gradients."""
    told = job.work.told
    data = job.study.training.data
    tuned = told.get("recipe") == "tuned"
    deepest = job.study.removed(job.work.backbone or "")
    share = _share(on.shape, max(deepest) / 2) if tuned else 1.0
    learnt = told["lora_rank"] > 0
    if not tuned or learnt:
        demand = on.trained(told, data, told["epochs"], share, gated=not tuned)
    else:
        demand = Demand([], on.shape.parameters)
    if not tuned or "router_examples" not in told:
        return demand
    return Demand([*demand.passes, *_fit(told, on)], demand.loaded, demand.trained, demand.held)


def _fit(told: Mapping[str, Any], on: Sizes) -> list[Passes]:
    """The tuned router: sets of blocks tried in searches, a table of losses, and held-out losses of some ten states."""
    blocks, deepest, depths = on.shape.blocks, told["most_removed"], len(told["depths"])
    tokens = 70 + told["router_response_tokens"]
    tried = 2 * blocks + told["router_exchanges"] * (deepest + 15) + 4 * deepest
    searches = (1 + told["router_orders"] * told["router_rounds"]) * tried * told["router_search_examples"]
    table = (told["router_examples"] + told["router_held_out"]) * (2 + told["router_orders"]) * depths
    states = 10 * told["router_held_out"] * depths
    return [on.forward(searches + table + states, tokens, told["router_batch_size"], 0.6, 0.3)]


def gates(job: Job, on: Sizes) -> Demand:
    """FiRST's gates, at full depth and without LoRA."""
    told = job.work.told
    return on.trained(told, job.study.training.data, told["first_epochs"], lora=False, gated=True)


def peer(job: Job, on: Sizes) -> Demand:
    """A peer's choice by the prompt, as far as it has one, and LoRA in the blocks that it leaves."""
    told, kind = job.work.told, METHODS[job.work.told["method"]].kind
    removed = told.get("removed", 0)
    share = _share(on.shape, removed)
    passes: list[Passes] = []
    if told["method"] == "pudding":
        sets = len(job.study.pudding.tasks) * len(job.study.pudding.criteria)
        for task in job.study.pudding.tasks:
            text = on.texts(task)
            items = min(told["pudding_router_items"] or text.trained, text.trained)
            passes.append(on.forward(items * sets, text.prompt + text.choices * text.response, 16, share))
    if told["method"] == "first":
        passes.append(on.forward(2 * 12 * told["first_calibration_prompts"], 100, told["batch_size"], share, 0.0))
    if told.get("lora", "trained") == "none":
        return _reading(on, passes, told["batch_size"], told["max_length"])
    learnt = on.trained(told, job.study.training.data, told["epochs"], share if kind != "whole" else 1.0)
    return Demand([*passes, *learnt.passes], learnt.loaded, learnt.trained, learnt.held)


def answering(job: Job, on: Sizes) -> Demand:
    """Prompts answered by a backbone itself."""
    told = job.work.told
    text = on.texts(told["name"])
    items = min(told["examples"] or text.trained, text.trained)
    passes = on.decode(items, text.prompt, told["new_tokens"], told["batch_size"])
    return _reading(on, passes, told["batch_size"], text.prompt + told["new_tokens"], 1)


def predictor(job: Job, on: Sizes) -> Demand:
    """A budget predictor: losses of a group of drawn depths at every update, or of all depths once."""
    told, settings = job.work.told, job.study.predictor
    if told["preset"] == "paper":
        text = on.texts(settings.data[0])
        items, batch = told["steps"] * told["batch_size"] * told["group"], told["batch_size"] * told["group"]
        passes = [on.forward(items, text.prompt + text.response, batch, 0.75)]
    else:
        batch = told["table_batch"]
        passes = []
        for name in settings.tuned_data:
            text = on.texts(name)
            own = told["examples"] or {"rise": 400}.get(told["preset"], 2000)
            items = min(own, text.trained) * told["depths"]
            passes.append(on.forward(items, text.prompt + text.response, batch, 0.75))
    return _reading(on, passes, batch, told["max_length"], 128)


# ---- measurements ----------------------------------------------------------------------------------------------------


def _shares(on: Sizes, told: Mapping[str, Any]) -> list[float]:
    """Of the blocks that run at every depth; where a predictor chooses, some three quarters of them."""
    return [_share(on.shape, removed) for removed in told["removed"]] if "removed" in told else [0.75]


def _questions(on: Sizes, told: Mapping[str, Any], share: float) -> list[Passes]:
    passes = []
    for task in told["tasks"]:
        text = on.texts(task)
        items = min(told["limit"] or text.evaluated, text.evaluated)
        shots = (told.get("few_shot") or 0) * (text.prompt + text.response)
        tokens = shots + text.prompt + text.response
        passes.append(on.forward(items * text.choices, tokens, told["batch_size"], share, text.response / tokens))
    return passes


def evaluation(job: Job, on: Sizes) -> Demand:
    """Questions scored at every depth."""
    told = job.work.told
    passes = [one for share in _shares(on, told) for one in _questions(on, told, share)]
    return _reading(on, passes, told["batch_size"], 1024, 64)


def constant_budgets(job: Job, on: Sizes) -> Demand:
    """Held-out inputs at every depth from the deepest pruning to the whole model."""
    told, settings = job.work.told, job.study.predictor
    depths = max(job.study.removed(job.work.backbone or "")) + 1
    passes = []
    for name in settings.datasets:
        text = on.texts(name)
        items = min(told["limit"] or text.evaluated, text.evaluated) * depths
        passes.append(on.forward(items, text.prompt + text.response, told["table_batch"], 0.75))
    return _reading(on, passes, told["table_batch"], told["max_length"], 128)


def solving(job: Job, on: Sizes) -> Demand:
    """Problems answered by generation, after solved ones; the harness has five where none are asked for."""
    told = job.work.told
    text = on.texts("gsm8k")
    shots = 5 if told["few_shot"] is None else told["few_shot"]
    prompt = text.prompt + shots * (text.prompt + text.response)
    items = min(told["limit"] or text.evaluated, text.evaluated) * len(job.study.generation.tasks)
    passes: list[Passes] = []
    for share in _shares(on, told):
        passes += on.decode(items, prompt, told["new_tokens"], told["batch_size"], share)
    return _reading(on, passes, told["batch_size"], prompt + told["new_tokens"], 1)


def generating(job: Job, on: Sizes) -> Demand:
    """Prompts of a data set and tokens after them, at every depth: paths, or summaries with the path kept and chosen anew."""
    told = job.work.told
    text = on.texts(job.wildcards["dataset"])
    modes = 2 if job.stage == "rouge" else 1
    passes: list[Passes] = []
    for removed in told["removed"]:
        share = _share(on.shape, removed)
        passes += on.decode(modes * told["prompts"], text.prompt, told["new_tokens"], told.get("batch_size", 8), share)
    return _reading(on, passes, told.get("batch_size", 8), 512 + told["new_tokens"], 1)


def scoring(job: Job, on: Sizes) -> Demand:
    """Held-out text at every depth, in every mode, beside the whole model."""
    told, sets = job.work.told, len(job.study.likelihood.datasets)
    modes = len(told.get("kv", [""])) * len(told.get("decode", [""]))
    times = 1 + CAUSAL * modes * sum(_share(on.shape, removed) for removed in told["removed"] if removed)
    passes = on.forward(sets * told["items"], told["max_length"] * 0.7, told["batch_size"], 1.0, 0.5).times(times)
    return _reading(on, [passes], told["batch_size"], told["max_length"], told["max_length"])


def _contenders(told: Mapping[str, Any], shape: Shape, batch: int) -> float:
    """What takes turns at a batch size, in whole models: in every heat the dense one, and others at their depths
    (`buddy.evaluation.latency.heats`)."""
    executions, depths = told["executions"], [_share(shape, removed) for removed in told["removed"]]
    own = sum(name in executions for name in ("reuse", "recompute"))
    cut, varied = "sliced" in executions, "varied" in executions
    bounds = len(told.get("slack", [])) if batch > 1 else 0
    heats = [1 + share * (cut + own) for share in depths if own or (cut and not varied)]
    heats += [1 + share * (cut + 1 + bounds) for share in depths if varied]
    heats += [2.0] if "full" in executions else []
    if batch > 1:
        heats += [1 + sum(depths) + 1] if "mixed" in executions else []
        heats += [1 + 2 * max(depths)] if "nested" in executions else []
    return sum(heats) or 1.0


def timing(job: Job, on: Sizes) -> Demand:
    """Executions side by side, so many passes over the prompts, at every batch size and depth: launch by launch, and by
    captured graphs, which no launch holds up."""
    told = job.work.told
    text = on.texts(job.wildcards["dataset"])
    rounds = told["repeats"] + told["warmup"]
    passes: list[Passes] = []
    for batch in told["batch_sizes"]:
        depth = _contenders(told, on.shape, batch) * rounds
        prompts, decoded = on.decode(max(told["prompts"], batch), text.prompt, told["new_tokens"], batch)
        for engine in told["engines"]:
            captured = engine == "graph"
            passes += [prompts.times(depth), replace(decoded.times(depth), **({"calls": 0.0} if captured else {}))]
    largest = max(told["batch_sizes"])
    # Sliced models share their weights; captured graphs have a cache and buffers of their own for each route.
    return Demand(passes, on.shape.parameters, held=4 * on.read(largest, text.prompt + told["new_tokens"], 1))


def profiling(job: Job, on: Sizes) -> Demand:
    """A few steps under the profiler, which makes them several times as long, and prompts of every length."""
    told = job.work.told
    passes: list[Passes] = []
    for _ in told["removed"]:
        steps = on.decode(told["batch_size"], told["tokens"], told["steps"], told["batch_size"])
        passes += [one.times(5 * (told["repeats"] + 1)) for one in steps]
        passes += [on.forward(1, length, 1).times(told["repeats"] + 1) for length in told["contexts"]]
    return _reading(on, passes, told["batch_size"], max([*told["contexts"], told["tokens"]]) / told["batch_size"], 1)
