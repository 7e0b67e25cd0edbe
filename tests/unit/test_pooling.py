"""What of a prompt the router reads: all of it, or what is not the template's; and how far other prompts are from it."""

import json
import statistics

import pytest
import torch
from command_line import buddy
from models import tiny, with_router
from transformers.cache_utils import DynamicCache

from buddy.backbones.untrained import byte_tokenizer
from buddy.data import materialise, mixture, store
from buddy.data.templates import examples
from buddy.errors import UserError
from buddy.evaluation.distance import distances
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.decision import source_feature
from buddy.policies.static import StaticPolicy
from buddy.routing.engine import Routing, routed
from buddy.routing.model import RoutedModel
from buddy.runs import RunInfo, load
from buddy.study.records import Record
from buddy.training import prompts
from buddy.training.examples import Collator, encode
from buddy.training.probes import Probes
from buddy.training.router import read

ALPACA = [
    {"instruction": "Name a {colour}.", "input": "", "output": "Red."},
    {"instruction": "Sort these.", "input": "b, a", "output": "a, b"},
]
TOKENIZER = byte_tokenizer()


def letters(row):
    return TOKENIZER.decode([row["input_ids"][place] for place in row["question"]])


def test_the_template_is_told_from_the_row():
    first, second = examples("alpaca", ALPACA)
    assert [first.prompt[start:end] for start, end in first.own] == ["Name a {colour}."]
    assert [second.prompt[start:end] for start, end in second.own] == ["Sort these.", "b, a"]
    ((dialogue),) = examples("samsum", [{"dialogue": "A: hi\r\nB: yo", "summary": "Greetings."}])
    assert [dialogue.prompt[start:end] for start, end in dialogue.own] == ["A: hi\nB: yo"]
    assert examples("pairs", [{"prompt": "what", "response": "that"}])[0].own == ()


def test_a_mixture_remembers_it():
    rows, _ = mixture.mixed(["alpaca", "gsm8k", "ptb"], "embedded")
    for row, example in zip(rows, examples("pairs", rows), strict=True):
        own = " ".join(example.prompt[start:end] for start, end in example.own)
        assert ("### Response" in example.prompt) == (row["of"] == "alpaca")
        assert "###" not in own
        assert bool(own) == (row["of"] != "ptb")


def test_tokens_of_the_question_are_marked():
    rows = encode(TOKENIZER, [*examples("alpaca", ALPACA), ("bare", "answer")], 512, "question")
    assert [letters(row) for row in rows] == ["Name a {colour}.", "Sort these.b, a", "bare"]
    assert "question" not in encode(TOKENIZER, examples("alpaca", ALPACA), 512)[0]
    batch = Collator(0, pool_over="question")(rows)
    for place, row in enumerate(rows):
        ends = row["prompt_length"]
        unread = set(range(ends)) - set(row["question"])
        assert batch["read_mask"][place, :ends].tolist() == [int(token not in unread) for token in range(ends)]
        length = len(row["input_ids"])
        assert batch["read_mask"][place, ends:].tolist() == [1] * (length - ends) + [0] * (
            batch["input_ids"].shape[1] - length
        )
        assert batch["context_mask"][place].sum() == ends
    assert "read_mask" not in Collator(0)(rows)


def test_a_tokenizer_that_cannot_tell_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="pool_over"):
        encode(Slow(), [("a", "b")], 64, "question")


def model_and_rows():
    backbone = tiny()
    backbone.resize_token_embeddings(300)
    rows = encode(TOKENIZER, [*examples("alpaca", ALPACA), ("bare", "answer")], 512, "question")
    return with_router(backbone), rows


@torch.no_grad()
def features(model, row):
    """(tokens, width): what the plain model's first block has of a row."""
    model.backbone(torch.tensor([row["input_ids"]]), past_key_values=(plain := DynamicCache()), use_cache=True)
    return source_feature(plain.layers[0].keys, plain.layers[0].values, "value")[0]


@torch.no_grad()
@pytest.mark.parametrize("form", ["sequence", "causal"])
def test_the_router_reads_the_question_alone(form):
    """Scores again by hand: the mean over the question's tokens, and token by token over what follows the prompt."""
    model, rows = model_and_rows()
    policy, batch = model.policy, Collator(0, pool_over="question")(rows)
    routing = Routing(policy, 5 / 7, form=form, context_mask=batch["context_mask"], read_mask=batch["read_mask"])
    with routed(model.backbone, routing):
        model.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for place, row in enumerate(rows):
        scores = policy.decision(features(model, row)[None])[0].double()
        prompt, steps = row["prompt_length"], len(row["input_ids"]) - row["prompt_length"]
        for step in range(steps + 1 if form == "causal" else 1):
            read_now = [*row["question"], *range(prompt, prompt + step)]
            kept = scores[read_now].mean(0).topk(3).indices.sort().values + 1
            found = routing.trace.paths(place)[prompt - 1 + step if form == "causal" else 0]
            assert found == (0, *kept.tolist(), 6)


@torch.no_grad()
def test_fit_and_probes_read_the_same():
    model, rows = model_and_rows()
    for found, row in zip(read(model.backbone, model.policy, rows, 2), rows, strict=True):
        torch.testing.assert_close(found, features(model, row)[row["question"]], atol=1e-5, rtol=1e-4)
    scores = Probes._scores(model.backbone, model.policy, Probes.of(rows, 2).prompts)
    for found, row in zip(scores, rows, strict=True):
        by_hand = model.policy.decision(features(model, row)[None])[0, row["question"]].double().mean(0)
        torch.testing.assert_close(found, by_hand + 0.1 * model.policy.prior, atol=1e-4, rtol=1e-4)


# ---- distance ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("feature", "source"), [("value", 1), ("key", 2)])
def test_distance_by_hand(feature, source):
    """Population mean and deviation of pooled features by the statistics module, each prompt read alone."""
    backbone = tiny()
    backbone.resize_token_embeddings(300)
    policy = BuddyPolicy(7, 16, feature, source, prompts_noted=True)
    model = RoutedModel(backbone, policy, tokenizer=TOKENIZER).eval()
    pairs = [(f"what is {number} times {number + 3}", "much") for number in range(6)]
    rows = encode(TOKENIZER, pairs, 64)
    prompts.note(backbone, policy, rows, 4)

    def pooled(ids):
        backbone(torch.tensor([ids]), past_key_values=(plain := DynamicCache()), use_cache=True)
        states = plain.layers[source - 1]
        return source_feature(states.keys, states.values, feature)[0].mean(0).tolist()

    known = list(zip(*[pooled(row["input_ids"][: row["prompt_length"]]) for row in rows], strict=True))
    contexts = [TOKENIZER(text).input_ids for text in ("quite another text", "what is 2 times 5")]
    for found, ids in zip(distances(model, contexts), contexts, strict=True):
        squares = [
            ((value - statistics.mean(column)) / statistics.pstdev(column)) ** 2
            for value, column in zip(pooled(ids), known, strict=True)
        ]
        assert found.item() == pytest.approx(statistics.mean(squares) ** 0.5, rel=1e-3)
    own = distances(model, [row["input_ids"][: row["prompt_length"]] for row in rows])
    assert own.square().mean().item() == pytest.approx(1, rel=1e-3)  # of the prompts themselves
    assert distances(RoutedModel(backbone, BuddyPolicy(7, 16)), contexts) is None
    assert distances(RoutedModel(backbone, StaticPolicy(7)), contexts) is None


@pytest.mark.parametrize("recipe", ["paper", "tuned"])
def test_a_trained_run_says_how_far_tasks_are(tmp_path, recipe):
    def run(*words):
        said = buddy(*words)
        assert said.status == 0, said.err

    run("backbone", "--random", "tiny-llama", "--layers", 6, "--dtype", "float32", "--out", tmp_path / "backbone")
    for name in ("alpaca", "winogrande", "boolq"):
        materialise(name, "embedded", tmp_path / "data" / name)
    tuned = ("--recipe", "tuned", "--depths", "2", "--router-examples", 8, "--router-held-out", 4)
    tuned += ("--router-orders", 1, "--router-search-examples", 2, "--router-rounds", 1)
    run(
        *("train", "--backbone", tmp_path / "backbone", "--data", tmp_path / "data/alpaca", "--most-removed", 2),
        *("--examples", 12, "--epochs", 1, "--lora-rank", 2, "--warmup-steps", 0, "--out", tmp_path / "run"),
        *(tuned if recipe == "tuned" else ("--pool-over", "question")),
    )
    model = load(tmp_path / "run")
    rows = encode(
        model.tokenizer, examples("alpaca", store.read(tmp_path / "data/alpaca", "train")[:12]), 512, "question"
    )
    means = torch.stack([each.mean(0) for each in read(model.backbone, model.policy, rows, 4)])
    torch.testing.assert_close(model.policy.prompts_mean, means.mean(0), atol=1e-5, rtol=1e-3)
    training = RunInfo.read(tmp_path / "run").training
    assert (training["router"] if recipe == "tuned" else training)["pool_over"] == "question"
    run(
        *("evaluate", "--run", tmp_path / "run", "--data", tmp_path / "data", "--tasks", "winogrande,boolq"),
        *("--limit", 5, "--removed", "0,2", "--out", tmp_path / "records"),
    )
    found = [Record.read(tmp_path / f"records/removed~{removed}.json").metrics["tasks"] for removed in (0, 2)]
    sentences = [json.loads(line) for line in (tmp_path / "data/winogrande/validation.jsonl").read_text().splitlines()]
    before = [model.tokenizer(row["sentence"].split("_")[0].rstrip()).input_ids for row in sentences[:5]]
    assert found[0]["winogrande"]["distance"] == pytest.approx(distances(model, before).mean().item(), rel=0.05)
    for task in ("winogrande", "boolq"):
        assert found[0][task]["distance"] == pytest.approx(found[1][task]["distance"])
        assert found[0][task]["distance"] > 0
