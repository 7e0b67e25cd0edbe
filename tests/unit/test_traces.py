"""Traces against routes written down by hand, hooks on the backbone's blocks, and the harness's own requests."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from models import saved

from buddy.commands.trace import trace as command
from buddy.data import inputs, materialise
from buddy.data.tasks import tasks
from buddy.errors import BudgetError, UserError
from buddy.evaluation import traces
from buddy.policies.static import StaticPolicy
from buddy.routing.model import RoutedModel
from buddy.routing.trace import Trace as Routes
from buddy.settings import Trace
from buddy.study.records import Record

PROMPTS = ["one prompt", "another, longer prompt", "third", "What is it?", "a"]
SETTINGS = Trace(prompts=5, new_tokens=9, batch_size=3)


def routes(*rows):
    """Boolean (passes, L) from strings such as "1011"."""
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_a_summary_counted_by_hand():
    found = traces.summary(
        [
            routes("1101", "1101", "1011", "1101"),  # two paths, 3 blocks each; two of three steps change
            routes("1101", "1111"),  # two paths, 3 and 4 blocks; the step changes
            routes("1001"),  # ended at once: a prefill of 2 blocks and no step
        ],
        requested=3,
    )
    spread = found.pop("distinct_paths_per_generation")
    assert spread["values"] == [2, 2, 1]
    assert spread["mean"] == pytest.approx(5 / 3)
    assert (spread["median"], spread["p10"], spread["p90"]) == (2, pytest.approx(1.2), 2)
    assert found.pop("block_frequency") == pytest.approx([1, 5 / 7, 2 / 7, 1])
    assert found.pop("block_frequency_prefill") == pytest.approx([1, 2 / 3, 0, 1])
    assert found.pop("executed_mean") == pytest.approx((4 * 3 + 3 + 4 + 2) / 7)
    assert found.pop("changed_steps_mean") == pytest.approx(3 / 4)
    assert found == {
        "requested_executed": 3,
        "executed_min": 2,
        "executed_max": 4,
        "largest_deviation": 1,
        "distinct_paths_over_prompts": 2,
    }


def test_where_nothing_is_decoded_no_step_changes():
    found = traces.summary([routes("101"), routes("101")], requested=2)
    assert found["changed_steps_mean"] is None
    assert found["block_frequency"] == found["block_frequency_prefill"] == [1, 0, 1]
    json.dumps(found, allow_nan=False)


def test_passes_after_the_end_of_a_sequence_are_left_out():
    new = torch.tensor([[5, 6, 7, 8], [5, 2, 0, 0], [3, 0, 0, 0], [5, 6, 7, 2]])
    assert traces.needed_passes(new, {2, 3}) == [4, 2, 1, 4]
    assert traces.needed_passes(new, ()) == [4, 4, 4, 4]
    recorded = Routes([routes("11", "10"), routes("01", "10"), routes("00", "11")], [3, 1, 1])
    first, second = traces.needed_routes(recorded, [3, 1])
    assert torch.equal(first, routes("11", "01", "00"))
    assert torch.equal(second, routes("10"))


# ---- what ran --------------------------------------------------------------------------------------------------------


def by_hooks(model, ran, budget, settings):
    """Prompt by prompt, alone: (passes, L) from what hooks saw until the sequence had ended."""
    found = []
    for prompt in PROMPTS:
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        ran.clear()
        model.generate(ids, budget=budget, decode=settings.decode, max_new_tokens=settings.new_tokens, do_sample=False)
        found.append(torch.tensor([[index in blocks for index in range(model.blocks)] for blocks in ran]))
    return found


@pytest.mark.parametrize("decode", ["recompute", "reuse"])
def test_routes_of_a_batch_are_what_hooks_see_alone(model, ran, decode):
    settings = SETTINGS.model_copy(update={"decode": decode})
    found = traces.collect(model, PROMPTS, 4 / 7, settings)
    for mine, seen in zip(found, by_hooks(model, ran, 4 / 7, settings), strict=True):
        assert torch.equal(mine, seen)
        assert mine.shape == (9, 7)
    told = traces.summary(found, 4)
    assert (told["executed_min"], told["executed_max"], told["largest_deviation"]) == (4, 4, 0)
    assert told["distinct_paths_over_prompts"] == len({tuple(route[0].tolist()) for route in found}) > 1
    assert (told["distinct_paths_per_generation"]["mean"] > 1) is (decode == "recompute")
    assert (told["changed_steps_mean"] > 0) is (decode == "recompute")


def test_sequences_that_end_early_leave_only_their_own_passes(model, ran):
    def new(prompt):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        return model.generate(ids, budget=4 / 7, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :].tolist()

    texts = [new(prompt) for prompt in PROMPTS]
    ends = [texts[0][3], texts[1][5]]  # tokens that some of the sequences come to, and others do not
    expected = [min((text.index(end) + 1 for end in ends if end in text), default=9) for text in texts]
    assert min(expected) < max(expected) == 9
    model.backbone.generation_config.eos_token_id = ends
    found = traces.collect(model, PROMPTS, 4 / 7, SETTINGS)
    assert [len(route) for route in found] == expected
    for mine, seen in zip(found, by_hooks(model, ran, 4 / 7, SETTINGS), strict=True):
        assert torch.equal(mine, seen)


def test_the_dense_model_runs_every_block(model):
    dense = RoutedModel(model.backbone, StaticPolicy(7), tokenizer=model.tokenizer).eval()
    told = traces.summary(traces.collect(dense, PROMPTS, 1.0, SETTINGS), 7)
    assert told["block_frequency"] == told["block_frequency_prefill"] == [1.0] * 7
    assert (told["executed_mean"], told["largest_deviation"], told["distinct_paths_over_prompts"]) == (7, 0, 1)
    assert told["changed_steps_mean"] == 0


@pytest.mark.parametrize(("ends", "expected"), [(None, set()), (2, {2}), ([2, 5], {2, 5})])
def test_a_model_may_have_no_end_one_or_several(ends, expected):
    backbone = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))
    assert traces.end_tokens(SimpleNamespace(backbone=backbone)) == expected


# ---- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["piqa", "boolq", "hellaswag", "winogrande", "arc_easy"])
def test_a_task_asks_what_the_harness_scores(tmp_path, name):
    materialise(name, "embedded", tmp_path / name)
    _, (task,) = tasks(tmp_path, [name])
    task.build_all_requests()
    first = {request.doc_id: request.args[0] for request in reversed(task.instances)}
    if name == "winogrande":  # there both options are asked about: what stands before them
        for number, document in enumerate(task.eval_docs):
            before, same = document["sentence"].split("_")[0], []
            for one, other in zip(document["option1"].split(" "), document["option2"].split(" "), strict=False):
                if one != other:
                    break
                same.append(one)
            first[number] = " ".join([before.rstrip(" "), *same])
    assert traces.prompts(tmp_path / name) == [first[number] for number in sorted(first)]


@pytest.mark.parametrize("name", ["alpaca", "samsum", "gsm8k"])
def test_instructions_ask_what_they_train_with(tmp_path, name):
    materialise(name, "embedded", tmp_path / name)
    found = traces.prompts(tmp_path / name)
    assert found == [prompt for prompt, _ in inputs.pairs(tmp_path / name)]
    assert len(found) >= 40


def test_what_is_no_set_of_prompts_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a data set"):
        traces.prompts(tmp_path)
    materialise("ptb", "embedded", tmp_path / "ptb")
    with pytest.raises(UserError, match="has no prompts"):
        traces.prompts(tmp_path / "ptb")
    with pytest.raises(UserError, match=r"task piqa: no .*validation.jsonl"):
        traces.prompts(tmp_path / "piqa")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(model, tmp_path):
    """A run on disk and prompts, and the command's arguments for them."""
    run = saved(model, tmp_path)
    materialise("piqa", "embedded", tmp_path / "piqa")
    given = {"run": run, "data": tmp_path / "piqa", "removed": "3,1,3", "out": tmp_path / "out"}
    rest = {"study": "", "name": "", "device": "cpu", "dtype": "auto"}
    settings = Trace(prompts=4, new_tokens=5, batch_size=3).model_dump(exclude={"backbones", "datasets", "tasks"})
    return given | rest | settings


def test_what_a_record_says(arguments, model):
    command(**arguments)
    out = arguments["out"]
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == ["removed~1.json", "removed~3.json"]
    texts = traces.prompts(arguments["data"])[:4]
    for removed in (1, 3):
        record = Record.read(out / f"removed~{removed}.json")
        assert (record.kind, record.study, record.backbone, record.seed, record.n) == ("trace", "small", "tiny", 3, 4)
        assert record.variant == {"feature": "value", "kv": "zero"}
        assert record.budget.executed == record.metrics["requested_executed"] == 7 - removed
        assert record.metrics["dataset"] == "piqa"
        expected = traces.summary(
            traces.collect(model, texts, (7 - removed) / 7, Trace(new_tokens=5, batch_size=1)), 7 - removed
        )
        assert {key: record.metrics[key] for key in expected} == expected
        assert math.isclose(sum(record.metrics["block_frequency"]), 7 - removed)


def test_a_record_shows_the_first_prompts_generation(arguments, model, ran):
    command(**arguments)
    prompt = traces.prompts(arguments["data"])[0]
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    for removed in (1, 3):
        shown = Record.read(arguments["out"] / f"removed~{removed}.json").metrics["example"]
        ran.clear()
        new = model.generate(ids, budget=(7 - removed) / 7, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert shown["prompt"] == prompt
        assert shown["tokens"] == [model.tokenizer.decode([token]) for token in new.tolist()]
        assert shown["routes"] == ["".join("01"[index in blocks] for index in range(7)) for blocks in ran]


def test_a_backbone_traces_as_the_dense_model(arguments, tmp_path):
    command(**arguments | {"run": tmp_path / "backbones/tiny", "removed": "0", "name": "mine", "study": "s"})
    record = Record.read(arguments["out"] / "removed~0.json")
    assert (record.method, record.backbone, record.study, record.variant) == ("dense", "mine", "s", {})
    assert record.metrics["executed_min"] == record.metrics["requested_executed"] == 7


@pytest.mark.parametrize(
    ("wrong", "message"), [({"removed": "1,6"}, "--removed: [0-9]+ is not"), ({"decode": "never"}, "--decode: 'never'")]
)
def test_a_mistake_leaves_no_record(arguments, wrong, message):
    with pytest.raises((BudgetError, UserError), match=message):
        command(**arguments | wrong)
    assert not arguments["out"].exists()
