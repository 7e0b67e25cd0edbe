"""`pairs` of several sets: every row in its own set's words, spread evenly, and where each came from."""

import json
from collections import Counter

import pytest
from command_line import buddy

from buddy import data
from buddy.backbones.untrained import byte_tokenizer
from buddy.data import inputs, materialise, mixture
from buddy.data.rows import read_file
from buddy.training.examples import encode

ASKED = ("alpaca", "gsm8k", "samsum")


def made(tmp_path, *names):
    answer = buddy("data", "--name", "pairs", "--source", "embedded", "--of", ",".join(names), "--out", tmp_path / "p")
    assert answer.status == 0, answer.err
    return read_file(tmp_path / "p/train.jsonl"), json.loads((tmp_path / "p/data.json").read_text())


def test_every_set_gives_its_training_prompts_and_responses_in_its_own_words(tmp_path):
    rows, content = made(tmp_path, *ASKED)
    for name in ASKED:
        own = [(row["prompt"], row["response"]) for row in rows if row["of"] == name]
        assert own == data.prompts(name, data.load(name, "embedded", "train"))
        assert content["of"][name] == {"split": "train", "rows": len(own)}
    assert len({row["id"] for row in rows}) == len(rows) == content["splits"]["train"]["rows"]
    assert [(one.prompt, one.response) for one in inputs.training(tmp_path / "p")] == [
        (row["prompt"], row["response"]) for row in rows
    ]


def test_the_first_rows_are_a_fair_part_of_each_set(tmp_path):
    rows, content = made(tmp_path, *ASKED, "ptb")
    total = len(rows)
    for first in (10, 50, 100, total):
        seen = Counter(row["of"] for row in rows[:first])
        for name, facts in content["of"].items():
            assert abs(seen[name] - first * facts["rows"] / total) <= 1


def test_prose_gives_passages_that_go_on_and_teach_no_end(tmp_path):
    rows, _ = made(tmp_path, "ptb")
    articles = {row["id"]: row["text"].split() for row in data.load("ptb", "embedded")}
    before, after = mixture.WORDS
    for row in rows:
        article, start = row["id"].rsplit("-", 1)
        words = articles[article][int(start) :]
        assert row["prompt"] == " ".join(words[:before])
        assert row["response"].split() == words[before : before + after]
        assert row["cut"] is True
    assert {row["id"].rsplit("-", 1)[0] for row in rows} == {
        name for name, text in articles.items() if len(text) > before
    }
    encoded = encode(byte_tokenizer(), inputs.training(tmp_path / "p")[:3], 2048)
    assert all(row["input_ids"][-1] != byte_tokenizer().eos_token_id for row in encoded)


def test_prompts_alone_stay_alone_and_a_backbone_answers_them(tmp_path):
    (tmp_path / "mine").mkdir()
    rows = [{"instruction": f"Say {number}."} for number in range(3)]
    (tmp_path / "mine/alpaca.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of = ("data", "--name", "pairs", "--source", tmp_path / "mine", "--of", "alpaca")
    assert buddy(*of, "--out", tmp_path / "alone").status == 0
    assert all("response" not in row for row in read_file(tmp_path / "alone/train.jsonl"))
    assert buddy("backbone", "--random", "tiny-llama", "--layers", 3, "--out", tmp_path / "tiny").status == 0
    by = ("--answers-by", tmp_path / "tiny", "--new-tokens", 3)
    assert buddy(*of, *by, "--out", tmp_path / "answered").status == 0
    answered = read_file(tmp_path / "answered/train.jsonl")
    assert [row["prompt"] for row in answered] == [row["prompt"] for row in read_file(tmp_path / "alone/train.jsonl")]
    assert all(row["response"] for row in answered)
    assert json.loads((tmp_path / "answered/data.json").read_text())["of"] == {"alpaca": {"split": "train", "rows": 3}}
    # the folder of a mixture is a source as any other, and still says what it was made of
    content = materialise("pairs", str(tmp_path / "answered"), tmp_path / "again")
    assert content["of"] == {"alpaca": {"split": "train", "rows": 3}}


@pytest.mark.parametrize(
    ("name", "of", "message"),
    [
        ("alpaca", "gsm8k", "--of gsm8k: belongs to --name pairs, not to --name alpaca"),
        ("pairs", "alpaca,piqa", "--of piqa: gives no prompts; those that do: gsm8k, alpaca, samsum, wikitext2 or ptb"),
        ("pairs", "pairs", "--of pairs: gives no prompts"),
        ("pairs", "alpaka", "did you mean alpaca?"),
        ("pairs", "alpaca,alpaca", "a set occurs twice"),
        ("pairs", "", "or make it of other sets (`buddy data --of`)"),
    ],
)
def test_what_cannot_be_mixed_is_one_line_and_leaves_nothing(tmp_path, name, of, message):
    more = ("--of", of) if of else ()
    line = buddy("data", "--name", name, "--source", "embedded", *more, "--out", tmp_path / "p").mistake
    assert message in line
    assert not list(tmp_path.glob("p*"))
