"""PuDDing: its pool against an exhaustive greedy, its targets against a slow loop, its choice against the truth."""

import copy
import json
import shutil
from itertools import product

import pytest
import torch
from models import VOCABULARY, prompts, tiny
from tape import Tape
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import buddy
from buddy import data, runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.baselines.pudding import Omission, find_pool, pool
from buddy.data.choices import Item, training_items
from buddy.data.tasks import STOCK, tasks
from buddy.errors import BudgetError, UserError
from buddy.evaluation.breakdown import breakdown
from buddy.policies.pudding import PuddingPolicy
from buddy.routing.engine import Routing, routed
from buddy.routing.graphs.decoders import Decoders
from buddy.routing.kv import RoutedCache
from buddy.routing.model import RoutedModel
from buddy.routing.policy import Policy
from buddy.settings import Breakdown, Pudding, Training
from buddy.training import pudding, sft
from buddy.training.pudding import fit_router, omission_losses, router_inputs
from buddy.training.recipe import Recipe

SETS = [[1, 3], [2, 5], [4, 5]]
ROUTER = Pudding(epochs=40, batch_size=8, learning_rate=3e-3)
ENCODERS = ("backbone", "text")


# ---- what the tests are made of ------------------------------------------------------------------------------------------


def questions(count=5, seed=0):
    """Random questions: 2 to 4 choices, answers of 1 to 4 tokens; every third has its choice in the context."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())

    found = []
    for number in range(count):
        choices = 2 + number % 3
        if number % 3 == 2:
            before, answer = tokens(3, 8), tokens(1, 4)
            contexts = tuple((*before, first, *tokens(0, 3)) for first in range(1, choices + 1))
            answers = (answer,) * choices
        else:
            contexts, answers = (tokens(3, 8),) * choices, tuple(tokens(1, 4) for _ in range(choices))
        found.append(Item(contexts, answers, number % choices))
    return found


def pruned(backbone, removed):
    """The Hugging Face model with blocks deleted."""
    model = copy.deepcopy(backbone)
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList(layer for index, layer in enumerate(decoder.layers) if index not in removed)
    return model


@torch.no_grad()
def slow_likelihood(model, context, answer):
    """One answer at a time, no padding."""
    logits = model(torch.tensor([[*context, *answer]]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(context) - 1 + place, token]) for place, token in enumerate(answer)) / len(answer)


def slow_score(model, items, criterion):
    total = 0.0
    for item in items:
        found = [slow_likelihood(model, *pair) for pair in zip(item.contexts, item.answers, strict=True)]
        right = found.pop(item.right)
        total -= right if criterion == "likelihood" else sum(right - wrong for wrong in found)
    return total / len(items)


def slow_losses(backbone, items):
    models = [pruned(backbone, blocks) for blocks in SETS]
    return [[-slow_likelihood(model, *item.solution) for model in models] for item in items]


def slow_order(backbone, items, removed, criterion):
    order, rounds = [], []
    for _ in range(removed):
        candidates = [index for index in range(1, backbone.config.num_hidden_layers - 1) if index not in order]
        rounds.append({index: slow_score(pruned(backbone, [*order, index]), items, criterion) for index in candidates})
        order.append(min(candidates, key=rounds[-1].__getitem__))
    return order, rounds


def words():
    """A tokenizer for the tiny backbones: token n is the word ``wn``."""
    vocabulary = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2", bos_token="w1")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A tiny BERT on disk, with WordPiece: ``w12`` is ``w``, ``##1``, ``##2`` to it."""
    folder = tmp_path_factory.mktemp("encoder")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "w", *(f"##{digit}" for digit in range(10))]
    tokenizer = Tokenizer(WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(pieces),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)
    return str(folder)


def policy_of(kind, encoder, sets=SETS, strong=True, seed=0):
    """A policy for the tiny backbones; a strong one chooses differently for different prompts."""
    torch.manual_seed(seed)
    if kind == "backbone":
        policy = PuddingPolicy(7, sets, width=16, hidden=16)
        last = policy.predictor.outer
    else:
        policy = PuddingPolicy(7, sets, encoder, tokenizer=words())
        last = policy.predictor.head
    if strong:
        torch.nn.init.normal_(last.weight, std=20.0)
    return policy


def chooser(kind, encoder, backbone=None, kv="zero", seed=0):
    return RoutedModel(backbone or tiny(), policy_of(kind, encoder, seed=seed), kv, words()).eval()


def counted(model):
    """How many sequences each block is called with, per call of the block."""
    calls = {index: [] for index in range(model.blocks)}
    for index, layer in enumerate(model.backbone.get_decoder().layers):
        layer.register_forward_hook(lambda _, inputs, __, index=index: calls[index].append(len(inputs[0])))
    return calls


def without(found):
    return tuple(index for index in range(7) if index not in found)


# ---- questions -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in STOCK:
        data.materialise(name, "embedded", folder / name)
    return folder


MULTIPLE = [name for name in STOCK if name not in ("gsm8k", "mmlu")]


def test_nothing_is_trained_on_the_solved_examples_of_prompts(root):
    with pytest.raises(UserError, match="holds solved examples for prompts; nothing is trained on it"):
        training_items(root, ["mmlu"], byte_tokenizer(), 6)


@pytest.mark.parametrize("name", MULTIPLE)
def test_questions_are_the_tokens_that_the_harness_scores(root, name):
    from buddy.evaluation.harness import BuddyLM

    tokenizer = byte_tokenizer()
    backbone = tiny()
    backbone.resize_token_embeddings(300)
    lm = BuddyLM(RoutedModel(backbone, PuddingPolicy(7, SETS, width=16), tokenizer=tokenizer))
    items = training_items(root, [name], tokenizer, 6)[name]
    task = tasks(root, [name])[1][0]
    rows = [json.loads(line) for line in (root / name / "train.jsonl").read_text().splitlines()]
    assert len(items) == 6
    for item, document, row in zip(items, list(task.training_docs()), rows, strict=False):
        requests = task.construct_requests(document, task.fewshot_context(document, 0), metadata=(None, None, None))
        assert list(zip(item.contexts, item.answers, strict=True)) == [
            tuple(map(tuple, lm._encode_pair(*request.args[:2]))) for request in requests
        ]
        shared = tokenizer(row["sentence"].split("_")[0]).input_ids if name == "winogrande" else list(item.contexts[0])
        assert list(item.shared)[: len(shared)] == shared  # WinoGrande: options may have their first letters in common
        assert all(context[: len(item.shared)] == item.shared for context in item.contexts)
        assert len(set(item.contexts)) == (2 if name == "winogrande" else 1)
        spoken = tokenizer.decode([*item.solution[0], *item.solution[1]])
        assert solution(name, row) in spoken


def solution(name, row):
    """The right choice, read from the row as published."""
    if name in ("openbookqa", "arc_easy", "arc_challenge"):
        return row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    return {
        "piqa": lambda: row[f"sol{row['label'] + 1}"],
        "boolq": lambda: "Answer: " + ("yes" if row["label"] else "no"),
        "siqa": lambda: row["answer" + "ABC"[int(row["label"]) - 1]],
        "hellaswag": lambda: row["endings"][int(row["label"])],
        "winogrande": lambda: row["sentence"].replace("_", row[f"option{row['answer']}"]),
    }[name]()


def test_long_contexts_lose_their_beginning(root):
    tokenizer = byte_tokenizer()
    whole = training_items(root, ["boolq"], tokenizer, 1)["boolq"][0]
    cut = training_items(root, ["boolq"], tokenizer, 1, max_length=50)["boolq"][0]
    longest = max(len(context + answer[:-1]) for context, answer in zip(cut.contexts, cut.answers, strict=True))
    assert longest == 50
    for context, long in zip(cut.contexts, whole.contexts, strict=True):
        assert context == long[-len(context) :]
    assert len({len(context) for context in cut.contexts}) == 1
    assert cut.shared == cut.contexts[0]


def test_questions_that_are_not_there(root, tmp_path):
    with pytest.raises(UserError, match="piqa: 1000 training items asked for, the split has"):
        training_items(root, ["piqa"], byte_tokenizer(), 1000)
    with pytest.raises(UserError, match="gsm8k"):
        training_items(root, ["gsm8k"], byte_tokenizer(), 1)
    shutil.copytree(root / "piqa", tmp_path / "piqa")
    (tmp_path / "piqa" / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"piqa: no .*train.jsonl"):
        training_items(tmp_path, ["piqa"], byte_tokenizer(), 1)


# ---- the pool ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "attention"), [("llama", "sdpa"), ("qwen2", "eager"), ("qwen3", "sdpa")])
@pytest.mark.parametrize("criteria", [("likelihood", "likelihood_diff"), ("likelihood",)])
def test_the_pool_is_the_exhaustive_greedy(architecture, attention, criteria):
    backbone = tiny(architecture, blocks=6, seed=3)
    backbone.set_attn_implementation(attention)
    items = {"one": questions(5, seed=1), "two": questions(2, seed=2)}
    found = find_pool(backbone, items, 3, criteria, batch_size=2)
    assert [(o.task, o.criterion) for o in found] == list(product(items, criteria))
    for omission in found:
        order, rounds = slow_order(backbone, items[omission.task], 3, omission.criterion)
        assert omission.order == order
        for scores, expected in zip(omission.scores, rounds, strict=True):
            assert scores == pytest.approx(expected, abs=1e-5)
        assert Omission.of(json.loads(json.dumps(omission.content()))) == omission


def test_criteria_can_differ():
    """What makes two criteria worth comparing above."""
    found = find_pool(tiny(blocks=6, seed=3), {"one": questions(5, seed=1)}, 3)
    assert found[0].order != found[1].order


def test_equal_sets_are_one():
    orders = [("a", "likelihood", [3, 1, 2]), ("a", "likelihood_diff", [1, 3, 4]), ("b", "likelihood", [4, 1, 3])]
    omissions = [Omission(task, criterion, order, []) for task, criterion, order in orders]
    assert pool(omissions, 2) == {(1, 3): ["a/likelihood", "a/likelihood_diff"], (1, 4): ["b/likelihood"]}
    assert list(pool(omissions, 3)) == [(1, 2, 3), (1, 3, 4)]
    with pytest.raises(UserError, match="4 blocks asked for, the pool's orders have 3"):
        pool(omissions, 4)


def test_a_pool_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="not between 1 and 5"):
        find_pool(tiny(), {"one": questions(2)}, 6)
    with pytest.raises(UserError, match="did you mean likelihood"):
        find_pool(tiny(), {"one": questions(2)}, 1, ["likelyhood"])


# ---- the targets ---------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_a_slow_loop_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(pudding, "SHARD", 2)
    backbone, items = tiny(seed=1), questions(5)
    found = omission_losses(backbone, items, SETS, batch_size=2, folder=tmp_path)
    torch.testing.assert_close(
        found, torch.tensor(slow_losses(backbone, items), dtype=torch.float64), atol=1e-5, rtol=1e-5
    )
    files = sorted((tmp_path / "checkpoints" / "pudding").iterdir())
    assert len(files) == 3
    measured = []
    slow = pudding._losses
    monkeypatch.setattr(pudding, "_losses", lambda *given: measured.append(len(given[1])) or slow(*given))
    files[1].unlink()  # as if killed
    files[2].write_bytes(files[2].read_bytes()[:-9])  # as if the power had failed
    assert torch.equal(omission_losses(backbone, items, SETS, batch_size=2, folder=tmp_path), found)
    assert measured == [2, 1]  # only what is missing or damaged
    other = omission_losses(backbone, items, SETS[:2], batch_size=2, folder=tmp_path)
    torch.testing.assert_close(other, found[:, :2], atol=1e-5, rtol=1e-5)  # other sets, other losses: measured anew
    again = omission_losses(tiny(seed=2), items, SETS[:2], batch_size=2, folder=tmp_path)
    assert not torch.isclose(again, other).any()  # and so with another backbone
    assert measured == [2, 1, *[2, 2, 1] * 2]


# ---- the choice ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_with_the_truth_for_a_predictor_the_best_set_is_left_out(kind, encoder):
    model, items = chooser(kind, encoder, tiny(seed=4)), questions(12, seed=5)
    losses = zip(items, slow_losses(model.backbone, items), strict=True)
    truth = {item.shared: row for item, row in losses}
    model.policy.replace_predictor(lambda ids: torch.tensor([truth[tuple(row)] for row in ids]))
    chosen = set()
    for prompt, losses in truth.items():
        model.generate(torch.tensor([prompt]), budget=5 / 7, max_new_tokens=2, pad_token_id=0)
        best = min(range(len(SETS)), key=losses.__getitem__)
        assert model.trace.paths() == [without(SETS[best])] * 2
        chosen.add(best)
    assert len(chosen) == len(SETS)


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_path_is_chosen_once_and_nothing_else_runs(kind, encoder):
    model = chooser(kind, encoder)
    chosen = set()
    for seed in range(8):
        ids, _ = prompts(batch=1, seed=seed)
        calls = counted(model)
        model.generate(ids, budget=5 / 7, max_new_tokens=6, pad_token_id=0)
        assert model.trace.distinct_paths() == 1
        path = model.trace.paths()[0]
        assert {index: len(found) for index, found in calls.items()} == {
            index: 6 if index in path else 0 for index in range(7)
        }
        chosen.add(path)
        for layer in model.backbone.get_decoder().layers:
            layer._forward_hooks.clear()
    assert chosen <= {without(found) for found in SETS}
    assert len(chosen) > 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("kv", ["zero", "mask", "project"])
def test_a_batch_with_padding_is_as_its_sequences_alone(kind, kv, encoder):
    model = chooser(kind, encoder, kv=kv)
    ids, mask = prompts(batch=5)
    together = model.generate(ids, mask, budget=[5 / 7, 5 / 7, 1.0, 5 / 7, 5 / 7], max_new_tokens=5, pad_token_id=0)
    paths = [model.trace.paths(row) for row in range(5)]
    assert len({path[0] for path in paths}) > 2
    for row in range(5):
        own = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        alone = model.generate(own, budget=1.0 if row == 2 else 5 / 7, max_new_tokens=5, pad_token_id=0)
        assert alone[0, -5:].tolist() == together[row, -5:].tolist()
        assert model.trace.paths() == paths[row]


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_full_depth_is_the_untouched_model(kind, encoder):
    model = chooser(kind, encoder)
    ids, mask = prompts()
    assert torch.equal(model(ids, mask, budget=1.0).logits, model.backbone(ids, attention_mask=mask).logits)
    assert not torch.equal(model(ids, mask).logits, model.backbone(ids, attention_mask=mask).logits)
    assert model.trace.executed().tolist() == [[5, 5, 5]]  # without a budget, that of the sets


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("form", ["sequence", "causal"])
def test_an_answer_does_not_choose_its_route(kind, form, encoder):
    model = chooser(kind, encoder)
    ids, _ = prompts(batch=6, length=12)
    context = torch.zeros_like(ids)
    context[:, :6] = 1
    ids[1], context[1, :4] = ids[1].clamp(min=1), 1
    model(ids[:, :6], budget=5 / 7)
    expected = [model.trace.paths(row)[0] for row in range(6)]
    assert len(set(expected)) > 1
    for _ in range(3):
        ids[:, 6:] = torch.randint(1, VOCABULARY, (6, 6))
        model(ids, budget=5 / 7, routing=form, context_mask=context)
        assert [set(model.trace.paths(row)) for row in range(6)] == [{path} for path in expected]


@torch.no_grad()
def test_routes_of_all_tokens_are_those_of_token_by_token():
    policy = policy_of("backbone", None)
    keys, values = torch.randn(2, 4, 2, 9, 8).unbind()
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[0, :2] = mask[1, 7:] = False
    prompt = mask & (mask.cumsum(1) <= 4)
    cpu = torch.device("cpu")
    found = policy.decide_each(policy.begin(5 / 7, 4, cpu), keys, values, mask, prompt)
    assert torch.equal(found, Policy.decide_each(policy, policy.begin(5 / 7, 4, cpu), keys, values, mask, prompt))


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("make", [lambda: Decoders(lambda _: None, 8), lambda: Decoders(lambda _: Tape(False), 8)])
def test_captured_steps_are_those_of_the_eager_engine(kind, make, encoder):
    model = chooser(kind, encoder)
    decoders = make()
    for seed in range(2):  # the second generation goes on with the graphs of the first
        ids, mask = prompts(seed=seed)
        tokens = torch.randint(1, VOCABULARY, (3, 6))
        results = []
        for cache in (RoutedCache(7, "zero"), decoders.lease(model, 32, 3)):
            attention, found = mask, []
            for step in range(7):
                new = ids if step == 0 else tokens[:, step - 1 : step]
                attention = attention if step == 0 else torch.nn.functional.pad(attention, (0, 1), value=1)
                out = model(new, attention, budget=[1.0, 5 / 7, 5 / 7], past_key_values=cache)
                found.append((out.logits[:, -1], model.trace.steps[-1]))
            results.append(found)
        assert cache.graph is not None
        for (logits, route), (other, expected) in zip(*results, strict=True):
            assert torch.equal(route, expected)
            torch.testing.assert_close(logits, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ENCODERS)
def test_only_the_depth_of_the_sets_and_full_depth_are_legal(kind, encoder):
    model = chooser(kind, encoder)
    ids, _ = prompts(batch=1)
    for budget in (6 / 7, 4 / 7, 0.1, 0, 1.2, [5 / 7, 6 / 7]):
        with pytest.raises(BudgetError, match=r"0.7143 \(5 blocks\) and 1 \(7 blocks\)"):
            model.generate(ids if isinstance(budget, float | int) else ids.repeat(2, 1), budget=budget)
    with pytest.raises(BudgetError, match="3 fractions do not fit a batch of 1"):
        model.policy.begin([5 / 7] * 3, 1, torch.device("cpu"))


def test_sets_that_are_none_are_refused():
    for sets in ([], [[]], [[1], [2, 3]]):
        with pytest.raises(UserError, match="equally many"):
            PuddingPolicy(7, sets, width=16)
    for blocks in ([0, 2], [2, 6], [2, 2]):
        with pytest.raises(UserError, match="between 1 and 5"):
            PuddingPolicy(7, [blocks], width=16)


def test_an_encoder_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match="neither backbone nor the folder") as raised:
        PuddingPolicy(7, SETS, str(tmp_path), tokenizer=words())
    assert "\n" not in str(raised.value)


def test_text_needs_tokens(encoder):
    model = chooser("text", encoder)
    with routed(model.backbone, Routing(model.policy, 5 / 7)), pytest.raises(UserError, match="input_ids"):
        model.backbone(inputs_embeds=torch.zeros(1, 3, 32))


# ---- the router ----------------------------------------------------------------------------------------------------------


def two_kinds(count=60):
    """Prompts of low or of high tokens; the first set is best for one kind, the second for the other."""
    generator = torch.Generator().manual_seed(7)
    items, losses = [], []
    for number in range(count):
        high = number % 2
        low = 1 if not high else 50
        length = int(torch.randint(3, 9, (), generator=generator))
        context = tuple(torch.randint(low, low + 6, (length,), generator=generator).tolist())
        items.append(Item((context, context), ((3,), (4,)), 0))
        noise = torch.rand(2, generator=generator) * 0.2 + torch.rand(1, generator=generator)
        losses.append(noise + torch.tensor([high, 1 - high]))
    return items, torch.stack(losses).double()


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_router_learns_which_prompts_need_which_set(kind, encoder, tmp_path):
    items, losses = two_kinds()
    backbone = tiny()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    settings = ROUTER if kind == "backbone" else Pudding(epochs=30, batch_size=8, learning_rate=2e-3)
    policy = policy_of(kind, encoder, SETS[:2], strong=False)
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    fit = fit_router(policy, backbone, items, losses, settings, folder=tmp_path)
    assert fit.held_out == 12
    assert fit.best_share >= 0.9
    assert fit.loss_oracle <= fit.loss < fit.loss_oracle + 0.25 * (fit.loss_single - fit.loss_oracle)
    assert fit.mse < 0.5 * fit.mse_constant
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    frozen = ("loss", "_extra_state", "position_ids")
    moved = [not torch.equal(v, start[n]) for n, v in policy.state_dict().items() if not any(f in n for f in frozen)]
    assert sum(moved) > 0.9 * len(moved)
    # What was measured on held-out prompts holds in the engine, prompt by prompt, for questions never seen.
    model = RoutedModel(backbone, policy, tokenizer=words()).eval()
    fresh, truth = two_kinds(90)
    hits = 0
    for item, losses_of in zip(fresh[60:], truth[60:], strict=True):
        model(torch.tensor([item.contexts[0]]), budget=5 / 7)
        hits += model.trace.paths()[0] == without(SETS[int(losses_of.argmin())])
    assert hits >= 27
    again = policy_of(kind, encoder, SETS[:2], strong=False)
    assert fit_router(again, nothing_to_run(), items, losses, settings, folder=tmp_path) == fit
    same_state(policy, again)


def nothing_to_run():
    """The same backbone, which cannot run: what was kept is read."""
    backbone = tiny()
    for layer in backbone.model.layers:
        layer.register_forward_pre_hook(lambda *_: pytest.fail("what was kept was not read"))
    return backbone


def same_state(one, other):
    for (name, value), (_, twin) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(value, twin), name


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_seed_gives_one_router(kind, encoder):
    items, losses = two_kinds(20)
    settings = Pudding(epochs=2, batch_size=8, learning_rate=1e-3)
    fits, policies = [], []
    for seed in (1, 1, 2):
        policies.append(policy_of(kind, encoder, SETS[:2], strong=False))
        torch.rand(len(fits))  # what was drawn before must not matter
        fits.append(fit_router(policies[-1], tiny(), items, losses, settings, seed))
    assert fits[0] == fits[1] != fits[2]
    same_state(*policies[:2])


def test_the_fit_is_measured_on_questions_held_out():
    """Every figure again, from the predictions of the policy and the losses alone."""
    items, losses = questions(30, seed=3), torch.rand(30, 3, dtype=torch.float64)
    backbone, policy = tiny(), policy_of("backbone", None, strong=False)
    fit = fit_router(policy, backbone, items, losses, Pudding(epochs=5, batch_size=8, learning_rate=1e-2))
    held = set(torch.randperm(30, generator=torch.Generator().manual_seed(0))[:6].tolist())
    test = sorted(held)
    train = losses[[index for index in range(30) if index not in held]]
    true = losses[test]
    with torch.no_grad():
        predicted = policy.predict(router_inputs(policy, backbone, [items[index].shared for index in test])).double()
    assert (fit.prompts, fit.held_out) == (30, 6)
    choice = [min(range(3), key=row.__getitem__) for row in predicted.tolist()]
    best = [min(range(3), key=row.__getitem__) for row in true.tolist()]
    single = min(range(3), key=train.mean(0).tolist().__getitem__)
    rows_of = true.tolist()
    count = len(test)
    assert fit.mse == pytest.approx(float(((predicted - true) ** 2).sum()) / (3 * count), rel=1e-5)
    assert fit.mse_constant == pytest.approx(float(((train.mean(0) - true) ** 2).sum()) / (3 * count), rel=1e-5)
    assert fit.best_share == pytest.approx(sum(a == b for a, b in zip(choice, best, strict=True)) / count)
    assert fit.best_share_single == pytest.approx(best.count(single) / count)
    assert fit.loss == pytest.approx(sum(row[c] for row, c in zip(rows_of, choice, strict=True)) / count)
    assert fit.loss_single == pytest.approx(sum(row[single] for row in rows_of) / count)
    assert fit.loss_oracle == pytest.approx(sum(map(min, rows_of)) / count)
    assert fit.chosen == [choice.count(index) for index in range(3)]


@torch.no_grad()
def test_the_router_is_trained_on_what_a_prefill_shows_it():
    """Mean keys and values of the first block, from the Hugging Face model's own cache."""
    backbone, policy = tiny(), policy_of("backbone", None)
    found = [(5, 6, 7), (8,), tuple(range(20, 31))]
    inputs = router_inputs(policy, backbone, found, batch_size=2)
    for prompt, row in zip(found, inputs, strict=True):
        cache = backbone(torch.tensor([prompt]), use_cache=True).past_key_values.layers[0]
        states = torch.cat([cache.keys[0].mean(1).flatten(), cache.values[0].mean(1).flatten()])
        torch.testing.assert_close(row, states, atol=1e-5, rtol=1e-5)


def test_too_few_questions_are_refused():
    with pytest.raises(UserError, match="1 questions"):
        fit_router(policy_of("backbone", None), tiny(), questions(1), torch.zeros(1, 3), ROUTER)


# ---- on disk -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_save_and_load_round_trip_to_equal_logits(kind, encoder, tmp_path):
    folder, run = tmp_path / "tiny", tmp_path / "run"
    model = chooser(kind, encoder)
    model.policy.loss_mean.copy_(torch.tensor([0.1, 0.2, 0.3]))
    model.policy.loss_scale.fill_(2.0)
    model.backbone.save_pretrained(folder)
    words().save_pretrained(folder)
    settings = json.loads(json.dumps(model.policy.settings()))
    info = runs.RunInfo("pudding", "pudding", settings, "tiny", runs.relative(folder, run))
    runs.save(run, info, model.policy)
    if kind == "text":  # the run must not need the encoder's folder again
        content = (run / "run.json").read_text().replace(encoder, str(tmp_path / "gone"))
        (run / "run.json").write_text(content)
    again = buddy.load(run, device="cpu")
    again.save(tmp_path / "copy")
    ids, mask = prompts(batch=5)
    for loaded in (again, buddy.load(tmp_path / "copy", device="cpu")):
        for budget in (5 / 7, 1.0):
            assert torch.equal(loaded(ids, mask, budget=budget).logits, model(ids, mask, budget=budget).logits)
            assert loaded.trace.paths(3) == model.trace.paths(3)
        same_state(loaded.policy, model.policy)
        assert torch.equal(loaded.policy.loss_mean, torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize("kind", ENCODERS)
def test_lora_is_trained_on_the_routes_that_the_router_picks(kind, encoder, tmp_path):
    backbone = tiny()
    policy = policy_of(kind, encoder, sets=[[1, 4], [2, 4], [4, 5]])
    before = copy.deepcopy(policy)
    numbers = torch.randint(3, VOCABULARY, (12, 9)).tolist()
    pairs = [(" ".join(f"w{number}" for number in row), " w5 w7") for row in numbers]
    routes = []
    first = RoutedModel(copy.deepcopy(backbone), policy, tokenizer=words()).eval()
    for prompt, _ in pairs:
        first(torch.tensor([words()(prompt).input_ids]))
        routes.append(first.trace.paths()[0])
    assert len(set(routes)) > 1  # where all examples go one way, the comparison below would say nothing
    settings = Training(epochs=1, batch_size=3, warmup_steps=0, lora_rank=2, logging_steps=1, save_steps=2)
    trained = sft.train(backbone, words(), policy, pairs, settings, Recipe(), tmp_path)
    same_state(policy, before)
    assert not any(module.training for module in policy.modules())  # no dropout in the choice
    assert [point["executed_fraction"] for point in trained.curve] == pytest.approx([5 / 7] * 4)
    moved = {
        name.split(".layers.")[1][0] for name, p in trained.adapted.named_parameters() if "lora_B" in name and p.any()
    }
    assert moved == {str(block) for path in routes for block in path}


def test_a_run_is_profiled_at_its_own_depth():
    """Its router chooses a set and no depth: there is no budget predictor to ask."""
    backbone = tiny()
    backbone.resize_token_embeddings(300)
    model = RoutedModel(backbone, PuddingPolicy(7, SETS, width=16, hidden=16), "zero", byte_tokenizer()).eval()
    settings = Breakdown(batch_size=2, tokens=16, steps=2, repeats=1, contexts=[32])
    ((removed, found),) = breakdown(model, ["a prompt", "another"], [len(SETS[0])], settings)
    assert removed == len(SETS[0])
    assert set(found["phases"]) == {"prefill", "decode"}
    assert "auto" not in found
