"""Rows as text: the one place where a row becomes a prompt and its response, or running prose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import Formatter
from typing import NamedTuple

from buddy.data.catalogue import entry
from buddy.data.rows import Row
from buddy.errors import UserError, choices

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The template of Stanford Alpaca, with which `yahma/alpaca-cleaned` models are trained."""

SUMMARISE = "Summarize the following dialogue.\n\n{dialogue}\n\nSummary:\n"
PROBLEM = "Question: {question}\nAnswer: "
"""As lm-evaluation-harness asks GSM8K, the space between question and answer included."""


Spans = tuple[tuple[int, int], ...]
"""Pieces of a text, each from its first letter up to, and without, its last."""


class Prompt(NamedTuple):
    """A row as it is asked; ``own``: what of it is the row's and not the template's, nothing where all of it is."""

    text: str
    own: Spans = ()


def _filled(template: str, **fields: str) -> Prompt:
    """A template with its fields put in."""
    text, own = "", []
    for words, name, _, _ in Formatter().parse(template):
        text += words
        if name is not None:
            own.append((len(text), len(text) + len(fields[name])))
            text += fields[name]
    return Prompt(text, tuple(own))


def _instruction(text: str, context: str) -> Prompt:
    if context.strip():
        return _filled(ALPACA_INPUT, instruction=text, input=context)
    return _filled(ALPACA, instruction=text)


def instruction(text: str, context: str = "") -> str:
    """Alpaca's prompt for an instruction, with further input where there is some."""
    return _instruction(text, context).text


def _alpaca(row: Row) -> Prompt:
    return _instruction(row["instruction"], row.get("input") or "")


def _samsum(row: Row) -> Prompt:
    return _filled(SUMMARISE, dialogue=row["dialogue"].replace("\r\n", "\n"))


def _gsm8k(row: Row) -> Prompt:
    return _filled(PROBLEM, question=row["question"])


def _pairs(row: Row) -> Prompt:
    return Prompt(str(row["prompt"]), tuple((start, end) for start, end in row.get(OWN, ())))


OWN = "own"
"""Column of a row of `pairs`: `Prompt.own` of its prompt; others do not have it."""

QUESTIONS: dict[str, Callable[[Row], Prompt]] = {
    "alpaca": _alpaca,
    "samsum": _samsum,
    "gsm8k": _gsm8k,
    "pairs": _pairs,
}
"""How a row of each set is asked; sets that are not among them have no prompts with responses."""

CUT = "cut"
"""Column of a row whose response was cut off before its end; others do not have it."""


class Example(NamedTuple):
    """A prompt and its response, to be joined with nothing between; ``ends``: whether the response comes to its end;
    ``own``: as of `Prompt`."""

    prompt: str
    response: str
    ends: bool = True
    own: Spans = ()


def questions(name: str, rows: Sequence[Row]) -> list[str]:
    """Prompt of each row; no chat template, no special tokens. Arguments and errors as of `asked`."""
    return [prompt.text for prompt in asked(name, rows)]


def asked(name: str, rows: Sequence[Row]) -> list[Prompt]:
    """Each row as it is asked.

    Args:
        name: alpaca, samsum, gsm8k or pairs.
        rows: rows of that data set; they need no response.

    Raises:
        UserError: the data set has no prompts and responses.
    """
    if name not in QUESTIONS:
        raise UserError(
            f"data set {entry(name).name}: has no prompts with responses; those that have: {choices(QUESTIONS)}"
        )
    return [QUESTIONS[name](row) for row in rows]


def examples(name: str, rows: Sequence[Row]) -> list[Example]:
    """Prompt and response of each row.

    Args:
        name: alpaca, samsum, gsm8k or pairs.
        rows: rows of that data set.

    Raises:
        UserError: the data set has no prompts and responses, or a row has no response.
    """
    found = []
    for row, prompt in zip(rows, asked(name, rows), strict=True):
        response = row.get(str(entry(name).response))
        if response is None:
            raise UserError(
                f"data set {name}: row {row.get('id')} has no {entry(name).response}; prompts alone are answered by "
                "`buddy data --answers-by BACKBONE`, in a study by data.answers: backbone"
            )
        found.append(Example(prompt.text, response, not row.get(CUT, False), prompt.own))
    return found


def prompts(name: str, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """`examples` as pairs of prompt and response."""
    return [(one.prompt, one.response) for one in examples(name, rows)]


def text_of(rows: Sequence[Row]) -> str:
    """The running text of a prose corpus, to be tokenised once and cut into windows.

    Rows that end their own line (WikiText as published, PTB) are joined with nothing between. Others get a line
    break if they are one line (a sentence), and a blank line if they are more (an article).
    """
    return "".join(text if text.endswith("\n") else text + _separator(text) for text in (row["text"] for row in rows))


def _separator(text: str) -> str:
    return "\n\n" if "\n" in text else "\n"
