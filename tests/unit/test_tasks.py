"""lm-eval tasks over local rows: what the model is asked, and how it is scored, is the stock task's."""

import re
import socket
from pathlib import Path

import lm_eval
import lm_eval.tasks
import pytest
import yaml
from lm_eval.api.model import LM

from buddy import data
from buddy.data.rows import write_file
from buddy.data.tasks import PREFIX, STOCK, check_examples, config, tasks
from buddy.errors import UserError
from buddy.tasks import TASKS, headline

# Rows with what real ones have and the embedded ones may not: markup, digits as keys, three or five choices.
AWKWARD = {
    "openbookqa": [{"question_stem": "Stem", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": " B"}],
    "piqa": [{"goal": "Goal?", "sol1": "one ", "sol2": "{{two}}", "label": 0}],
    "boolq": [{"passage": "Title -- A passage.", "question": "is it so", "label": 1}],
    "siqa": [{"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"}],
    "hellaswag": [
        {
            "activity_label": "Home",
            "ctx_a": "[header] How to sing [title] Breathe.",
            "ctx_b": "the SINGER",
            "endings": ["[step] sings  loud.", "eats", "stops [substeps] now", "runs"],
            "label": "3",
        }
    ],
    "arc_easy": [{"question": "Q?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}],
    "arc_challenge": [
        {"question": "Q?", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"},
    ],
    "winogrande": [{"sentence": "The _ fell, said _x.", "option1": "cup", "option2": "jar", "answer": "2"}],
    "mmlu": [
        {"question": " Q {{x}}? ", "subject": "high_school_us_history", "choices": ["1", "b.", "C", "d"], "answer": 3}
    ],
    "gsm8k": [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}],
}


def choices_with_key(row, prompt):
    choices = row["choices"]
    key = row["answerKey"].lstrip() if "question_stem" in row else row["answerKey"]
    return [prompt] * len(choices["text"]), choices["text"], choices["label"].index(key)


def tidy(text):
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def expected(name, row):
    """Contexts, continuations and the right one's number, written from the benchmarks' descriptions."""
    if name == "openbookqa":
        return choices_with_key(row, row["question_stem"])
    if name.startswith("arc_"):
        return choices_with_key(row, "Question: " + row["question"] + "\nAnswer:")
    if name == "piqa":
        return ["Question: " + row["goal"] + "\nAnswer:"] * 2, [row["sol1"], row["sol2"]], row["label"]
    if name == "boolq":
        return [f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"] * 2, ["no", "yes"], row["label"]
    if name == "siqa":
        prompt = "Q: " + row["context"] + " " + row["question"] + "\nA:"
        return [prompt] * 3, [row["answerA"], row["answerB"], row["answerC"]], int(row["label"]) - 1
    if name == "hellaswag":
        prompt = tidy(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        return [prompt] * 4, [tidy(ending) for ending in row["endings"]], int(row["label"])
    if name == "mmlu":
        lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
        return ["\n".join([row["question"].strip(), *lettered, "Answer:"])] * 4, list("ABCD"), row["answer"]
    before, _, after = row["sentence"].partition("_")
    return [before + row["option1"], before + row["option2"]], [after.strip()] * 2, int(row["answer"]) - 1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Embedded and awkward rows of every task, as a study keeps them."""
    folder = tmp_path_factory.mktemp("data")
    for name in STOCK:
        data.materialise(name, "embedded", folder / name)
    return folder


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("awkward")
    for name, rows in AWKWARD.items():
        (folder / "in").mkdir(exist_ok=True)
        for split in data.CATALOGUE[name].splits:
            write_file(folder / "in" / f"{name}.{split}.jsonl", rows)
        data.materialise(name, str(folder / "in"), folder / name)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a test that must run offline opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Scores(LM):
    """A model whose answers are a fixed function of what it is asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    @staticmethod
    def loglikelihood_of(context, continuation):
        return -float(sum(map(ord, context[-40:] + continuation)) * 7919 % 1009)

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        return [(self.loglikelihood_of(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        """Right with working for a question of even length, right in a sentence for the others."""
        answers = []
        for request in requests:
            self.asked.append(request.args)
            question = request.args[0].rpartition("Question: ")[2].removesuffix("\nAnswer:")
            gold = GOLD[question]
            answers.append(f"So. #### {gold}" if len(question) % 2 == 0 else f"It must be {gold} in all")
        return answers


GOLD = {row["question"]: row["answer"].rpartition("#### ")[2] for row in data.load("gsm8k", "embedded")}


@pytest.mark.parametrize("name", [name for name in STOCK if name != "gsm8k"])
@pytest.mark.parametrize("where", ["root", "awkward"])
def test_what_is_asked_is_what_the_stock_task_asks(name, where, request):
    folder = request.getfixturevalue(where)
    _, (task,) = tasks(folder, [name])
    rows = data.read(folder / name, data.CATALOGUE[name].evaluation)
    documents = list(task.eval_docs)
    assert [document["id"] for document in documents] == [row["id"] for row in rows]
    for document, row in zip(documents, rows, strict=True):
        contexts, continuations, right = expected(name, row)
        text, choices, target = task.doc_to_text(document), task.doc_to_choice(document), task.doc_to_target(document)
        if name == "winogrande":  # partial evaluation: the choices are the contexts, the target follows them
            assert (choices, text, target) == (contexts, right, continuations[0])
        else:
            assert (text, choices, int(target)) == (contexts[0], continuations, right)
        requests = task.construct_requests(document, text if name != "winogrande" else "")
        if name != "winogrande":
            assert [r.args for r in requests] == list(zip(contexts, [f" {c}" for c in continuations], strict=True))


def test_gsm8k_question_and_target(awkward):
    _, (task,) = tasks(awkward, ["gsm8k"])
    (document,) = task.eval_docs
    assert task.doc_to_text(document) == "Question: 1+1?\nAnswer:"
    assert task.doc_to_target(document) == AWKWARD["gsm8k"][0]["answer"]


class Loader(yaml.SafeLoader):
    """Reads a task file as it stands, functions as their names."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("name", list(STOCK))
def test_only_the_source_of_documents_differs_from_the_stock_file(name):
    root = Path(lm_eval.tasks.__file__).parent
    stock = yaml.load((root / STOCK[name]).read_text(), Loader)
    if "include" in stock:
        stock = {**yaml.load(((root / STOCK[name]).parent / stock.pop("include")).read_text(), Loader), **stock}
    ours = config(name, {"train": [], "validation": [], "test": [], "dev": []})
    about_data = {"task", "tag", "dataset_path", "dataset_name", "dataset_kwargs"}
    if name == "mmlu":  # its other files, one per subject, add a description: below
        stock["description"] = ours["description"]
    assert set(ours) - about_data == set(stock) - about_data
    for key in set(stock) - about_data:
        if callable(ours[key]):
            assert ours[key].__name__ == stock[key].rpartition(".")[2]
            assert Path(ours[key].__code__.co_filename).is_relative_to(root)
        else:
            assert ours[key] == stock[key]
    assert ours["task"] == PREFIX + name


def test_every_subject_of_mmlu_is_asked_as_by_its_stock_file(root):
    """All of a subject's requests, without and with a solved example, by lm-eval's own task of it over the same rows."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    rows = {split: data.read(root / "mmlu", split) for split in ("test", "dev")}

    class Stock(ConfigurableTask):
        def download(self, dataset_kwargs=None, **_):
            own = {split: [one for one in found if one["subject"] == self.subject] for split, found in rows.items()}
            self.dataset = DatasetDict({split: Dataset.from_list(found) for split, found in own.items()})

    _, (task,) = tasks(root, ["mmlu"])
    documents = {document["id"]: document for document in task.eval_docs}
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    template = yaml.load((folder / "_default_template_yaml").read_text(), Loader)
    for file in sorted(folder.glob("mmlu_*.yaml")):
        own = yaml.load(file.read_text(), Loader)
        Stock.subject = own["dataset_name"]
        about = {key: own[key] for key in ("task", "description")}
        stock = Stock(config={**template, **about, "dataset_path": "json", "dataset_name": None})
        for document in stock.eval_docs:
            for solved in (0, 1):
                theirs = stock.fewshot_context(document, solved)
                assert task.fewshot_context(documents[document["id"]], solved) == theirs
                assert theirs.startswith(own["description"])
            args = {"ctx": theirs, "metadata": (None, None, None)}
            ours = task.construct_requests(documents[document["id"]], **args)
            assert [one.args for one in ours] == [one.args for one in stock.construct_requests(document, **args)]


def test_the_first_questions_of_mmlu_are_of_all_subjects(tmp_path):
    """Published rows stand subject after subject; a limit takes the first ones."""
    order = sorted(data.load("mmlu", "embedded"), key=lambda row: row["subject"])
    (tmp_path / "in").mkdir()
    write_file(tmp_path / "in" / "mmlu.test.jsonl", order)
    data.materialise("mmlu", str(tmp_path / "in"), tmp_path / "mmlu")
    _, (task,) = tasks(tmp_path, ["mmlu"])
    first = list(task.eval_docs)[:57]
    assert len({document["subject"] for document in first}) == 57
    by_subject = sorted(task.eval_docs, key=lambda document: document["subject"])
    assert [document["id"] for document in by_subject] == [row["id"] for row in order]


@pytest.mark.usefixtures("no_network")
def test_the_harness_runs_them_offline_and_scores_them(root):
    model = Scores()
    manager, found = tasks(root, list(STOCK))
    results = lm_eval.simple_evaluate(model, tasks=found, task_manager=manager, bootstrap_iters=0)["results"]
    assert set(results) == {PREFIX + name for name in STOCK}
    for name in STOCK:
        if name == "gsm8k":
            continue
        right = normalised = 0
        rows = data.read(root / name, data.CATALOGUE[name].evaluation)
        for row in rows:
            contexts, continuations, answer = expected(name, row)
            scores = [model.loglikelihood_of(c, f" {a}") for c, a in zip(contexts, continuations, strict=True)]
            by_length = [score / len(a) for score, a in zip(scores, continuations, strict=True)]
            right += scores.index(max(scores)) == answer
            normalised += by_length.index(max(by_length)) == answer
        result = results[PREFIX + name]
        assert result["acc,none"] == pytest.approx(right / len(rows)), name
        if name in ("openbookqa", "piqa", "hellaswag", "arc_easy", "arc_challenge"):
            assert result["acc_norm,none"] == pytest.approx(normalised / len(rows)), name
    strict = sum(len(question) % 2 == 0 for question in GOLD) / len(GOLD)
    assert 0 < strict < 1
    assert results["buddy_gsm8k"]["exact_match,strict-match"] == pytest.approx(strict)
    assert results["buddy_gsm8k"]["exact_match,flexible-extract"] == 1


@pytest.mark.usefixtures("no_network")
def test_solved_examples_come_from_the_train_split(root):
    model = Scores()
    manager, found = tasks(root, ["gsm8k", "arc_easy"])
    lm_eval.simple_evaluate(model, tasks=found, task_manager=manager, num_fewshot=5, limit=3, bootstrap_iters=0)
    train = {row["question"] for name in ("gsm8k", "arc_easy") for row in data.read(root / name, "train")}
    test = {row["question"] for name in ("gsm8k", "arc_easy") for row in data.read(root / name, "test")}
    for context, _ in model.asked:
        *solved, asked = re.findall(r"Question: (.*?)\nAnswer:", context, flags=re.DOTALL)
        assert len(solved) == 5
        assert set(solved) <= train
        assert asked in test


def test_a_folder_with_no_train_split_still_evaluates(tmp_path):
    rows = data.load("winogrande", "embedded")[:4]
    (tmp_path / "winogrande").mkdir()
    write_file(tmp_path / "winogrande" / "validation.jsonl", rows)
    _, (task,) = tasks(tmp_path, ["winogrande"])
    assert not task.has_training_docs()
    assert len(task.eval_docs) == 4


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"task: 'pica' is not one of .* \(did you mean piqa\?\)"):
        tasks(tmp_path, ["pica"])
    data.materialise("mmlu", "embedded", tmp_path / "mmlu")
    check_examples(tmp_path, ["mmlu"], 1)
    with pytest.raises(UserError, match=r"--few-shot: 5 .*dev.jsonl has 1 of .*; give at most 1"):
        check_examples(tmp_path, ["mmlu"], 5)
    with pytest.raises(UserError, match=r"task piqa: no .*validation.jsonl; fetch it with `buddy data --name piqa"):
        tasks(tmp_path, ["piqa"])
    (tmp_path / "gsm8k").mkdir()
    write_file(tmp_path / "gsm8k" / "test.jsonl", AWKWARD["gsm8k"])
    with pytest.raises(UserError, match=r"no .*train.jsonl, from which its solved examples are drawn"):
        tasks(tmp_path, ["gsm8k"])


def test_the_headline_metric_is_the_papers_and_the_harness_has_it():
    """Every task has the metric by which the tables show it; a record without it is shown by the other."""
    for name, metric in ((task.name, task.headline) for task in TASKS.values()):
        assert metric in {entry["metric"] for entry in config(name, {}).get("metric_list", [{"metric": "acc"}])}
    assert headline("arc_easy", {"acc": 0.7635, "acc_norm": 0.7466}) == "acc"
    assert headline("arc_challenge", {"acc": 0.4352, "acc_norm": 0.4633}) == "acc_norm"
    assert headline("arc_easy", {"acc_norm": 0.5}) == "acc_norm"
    assert headline("piqa", {"acc": 0.5, "acc_norm": None}) == "acc"
