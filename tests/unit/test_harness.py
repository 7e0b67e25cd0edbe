"""Scores through lm-eval against the harness's own Hugging Face model and against scoring one request at a time."""

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from models import tiny

from buddy.backbones.untrained import byte_tokenizer
from buddy.data import materialise
from buddy.data.tasks import tasks
from buddy.evaluation import accuracy
from buddy.evaluation.harness import BuddyLM
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.model import RoutedModel
from buddy.routing.sliced import sliced
from buddy.settings import Evaluation

NAMES = ["piqa", "boolq", "openbookqa", "winogrande"]


@pytest.fixture(scope="module")
def backbone():
    model = tiny("llama")
    model.resize_token_embeddings(300)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in NAMES:
        materialise(name, "embedded", root / name)
    return root


def request(context, answer):
    return Instance(request_type="loglikelihood", doc={}, arguments=(context, answer), idx=0)


REQUESTS = [
    request("The sky is", " blue"),
    request("The sky is", " green and wide"),
    request("Is it so?\nAnswer:", "y"),
    request("Is it so?\nAnswer:", "n"),
    request("", "from nothing"),
    request(("a long context " * 8).strip(), " z"),
]


@torch.no_grad()
def test_scores_equal_one_request_at_a_time(backbone):
    """By the definition: sum of log softmax of each answer token, in an unpadded pass of the plain model."""
    tokenizer = byte_tokenizer()
    lm = BuddyLM(RoutedModel(backbone, StaticPolicy(7), tokenizer=tokenizer), batch_size=4)
    for found, asked in zip(lm.loglikelihood(REQUESTS, disable_tqdm=True), REQUESTS, strict=True):
        context, answer = asked.args
        start = tokenizer(context).input_ids if context else [tokenizer.bos_token_id]
        end = tokenizer(answer, add_special_tokens=False).input_ids
        logits = backbone(torch.tensor([start + end])).logits[0].log_softmax(-1)
        steps = logits[len(start) - 1 : -1]
        expected = sum(steps[i, token].item() for i, token in enumerate(end))
        assert found[0] == pytest.approx(expected, abs=1e-3)
        assert found[1] == (steps.argmax(-1).tolist() == end)


def test_a_batch_scores_as_its_requests_do_alone_when_routed(backbone):
    torch.manual_seed(0)
    policy = BuddyPolicy(7, 16)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    model = RoutedModel(backbone, policy, tokenizer=byte_tokenizer())
    together = BuddyLM(model, budget=4 / 7, batch_size=6).loglikelihood(REQUESTS, disable_tqdm=True)
    lm = BuddyLM(model, budget=4 / 7, batch_size=1)
    for found, asked in zip(together, REQUESTS, strict=True):
        assert lm.loglikelihood([asked], disable_tqdm=True)[0][0] == pytest.approx(found[0], abs=1e-3)
    assert lm.executed_mean == 4


def test_a_bound_holds_for_what_is_scored_and_generated(backbone):
    torch.manual_seed(0)
    policy = BuddyPolicy(7, 16)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    model = RoutedModel(backbone, policy, tokenizer=byte_tokenizer())
    texts = [
        Instance("generate_until", {}, (text, {"until": ["q"], "max_gen_toks": 6}), 0) for text in ("abc", "hello")
    ]
    for slack, paths in (("0", {1}), (None, {1, 2})):  # a string, as lm-eval's command line has it
        lm = BuddyLM(model, budget=4 / 7, slack=slack, batch_size=2)
        lm.generate_until(texts, disable_tqdm=True)
        found = set(model.trace.paths_at_once().tolist())
        lm.loglikelihood([REQUESTS[0], REQUESTS[-1]], disable_tqdm=True)
        found |= set(model.trace.paths_at_once().tolist())
        assert found <= paths
        assert lm.executed_mean == 4
    assert 2 in found, "they agree by themselves: nothing is shown"


def test_static_removal_scores_as_the_sliced_model_through_plain_lm_eval(backbone, data):
    """Accuracy of a routed static model equals that of a physically smaller one through lm-eval's own wrapper."""
    removed = [2, 4]
    smaller = sliced(backbone, [i for i in range(7) if i not in removed])
    manager, chosen = tasks(data, NAMES)
    plain = simple_evaluate(
        HFLM(pretrained=smaller, tokenizer=byte_tokenizer(), batch_size=8, max_length=512),
        tasks=chosen, task_manager=manager, limit=24, bootstrap_iters=100,
    )  # fmt: skip
    lm = BuddyLM(
        RoutedModel(backbone, StaticPolicy(7, removed), tokenizer=byte_tokenizer()), batch_size=8, max_length=512
    )
    metrics = accuracy.measure(lm, 5 / 7, Evaluation(tasks=NAMES, limit=24), data)
    assert metrics["executed_mean"] == 5
    assert metrics["limit"] == 24
    for name in NAMES:
        expected, found = plain["results"][f"buddy_{name}"], metrics["tasks"][name]
        assert found["n"] == 24
        for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
            key = f"{metric},none"
            assert (metric in found) == (key in expected)
            if metric in found:
                assert found[metric] == pytest.approx(expected[key])
        for metric, items in found["items"].items():
            assert len(items) == 24
            assert items.count("1") / 24 == pytest.approx(found[metric])


def test_generation_stops_at_stop_strings_and_rolls_over_windows(backbone):
    tokenizer = byte_tokenizer()
    lm = BuddyLM(RoutedModel(backbone, StaticPolicy(7), tokenizer=tokenizer), batch_size=2, max_length=64)
    asked = [
        Instance("generate_until", {}, (text, {"until": ["q"], "max_gen_toks": 12}), 0)
        for text in ("abc", "hello there")
    ]
    for found, one in zip(lm.generate_until(asked, disable_tqdm=True), asked, strict=True):
        ids = tokenizer(one.args[0], return_tensors="pt").input_ids
        whole = backbone.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
        expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).split("q")[0]
        assert found == expected
    text = "some running text " * 10
    rolled = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    reference = HFLM(pretrained=backbone, tokenizer=tokenizer, max_length=64, prefix_token_id=tokenizer.bos_token_id)
    expected = reference.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    assert rolled[0] == pytest.approx(expected[0], rel=1e-4)
