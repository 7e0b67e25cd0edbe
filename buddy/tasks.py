"""The multiple-choice tasks of the paper, as lm-evaluation-harness defines them: what each is called, published and scored by.

Eight of them are its suite; MMLU is asked of the budget predictor alone (Figure 13). Its 57 subjects are one task here: the
score is over items, as the harness's own weighs subjects by their size.

A task is an entry here; another package brings its own (`buddy.extensions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buddy.extensions import Task, table

__all__ = ["PAPERS", "TASKS", "Task", "headline", "percents"]


_ARC = ("allenai/ai2_arc", ("question", "choices", "answerKey"), "test")
_SUITE = (
    Task(
        *("openbookqa", "OBQA", "acc_norm", 4, "openbookqa/openbookqa.yaml"),
        *("allenai/openbookqa", ("question_stem", "choices", "answerKey"), "test", "main"),
    ),
    Task("piqa", "PIQA", "acc_norm", 2, "piqa/piqa.yaml", "baber/piqa", ("goal", "sol1", "sol2", "label")),
    Task(
        *("boolq", "BoolQ", "acc", 2, "super_glue/boolq/default.yaml"),
        *("aps/super_glue", ("passage", "question", "label"), "validation", "boolq"),
    ),
    Task(
        *("siqa", "SIQA", "acc", 3, "siqa/siqa.yaml"),
        *("lighteval/siqa", ("context", "question", "answerA", "answerB", "answerC", "label")),
    ),
    Task(
        *("hellaswag", "HellaSwag", "acc_norm", 4, "hellaswag/hellaswag.yaml"),
        *("Rowan/hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    ),
    Task("arc_easy", "ARC-e", "acc", 4, "arc/arc_easy.yaml", *_ARC, "ARC-Easy"),
    Task("arc_challenge", "ARC-c", "acc_norm", 4, "arc/arc_challenge.yaml", *_ARC, "ARC-Challenge"),
    Task(
        *("winogrande", "WinoGrande", "acc", 2, "winogrande/default.yaml"),
        *("allenai/winogrande", ("sentence", "option1", "option2", "answer"), "validation", "winogrande_xl"),
    ),
)
_MMLU = Task(
    *("mmlu", "MMLU", "acc", 4, "mmlu/default/_default_template_yaml"),
    *("cais/mmlu", ("question", "subject", "choices", "answer"), "test", "all"),
    train="dev",
    group="subject",
    description="The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\n\n",
)

TASKS: dict[str, Task] = table("buddy.tasks", (*_SUITE, _MMLU))
"""Every task by name, in the order of the paper's columns."""
PAPERS = tuple(task.name for task in _SUITE)
"""The paper's suite, over which its averages are."""


def headline(task: str, scores: Mapping[str, Any]) -> str:
    """Of the scores that a record has of a task the name of the one that is shown; the other one where that is missing."""
    first = TASKS[task].headline if task in TASKS else "acc_norm"
    other = "acc" if first == "acc_norm" else "acc_norm"
    return other if scores.get(first) is None else first


def percents(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Each task's headline score in percent, of the ``tasks`` of an accuracy record."""
    return {name: 100 * scores[headline(name, scores)] for name, scores in tasks.items()}
