"""The data sets by name: where each is published, which splits the project reads, and their columns.

Repositories and configurations are those of lm-evaluation-harness 0.4.13 for the tasks it defines. Revisions are
branches; the commit found is recorded beside the rows when they are fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from buddy.errors import UserError, choices, unknown
from buddy.tasks import TASKS

CHOICE = "multiple choice"
PROBLEMS = "word problems"
INSTRUCTIONS = "instructions"
DIALOGUES = "dialogues"
PROSE = "prose"


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        name: our name of it.
        kind: what its rows are.
        repository, config, revision: where it is published on the Hugging Face Hub; no repository for rows of one's own.
        columns: columns that every row has besides ``id``, which is made where the publisher gives none.
        optional: of them those that rows of one's own may leave out.
        response: the column that answers the prompt; None for a set without prompts and responses.
        evaluation: the split that measurements read.
        train: the split for training and for solved examples in prompts; None where the project needs none.
        rename: published column names that differ from ours.
        files: for a repository without a layout that `datasets` knows: file of each split.
    """

    name: str
    kind: str
    repository: str
    columns: tuple[str, ...]
    evaluation: str
    train: str | None = "train"
    config: str | None = None
    revision: str = "main"
    rename: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    response: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """Columns that no row may lack."""
        return tuple(column for column in self.columns if column not in self.optional)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits the project reads, the evaluation split first."""
        return tuple(dict.fromkeys(split for split in (self.evaluation, self.train) if split is not None))


_SETS = (
    *(
        DataSet(task.name, CHOICE, task.repository, task.columns, task.evaluation, task.train, task.config)
        for task in TASKS.values()
    ),
    DataSet(
        "gsm8k",
        PROBLEMS,
        "openai/gsm8k",
        ("question", "answer"),
        evaluation="test",
        config="main",
        response="answer",
    ),
    DataSet(
        "alpaca",
        INSTRUCTIONS,
        "yahma/alpaca-cleaned",
        ("instruction", "input", "output"),
        evaluation="train",
        optional=("input", "output"),
        response="output",
    ),
    # Prompts and responses as they are, of any kinds mixed: rows of one's own, from a folder.
    DataSet(
        "pairs",
        INSTRUCTIONS,
        "",
        ("prompt", "response"),
        evaluation="train",
        optional=("response",),
        response="response",
    ),
    DataSet(
        "samsum",
        DIALOGUES,
        "knkarthick/samsum",
        ("dialogue", "summary"),
        evaluation="test",
        response="summary",
    ),
    DataSet(
        "wikitext2",
        PROSE,
        "Salesforce/wikitext",
        ("text",),
        evaluation="validation",
        train=None,
        config="wikitext-2-raw-v1",
    ),
    DataSet(
        "ptb",
        PROSE,
        "ptb-text-only/ptb_text_only",
        ("text",),
        evaluation="validation",
        train=None,
        # The repository's main branch holds a loading script, which `datasets` no longer runs.
        revision="refs/convert/parquet",
        rename={"sentence": "text"},
        files={"validation": "penn_treebank/validation/0000.parquet"},
    ),
)

CATALOGUE: dict[str, DataSet] = {entry.name: entry for entry in _SETS}


def entry(name: str) -> DataSet:
    """The data set of that name.

    Raises:
        UserError: there is none.
    """
    if name not in CATALOGUE:
        raise unknown("data set", name, CATALOGUE)
    return CATALOGUE[name]


def check_corpus(corpus: str, where: str) -> None:
    """Refuse what is no calibration corpus.

    Args:
        corpus: name of a data set, or a path.
        where: file and key that name it, for the message.

    Raises:
        UserError: it is neither a prose set nor a text file.
    """
    sets = [data.name for data in _SETS if data.kind == PROSE]
    if corpus not in sets and not Path(corpus).is_file():
        raise UserError(f"{where}: {corpus!r} is neither a prose set ({choices(sets)}) nor a text file that is there")
