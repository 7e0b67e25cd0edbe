"""What a router may read of a question: what its options share.

A question is scored by a request per option. Mostly the options are the answers, after one context. In WinoGrande the
option stands in the context: if each context chose its own route, two options of a question would be scored by two
networks, and their likelihoods would say as much about the networks as about the options. So every option of a question is
routed by what precedes the first token in which their contexts differ. If that is nothing, nothing is read, and the route
is the one that the policy has for no input at all: BUDDY its prior's, FiRST every block.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from buddy.data.choices import shared


class Question(NamedTuple):
    """A task's document, to which several requests may belong; ``task`` is empty for requests that belong to none."""

    task: str
    document: Hashable


class Read(NamedTuple):
    """The tokens of a context that the policy reads, from ``first`` up to, and without, ``last``."""

    first: int
    last: int


def asked_by(requests: Sequence[Any]) -> list[Question]:
    """The question of each of the harness's requests.

    A request without a document is a question of its own; so is one with an empty context, by which the harness asks how
    likely an option is by itself.

    Args:
        requests: `lm_eval.api.instance.Instance`.
    """
    return [
        Question(request.task_name or "", place)
        if request.doc_id is None or not request.args[0]
        else Question(request.task_name or "", (request.doc_id,))
        for place, request in enumerate(requests)
    ]


def reads(
    questions: Sequence[Question], contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], longest: int
) -> list[Read]:
    """What is read of the context of each request, the same tokens for all requests of a question.

    Args:
        questions: of each request.
        contexts, answers: their tokens.
        longest: tokens that the model takes in: a context with its answer loses its beginning beyond that, with the longest
            answer of a question the most, and that is read of none.
    """
    members: dict[Question, list[int]] = {}
    for place, question in enumerate(questions):
        members.setdefault(question, []).append(place)
    found = [Read(0, 0)] * len(questions)
    for places in members.values():
        last = shared([contexts[place] for place in places])
        cut = max(len(contexts[place]) + len(answers[place]) - longest - 1 for place in places)
        for place in places:
            found[place] = Read(max(cut, 0), last)
    return found


def differing(routes: Sequence[tuple[Question, bytes]]) -> float:
    """Share of the questions whose requests did not all take the same route.

    Args:
        routes: of each request its question, and its route.
    """
    found: dict[Question, set[bytes]] = {}
    for question, route in routes:
        found.setdefault(question, set()).add(route)
    return sum(len(different) > 1 for different in found.values()) / max(len(found), 1)
