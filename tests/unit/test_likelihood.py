"""Likelihoods of held-out text: against decoding step by step, a model of fewer blocks, and sums done here."""

import json

import numpy as np
import pytest
import torch
from models import VOCABULARY, saved, tiny, with_router
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaForCausalLM

from buddy import runs
from buddy.commands.score import score as command
from buddy.data import materialise
from buddy.errors import BudgetError, UserError
from buddy.evaluation import likelihood, passages
from buddy.evaluation.likelihood import Mode
from buddy.evaluation.passages import Passage
from buddy.policies.first import FirstPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.model import RoutedModel
from buddy.study.records import Record, find

KV = ("zero", "mask", "project")
DECODE = ("recompute", "reuse")
LENGTHS = [(4, 9), (5, 14), (1, 6), (7, 8), (4, 12)]  # prompt, whole
MODES = [Mode(4 / 7, kv, decode) for kv in KV for decode in DECODE]


def some_passages(seed=0, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, vocabulary, (whole,), generator=generator).tolist() for _, whole in LENGTHS]
    return [
        Passage(place, tuple(row), prompt) for place, (row, (prompt, _)) in enumerate(zip(rows, LENGTHS, strict=True))
    ]


def decoded(model, passage, mode):
    """Logits (n, V) of each token of the continuation and the routes (n, L), one decode step at a time."""
    kept, model.kv = model.kv, mode.kv
    cache = model.new_cache(4)
    model.kv = kept
    ids = torch.tensor([passage.tokens])
    logits, routes = [], []
    for start, end in [(0, passage.prompt), *((n, n + 1) for n in range(passage.prompt, ids.shape[1] - 1))]:
        output = model(ids[:, start:end], budget=mode.budget, decode=mode.decode, past_key_values=cache)
        logits.append(output.logits[0, -1])
        routes.append(model.trace.steps[0][0])
    return torch.stack(logits), torch.stack(routes)


def by_hand(logits, whole, passage):
    """(NLL, KL, agreement, NLL of the whole model), by torch's own functions."""
    targets = torch.tensor(passage.tokens[passage.prompt :])
    told = whole(torch.tensor([passage.tokens])).logits[0, passage.prompt - 1 : -1]
    divergence = kl_div(logits.log_softmax(-1), told.log_softmax(-1), log_target=True, reduction="batchmean")
    same = (logits.argmax(-1) == told.argmax(-1)).float().mean()
    return [value.item() for value in (cross_entropy(logits, targets), divergence, same, cross_entropy(told, targets))]


def values(score):
    return [score.nll, score.kl, score.agreement, score.whole_nll]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.kv}-{mode.decode}")
def test_scores_are_those_of_decoding_step_by_step(architecture, mode, monkeypatch):
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 7 * VOCABULARY)  # several parts
    model = with_router(tiny(architecture))
    items = some_passages()
    found = likelihood.measure(model, model.backbone, items, MODES, batch_size=3)[mode]
    changed = 0
    for passage, score in zip(items, found, strict=True):
        logits, routes = decoded(model, passage, mode)
        assert torch.equal(score.routes, routes)
        assert values(score) == pytest.approx(by_hand(logits, model.backbone, passage), abs=1e-4)
        changed += len(routes.unique(dim=0)) > 1
    assert (changed > 1) is (mode.decode == "recompute")


@torch.no_grad()
def test_the_modes_differ_where_routes_do_and_only_there():
    model = with_router(tiny("llama"))
    found = likelihood.measure(model, model.backbone, some_passages(), MODES, batch_size=5)
    nll = {mode: np.array([score.nll for score in scores]) for mode, scores in found.items()}
    moved = np.array([len(score.routes.unique(dim=0)) > 1 for score in found[MODES[0]]])
    assert moved.any()
    assert not moved.all()
    for kv in KV[1:]:
        assert (np.abs(nll[Mode(4 / 7, kv, "recompute")] - nll[MODES[0]]) > 1e-6).tolist() == moved.tolist()
        assert (nll[Mode(4 / 7, kv, "reuse")] == nll[Mode(4 / 7, "zero", "reuse")]).all()


@torch.no_grad()
def test_a_static_route_scores_as_a_model_without_those_blocks():
    backbone = tiny("llama")
    model = RoutedModel(backbone, StaticPolicy(7, [2, 4])).eval()
    sliced: LlamaForCausalLM = tiny("llama")
    sliced.model.layers = torch.nn.ModuleList(layer for at, layer in enumerate(sliced.model.layers) if at not in (2, 4))
    items = some_passages()
    found = likelihood.measure(model, backbone, items, [mode._replace(budget=5 / 7) for mode in MODES], batch_size=2)
    for scores in found.values():
        assert scores == found[Mode(5 / 7, "zero", "recompute")]
        for passage, score in zip(items, scores, strict=True):
            ids = torch.tensor([passage.tokens])
            logits = sliced(ids, use_cache=False).logits[0, passage.prompt - 1 : -1]
            assert values(score) == pytest.approx(by_hand(logits, backbone, passage), abs=1e-5)
            assert score.routes.tolist() == [[True, True, False, True, False, True, True]] * passage.scored


@torch.no_grad()
def test_gates_ask_the_prompt_once_and_every_mode_is_the_same():
    backbone = tiny("llama")
    policy = FirstPolicy(7, 32, {3: 0.5})
    torch.nn.init.normal_(policy.weight, std=2.0)
    torch.nn.init.zeros_(policy.bias)
    model = RoutedModel(backbone, policy).eval()
    items = some_passages()
    found = likelihood.measure(model, backbone, items, MODES, batch_size=3)
    for mode, scores in found.items():
        for passage, score in zip(items, scores, strict=True):
            logits, routes = decoded(model, passage, mode)
            assert torch.equal(score.routes, routes)
            assert values(score) == pytest.approx(by_hand(logits, backbone, passage), abs=1e-4)
    assert len({tuple(score.routes[0].tolist()) for score in found[MODES[0]]}) > 1


@torch.no_grad()
def test_neither_company_nor_padding_matters():
    model = with_router(tiny("llama"))
    items = some_passages(3)
    alone = likelihood.measure(model, model.backbone, items, MODES, batch_size=1)
    together = likelihood.measure(model, model.backbone, items, MODES, batch_size=5)
    for mode in MODES:
        for one, other in zip(alone[mode], together[mode], strict=True):
            assert values(one) == pytest.approx(values(other), abs=1e-4)
            assert torch.equal(one.routes, other.routes)


@torch.no_grad()
def test_full_depth_without_an_adapter_is_the_whole_model():
    model = with_router(tiny("llama"))
    for score in likelihood.measure(model, model.backbone, some_passages(), [Mode(1.0, "zero", "recompute")])[
        Mode(1.0, "zero", "recompute")
    ]:
        assert (score.kl, score.agreement, score.nll) == (0, 1, score.whole_nll)


# ---- items -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(model):
    return model.tokenizer


def test_responses_follow_their_prompts_in_rows_that_training_did_not_have(tokenizer, tmp_path):
    materialise("alpaca", "embedded", tmp_path / "alpaca")
    rows = [json.loads(line) for line in (tmp_path / "alpaca/train.jsonl").read_text().splitlines()]
    found = passages.read(tmp_path / "alpaca", tokenizer, 6, 400, {"data": "alpaca", "examples": 50})
    assert (found.name, found.rows, len(found.items)) == ("alpaca", "last rows", 6)
    assert [one.place for one in found.items] == sorted(one.place for one in found.items)
    for one in found.items:
        row = rows[one.place]
        text = tokenizer.decode(one.tokens[: one.prompt])
        assert row["instruction"] in text
        assert row["output"].startswith(tokenizer.decode(one.tokens[one.prompt :]))
        assert len(one.tokens) <= 400
    assert found.items[0].place >= 50
    for training in ({"data": "alpaca", "examples": None}, {"data": "alpaca", "examples": len(rows)}):
        assert passages.read(tmp_path / "alpaca", tokenizer, 6, 400, training).rows == "last rows, trained on"
    assert passages.read(tmp_path / "alpaca", tokenizer, 6, 400, {"data": "gsm8k"}).rows == "last rows"
    with pytest.raises(UserError, match=r"max_length: no prompt of .*alpaca leaves room for a response in 16 tokens"):
        passages.read(tmp_path / "alpaca", tokenizer, 6, 16)


def test_prose_is_cut_into_windows_that_go_on(tokenizer, tmp_path):
    text = "".join(f"line {number}\n" for number in range(200))
    (tmp_path / "novel.txt").write_text(text)
    found = passages.read(tmp_path / "novel.txt", tokenizer, 4, 32)
    assert (found.name, found.rows) == ("novel", "text")
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    windows = len(tokens) // 32
    assert [one.place for one in found.items] == [0, windows // 4, windows // 2, 3 * windows // 4]
    for one in found.items:
        assert (one.prompt, one.scored) == (16, 16)
        assert list(one.tokens) == tokens[32 * one.place : 32 * (one.place + 1)]
    assert len(passages.read(tmp_path / "novel.txt", tokenizer, 1000, 32).items) == windows
    other = passages.read(tmp_path / "novel.txt", tokenizer, 4, 34)
    assert len({found.sha256, other.sha256}) == 2
    with pytest.raises(UserError, match="no window of 4096"):
        passages.read(tmp_path / "novel.txt", tokenizer, 4, 4096)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(model, tmp_path):
    """A run on disk, two data sets, and the command's arguments for them."""
    run = saved(model, tmp_path)
    for name in ("alpaca", "ptb"):
        materialise(name, "embedded", tmp_path / name)
    given = {
        "run": run,
        "data": [f"{tmp_path}/alpaca,{tmp_path}/ptb"],
        "removed": "3,0",
        "out": tmp_path / "likelihood",
    }
    rest = {"study": "", "name": "", "device": "cpu", "dtype": "auto", "kv": "zero,mask", "decode": "recompute,reuse"}
    return given | rest | {"items": 3, "max_length": 320, "batch_size": 2}


def test_what_a_record_says(arguments, capsys):
    command(**arguments)
    made = [path.relative_to(arguments["out"]).as_posix() for path in find(arguments["out"])]
    assert made == [f"kv~{kv}/decode~{d}/removed~{n}.json" for kv in ("mask", "zero") for d in DECODE for n in (0, 3)]
    model = runs.load(arguments["run"], device="cpu")
    sets = [passages.read(arguments["out"].parent / name, model.tokenizer, 3, 320) for name in ("alpaca", "ptb")]
    mode = Mode(4 / 7, "mask", "recompute")
    items = [item for one in sets for item in one.items]
    scores = likelihood.measure(model, model.backbone, items, [mode], batch_size=1)[mode]
    record = Record.read(arguments["out"] / "kv~mask/decode~recompute/removed~3.json")
    assert (record.kind, record.study, record.n, record.seed) == ("likelihood", "small", 6, 3)
    assert record.variant == {"feature": "value", "kv": "mask", "decode": "recompute"}
    metrics = record.metrics
    assert record.budget is not None
    assert metrics["executed_mean"] == metrics["executed_min"] == metrics["executed_max"] == record.budget.executed == 4
    assert metrics["tokens"] == sum(one.scored for one in items)
    assert metrics["distinct_paths"] == len(torch.cat([score.routes for score in scores]).unique(dim=0))
    for name, part in (("alpaca", scores[:3]), ("ptb", scores[3:])):
        found = metrics["datasets"][name]
        for measure in likelihood.MEASURES:
            expected = [getattr(score, measure) for score in part]
            assert found[measure]["values"] == pytest.approx(expected, abs=1e-4)
            assert found[measure]["mean"] == pytest.approx(sum(expected) / 3, abs=1e-4)
            assert min(expected) - 1e-4 <= found[measure]["low"] <= found[measure]["high"] <= max(expected) + 1e-4
        assert found["paths"] == [len(score.routes.unique(dim=0)) for score in part]
        assert found["tokens"] == [len(score.routes) for score in part]
    averages = [np.mean(metrics["datasets"][name]["nll"]["values"]) for name in ("alpaca", "ptb")]
    assert metrics["average"]["nll"]["mean"] == pytest.approx(np.mean(averages))
    whole = Record.read(arguments["out"] / "kv~zero/decode~reuse/removed~0.json").metrics
    assert (whole["average"]["kl"]["mean"], whole["average"]["agreement"]["mean"]) == (0, 1)
    assert "3 of 7 blocks removed, mask, recompute: NLL " in capsys.readouterr().out


def test_the_whole_model_has_no_adapter(model, arguments, tmp_path):
    from peft import LoraConfig, get_peft_model

    backbone = runs.load_backbone(tmp_path / "backbones/tiny", "cpu")[0]
    untouched = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    adapted = get_peft_model(backbone, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    runs.save(arguments["run"], runs.RunInfo.read(arguments["run"]), model.policy, adapted)
    loaded = runs.load(arguments["run"], device="cpu")
    whole = runs.untouched(loaded)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in whole.state_dict().items())
    command(**arguments)
    metrics = Record.read(arguments["out"] / "kv~zero/decode~recompute/removed~0.json").metrics
    items = passages.read(tmp_path / "alpaca", loaded.tokenizer, 3, 320).items
    for place, item in enumerate(items):
        with torch.no_grad():
            logits = loaded.backbone(torch.tensor([item.tokens])).logits[0, item.prompt - 1 : -1]  # LoRA is merged in
            expected = by_hand(logits, model.backbone, item)
        found = metrics["datasets"]["alpaca"]
        assert [found[name]["values"][place] for name in likelihood.MEASURES] == pytest.approx(expected[:3], abs=1e-4)
        assert found["whole_nll"][place] == pytest.approx(expected[3], abs=1e-4)
    assert metrics["average"]["kl"]["mean"] > 0.01


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"removed": "1,6"}, "--removed: [0-9]+ is not"),
        ({"kv": "zero,none"}, "--kv: 'none'"),
        ({"kv": "zero,zero"}, "--kv: .*one is named twice"),
        ({"data": ["nowhere"]}, "not a data set"),
        ({"data": ["a/x,b/x"]}, "each once"),
        ({"items": 0}, "--items"),
    ],
)
def test_a_mistake_leaves_no_record(arguments, wrong, message):
    with pytest.raises((BudgetError, UserError), match=message):
        command(**arguments | wrong)
    assert not arguments["out"].exists()
