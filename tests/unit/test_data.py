"""Data: the embedded sets are what they claim, and every source gives the same rows or one clear line."""

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hub_server
import pandas as pd
import pytest

from buddy import data
from buddy.data import sources, store, templates
from buddy.errors import UserError
from buddy.tasks import TASKS

COLUMNS = {
    "openbookqa": {"question_stem", "choices", "answerKey"},
    "piqa": {"goal", "sol1", "sol2", "label"},
    "boolq": {"passage", "question", "label", "idx"},
    "siqa": {"context", "question", "answerA", "answerB", "answerC", "label"},
    "hellaswag": {"activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"},
    "arc_easy": {"question", "choices", "answerKey"},
    "arc_challenge": {"question", "choices", "answerKey"},
    "winogrande": {"sentence", "option1", "option2", "answer"},
    "mmlu": {"question", "subject", "choices", "answer"},
    "gsm8k": {"question", "answer"},
    "alpaca": {"instruction", "input", "output"},
    "samsum": {"dialogue", "summary"},
    "wikitext2": {"text"},
    "ptb": {"text"},
}
LEAST = {**dict.fromkeys(TASKS, 60), "gsm8k": 60, "alpaca": 200, "samsum": 40}
PUBLISHED = {
    name: entry for name, entry in data.CATALOGUE.items() if entry.repository
}  # others are of rows of one's own
EMBEDDED = [(name, split) for name, entry in PUBLISHED.items() for split in entry.splits]
PROSE = ("wikitext2", "ptb")


def rows_of(name, split=None):
    return data.load(name, "embedded", split)


def options(name, row):
    """The answers of a multiple-choice row, and which is right."""
    if name in ("openbookqa", "arc_easy", "arc_challenge"):
        return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
    if name == "piqa":
        return [row["sol1"], row["sol2"]], row["label"]
    if name == "boolq":
        return ["no", "yes"], row["label"]
    if name == "siqa":
        return [row["answerA"], row["answerB"], row["answerC"]], int(row["label"]) - 1
    if name == "hellaswag":
        return row["endings"], int(row["label"])
    if name == "mmlu":
        return row["choices"], row["answer"]
    return [row["option1"], row["option2"]], int(row["answer"]) - 1


def question(name, row):
    """What tells one row from another."""
    keys = {
        "openbookqa": ("question_stem",),
        "piqa": ("goal",),
        "boolq": ("question",),
        "siqa": ("context", "question"),
        "hellaswag": ("ctx",),
        "winogrande": ("sentence",),
        "alpaca": ("instruction", "input"),
        "samsum": ("dialogue",),
        "wikitext2": ("text",),
        "ptb": ("text",),
    }.get(name, ("question",))
    return " ".join(row[key] for key in keys)


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


# The embedded sets


@pytest.mark.parametrize(("name", "split"), EMBEDDED)
def test_embedded_columns_and_ids(name, split):
    rows = rows_of(name, split)
    assert all(set(row) == {"id", *COLUMNS[name]} for row in rows)
    pattern = rf"{name}-\d{{3}}" if name in PROSE else rf"{name}-(easy|medium|hard)-\d{{3}}"
    assert all(re.fullmatch(pattern, row["id"]) for row in rows)
    empty_allowed = {"alpaca": {"input"}, "hellaswag": {"ctx_b"}}.get(name, set())
    for row in rows:
        for column in COLUMNS[name] - empty_allowed:
            assert not isinstance(row[column], str) or row[column].strip(), row["id"]


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_embedded_evaluation_sets_are_large_enough(name, least):
    assert len(rows_of(name)) >= least


@pytest.mark.parametrize(("name", "split"), [(n, s) for n, s in EMBEDDED if n not in PROSE])
def test_embedded_sets_are_graded_and_mixed(name, split):
    grades = [row["id"].split("-")[1] for row in rows_of(name, split)]
    third = len(grades) / 3
    assert all(0.8 * third <= count <= 1.2 * third + 1 for count in Counter(grades).values())
    assert len(set(grades[: max(12, len(grades) // 4)])) == 3  # the first rows are a sample of all grades


@pytest.mark.parametrize(("name", "split"), [(n, s) for n, s in EMBEDDED if n in TASKS])
def test_embedded_answers_are_balanced(name, split):
    rows = rows_of(name, split)
    places = Counter(options(name, row)[1] for row in rows)
    assert set(places) == set(range(len(options(name, rows[0])[0])))
    assert max(places.values()) - min(places.values()) <= 1
    for row in rows:
        answers, _ = options(name, row)
        assert len({answer.strip().lower() for answer in answers}) == len(answers), row["id"]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "boolq"])
def test_embedded_right_answers_are_not_told_by_their_length(name):
    right, wrong = [], []
    for row in rows_of(name):
        answers, place = options(name, row)
        right.append(len(answers[place]))
        wrong += [len(answer) for i, answer in enumerate(answers) if i != place]
    assert abs(sum(right) / len(right) / (sum(wrong) / len(wrong)) - 1) <= 0.1


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_embedded_rows_are_all_different(name):
    """No two rows of a set, in one split or across, have the same id or nearly the same words."""
    rows = [row for split in data.CATALOGUE[name].splits for row in rows_of(name, split)]
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == len(ids)
    bags = [set(words(question(name, row))) for row in rows]
    texts = [" ".join(words(question(name, row))) for row in rows]
    assert len(set(texts)) == len(texts)
    # Twin sentences, alike but for the word that turns the answer, are what WinoGrande is made of.
    limit = 0.9 if name == "winogrande" else 0.8
    for i, bag in enumerate(bags):
        for j in range(i):
            shared = len(bag & bags[j]) / len(bag | bags[j])
            assert shared < limit, (ids[i], ids[j])


@pytest.mark.parametrize("split", ["test", "train"])
def test_embedded_arithmetic_is_right(split):
    for row in rows_of("gsm8k", split):
        steps = re.findall(r"([\d.+\-*/() ]+)=\s*<<([\d.+\-*/()]+)=(\d+(?:\.\d+)?)>>(\d+(?:\.\d+)?)", row["answer"])
        assert len(steps) == row["answer"].count("<<") > 0, row["id"]
        for shown, inside, result, repeated in steps:
            assert eval(inside) == pytest.approx(float(result)), row["id"]
            assert eval(shown) == pytest.approx(float(result)), row["id"]
            assert result == repeated, row["id"]
        final = re.fullmatch(r"(?s).*\n#### (-?\d+)", row["answer"])
        assert final, row["id"]
        assert float(final[1]) == float(steps[-1][2]), row["id"]


def test_embedded_winogrande_sentences_name_both_options():
    for split in data.CATALOGUE["winogrande"].splits:
        for row in rows_of("winogrande", split):
            assert row["sentence"].count("_") == 1, row["id"]
            assert all(option in row["sentence"].replace("_", "") for option in (row["option1"], row["option2"]))


def test_embedded_hellaswag_contexts_are_their_parts():
    for row in rows_of("hellaswag"):
        assert row["ctx"] == f"{row['ctx_a']} {row['ctx_b']}".strip(), row["id"]


def test_embedded_instructions_and_responses_vary():
    rows = rows_of("alpaca")
    lengths = sorted(len(words(row["output"])) for row in rows)
    assert lengths[len(lengths) // 10] <= 15
    assert lengths[-len(lengths) // 10] >= 80
    assert 0.1 < sum(bool(row["input"]) for row in rows) / len(rows) < 0.6


def test_embedded_dialogues_have_speakers_and_shorter_summaries():
    for split in data.CATALOGUE["samsum"].splits:
        for row in rows_of("samsum", split):
            lines = row["dialogue"].split("\n")
            speakers = {line.split(":")[0] for line in lines}
            assert len(lines) >= 3
            assert 2 <= len(speakers) <= 6, row["id"]
            assert len(words(row["summary"])) < len(words(row["dialogue"])), row["id"]


def test_embedded_corpora_are_long_and_of_two_kinds():
    corpora = {name: words(data.text_of(rows_of(name))) for name in PROSE}
    assert all(len(corpus) >= 8000 for corpus in corpora.values())
    grams = {name: [tuple(corpus[i : i + 12]) for i in range(len(corpus))] for name, corpus in corpora.items()}
    assert not set(grams["wikitext2"]) & set(grams["ptb"])
    for name in PROSE:  # nothing is said twice to fill the pages
        assert len(set(grams[name])) > 0.995 * len(grams[name])
    quoted = {name: data.text_of(rows_of(name)).count('"') for name in PROSE}
    assert quoted["ptb"] > 5 * max(quoted["wikitext2"], 1) or quoted["wikitext2"] > 5 * max(quoted["ptb"], 1)


def test_embedded_mmlu_has_the_harness_subjects_each_as_often():
    """Its 57 subjects, three questions of each, one of each grade, and one solved example."""
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    subjects = {path.stem.removeprefix("mmlu_") for path in stock.glob("mmlu_*.yaml")}
    assert len(subjects) == 57
    test, dev = rows_of("mmlu"), rows_of("mmlu", "dev")
    grades = Counter((row["subject"], row["id"].split("-")[1]) for row in test)
    assert grades == {(subject, grade): 1 for subject in subjects for grade in ("easy", "medium", "hard")}
    assert Counter(row["subject"] for row in dev) == dict.fromkeys(subjects, 1)
    assert {row["subject"] for row in test[:57]} == subjects


def test_every_embedded_file_is_in_the_catalogue():
    known = {f"{name}.{split}.jsonl" for name, split in EMBEDDED}
    assert {path.name for path in sources.EMBEDDED.iterdir()} == known


# Sources


def test_materialised_rows_are_the_source_rows(tmp_path):
    content = data.materialise("siqa", "embedded", tmp_path / "siqa")
    for split in ("validation", "train"):
        original = [json.loads(line) for line in (sources.EMBEDDED / f"siqa.{split}.jsonl").read_text().splitlines()]
        assert data.read(tmp_path / "siqa", split) == original
        facts = content["splits"][split]
        assert facts["rows"] == len(original)
        assert facts["sha256"] == hashlib.sha256((tmp_path / "siqa" / f"{split}.jsonl").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "siqa" / "data.json").read_text()) == content
    assert (content["source"], content["revision"]) == ("embedded", None)


def write(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


PIQA = [{"goal": f"goal {i}\u2028x", "sol1": "a", "sol2": "b", "label": i % 2, "more": [1]} for i in range(3)]
GSM8K = [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}]


@pytest.mark.parametrize(
    ("name", "file", "split"),
    [
        ("piqa", "piqa.validation.jsonl", "validation"),
        ("piqa", "piqa.validation.jsonl.gz", "validation"),
        ("piqa", "piqa.jsonl", "validation"),
        ("piqa", "piqa.jsonl.gz", "validation"),
        ("piqa", "train/piqa.jsonl.gz", "train"),
        ("piqa", "piqa.train.jsonl.gz", "train"),
        ("gsm8k", "gsm8k_test.jsonl.gz", "test"),
        ("gsm8k", "gsm8k_train.jsonl.gz", "train"),
        ("wikitext2", "wikitext2_valid.jsonl.gz", "validation"),
        ("alpaca", "alpaca.jsonl.gz", "train"),
    ],
)
def test_folder_layouts(tmp_path, name, file, split):
    rows = {
        "piqa": PIQA,
        "gsm8k": GSM8K,
        "wikitext2": [{"text": "a\n"}],
        "alpaca": [{"instruction": "a", "input": "", "output": "b"}],
    }[name]
    write(tmp_path / file, rows)
    loaded = data.load(name, str(tmp_path), split)
    assert [{key: value for key, value in row.items() if key != "id"} for row in loaded] == rows
    assert [row["id"] for row in loaded] == [f"{name}-{split}-{i}" for i in range(len(rows))]


def test_folder_without_a_train_split_gives_the_evaluation_split_alone(tmp_path):
    write(tmp_path / "in" / "piqa.jsonl.gz", PIQA)
    content = data.materialise("piqa", str(tmp_path / "in"), tmp_path / "out")
    assert list(content["splits"]) == ["validation"]
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["data.json", "validation.jsonl"]


def test_ids_of_the_source_are_kept(tmp_path):
    write(tmp_path / "piqa.jsonl", [{**PIQA[0], "id": 17}, {**PIQA[1], "id": "mine"}, PIQA[2]])
    assert [row["id"] for row in data.load("piqa", str(tmp_path), "validation")] == ["17", "mine", "piqa-validation-2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"piqa.jsonl: empty"),
        ("\n\n", r"piqa.jsonl: empty"),
        ('{"goal": 1}\n', r"piqa.jsonl: row 1: no column 'sol1'; needed are goal, sol1, sol2 or label"),
        (json.dumps({**PIQA[0], "label": None}) + "\n", r"row 1: no column 'label'"),
        (json.dumps(PIQA[0]) + "\n{oops\n", r"piqa.jsonl: line 2: not valid JSON"),
        ("[1]\n", r"piqa.jsonl: line 1: expected an object, found list"),
    ],
)
def test_bad_files_are_one_line_and_leave_nothing(tmp_path, content, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "piqa.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        data.materialise("piqa", str(tmp_path / "in"), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_unknown_names_and_sources():
    with pytest.raises(UserError, match=r"data set: 'piqua' is not one of .* \(did you mean piqa\?\)"):
        data.load("piqua", "embedded")
    with pytest.raises(UserError, match="data source 'embeded': neither hub nor embedded, and no such folder"):
        data.load("piqa", "embeded")
    with pytest.raises(UserError, match="no split 'test'; there is validation or train"):
        data.load("piqa", "embedded", "test")


def test_a_folder_of_other_files_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files than a data set"):
        data.materialise("piqa", "embedded", tmp_path)
    assert (tmp_path / "notes.txt").exists()


def test_hub_sets_go_through_the_same_door(tmp_path):
    """A server on this machine plays the Hub: configurations, Parquet, renamed columns, rows without content."""

    def parquet(**columns):
        buffer = io.BytesIO()
        pd.DataFrame(columns).to_parquet(buffer)
        return buffer.getvalue()

    def fetch(name, **environment):
        command = [sys.executable, "-m", "buddy", "data", "--name", name, "--out", str(tmp_path / name)]
        settings = {**hub_server.environment(hub.url, tmp_path / "cache"), **environment}
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    boolq = parquet(question=["q"] * 3, passage=["p", None, "r"], label=[0, 1, 1], idx=[0, 1, 2])
    card = "---\nconfigs:\n- config_name: boolq\n  data_files:\n  - {split: train, path: boolq/train-*}\n  - {split: validation, path: boolq/validation-*}\n---\n"
    with hub_server.serve() as hub:
        sets = hub.repositories["datasets"]
        sets["aps/super_glue"] = {
            "README.md": card.encode(),
            "boolq/train-0.parquet": boolq,
            "boolq/validation-0.parquet": boolq,
        }
        sets["ptb-text-only/ptb_text_only"] = {
            "ptb_text_only.py": b"raise SystemExit",
            "penn_treebank/validation/0000.parquet": parquet(sentence=["a b", "c <unk> d"]),
        }
        sets["baber/piqa"] = {"validation.jsonl": json.dumps({"goal": "g", "sol1": "a"}).encode()}
        hub.gated.add("knkarthick/samsum")
        sets["knkarthick/samsum"] = {"test.jsonl": b"{}", "train.jsonl": b"{}"}
        assert fetch("boolq")[0] == 0
        assert fetch("ptb")[0] == 0
        status, message = fetch("piqa", BUDDY_LOG="ERROR")
        assert status == 2
        assert "data set baber/piqa, split validation: row 1: no column 'sol2'" in message
        status, message = fetch("alpaca", BUDDY_LOG="ERROR")
        assert status == 2
        assert "data set yahma/alpaca-cleaned: no such repository on the Hub" in message
        status, message = fetch("samsum", BUDDY_LOG="ERROR")
        assert status == 2
        assert "gated; accept its licence" in message
    assert [row["passage"] for row in data.read(tmp_path / "boolq", "validation")] == ["p", "r"]
    assert data.read(tmp_path / "boolq", "train")[0]["id"] == "boolq-train-0"
    assert data.text_of(data.read(tmp_path / "ptb", "validation")) == "a b\nc <unk> d\n"
    assert json.loads((tmp_path / "ptb" / "data.json").read_text())["revision"] == hub_server.COMMIT
    status, message = fetch("gsm8k", HF_HUB_OFFLINE="1", BUDDY_LOG="ERROR")
    assert status == 2
    assert "HF_HUB_OFFLINE forbids" in message
    assert not (tmp_path / "gsm8k").exists()


def test_catalogue_names_the_repositories_of_the_harness():
    """Published sets are those that lm-eval's own task files name."""
    import lm_eval.tasks
    import yaml

    from buddy.data.tasks import STOCK

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    root = Path(lm_eval.tasks.__file__).parent
    for name, file in STOCK.items():
        stock = yaml.load((root / file).read_text(), Loader)
        if "include" in stock:
            stock = {**yaml.load(((root / file).parent / stock["include"]).read_text(), Loader), **stock}
        entry = data.CATALOGUE[name]
        # MMLU has a file, and a configuration on the Hub, per subject, and one of all.
        config = "all" if name == "mmlu" else stock.get("dataset_name")
        assert (entry.repository, entry.config) == (stock["dataset_path"], config)
        assert entry.evaluation == (stock.get("test_split") or stock["validation_split"])
        assert entry.train == (stock.get("training_split") or stock["fewshot_split"])
    assert set(TASKS) < set(STOCK)


# Text


def test_alpaca_prompts_use_its_template():
    plain = {"instruction": "Name a color.", "input": "", "output": "Red"}
    full = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    (first, red), (second, sorted_) = data.prompts("alpaca", [plain, full])
    assert (red, sorted_) == ("Red", "a b")
    assert first == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a color.\n\n### Response:\n"
    )
    assert second.endswith("### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:\n")
    assert data.instruction("Name a color.") == first


def test_dialogues_and_problems_have_prompts():
    ((prompt, summary),) = data.prompts("samsum", [{"dialogue": "A: hi\r\nB: yo", "summary": "Greetings."}])
    assert (prompt, summary) == ("Summarize the following dialogue.\n\nA: hi\nB: yo\n\nSummary:\n", "Greetings.")
    assert data.prompts("gsm8k", GSM8K) == [("Question: 1+1?\nAnswer: ", GSM8K[0]["answer"])]
    with pytest.raises(UserError, match="data set piqa: has no prompts with responses"):
        data.prompts("piqa", PIQA)


def test_braces_in_a_row_are_text():
    row = {"instruction": "Explain {x} and {0}.", "input": "{y}", "output": "{z}"}
    ((prompt, response),) = data.prompts("alpaca", [row])
    assert "Explain {x} and {0}." in prompt
    assert response == "{z}"
    assert templates.instruction("{a}").count("{a}") == 1


def test_prose_is_joined_by_how_its_rows_end():
    assert data.text_of([{"text": ""}, {"text": " = A = \n"}, {"text": ""}, {"text": " b \n"}]) == "\n = A = \n\n b \n"
    assert data.text_of([{"text": "one line"}, {"text": "two"}]) == "one line\ntwo\n"
    assert (
        data.text_of([{"text": "= A =\n\nAn article."}, {"text": "= B =\n\nB."}])
        == "= A =\n\nAn article.\n\n= B =\n\nB.\n\n"
    )


def test_one_file_is_a_whole_set(tmp_path):
    rows = [{"prompt": "Say one.", "response": "One."}, {"prompt": "Say two.", "response": "Two."}]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = data.materialise("pairs", str(file), tmp_path / "out")
    assert found["splits"]["train"]["rows"] == 2
    assert [row["response"] for row in store.read(tmp_path / "out", "train")] == ["One.", "Two."]
    with pytest.raises(UserError, match=r"one file is the validation split of piqa; for its train split give a folder"):
        sources.load("piqa", str(file), "train")
    (tmp_path / "mine.txt").write_text("Say one.")
    with pytest.raises(UserError, match=r"its name must end in \.jsonl"):
        sources.load("pairs", str(tmp_path / "mine.txt"))
    file.write_text('{"text": "no prompt"}\n')
    with pytest.raises(UserError, match="row 1: no column 'prompt'"):
        sources.load("pairs", str(file))
