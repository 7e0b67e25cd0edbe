"""lm-evaluation-harness tasks over our rows: the harness's own definitions, reading local files.

``buddy_piqa`` is the stock ``piqa`` in all but where its documents come from: prompt, choices, processing, filters
and metrics are read from the YAML file that lm-eval ships, so published and embedded rows go through one definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.data.catalogue import entry
from buddy.data.store import read
from buddy.errors import UserError, unknown
from buddy.tasks import TASKS

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

PREFIX = "buddy_"

STOCK = {**{name: task.harness for name, task in TASKS.items()}, "gsm8k": "gsm8k/gsm8k.yaml"}
"""Our names, and the files below ``lm_eval/tasks`` that define them; that of another package's task is its own."""


def tasks(root: str | Path, names: Sequence[str]) -> tuple[TaskManager, list[ConfigurableTask]]:
    """Tasks over the data sets below ``root``.

    Args:
        root: the study's data folder: data set NAME is in ``root/NAME/{split}.jsonl``.
        names: data sets, keys of ``STOCK``; task NAME is called ``buddy_NAME``.

    Returns:
        Arguments of ``lm_eval.simple_evaluate``: ``task_manager`` (an empty one: lm-eval's own index takes seconds to
        build and is not needed) and ``tasks``.

    Raises:
        UserError: a name has no task, or its data are not there.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False), [_task(Path(root) / name, name) for name in names]


def check_examples(root: str | Path, names: Sequence[str], count: int | None) -> None:
    """Refuse solved examples in the prompt where there is no training split to draw them from.

    The harness would take them from the very items that it scores, without a word.

    Args:
        root, names: as for `tasks`.
        count: examples asked for; None is the harness's own number.

    Raises:
        UserError: a task has no split of solved examples there, or of some subject too few.
    """
    for name in names if count else ():
        folder, split = Path(root) / name, str(entry(name).train)
        if folder.is_dir() and not (folder / f"{split}.jsonl").exists():
            raise UserError(
                f"--few-shot: {count} solved examples asked for, but {folder} has no {split}.jsonl to draw "
                "them from; give 0, or a source of data that has it"
            )
        if folder.is_dir() and name in TASKS and (group := TASKS[name].group):
            subject, solved = min(_groups(read(folder, split), group).items(), key=lambda one: len(one[1]))
            if len(solved) < (count or 0):
                raise UserError(
                    f"--few-shot: {count} solved examples asked for, but {folder}/{split}.jsonl has {len(solved)} of "
                    f"{subject}; give at most {len(solved)}"
                )


def _task(folder: Path, name: str) -> ConfigurableTask:
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    splits = _splits(folder, name)
    group = TASKS[name].group if name in TASKS else None

    class LocalTask(ConfigurableTask):
        """A stock task whose documents are the rows of a local folder, held in memory.

        `datasets.load_dataset("json")` would do the same through a cache in the home folder, whose locks many jobs on
        a cluster would share.
        """

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
            self.dataset = DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})

        @cached_property
        def solved(self) -> dict[Any, list[dict[str, Any]]]:
            """Solved examples by subject."""
            return _groups(list(self.fewshot_docs()), str(group))

        def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *args: Any, **kwargs: Any) -> Any:
            """As it is there; of a task of many subjects the solved examples are those of the question's own."""
            if group and num_fewshot:
                self.sampler.replace_df(self.solved[doc[group]])
            return super().fewshot_context(doc, num_fewshot, *args, **kwargs)

    return LocalTask(config=config(name, splits))


def config(name: str, splits: dict[str, Any]) -> dict[str, Any]:
    """The stock configuration of a task with only its source of documents replaced, and its description where it has one.

    Args:
        name: a key of ``STOCK``.
        splits: the splits that are there; the configuration names no other.
    """
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml  # lm-eval 0.4 has no public door to a task's resolved file

    content = load_yaml(Path(lm_eval.tasks.__file__).parent / STOCK[name])
    content.pop("tag", None)
    content.update(task=PREFIX + name, dataset_path="json", dataset_name=None, dataset_kwargs=None)
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if key in content and content[key] not in splits:
            content[key] = None
    if name in TASKS and TASKS[name].description is not None:
        content["description"] = TASKS[name].description
    return content


def check_rows(folder: Path, name: str) -> None:
    """Refuse a task whose items are not there.

    Args:
        folder: of its data set.
        name: a key of ``STOCK``.

    Raises:
        UserError: there is no such task, or no such data.
    """
    if name not in STOCK:
        raise unknown("task", name, STOCK)
    split = entry(name).evaluation
    if not (folder / f"{split}.jsonl").exists():
        raise UserError(
            f"task {name}: no {folder / split}.jsonl; fetch it with `buddy data --name {name} --out {folder}`"
        )


def _splits(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    check_rows(folder, name)
    data = entry(name)
    splits = {split: read(folder, split) for split in data.splits if (folder / f"{split}.jsonl").exists()}
    if name in TASKS and (group := TASKS[name].group):
        splits = {split: _in_turn(rows, group) for split, rows in splits.items()}
    if name == "gsm8k" and data.train not in splits:  # its stock definition shows five solved examples
        raise UserError(f"task {name}: no {folder}/{data.train}.jsonl, from which its solved examples are drawn")
    return splits


def _in_turn(rows: list[dict[str, Any]], group: str) -> list[dict[str, Any]]:
    """Rows of every group in turn, so that the first of them are a sample of all: published sets have one after the other."""
    return [row for turn in zip_longest(*_groups(rows, group).values()) for row in turn if row is not None]


def _groups(rows: list[dict[str, Any]], group: str) -> dict[Any, list[dict[str, Any]]]:
    """Rows by what stands in this column."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row[group], []).append(row)
    return found
