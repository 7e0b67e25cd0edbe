"""Scores through lm-eval against the harness's own Hugging Face model and against scoring one request at a time."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from models import tiny
from tokenizers import processors

from buddy.backbones.untrained import byte_tokenizer
from buddy.data import materialise
from buddy.data.tasks import tasks
from buddy.errors import UserError
from buddy.evaluation import accuracy
from buddy.evaluation.harness import BuddyLM
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.model import RoutedModel
from buddy.routing.sliced import sliced
from buddy.settings import Evaluation
from buddy.storage.checkpoints import Checkpoints

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


# ---- at full depth, lm-eval's own model ------------------------------------------------------------------------------


def begins_with_bos(tokenizer):
    """The same tokenizer, putting its token at the beginning of every text, as Llama's does."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


def both(backbone, tokenizer=byte_tokenizer, budget=1.0, **options):
    """A routed model at full depth, and lm-eval's own over the same backbone."""
    routed = RoutedModel(backbone, BuddyPolicy(7, 16), tokenizer=tokenizer())
    plain = HFLM(pretrained=backbone, backend="causal", tokenizer=tokenizer(), batch_size=2, **options)
    return BuddyLM(routed, budget=budget, batch_size=2, **options), plain


def instances(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


PROMPTS = ("abc", "hello there", "a longer prompt that says more", "q")
GENERATION = [
    {"max_new_tokens": 5},
    {"max_gen_toks": 6},
    {"max_tokens": 4, "until": "e"},
    {"max_gen_toks": 6, "until": ["t", "zz"], "do_sample": False},
    {"max_gen_toks": 5, "do_sample": False, "temperature": 0.8},
    {"max_gen_toks": 5, "do_sample": True, "temperature": 1.0, "top_k": 1},
    {"max_gen_toks": 5, "do_sample": True, "temperature": 0.7, "top_k": 9},
    {"max_gen_toks": 5, "temperature": 1.5},
    {"max_gen_toks": 5, "temperature": 0.0},
    {"max_gen_toks": 5, "do_sample": True, "temperature": 1.3, "top_p": 0.6},
    {"max_gen_toks": 6, "do_sample": False, "repetition_penalty": 1.9},
    {"max_gen_toks": 6, "do_sample": False, "no_repeat_ngram_size": 1, "min_new_tokens": 4},
    {"max_length": 40},
    {"until": ["b"]},
]


@torch.no_grad()
@pytest.mark.parametrize("settings", GENERATION, ids=str)
def test_generation_options_do_what_they_do_for_lm_evals_own_model(backbone, settings):
    routed, plain = both(backbone, max_length=48 if "max_gen_toks" in settings else 300)
    answers = []
    for lm in (routed, plain):
        torch.manual_seed(11)
        asked = instances("generate_until", *((prompt, dict(settings)) for prompt in PROMPTS))
        answers.append(lm.generate_until(asked, disable_tqdm=True))
    assert answers[0] == answers[1]
    assert routed.executed_mean == 7


@torch.no_grad()
def test_seeds_choose_what_is_sampled_and_greedy_answers_ignore_them(backbone):
    lm, _ = both(backbone)

    def answers(seed, **settings):
        torch.manual_seed(seed)
        asked = instances("generate_until", *((prompt, {"max_gen_toks": 8, **settings}) for prompt in PROMPTS))
        return lm.generate_until(asked, disable_tqdm=True)

    assert answers(1, do_sample=True, temperature=2.0) == answers(1, do_sample=True, temperature=2.0)
    assert answers(1, do_sample=True, temperature=2.0) != answers(2, do_sample=True, temperature=2.0)
    assert answers(1, do_sample=False, temperature=2.0) == answers(2, do_sample=False)


@torch.no_grad()
def test_long_prompts_are_cut_as_there_and_it_is_said(backbone, caplog):
    routed, plain = both(backbone, max_length=32)
    long = "one two three four five six seven eight nine ten eleven twelve"
    asked = [(long, {"max_gen_toks": 10}), ("short", {"max_gen_toks": 10})]
    found = routed.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    assert "truncating to last 22 tokens" in caplog.text
    assert found == plain.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    caplog.clear()
    pairs = instances("loglikelihood", (long, " thirteen"), ("short", " one"))
    scores = routed.loglikelihood(pairs, disable_tqdm=True)
    assert (
        f"1 of 2 requests are longer than 32 tokens and are cut from the left, by {62 + 9 - 33} tokens" in caplog.text
    )
    for one, other in zip(scores, plain.loglikelihood(pairs, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3)
        assert one[1] == other[1]
    for settings in ({"max_gen_toks": 32}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match=r"max_gen_toks: \d+ leaves no room"):
            routed.generate_until(instances("generate_until", (long, settings)), disable_tqdm=True)
    with pytest.raises(UserError, match="40 tokens; it needs 1 to 32"):
        routed.loglikelihood(instances("loglikelihood", ("a", "b" * 40)), disable_tqdm=True)
    with pytest.raises(UserError, match="0 tokens; it needs 1 to 32"):
        routed.loglikelihood(instances("loglikelihood", ("a", "")), disable_tqdm=True)
    with pytest.raises(UserError, match="'top_q' is no option"):
        routed.generate_until(instances("generate_until", ("a", {"top_q": 3, "max_gen_toks": 4})), disable_tqdm=True)


@torch.no_grad()
def test_the_token_that_begins_a_text_stands_there_once(backbone):
    def tokenizer():
        return begins_with_bos(byte_tokenizer())

    routed, plain = both(backbone, tokenizer, max_length=64)
    bos, bos_id = routed.tokenizer.bos_token, routed.tokenizer.bos_token_id
    for text in ("abc", bos + "abc"):
        assert routed.tok_encode(text) == plain.tok_encode(text)
        assert routed.tok_encode(text).count(bos_id) == 1
    pairs = instances("loglikelihood", ("The sky", " is blue"), (bos + "The sky", " is blue"), ("", "from nothing"))
    scores = routed.loglikelihood(pairs, disable_tqdm=True)
    assert scores[0] == pytest.approx(scores[1])
    for one, other in zip(scores, plain.loglikelihood(pairs, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3)
    asked = [("The sky", {"max_gen_toks": 6}), (bos + "The sky", {"max_gen_toks": 6})]
    found = [routed.generate_until(instances("generate_until", one), disable_tqdm=True) for one in asked]
    assert found[0] == found[1]
    assert found[0] == plain.generate_until(instances("generate_until", asked[0]), disable_tqdm=True)
    text = instances("loglikelihood_rolling", ("some running text " * 10,))
    once = HFLM(pretrained=backbone, backend="causal", tokenizer=tokenizer(), add_bos_token=False, max_length=64)
    expected = once.loglikelihood_rolling(text, disable_tqdm=True)
    assert routed.loglikelihood_rolling(text, disable_tqdm=True)[0] == pytest.approx(expected[0], rel=1e-4)


@torch.no_grad()
def test_chat_templates_work_as_there(backbone, data):
    routed, plain = both(backbone, lambda: begins_with_bos(byte_tokenizer()), max_length=512)
    history = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    assert routed.apply_chat_template(history) == plain.apply_chat_template(history)
    assert routed.tokenizer_name == plain.tokenizer_name
    results = []
    for lm in (routed, plain):
        manager, chosen = tasks(data, ["piqa"])
        results.append(
            simple_evaluate(
                lm, tasks=chosen, task_manager=manager, limit=6, bootstrap_iters=10, apply_chat_template=True,
                system_instruction="Answer well.", num_fewshot=0,
            )
        )  # fmt: skip
    samples = [result["samples"]["buddy_piqa"] for result in results]
    assert "Answer well." in samples[0][0]["arguments"][0][0]
    for one, other in zip(*samples, strict=True):
        assert one["arguments"] == other["arguments"]
        for score, expected in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert score[0] == pytest.approx(expected[0], abs=1e-3)
    assert results[0]["config"]["model_num_parameters"] == results[1]["config"]["model_num_parameters"]


def test_a_tokenizer_without_a_token_to_begin_with_is_refused(backbone):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="prefix_token_id"):
        BuddyLM(RoutedModel(backbone, StaticPolicy(7), tokenizer=tokenizer))


def test_a_task_that_was_scored_is_not_scored_again(backbone, data, tmp_path):
    model = RoutedModel(backbone, StaticPolicy(7, [2, 4]), tokenizer=byte_tokenizer())
    lm = BuddyLM(model, batch_size=8, max_length=512)
    passes = []
    hook = backbone.get_decoder().layers[0].register_forward_hook(lambda *_: passes.append(1))

    def measure(limit=6, made_by="a run"):
        passes.clear()
        kept = Checkpoints(tmp_path / "kept", {"run": made_by})
        found = accuracy.measure(lm, 5 / 7, Evaluation(tasks=NAMES, limit=limit), data, kept)
        return found, len(passes)

    try:
        plain = accuracy.measure(lm, 5 / 7, Evaluation(tasks=NAMES, limit=6), data)
        first, all_passes = measure()
        again, none = measure()
        assert first == again == plain
        assert (all_passes > 0, none) == (True, 0)
        (lost,) = tmp_path.glob(f"kept/*-{NAMES[0]}")
        lost.unlink()
        rest, some = measure()
        assert rest == plain
        assert 0 < some < all_passes
        assert measure(limit=4)[1] > 0  # of other settings
        assert measure(limit=4, made_by="another run")[1] > 0
    finally:
        hook.remove()


def test_a_task_that_is_not_there_is_told_before_the_first_is_scored(backbone, data, tmp_path):
    model = RoutedModel(backbone, StaticPolicy(7, [2, 4]), tokenizer=byte_tokenizer())
    lm = BuddyLM(model, batch_size=8, max_length=512)
    kept = Checkpoints(tmp_path / "kept", {})
    with pytest.raises(UserError, match=r"task hellaswag: no .*hellaswag/validation\.jsonl; fetch it with"):
        accuracy.measure(lm, 5 / 7, Evaluation(tasks=[NAMES[0], "hellaswag"], limit=2), data, kept)
    assert not (tmp_path / "kept").exists()


def test_a_killed_evaluation_goes_on_after_its_last_task(tmp_path, data):
    def buddy(*words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        return subprocess.Popen(
            [sys.executable, "-m", "buddy", *map(str, words)], env=environment, stderr=subprocess.PIPE, text=True
        )

    made = buddy(
        "backbone",
        "--random",
        "tiny-llama",
        "--layers",
        "6",
        "--blocks",
        "6",
        "--dtype",
        "float32",
        "--out",
        tmp_path / "tiny",
    )
    assert made.communicate()
    assert made.returncode == 0
    words = (
        "evaluate",
        "--run",
        tmp_path / "tiny",
        "--data",
        data,
        "--tasks",
        ",".join(NAMES),
        "--limit",
        "8",
        "--out",
    )
    whole = buddy(*words, tmp_path / "whole")
    assert whole.communicate()
    assert whole.returncode == 0
    killed = buddy(*words, tmp_path / "killed")
    while killed.poll() is None and not list(tmp_path.glob(f".killed.checkpoints/*-{NAMES[0]}")):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "killed/removed~0.json").exists()
    again = buddy(*words, tmp_path / "killed")
    _, told = again.communicate()
    assert again.returncode == 0, told
    assert f"{NAMES[0]} at 1.0: scored before" in told
    assert f"{NAMES[-1]} at 1.0: scored before" not in told
    records = [json.loads((tmp_path / name / "removed~0.json").read_text()) for name in ("whole", "killed")]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert not list(tmp_path.glob(".*.checkpoints"))
