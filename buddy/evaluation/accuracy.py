"""Accuracy of one run at several budgets: lm-eval's results, reduced to what a record keeps."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from buddy.data.choices import Tokens, shared
from buddy.data.tasks import PREFIX, check_rows, tasks
from buddy.errors import UserError
from buddy.evaluation.distance import distances
from buddy.evaluation.harness import BuddyLM
from buddy.evaluation.questions import Question, differing
from buddy.routing.policy import GatedPolicy
from buddy.settings import Evaluation, Generation
from buddy.storage.checkpoints import Checkpoints
from buddy.storage.files import sha256
from buddy.tasks import TASKS, headline

log = logging.getLogger(__name__)

KEPT = ("acc", "acc_norm", "exact_match")


def measure(
    lm: BuddyLM, budget: float | str, settings: Evaluation, data: Path, kept: Checkpoints | None = None
) -> dict[str, Any]:
    """Score the answers of multiple-choice tasks at one budget, task after task.

    Args:
        lm: the model; its budget is set here.
        budget: fraction of blocks; or ``auto``, ``auto:PRICE``.
        settings: the section `evaluation` of the study.
        data: folder of materialised data sets.
        kept: where a task's scores are kept, and taken from instead of being measured; what made them are the model's own
            facts, the task's are added here.

    Returns:
        ``metrics`` of an accuracy record: per task acc, acc_norm, their standard errors, n and one digit per item, the
        mean number of blocks executed, `_routes` and `_distance`, of a task of many subjects the scores of each in
        ``groups``; the mean number of blocks of all; few_shot, limit and the harness version.

    Raises:
        UserError: a task's items are not there.
    """
    for task in settings.tasks:  # before the first of them is scored
        check_rows(data / task, task)
    parts = {task: _scored(lm, budget, settings, data, task, kept) for task in settings.tasks}
    blocks, passes = (sum(part[name] for part in parts.values()) for name in ("blocks", "passes"))
    return {
        "tasks": {task: part["scores"] for task, part in parts.items()},
        "executed_mean": blocks / max(passes, 1),
        **_facts(settings),
        **{"few_shot": settings.few_shot, "routing": settings.routing},
    }


def _scored(
    lm: BuddyLM, budget: float | str, settings: Evaluation, data: Path, task: str, kept: Checkpoints | None
) -> dict[str, Any]:
    """One task's scores, and the blocks and passes behind them; of a killed job's, if they are there."""
    if kept is None:
        return _score(lm, budget, settings.model_copy(update={"tasks": [task]}), data, task)
    facts = {"budget": budget, "settings": settings.model_dump(exclude={"tasks", "batch_size"}), **_facts(settings)}
    own = replace(kept, made_by={**kept.made_by, **facts, "data": sha256(data / task / "data.json")})
    name = f"{budget}-{task}"
    if (done := own.read(name)) is not None:
        log.info("%s at %s: scored before", task, budget)
        found: dict[str, Any] = json.loads(done)
        return found
    found = _score(lm, budget, settings.model_copy(update={"tasks": [task]}), data, task)
    own.write(name, json.dumps(found).encode())
    return found


def _score(lm: BuddyLM, budget: float | str, settings: Evaluation, data: Path, task: str) -> dict[str, Any]:
    results = _run(lm, budget, settings, data)
    name = PREFIX + task
    scores = _task_metrics(results["results"][name], results["samples"][name])
    if group := TASKS[task].group:
        scores["groups"] = _by_group(results["samples"][name], group, headline(task, scores))
    tally = lm.tallies[name]
    contexts = _contexts(lm, results["samples"][name])
    scores["executed_mean"] = tally.executed_mean
    blocks, passes = lm.all.blocks, lm.all.passes  # before contexts are read once more
    scores["routes"] = _routes(lm, contexts, tally.differing)
    scores["distance"] = _distance(lm, contexts)
    return {"scores": scores, "blocks": blocks, "passes": passes}


def predicted(
    lm: BuddyLM, budget: str, settings: Evaluation, data: Path, kept: Checkpoints | None = None
) -> dict[str, Any]:
    """Score the answers of multiple-choice tasks where the budget predictor sets the depth of each input.

    Args:
        lm, settings, data, kept: as for `measure`.
        budget: ``auto`` or ``auto:PRICE``.

    Returns:
        The same as `measure`, and ``budget``; each task has its own ``executed_mean``, and all have their mean.
    """
    found = measure(lm, budget, settings, data, kept)
    mean = fmean(scores["executed_mean"] for scores in found["tasks"].values())
    return {**found, "executed_mean": mean, "budget": budget}


def solve(lm: BuddyLM, budget: float | str, settings: Generation, data: Path) -> dict[str, Any]:
    """Let the model write its answers at one budget, and compare what is found in them with the right ones.

    Args:
        lm: the model; its budget is set here.
        budget: fraction of blocks; or ``auto``, ``auto:PRICE``.
        settings: the section `generation` of the study.
        data: folder of materialised data sets.

    Returns:
        ``metrics`` of a generation record: per task the share of exact matches and its standard error by the way an
        answer is found in the text (the harness's filters: for GSM8K ``strict-match`` and ``flexible-extract``), n
        and one digit per item; the mean number of blocks executed; few_shot (as asked, the harness's own number where
        the settings have none), limit, new_tokens, decode, slack and the harness version.

    Raises:
        UserError: the model's context has no room for a prompt beside that many new tokens.
    """
    if settings.new_tokens >= lm.max_length:
        raise UserError(
            f"--new-tokens: {settings.new_tokens} leaves no room for a prompt in a context of {lm.max_length} tokens"
        )
    results = _run(lm, budget, settings, data, gen_kwargs={"max_gen_toks": settings.new_tokens})
    facts = {
        "few_shot": results["n-shot"][PREFIX + settings.tasks[0]],
        "decode": settings.decode,
        "slack": settings.slack,
    }
    found = {
        name: _answer_metrics(results["results"][PREFIX + name], results["samples"][PREFIX + name])
        for name in settings.tasks
    }
    return {
        "tasks": found,
        "executed_mean": lm.executed_mean,
        **_facts(settings),
        **facts,
        "new_tokens": settings.new_tokens,
    }


def _contexts(lm: BuddyLM, samples: Sequence[Mapping[str, Any]]) -> list[list[Tokens]]:
    """The different contexts of each question, in tokens; most questions have one.

    Args:
        lm: has encoded them.
        samples: the harness's, each with the arguments of its requests.
    """
    return [
        [
            tuple(lm.tok_encode(context.rstrip()))[-lm.max_length :]
            for context in dict.fromkeys(argument[0] for argument in sample["arguments"] if argument[0])
        ]
        for sample in samples
    ]


def _distance(lm: BuddyLM, contexts: Sequence[Sequence[Tokens]]) -> float | None:
    """How far what the router reads of the questions is from its training prompts (`distances`), on average; None where
    nothing says so."""
    read = [one[0][: shared(one)] for one in contexts if one]
    found = distances(lm.model, [tokens for tokens in read if tokens], lm.batch_size)
    return None if found is None or not len(found) else found.mean().item()


def _routes(lm: BuddyLM, contexts: Sequence[Sequence[Tokens]], differed: float) -> dict[str, float]:
    """How many networks the questions of a task were scored by.

    Args:
        lm: after the task was scored, its budget as it was.
        contexts: of each question.
        differed: share of the questions whose options took more than one route.

    Returns:
        ``differ``, that share: none, but for rounding. ``would_differ``: the share, were each option's own context read;
        it is 0 where the options have one context, and where routes follow no input.
    """
    policy = lm.model.policy
    routed = policy.source_block or isinstance(policy, GatedPolicy) or policy.reads_tokens
    if not routed or all(len(one) < 2 for one in contexts):
        return {"differ": differed, "would_differ": 0.0}
    questions = [Question("", place) for place, one in enumerate(contexts) for _ in one]
    found = lm.routes([context for one in contexts for context in one])
    return {"differ": differed, "would_differ": differing(list(zip(questions, found, strict=True)))}


def items(metrics: Mapping[str, Any]) -> int:
    """Number of items behind the metrics of an accuracy or a generation record."""
    return sum(task["n"] for task in metrics["tasks"].values())


def _run(
    lm: BuddyLM, budget: float | str, settings: Evaluation | Generation, data: Path, **more: Any
) -> Mapping[str, Any]:
    """The harness's own results of the tasks at one budget, with every sample."""
    from lm_eval import simple_evaluate

    lm.budget = budget
    lm.reset_count()
    manager, chosen = tasks(data, settings.tasks)
    results = simple_evaluate(
        model=lm,
        tasks=chosen,
        task_manager=manager,
        num_fewshot=settings.few_shot,
        limit=settings.limit,
        batch_size=settings.batch_size,
        bootstrap_iters=1000,
        **more,
    )
    assert results is not None
    return results


def _facts(settings: Evaluation | Generation) -> dict[str, Any]:
    """What both kinds of records say of how they were measured."""
    return {"limit": settings.limit, "lm_eval": metadata.version("lm_eval")}


def _task_metrics(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kept: dict[str, Any] = {"n": len(samples), "items": {}}
    for key, value in result.items():
        metric = key.split(",")[0]
        if metric.removesuffix("_stderr") in KEPT and isinstance(value, int | float):
            kept[metric] = value
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    for metric in KEPT:
        if ordered and metric in ordered[0]:
            kept["items"][metric] = "".join(str(int(sample[metric])) for sample in ordered)
    return kept


def _by_group(samples: Sequence[Mapping[str, Any]], group: str, metric: str) -> dict[str, dict[str, float]]:
    """Of each subject of a task its number of items, and the metric's mean over them."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        found.setdefault(str(sample["doc"][group]), []).append(float(sample[metric]))
    return {subject: {"n": len(scores), metric: fmean(scores)} for subject, scores in sorted(found.items())}


def _answer_metrics(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Exact matches by filter; the harness lists every item once per filter."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    return {
        "n": len({sample["doc_id"] for sample in samples}),
        **{
            metric: {name: value for name in filters if isinstance(value := result[f"{metric},{name}"], int | float)}
            for metric in ("exact_match", "exact_match_stderr")
        },
        "items": {
            name: "".join(str(int(sample["exact_match"])) for sample in ordered if sample["filter"] == name)
            for name in filters
        },
    }
