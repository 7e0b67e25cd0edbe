"""An exported run is a plain Hugging Face model: loaded without this package, it computes what the run does."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import buddy as command
from models import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import buddy
from buddy import export, runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.errors import UserError
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.static import StaticPolicy
from buddy.study.records import Budget, Record

BLOCKS = 7
IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def trained(request, tmp_path):
    """Runs of a static peer and of BUDDY with random LoRA on one backbone, by method."""
    folder = tmp_path / "results" / "small" / "backbones" / "tiny"
    backbone = tiny(request.param)
    backbone.resize_token_embeddings(300)
    backbone.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    torch.manual_seed(1)
    adapted = get_peft_model(backbone, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    width = adapted.config.num_key_value_heads * adapted.config.head_dim
    router = BuddyPolicy(BLOCKS, width, rank=4)
    for parameter in router.parameters():  # strong enough to change its mind between steps
        torch.nn.init.normal_(parameter, std=20.0)
    made = {}
    for policy, name in ((StaticPolicy(BLOCKS, [4, 2, 3]), "sleb"), (router, "buddy")):
        run = tmp_path / "results" / "small" / "runs" / f"method~{name}"
        kind = "static" if name == "sleb" else "buddy"
        training = {"data": "alpaca", "loss": "kl", "lora_rank": 4}
        info = runs.RunInfo(name, kind, policy.settings(), "tiny", runs.relative(folder, run), training=training)
        runs.save(run, info, policy, adapted)
        made[name] = run
    return made


@torch.no_grad()
def test_a_static_peer_is_exported_exactly(trained, tmp_path):
    run, out = trained["sleb"], tmp_path / "out"
    done = command("export", "--run", run, "--removed", 2, "--out", out, "--license", "mit")
    assert done.status == 0, done.err
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    expected = buddy.load(run, device="cpu")(IDS, budget=5 / BLOCKS).logits
    assert type(plain).__module__.startswith("transformers.")
    assert plain.config.num_hidden_layers == len(plain.get_decoder().layers) == 5
    assert torch.equal(plain(IDS).logits, expected)
    cached = plain.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    uncached = plain.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(cached, uncached)  # blocks are renumbered in the cache, too
    assert AutoTokenizer.from_pretrained(out)("some text").input_ids == byte_tokenizer()("some text").input_ids
    said = (out / "README.md").read_text()
    assert "license: mit" in said
    assert "without 2 of its 7 blocks (2, 4; counted from 0), which sleb left out" in said
    assert "LoRA of rank 4 was trained on alpaca by KL divergence from the backbone at full depth without LoRA" in said
    assert "Nothing was measured" in said


@torch.no_grad()
def test_buddy_is_exported_by_its_most_frequent_route(trained, tmp_path):
    run, out = trained["buddy"], tmp_path / "out"
    model = buddy.load(run, device="cpu")
    texts = ["one", "another text", "the third of them"]
    found = export.chosen(model, 2, texts)
    routes = []
    for text in texts:  # one by one, by the model's own trace
        model.generate(
            **model.tokenizer(text, return_tensors="pt"), budget=5 / BLOCKS, max_new_tokens=32, do_sample=False
        )
        routes += [tuple(row) for row in model.trace.routes().tolist()]
    most = max(set(routes), key=routes.count)
    assert routes.count(tuple(found.route.tolist())) == routes.count(most)
    assert found.steps == pytest.approx(routes.count(most) / len(routes))
    assert found.paths == len(set(routes))
    export.save(model, found.kept, out, "card")
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    static = type(model)(model.backbone, StaticPolicy(BLOCKS, found.removed), model.kv)
    assert torch.equal(plain(IDS).logits, static(IDS, budget=5 / BLOCKS).logits)


def test_the_share_of_steps_and_prompts_is_counted():
    a, b = [True, True, False], [True, False, True]
    found = export.most_frequent([torch.tensor([a, a]), torch.tensor([a, b, b]), torch.tensor([a])])
    assert found.route.tolist() == a
    assert (found.steps, found.prompts, found.paths, found.seen) == (4 / 6, 2 / 3, 2, 3)
    assert (found.kept, found.removed) == ([0, 1], [2])


def test_mistakes_are_one_line_and_leave_nothing(trained, tmp_path):
    with pytest.raises(UserError, match="--data: needed: buddy chooses blocks by the input"):
        export.chosen(buddy.load(trained["buddy"], device="cpu"), 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for words, said in (
        (("--removed", 2, "--out", tmp_path / "mine"), "holds other files than an exported model"),
        (("--removed", 7, "--out", tmp_path / "new"), "leaves none"),
        (("--removed", 6, "--out", tmp_path / "new"), "budget"),
    ):
        done = command("export", "--run", trained["sleb"], *words)
        assert said in done.mistake
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_card_says_what_the_records_of_the_study_say(trained, tmp_path):
    run = trained["sleb"]
    tasks = {"piqa": {"n": 4, "acc": 0.5, "acc_norm": 0.25}, "winogrande": {"n": 4, "acc": 0.75}}
    shared = {"study": "small", "backbone": "tiny", "method": "sleb", "n": 4, "budget": Budget.of(5, 7)}
    Record(kind="accuracy", metrics={"tasks": tasks, "limit": 2}, **shared).write(
        tmp_path / "results/small/records/accuracy/method~sleb/removed~2.json"
    )
    done = command("export", "--run", run, "--removed", 2, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    said = (tmp_path / "out" / "README.md").read_text()
    assert "accuracy, average of 2 tasks: 50.00 %; limited to 2 items per task" in said
    assert "Not measured at this depth: answers to problems, the likelihood of held-out text, summaries, speed." in said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 5
