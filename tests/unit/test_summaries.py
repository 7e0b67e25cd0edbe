"""Summaries: ROUGE against sums done here, texts against generations one by one, and what a path kept means."""

import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from models import saved

from buddy import runs
from buddy.commands.rouge import rouge as command
from buddy.data import inputs, materialise
from buddy.errors import BudgetError, UserError
from buddy.evaluation import summaries, traces
from buddy.reporting import measured
from buddy.resampling import mean_interval
from buddy.settings import Summaries
from buddy.study.records import Record, find

PAIRS = [
    ("Ann: tea? Bob: yes.\n\nSummary:\n", "Ann and Bob have tea."),
    ("Cy: I am late, the bus is gone.\n\nSummary:\n", "Cy is late."),
    ("Di: ok\n\nSummary:\n", "Di agrees."),
    ("Ed: no. Flo: why? Ed: rain.\n\nSummary:\n", "Ed stays because of rain."),
]
SETTINGS = Summaries(prompts=4, new_tokens=9, batch_size=3)

# ---- ROUGE -----------------------------------------------------------------------------------------------------------


def words(text):
    return tuple(re.findall("[a-z0-9]+", text.lower()))


@cache
def longest(one, other):
    """Length of the longest common subsequence, by its definition."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + longest(one[:-1], other[:-1])
    return max(longest(one[:-1], other), longest(one, other[:-1]))


def f1(text, reference):
    """(ROUGE-1, ROUGE-L), from overlap and lengths."""
    said, right = words(text), words(reference)
    shared = sum((Counter(said) & Counter(right)).values()), longest(said, right)
    return tuple(2 * count / (len(said) + len(right)) if count else 0.0 for count in shared)


CASES = [
    ("Ann and Bob have tea.", "Ann and Bob have tea."),
    ("tea have Bob and Ann", "Ann and Bob have tea."),  # every word, none in order
    ("Bob, Bob, BOB!", "Ann meets Bob."),  # a word counts once
    ("They don't run at 8:30 am - runs matter", "At 8:30 they run; it doesn't matter."),
    ("nothing of it", "Ann meets Bob."),
    ("", "Ann meets Bob."),
    ("He said he would call her when the train had left the station", "When the train left, he would call."),
]


def test_rouge_is_what_its_definition_says():
    found = summaries.scores(*zip(*CASES, strict=True))
    expected = [f1(*case) for case in CASES]
    assert found["rouge1"] == pytest.approx([one for one, _ in expected])
    assert found["rougeL"] == pytest.approx([other for _, other in expected])
    # By hand: all; 5 and 1 of 5 words; "bob" of 3 and 3.
    assert found["rouge1"][:3] == pytest.approx([1, 1, 1 / 3])
    assert found["rougeL"][:3] == pytest.approx([1, 1 / 5, 1 / 3])
    assert found["rouge1"][4:6] == [0, 0]


def test_the_interval_is_the_means_own():
    values = np.random.default_rng(5).uniform(0, 0.6, 400).tolist()
    found = mean_interval(values)
    error = np.std(values) / 20
    mean, low, high = found
    assert mean == pytest.approx(np.mean(values))
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert mean_interval([0.25] * 7) == (0.25, 0.25, 0.25)
    assert mean_interval(values) == found  # the same every time


# ---- summaries -------------------------------------------------------------------------------------------------------


def alone(model, prompt, decode):
    """New tokens of one prompt by itself."""
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    new = model.generate(ids, budget=4 / 7, decode=decode, max_new_tokens=9, do_sample=False)
    return new[0, ids.shape[1] :].tolist()


def test_a_path_kept_is_the_prompts_and_one_chosen_anew_is_not(model, ran):
    prompts = [prompt for prompt, _ in PAIRS]
    kept, anew = (traces.answers(model, prompts, 4 / 7, decode, 9, 3) for decode in ("reuse", "recompute"))
    for prompt, one, other in zip(prompts, kept, anew, strict=True):
        assert one.routes.shape == (9, 7)
        assert torch.equal(one.routes, one.routes[:1].expand(9, 7))
        assert torch.equal(one.routes[0], other.routes[0])  # the prompt's path is the same in both
        ran.clear()
        assert one.tokens == alone(model, prompt, "reuse")
        assert ran == [set(one.routes[0].nonzero().flatten().tolist())] * 9
        assert other.tokens == alone(model, prompt, "recompute")
    assert any(len(set(map(tuple, answer.routes.tolist()))) > 1 for answer in anew)


@pytest.mark.parametrize("decode", ["reuse", "recompute"])
def test_the_metrics_are_those_of_the_texts(model, decode):
    found = summaries.measure(model, PAIRS, 4 / 7, decode, SETTINGS)
    texts = [model.tokenizer.decode(alone(model, prompt, decode), skip_special_tokens=True) for prompt, _ in PAIRS]
    expected = [f1(text, right) for text, (_, right) in zip(texts, PAIRS, strict=True)]
    for place, measure in enumerate(summaries.MEASURES):
        values = [one[place] for one in expected]
        assert found[measure]["values"] == pytest.approx(values)
        assert found[measure]["mean"] == pytest.approx(sum(values) / 4)
    assert (found["prompts"], found["new_tokens"], found["tokens_mean"], found["executed_mean"]) == (4, 9, 9, 4)
    assert (found["changed_steps_mean"] > 0) is (decode == "recompute")


def test_what_follows_the_end_of_a_summary_does_not_count(model):
    texts = [alone(model, prompt, "reuse") for prompt, _ in PAIRS]
    end = texts[0][3]
    model.backbone.generation_config.eos_token_id = end
    lengths = [text.index(end) + 1 if end in text else 9 for text in texts]
    answers = traces.answers(model, [prompt for prompt, _ in PAIRS], 4 / 7, "reuse", 9, 3)
    assert [answer.tokens for answer in answers] == [text[:n] for text, n in zip(texts, lengths, strict=True)]
    assert lengths[0] <= 4
    assert summaries.measure(model, PAIRS, 4 / 7, "reuse", SETTINGS)["tokens_mean"] == sum(lengths) / 4


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(model, tmp_path):
    """A run on disk and dialogues, and the command's arguments for them."""
    model.backbone.config.max_position_embeddings = 4096  # a token per byte: dialogues are long
    run = saved(model, tmp_path)
    materialise("samsum", "embedded", tmp_path / "samsum")
    given = {"run": run, "data": tmp_path / "samsum", "removed": "3,1", "out": tmp_path / "rouge/dataset~samsum"}
    rest = {"study": "", "name": "", "device": "cpu", "dtype": "auto"}
    settings = Summaries(prompts=3, new_tokens=5, batch_size=2).model_dump(exclude={"backbones"})
    return given | rest | settings


def test_what_a_record_says(arguments, capsys):
    command(**arguments)
    made = [path.relative_to(arguments["out"]).as_posix() for path in find(arguments["out"])]
    assert made == [f"decode~{decode}/removed~{n}.json" for decode in ("recompute", "reuse") for n in (1, 3)]
    model = runs.load(arguments["run"], device="cpu")
    pairs = inputs.pairs(arguments["data"])[:3]
    for decode in ("reuse", "recompute"):
        for removed in (1, 3):
            record = Record.read(arguments["out"] / f"decode~{decode}/removed~{removed}.json")
            assert (record.kind, record.study, record.backbone, record.seed, record.n) == (
                *("rouge", "small", "tiny"),
                *(3, 3),
            )
            assert record.variant == {"feature": "value", "kv": "zero", "decode": decode}
            assert record.budget.executed == record.metrics["executed_mean"] == 7 - removed
            settings = Summaries(new_tokens=5, batch_size=1)
            expected = summaries.measure(model, pairs, (7 - removed) / 7, decode, settings)
            assert {name: record.metrics[name] for name in expected} == expected
    # A study reads a mean with its interval for each measure, depth and mode.
    found = [one for one in measured.load(arguments["out"].parent.parent)[0] if isinstance(one, measured.Rouge)]
    assert len(found) == 2 * 2
    assert {(one.dataset, one.decode) for one in found} == {("samsum", "reuse"), ("samsum", "recompute")}
    figures = [figure for one in found for figure in one.figures.values()]
    assert len(figures) == 2 * 2 * 2
    assert all(figure.low <= figure.value <= figure.high for figure in figures)
    assert "3 of 7 blocks removed, recompute: ROUGE-1 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"removed": "1,6"}, "--removed: [0-9]+ is not"),
        ({"kv": "none"}, "--kv: 'none'"),
        ({"data": "nowhere"}, "not a data set"),
    ],
)
def test_a_mistake_leaves_no_record(arguments, wrong, message):
    with pytest.raises((BudgetError, UserError), match=message):
        command(**arguments | wrong)
    assert not arguments["out"].exists()
