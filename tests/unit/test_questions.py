"""One route per question: what is read of contexts that differ by option, for every policy."""

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from models import tiny
from transformers.cache_utils import DynamicCache

from buddy.backbones.untrained import byte_tokenizer
from buddy.data import materialise
from buddy.data.tasks import tasks
from buddy.evaluation import accuracy
from buddy.evaluation.harness import BuddyLM
from buddy.evaluation.questions import Question, Read, asked_by, differing, reads
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.decision import source_feature
from buddy.policies.first import FirstPolicy
from buddy.policies.pudding import PuddingPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.model import RoutedModel
from buddy.settings import Evaluation

BLOCKS = 7
BUDGET = 5 / BLOCKS


TEXTS = ["The cup was in the box because it", "Ann asked Bob whether", "It rained all day, so the dog and the cat were"]


@torch.no_grad()
def torn(policy, backbone):
    """The policy with large random weights that says nothing of these texts' mean: it tells texts apart that are much alike."""
    torch.manual_seed(3)
    for name, parameter in policy.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if name.endswith("bias") else 20.0)
    passes = [read(backbone, torch.tensor([byte_tokenizer()(text).input_ids])) for text in TEXTS]
    if isinstance(policy, BuddyPolicy):
        scores = [
            policy.decision(source_feature(keys, values, policy.feature)).mean((0, 1)) for keys, values, _ in passes
        ]
        policy.decision.up.bias -= sum(scores) / len(scores)
    elif isinstance(policy, PuddingPolicy):
        means = torch.cat(
            [torch.cat([keys, values], 1).transpose(1, 2).flatten(2).mean(1) for keys, values, _ in passes]
        )
        policy.predictor.mean.copy_(means.mean(0))
        policy.predictor.scale.copy_(means.std(0))
        policy.predictor.outer.bias -= policy.predict(means).mean(0)
    else:
        policy.weight /= 20
        for gate in range(BLOCKS - 2):
            policy.bias[gate] -= sum((states[gate + 1] @ policy.weight[gate]).mean() for *_, states in passes) / len(
                passes
            )
    return policy


def read(backbone, ids):
    """Keys and values of the first block, and every block's input, in the plain model."""
    states = backbone(ids, past_key_values=(plain := DynamicCache()), use_cache=True, output_hidden_states=True)
    return plain.layers[0].keys, plain.layers[0].values, states.hidden_states


def chooser(name, backbone):
    """A routed model of this kind of policy."""
    policies = {
        "buddy": BuddyPolicy(BLOCKS, 16),
        "first": FirstPolicy(BLOCKS, 32, {2: 0.5}),
        "pudding": PuddingPolicy(BLOCKS, [[1, 2], [3, 4], [2, 5]], width=16),
    }
    return RoutedModel(backbone, torn(policies[name], backbone), tokenizer=byte_tokenizer()).eval()


@pytest.fixture(scope="module")
def backbone():
    model = tiny("llama")
    model.resize_token_embeddings(300)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in ("winogrande", "piqa", "boolq"):
        materialise(name, "embedded", root / name)
    return root


@torch.no_grad()
def pruned_score(backbone, blocks, context, answer):
    """By the definition, in the plain model with these blocks alone."""
    decoder = backbone.get_decoder()
    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList(layers[index] for index in blocks)
    try:
        logits = backbone(torch.tensor([context + answer]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        decoder.layers = layers
    steps = logits[len(context) - 1 : -1]
    return sum(steps[place, token].item() for place, token in enumerate(answer))


@torch.no_grad()
@pytest.mark.parametrize("name", ["buddy", "first", "pudding"])
def test_all_options_are_scored_by_the_route_of_what_they_share(backbone, data, name):
    """Every score again: the route of the common beginning, read alone, and the plain model with those blocks."""
    tokenizer = byte_tokenizer()
    model = chooser(name, backbone)
    lm = BuddyLM(model, budget=BUDGET, batch_size=4)
    manager, chosen = tasks(data, ["winogrande"])
    found = simple_evaluate(lm, tasks=chosen, task_manager=manager, limit=40, bootstrap_iters=10)
    taken, own = set(), []
    for sample in found["samples"]["buddy_winogrande"]:
        ids = [tokenizer(argument[0]).input_ids for argument in sample["arguments"]]
        same = next(place for place, pair in enumerate(zip(*ids, strict=False)) if len(set(pair)) > 1)
        model(torch.tensor([ids[0][:same]]), budget=BUDGET)
        (path,) = model.trace.paths()
        taken.add(path)
        for context, argument, score in zip(ids, sample["arguments"], sample["filtered_resps"], strict=True):
            answer = tokenizer(argument[1], add_special_tokens=False).input_ids
            assert score[0] == pytest.approx(pruned_score(backbone, path, context, answer), abs=1e-3)
        paths = []
        for context in ids:
            model(torch.tensor([context]), budget=BUDGET)
            paths += model.trace.paths()
        own.append(len(set(paths)) > 1)
    assert len(taken) > 1, "one route for all questions: nothing is shown"
    metrics = accuracy.measure(lm, BUDGET, Evaluation(tasks=["winogrande"], limit=40), data)
    routes = metrics["tasks"]["winogrande"]["routes"]
    assert routes == {"differ": 0.0, "would_differ": pytest.approx(sum(own) / 40)}
    assert routes["would_differ"] > 0, "contexts of their own change nothing: nothing is shown"


def test_tasks_whose_options_are_answers_have_one_context(backbone, data):
    lm = BuddyLM(chooser("buddy", backbone), batch_size=4)
    metrics = accuracy.measure(lm, BUDGET, Evaluation(tasks=["piqa", "boolq"], limit=6), data)
    for scores in metrics["tasks"].values():
        assert scores["routes"] == {"differ": 0.0, "would_differ": 0.0}
        assert scores["executed_mean"] == 5


@torch.no_grad()
def test_in_the_causal_form_the_shared_beginning_is_the_prompt(backbone, data):
    """Options and answers are then decoded: each token's route is that of decoding after the shared beginning."""
    tokenizer, model = byte_tokenizer(), chooser("buddy", backbone)
    lm = BuddyLM(model, budget=BUDGET, batch_size=2, routing="causal")
    texts = ("The cup is red", "The cap is red")
    requests = [Instance("loglikelihood", {}, (text, " now"), i, ("task", 0, 1)) for i, text in enumerate(texts)]
    scores = lm.loglikelihood(requests, disable_tqdm=True)
    assert lm.tallies["task"].differing == 0
    for text, score in zip(texts, scores, strict=True):
        ids = tokenizer(text + " now").input_ids
        same, cache = len("The c"), model.new_cache(64)
        steps = [model(torch.tensor([ids[:same]]), budget=BUDGET, past_key_values=cache, use_cache=True).logits[0, -1]]
        for token in ids[same:-1]:
            steps.append(model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1])
        logs = torch.stack(steps)[-4:].log_softmax(-1)
        expected = sum(logs[place, token].item() for place, token in enumerate(ids[-4:]))
        assert score[0] == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_where_options_share_nothing_nothing_is_read(backbone):
    for name in ("buddy", "first", "pudding"):
        lm = BuddyLM(chooser(name, backbone), budget=BUDGET, batch_size=2)
        requests = [Instance("loglikelihood", {}, (text, " x"), i, ("task", 0, 1)) for i, text in enumerate("ab")]
        lm.loglikelihood(requests, disable_tqdm=True)
        tally = lm.tallies["task"]
        assert tally.differing == 0
        assert tally.executed_mean == (BLOCKS if name == "first" else 5)


def test_what_is_read_of_contexts():
    one, other, alone = Question("t", (0,)), Question("t", (1,)), Question("u", (0,))
    contexts = [[1, 2, 3, 4], [1, 2, 5], [7, 8], [7, 8], [1, 2]]
    answers = [[9], [9, 9], [1], [2, 2, 2], [3]]
    questions = [one, one, other, other, alone]
    assert reads(questions, contexts, answers, 99) == [Read(0, 2), Read(0, 2), Read(0, 2), Read(0, 2), Read(0, 2)]
    # Four tokens are taken in: the fourth request loses nothing, and a longest of 3 cuts the first and the fourth by one.
    assert reads(questions, contexts, answers, 3) == [Read(1, 2), Read(1, 2), Read(1, 2), Read(1, 2), Read(0, 2)]


def test_which_requests_ask_one_question():
    def request(context, document, place=0):
        return Instance("loglikelihood", {}, (context, "x"), place, ("task", document, 1))

    found = asked_by([request("a", 0), request("b", 0, 1), request("", 0, 2), request("", 0, 3), request("a", 1)])
    assert found[0] == found[1]
    assert len(set(found)) == 4
    assert len(set(asked_by([Instance("loglikelihood", {}, ("a", "x"), 0)] * 2))) == 2


def test_how_often_routes_differ():
    one, other = Question("t", 0), Question("t", 1)
    assert differing([(one, b"a"), (one, b"b"), (other, b"a"), (other, b"a")]) == 0.5
    assert differing([]) == 0


def test_a_fixed_route_is_not_looked_for(backbone, data):
    model = RoutedModel(backbone, StaticPolicy(BLOCKS, [2, 3]), tokenizer=byte_tokenizer())
    lm = BuddyLM(model, batch_size=4)
    lm.routes = None  # it would be called
    metrics = accuracy.measure(lm, BUDGET, Evaluation(tasks=["winogrande"], limit=3), data)
    assert metrics["tasks"]["winogrande"]["routes"] == {"differ": 0.0, "would_differ": 0.0}
