"""Which blocks ran, prompt by prompt and step by step: the measured properties of a policy.

The paper's Table 1 (is the budget kept, do paths follow the input, do they change while decoding), Figure 4 (distinct
paths per generation), Figures 6 and 9 to 11 (how often each block runs, task by task), and one generation to look at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from buddy.data import inputs
from buddy.data.catalogue import CATALOGUE, CHOICE
from buddy.data.choices import shared
from buddy.evaluation.latency import spread
from buddy.routing.model import RoutedModel
from buddy.routing.trace import Trace
from buddy.settings import Trace as Settings

# ---- what is asked ---------------------------------------------------------------------------------------------------


def prompts(folder: str | Path) -> list[str]:
    """The prompts of a data set, in the order of its rows.

    Args:
        folder: a data set folder. Of instructions, dialogues and problems it has the prompts; if it has the name of a
            multiple-choice task, what the harness puts before the answers of its evaluation split, without examples, as
            far as the options of a question share it.

    Raises:
        UserError: not a data set folder, or a set that asks nothing.
    """
    folder = Path(folder)
    data = CATALOGUE.get(folder.name)
    if data is not None and data.kind == CHOICE:
        return _contexts(folder)
    return inputs.prompts(folder)


def _contexts(folder: Path) -> list[str]:
    """What lm-eval asks of each document. Where the choices are contexts (WinoGrande), the words that they share; the first
    of them where they share none."""
    from buddy.data.tasks import tasks

    _, (task,) = tasks(folder.parent, [folder.name])
    contexts = []
    for document in task.eval_docs:
        text: Any = task.doc_to_text(document)
        contexts.append(text if isinstance(text, str) else _common_words(task.doc_to_choice(document)))
    return contexts


def _common_words(texts: Sequence[str]) -> str:
    """The words with which all texts begin, and the first text where they begin differently."""
    words = [text.split(" ") for text in texts]
    return " ".join(words[0][: shared(words)]).rstrip() or texts[0]


# ---- what ran --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What was generated after a prompt.

    Attributes:
        tokens: the new tokens, with the one that ended them if one did.
        routes: boolean (passes, L): the prefill's route, then that of every decode step whose token the sequence needed.
            The last new token is not fed back, so there are as many passes as new tokens.
    """

    tokens: list[int]
    routes: Tensor


def collect(model: RoutedModel, texts: Sequence[str], budget: float, settings: Settings) -> list[Tensor]:
    """The routes (passes, L) of a greedy generation after each prompt, as the section `trace` of the study has it."""
    found = answers(model, texts, budget, settings.decode, settings.new_tokens, settings.batch_size)
    return [answer.routes for answer in found]


def answers(
    model: RoutedModel, texts: Sequence[str], budget: float, decode: str, new_tokens: int, batch_size: int
) -> list[Answer]:
    """Generate greedily after each prompt.

    Args:
        model: the run, in evaluation mode.
        texts: the prompts; those of like length are generated together.
        budget: fraction of blocks.
        decode: ``recompute`` or ``reuse``.
        new_tokens: generated after each prompt, at most.
        batch_size: sequences generated together.

    Returns:
        An answer per prompt, in the order given.
    """
    rows = [model.tokenizer(text).input_ids for text in texts]
    found: dict[int, Answer] = {}
    with tqdm(total=len(rows), desc=f"generating at {budget:.3g}", unit="prompt") as bar:
        for numbers, given in batches(model, rows, budget, decode, new_tokens, batch_size):
            found.update(zip(numbers, given, strict=True))
            bar.update(len(numbers))
    return [found[number] for number in range(len(rows))]


def batches(
    model: RoutedModel, rows: Sequence[list[int]], budget: float, decode: str, new_tokens: int, batch_size: int
) -> Iterator[tuple[list[int], list[Answer]]]:
    """`answers` of prompts in tokens, batch by batch: the numbers of its prompts, and their answers."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))  # the longest first: trouble comes at once
    ends = end_tokens(model)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        padded = model.tokenizer.pad(
            {"input_ids": [rows[number] for number in batch]}, padding_side="left", return_tensors="pt"
        )
        ids = model.generate(
            padded["input_ids"].to(model.device),
            padded["attention_mask"].to(model.device),
            budget=budget,
            decode=decode,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=model.tokenizer.pad_token_id,
        )
        new = ids[:, padded["input_ids"].shape[1] :]
        passes = needed_passes(new, ends)
        routes = needed_routes(model.trace, passes)
        yield (
            batch,
            [Answer(tokens[:count], ran) for tokens, count, ran in zip(new.tolist(), passes, routes, strict=True)],
        )


def end_tokens(model: RoutedModel) -> frozenset[int]:
    """Tokens that end a generation of this model; none if it never ends by itself."""
    ends: Any = model.backbone.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else map(int, ends))


def needed_passes(new: Tensor, ends: Collection[int]) -> list[int]:
    """Passes that each sequence of a batch needed for its new tokens: one each, up to the first that ends it.

    Args:
        new: (B, N) generated tokens; what follows an end is padding.
        ends: tokens that end a sequence.
    """
    rows = new.tolist()
    return [next((at for at, token in enumerate(row, 1) if token in ends), len(row)) for row in rows]


def needed_routes(trace: Trace, passes: Sequence[int]) -> list[Tensor]:
    """Routes (passes, L) of each sequence of a generation, without the passes it took only because others went on."""
    return [trace.routes(sequence)[:count] for sequence, count in enumerate(passes)]


# ---- what it says ----------------------------------------------------------------------------------------------------


def summary(routes: Sequence[Tensor], requested: int) -> dict[str, Any]:
    """What a trace record says of the routes at one depth.

    Args:
        routes: per prompt a boolean tensor (passes, L), the prefill first.
        requested: number of blocks that the budget asks for.

    Returns:
        - ``requested_executed``; ``executed_min``, ``executed_max`` and ``executed_mean`` over all passes and
          sequences; ``largest_deviation``, the largest difference from the request among them, in blocks;
        - ``distinct_paths_over_prompts``: different routes among the prefills;
        - ``distinct_paths_per_generation``: different routes in one generation, prefill included: mean, median, p10,
          p90 and the values prompt by prompt;
        - ``block_frequency`` and ``block_frequency_prefill``: share of all passes, and of the prefills, in which each
          of the L blocks ran;
        - ``changed_steps_mean``: share of decode steps whose route is not that of the pass before; None where nothing
          was decoded.
    """
    every = torch.cat(list(routes))
    prefills = torch.stack([route[0] for route in routes])
    executed = every.sum(-1)
    changed = torch.cat([(route[1:] != route[:-1]).any(-1) for route in routes])
    paths = [_distinct(route) for route in routes]
    return {
        "requested_executed": requested,
        "executed_min": int(executed.min()),
        "executed_max": int(executed.max()),
        "executed_mean": executed.double().mean().item(),
        "largest_deviation": int((executed - requested).abs().max()),
        "distinct_paths_over_prompts": _distinct(prefills),
        "distinct_paths_per_generation": {"mean": sum(paths) / len(paths), **spread(paths)},
        "block_frequency": every.double().mean(0).tolist(),
        "block_frequency_prefill": prefills.double().mean(0).tolist(),
        "changed_steps_mean": changed.double().mean().item() if len(changed) else None,
    }


def example(tokenizer: Any, prompt: str, answer: Answer) -> dict[str, Any]:
    """One generation as a trace record has it, to be looked at.

    Returns:
        - ``prompt``: its text;
        - ``tokens``: the text of each new token;
        - ``routes``: of the pass that gave each of them, a string of L digits, 1 where the block ran. The first pass read
          the prompt.
    """
    return {
        "prompt": prompt,
        "tokens": [tokenizer.decode([token]) for token in answer.tokens],
        "routes": ["".join("1" if ran else "0" for ran in route) for route in answer.routes.tolist()],
    }


def _distinct(routes: Tensor) -> int:
    """Number of different rows of (N, L)."""
    return len(set(map(tuple, routes.tolist())))
