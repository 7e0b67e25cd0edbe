"""How much text there is: rows and tokens of the data sets, counted where they are at hand, else as published.

Rows are those of the published splits; tokens, of a Llama's tokenizer, are rounded means, good for planning alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from buddy.data.catalogue import CATALOGUE
from buddy.storage.files import read_json
from buddy.tasks import TASKS


@dataclass(frozen=True)
class Text:
    """A data set.

    Attributes:
        evaluated, trained: rows of the split that is measured on, and of the one that is trained on.
        prompt: tokens of a prompt, or of what the answers to a question share.
        response: tokens of a response, or of an answer.
        choices: answers of a question; 1 for a set of prompts.
    """

    evaluated: int
    trained: int
    prompt: float
    response: float
    choices: int = 1

    @property
    def asked(self) -> float:
        """Tokens of a question with each of its answers, or of a prompt with its response."""
        return self.choices * (self.prompt + self.response)


PUBLISHED = {
    "openbookqa": Text(500, 4957, 14, 4, 4),
    "piqa": Text(1838, 16113, 12, 25, 2),
    "boolq": Text(3270, 9427, 140, 1, 2),
    "siqa": Text(1954, 33410, 28, 6, 3),
    "hellaswag": Text(10042, 39905, 48, 32, 4),
    "arc_easy": Text(2376, 2251, 28, 5, 4),
    "arc_challenge": Text(1172, 1119, 32, 6, 4),
    "winogrande": Text(1267, 40398, 22, 6, 2),
    "mmlu": Text(14042, 99842, 90, 1, 4),
    "gsm8k": Text(1319, 7473, 60, 110),
    "alpaca": Text(51760, 51760, 70, 120),
    "samsum": Text(819, 14732, 170, 27),
}
"""By name; a task of another package counts as `OTHER`."""
OTHER = Text(2000, 5000, 60, 10, 4)


def text(name: str, source: str, fetched: Path) -> Text:
    """A data set of a study.

    Args:
        name: the data set.
        source: ``data.source`` of the study: hub, embedded, or a folder.
        fetched: its folder in the study, where it may be already.
    """
    known = PUBLISHED.get(name, OTHER)
    splits = (CATALOGUE[name].evaluation, CATALOGUE[name].train) if name in CATALOGUE else ("", None)
    there = read_json(fetched / "data.json").get("splits", {})

    def rows(split: str | None, published: int) -> int:
        if split in there:
            return int(there[split]["rows"])
        return _lines(name, source, split) or published if split is not None and source != "hub" else published

    choices = TASKS[name].choices if name in TASKS else known.choices
    evaluated, trained = rows(splits[0], known.evaluated), rows(splits[1], known.trained)
    if splits[0] == splits[1]:  # the last fifth is kept back (`buddy.training.predictor_examples`)
        evaluated //= 5
    return Text(evaluated, trained, known.prompt, known.response, choices)


@cache
def _lines(name: str, source: str, split: str) -> int:
    """Rows of a file of the package's own, or of a folder of the user's; 0 where there is none to count."""
    own = resources.files("buddy") / "data" / "embedded"
    file = own / f"{name}.{split}.jsonl" if source == "embedded" else Path(source) / f"{name}.{split}.jsonl"
    if not file.is_file():
        return 0
    with file.open("r", encoding="utf-8") as stream:
        return sum(1 for line in stream if line.strip())
