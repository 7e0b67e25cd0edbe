"""A backbone answers prompts itself: against greedy decoding by hand, killed and gone on with, and as data to train on."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from buddy.backbones.untrained import byte_tokenizer
from buddy.cli import build
from buddy.data import inputs, materialise, templates
from buddy.data.rows import read_file
from buddy.errors import UserError
from buddy.routing.model import RoutedModel
from buddy.runs import RunInfo
from buddy.training.examples import encode

NEW = 12
PROMPTS = [f"Say {word * (1 + i % 5)}" for i, word in enumerate(("one ", "two ", "three ", "four ", "five ") * 4)]


def run(*arguments):
    """A command, in this process; a user's mistake is raised."""
    result = CliRunner().invoke(build(), [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny Llama that ends some of its answers: the end is a token that it likes."""
    folder = tmp_path_factory.mktemp("answers") / "tiny"
    run("backbone", "--random", "tiny-llama", "--layers", 3, "--dtype", "float32", "--out", folder)
    plain = loaded(folder)
    by_hand = [greedy(plain, templates.instruction(prompt), ends=None) for prompt in PROMPTS]
    used = {token: sum(token in answer for answer in by_hand) for answer in by_hand for token in answer}
    liked = min(used, key=lambda token: abs(used[token] - len(PROMPTS) / 2))
    content = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**content, "eos_token_id": liked}))
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def greedy(model, prompt, ends):
    """The answer's tokens, one pass over the whole text for each."""
    ids = byte_tokenizer()(prompt).input_ids
    new = []
    while len(new) < NEW and (not new or new[-1] != ends):
        new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return new


@pytest.fixture
def prompts(tmp_path):
    """Rows with an instruction and nothing else."""
    write(tmp_path / "mine/alpaca.train.jsonl", [{"instruction": prompt} for prompt in PROMPTS])
    return tmp_path / "mine"


def answered(backbone, source, out, *more):
    return run(
        *("data", "--name", "alpaca", "--source", source, "--answers-by", backbone, "--new-tokens", NEW),
        *("--batch-size", 2, "--out", out, *more),
    )


def test_every_prompt_is_answered_greedily_and_the_data_set_says_by_whom(backbone, prompts, tmp_path):
    said = answered(backbone, prompts, tmp_path / "out")
    ends = json.loads((backbone / "generation_config.json").read_text())["eos_token_id"]
    rows = read_file(tmp_path / "out/train.jsonl")
    assert [row["instruction"] for row in rows] == PROMPTS
    plain, cut = loaded(backbone), 0
    for row, prompt in zip(rows, PROMPTS, strict=True):
        tokens = greedy(plain, templates.instruction(prompt), ends)
        assert row["output"] == byte_tokenizer().decode(tokens, skip_special_tokens=True)
        assert row.get("cut", False) is (tokens[-1] != ends)
        cut += tokens[-1] != ends
    assert 0 < cut < len(rows)
    content = json.loads((tmp_path / "out/data.json").read_text())
    facts = content["answers"]
    assert {name: facts[name] for name in ("by", "new_tokens", "rows", "cut")} == {
        "by": "tiny", "new_tokens": NEW, "rows": len(rows), "cut": cut,
    }  # fmt: skip
    assert facts["backbone"]["source"] == {"random": "tiny-llama", "seed": 0, "layers": 3, "tokenizer": None}
    assert f"answered by tiny ({cut} cut off after {NEW} tokens)" in said
    assert not list(tmp_path.glob(".out*"))


def test_killed_it_answers_nothing_twice_and_ends_the_same(backbone, prompts, tmp_path, monkeypatch):
    answered(backbone, prompts, tmp_path / "whole")
    generate, asked = RoutedModel.generate, []

    def dies(self, *arguments, **options):
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.append(len(arguments[0]))
        return generate(self, *arguments, **options)

    monkeypatch.setattr(RoutedModel, "generate", dies)
    CliRunner().invoke(build(), ["data", "--name", "alpaca", "--source", str(prompts), "--answers-by", str(backbone),
                                 "--new-tokens", str(NEW), "--batch-size", "2", "--out", str(tmp_path / "out")])  # fmt: skip
    assert len(asked) == 6
    assert not (tmp_path / "out").exists()

    def counts(self, *arguments, **options):
        asked.append(len(arguments[0]))
        return generate(self, *arguments, **options)

    monkeypatch.setattr(RoutedModel, "generate", counts)
    answered(backbone, prompts, tmp_path / "out")
    assert len(asked) - 6 == 10 - 4  # ten batches of two, of which four were kept
    assert (tmp_path / "out/train.jsonl").read_bytes() == (tmp_path / "whole/train.jsonl").read_bytes()


def test_answers_of_another_length_are_not_gone_on_from(backbone, prompts, tmp_path):
    """What was kept belongs to its settings: a longer answer is asked for anew."""
    answered(backbone, prompts, tmp_path / "long")
    answered(backbone, prompts, tmp_path / "short", "--new-tokens", 3)
    longest = max(len(row["output"]) for row in read_file(tmp_path / "short/train.jsonl"))
    assert longest < max(len(row["output"]) for row in read_file(tmp_path / "long/train.jsonl"))


def test_a_fetched_set_is_answered_and_keeps_its_origin(backbone, tmp_path):
    materialise("alpaca", "embedded", tmp_path / "alpaca")
    answered(backbone, tmp_path / "alpaca", tmp_path / "own/alpaca", "--examples", 3)
    before, after = (json.loads((tmp_path / name / "data.json").read_text()) for name in ("alpaca", "own/alpaca"))
    assert after["source"] == before["source"] == "embedded"
    old, new = read_file(tmp_path / "alpaca/train.jsonl")[:3], read_file(tmp_path / "own/alpaca/train.jsonl")
    assert [row["id"] for row in new] == [row["id"] for row in old]
    assert all(row["output"] != other["output"] for row, other in zip(new, old, strict=True))


def test_of_other_sets_only_what_is_trained_on_is_answered(backbone, tmp_path):
    materialise("samsum", "embedded", tmp_path / "samsum")
    run(
        *("data", "--name", "samsum", "--source", tmp_path / "samsum", "--answers-by", backbone, "--new-tokens", 2),
        *("--out", tmp_path / "own"),
    )
    assert sorted(path.name for path in (tmp_path / "own").glob("*.jsonl")) == ["train.jsonl"]
    assert len(inputs.training(tmp_path / "own")) == 12


def test_a_response_that_was_cut_off_teaches_no_end(tmp_path):
    write(tmp_path / "alpaca/train.jsonl", [
        {"id": "0", "instruction": "a", "output": "bc"}, {"id": "1", "instruction": "a", "output": "bc", "cut": True},
    ])  # fmt: skip
    write(tmp_path / "alpaca/data.json", [{"name": "alpaca"}])
    whole, cut = encode(byte_tokenizer(), inputs.training(tmp_path / "alpaca"), 512)
    assert whole["input_ids"] == [*cut["input_ids"], byte_tokenizer().eos_token_id]


def test_a_run_trained_on_a_backbones_answers_says_so(backbone, prompts, tmp_path):
    answered(backbone, prompts, tmp_path / "alpaca")
    run(
        *("train", "--backbone", backbone, "--data", tmp_path / "alpaca", "--most-removed", 1, "--epochs", 1),
        *("--examples", 4, "--loss", "kl", "--lora-rank", 2, "--warmup-steps", 0, "--out", tmp_path / "run"),
    )
    training = RunInfo.read(tmp_path / "run").training
    assert (training["data"], training["answered_by"], training["loss"]) == ("alpaca", "tiny", "kl")


def test_prompts_alone_are_measured_on_but_not_trained_on(prompts, tmp_path):
    materialise("alpaca", str(prompts), tmp_path / "alpaca")
    assert inputs.prompts(tmp_path / "alpaca") == [templates.instruction(prompt) for prompt in PROMPTS]
    for ask in (inputs.training, inputs.pairs):
        with pytest.raises(UserError, match=r"row alpaca-train-0 has no output; .* `buddy data --answers-by BACKBONE`"):
            ask(tmp_path / "alpaca")


def test_a_set_without_prompts_is_refused_before_a_model_is_loaded(backbone, tmp_path, monkeypatch):
    from buddy import runs

    monkeypatch.setattr(runs, "load", None)
    with pytest.raises(UserError, match="data set piqa: has no prompts with responses; those that have: alpaca"):
        run(*("data", "--name", "piqa", "--source", "embedded", "--answers-by", backbone, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
