"""Training questions of the multiple-choice tasks, as the backbone reads them when the task is evaluated.

Contexts and answers come from lm-evaluation-harness's own definition of each task (`buddy.data.tasks`), applied to the
training split, and are cut into tokens the way the harness cuts them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

from buddy.data.catalogue import entry
from buddy.data.tasks import PREFIX, tasks
from buddy.errors import UserError

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A question in tokens.

    Attributes:
        contexts: what precedes each choice. The same for all, except where the choice stands in the context (WinoGrande).
        answers: what is scored after it, at least one token for each choice.
        right: index of the right choice.
    """

    contexts: tuple[Tokens, ...]
    answers: tuple[Tokens, ...]
    right: int

    @property
    def shared(self) -> Tokens:
        """What the contexts have in common at their beginning: all that a router may see of this question."""
        return self.contexts[0][: shared(self.contexts)]

    @property
    def solution(self) -> tuple[Tokens, Tokens]:
        """Context and answer of the right choice."""
        return self.contexts[self.right], self.answers[self.right]


def shared(contexts: Sequence[Sequence[Hashable]]) -> int:
    """How many tokens (or words) contexts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*contexts, strict=False)))


def training_items(
    root: str | Path, names: Sequence[str], tokenizer: Any, count: int | None = None, max_length: int = 2048
) -> dict[str, list[Item]]:
    """The first questions of each task's training split.

    Args:
        root: the study's data folder, as for `buddy.data.tasks.tasks`.
        names: multiple-choice tasks.
        tokenizer: the backbone's.
        count: questions per task; all by default.
        max_length: longest context with its answer, tokens; a longer context loses its beginning, as in the harness.

    Returns:
        Questions by task, in the order of ``names``.

    Raises:
        UserError: a task has no training split there, fewer questions than ``count``, or no choices.
    """
    found = {}
    for name, task in zip(names, tasks(root, names)[1], strict=True):
        if task.OUTPUT_TYPE != "multiple_choice":
            raise UserError(f"task {name}: its answers are generated; a pool of omission sets needs multiple choice")
        if not task.has_training_docs():
            raise UserError(_untrained(root, name, "to train on"))
        documents = list(task.training_docs())
        if count is not None and len(documents) < count:
            raise UserError(f"task {name}: {count} training items asked for, the split has {len(documents)}")
        found[name] = [item_of(task, document, tokenizer, max_length) for document in documents[:count]]
    return found


def training_contexts(root: str | Path, names: Sequence[str], tokenizer: Any, count: int) -> list[list[int]]:
    """What a router may see of the tasks' training questions; no answer is looked at.

    Args:
        root, names, tokenizer: as for `training_items`.
        count: contexts at most, as evenly from the tasks as their number allows.

    Raises:
        UserError: a task has no training split there.
    """
    each = -(-count // max(len(names), 1))
    found = []
    for name, task in zip(names, tasks(root, names)[1], strict=True):
        if not task.has_training_docs():
            raise UserError(_untrained(root, name, "for its contexts"))
        documents = list(task.training_docs())[:each]
        found.append([list(item_of(task, document, tokenizer, 2048).shared) for document in documents])
    turns = [contexts for turn in zip_longest(*found) for contexts in turn if contexts]
    return turns[:count]


def _untrained(root: str | Path, name: str, for_what: str) -> str:
    """What is missing of a task that has no training split."""
    path = Path(root) / name / f"{entry(name).train}.jsonl"
    if path.exists():
        return f"task {name}: {path} holds solved examples for prompts; nothing is trained on it"
    return f"task {name}: no {path} {for_what}"


def item_of(task: Any, document: dict[str, Any], tokenizer: Any, max_length: int) -> Item:
    """A document of any split in the words of its evaluation, without solved examples, in tokens.

    Args:
        task: lm-evaluation-harness's task.
        document: one of its documents.
        tokenizer: the backbone's.
        max_length: longest context with its answer, tokens; longer ones lose their beginning, each option's as many tokens.
    """
    requests = task.construct_requests(document, task.fewshot_context(document, 0), metadata=(None, None, None))
    pairs = [_encoded(tokenizer, *request.args[:2]) for request in requests]
    # Alike for all options, so that what they share stays what they share.
    cut = max(0, *(len(context) + len(answer) - max_length - 1 for context, answer in pairs))
    contexts, answers = zip(
        *((context[min(cut, len(context) - 1) :], answer) for context, answer in pairs), strict=True
    )
    return Item(contexts, answers, _right(task, document))


def _right(task: Any, document: dict[str, Any]) -> int:
    """Index of the right choice; tasks give it as a number or as the choice's text."""
    right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    choices = task.doc_to_choice(document)
    index = choices.index(right) if isinstance(right, str) else int(right)
    if not 0 <= index < len(choices):
        name = task.config.task.removeprefix(PREFIX)
        raise UserError(f"task {name}: answer {right!r} is none of the {len(choices)} choices")
    return index


def _encoded(tokenizer: Any, context: str, answer: str) -> tuple[Tokens, Tokens]:
    """Context and answer as the harness encodes them: together, because words do not end where strings do."""
    bare = context.rstrip()
    start = tuple(tokenizer(bare).input_ids)
    whole = tuple(tokenizer(context + answer).input_ids)
    return start, whole[len(start) :]
