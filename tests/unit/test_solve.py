"""Generated answers: a model that has learnt some, through lm-eval's own Hugging Face model and through ours."""

import itertools
import math

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from models import tiny

from buddy import runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.commands.solve import solve as command
from buddy.data.rows import write_file
from buddy.data.tasks import tasks
from buddy.errors import BudgetError, UserError
from buddy.evaluation import accuracy
from buddy.evaluation.harness import BuddyLM
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.model import RoutedModel
from buddy.routing.sliced import sliced
from buddy.settings import Generation
from buddy.study.records import Record

# Question, right answer, what the model has learnt to say, and whether each of the two filters finds the answer in it.
ITEMS = [
    ("2+3?", "5", " #### 5", True, True),
    ("how many are seven?", "7", " so 7.", False, True),
    ("9 now", "9", " #### 8", False, False),
    ("4 is it", "4", " 12, #### 4 or 6", True, False),
    ("one hundred times ten, then", "1,000", " #### 1000", True, True),
]
STRICT, FLEXIBLE = ("".join(str(int(item[at])) for item in ITEMS) for at in (3, 4))
SETTINGS = Generation(few_shot=0, batch_size=2, new_tokens=20)


@pytest.fixture(scope="module")
def backbone():
    """A tiny model that has learnt its answers by heart, end included."""
    model, tokenizer = tiny("llama", blocks=4), byte_tokenizer()
    model.resize_token_embeddings(300)
    prompts = [tokenizer(f"Question: {question}\nAnswer:").input_ids for question, *_ in ITEMS]
    answers = [[*tokenizer(said).input_ids, tokenizer.eos_token_id] for _, _, said, *_ in ITEMS]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(300):
        loss = model(ids, labels=labels).loss
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "gsm8k"
    folder.mkdir()
    rows = [{"id": question, "question": question, "answer": f"So.\n#### {gold}"} for question, gold, *_ in ITEMS]
    write_file(folder / "test.jsonl", rows)
    write_file(folder / "train.jsonl", [{**row, "question": f"Is it so: {row['question']}"} for row in rows])
    return folder.parent


def routed(backbone):
    """The backbone with a router that has learnt nothing."""
    torch.manual_seed(0)
    return RoutedModel(backbone, BuddyPolicy(4, 16), tokenizer=byte_tokenizer()).eval()


def by_the_harness(model, data, new_tokens=20, few_shot=0):
    """(results, answers by question number) of lm-eval's own Hugging Face model."""
    manager, chosen = tasks(data, ["gsm8k"])
    lm = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2, max_length=512)
    found = simple_evaluate(
        lm, tasks=chosen, task_manager=manager, num_fewshot=few_shot, gen_kwargs={"max_gen_toks": new_tokens}
    )
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in found["samples"]["buddy_gsm8k"]}
    return found["results"]["buddy_gsm8k"], texts


@pytest.fixture
def written(monkeypatch):
    """Every text that our model writes, in the order of the requests."""
    texts = []
    original = BuddyLM.generate_until

    def spy(lm, *arguments, **more):
        texts[:] = original(lm, *arguments, **more)
        return list(texts)

    monkeypatch.setattr(BuddyLM, "generate_until", spy)
    return texts


def test_answers_found_strictly_and_flexibly_are_kept_apart(backbone, data, written):
    metrics = accuracy.solve(BuddyLM(routed(backbone), max_length=512), 1.0, SETTINGS, data)
    assert written == [said for _, _, said, *_ in ITEMS]
    (found,) = metrics["tasks"].values()
    assert found["n"] == 5
    assert found["items"] == {"strict-match": STRICT, "flexible-extract": FLEXIBLE}
    assert STRICT != FLEXIBLE
    assert found["exact_match"] == pytest.approx({"strict-match": 3 / 5, "flexible-extract": 3 / 5})
    error = math.sqrt(0.6 * 0.4 / 4)
    assert found["exact_match_stderr"] == pytest.approx({"strict-match": error, "flexible-extract": error})
    assert metrics["executed_mean"] == 4
    assert (metrics["few_shot"], metrics["limit"], metrics["new_tokens"], metrics["decode"]) == (
        0,
        None,
        20,
        "recompute",
    )


@pytest.mark.parametrize("few_shot", [0, None])
def test_the_full_budget_answers_as_the_untouched_model_through_plain_lm_eval(backbone, data, written, few_shot):
    settings = SETTINGS.model_copy(update={"few_shot": few_shot, "new_tokens": 8})  # some answers are cut
    expected, texts = by_the_harness(backbone, data, 8, few_shot)
    metrics = accuracy.solve(BuddyLM(routed(backbone), batch_size=2, max_length=512), 1.0, settings, data)
    assert written == [texts[number] for number in range(5)]
    assert len(set(written)) > 1
    assert metrics["few_shot"] == (5 if few_shot is None else 0)
    found = metrics["tasks"]["gsm8k"]
    for name, metric in itertools.product(("strict-match", "flexible-extract"), ("exact_match", "exact_match_stderr")):
        assert found[metric][name] == pytest.approx(expected[f"{metric},{name}"])


def test_a_static_run_answers_as_the_sliced_model_through_plain_lm_eval(backbone, data, written):
    expected, texts = by_the_harness(sliced(backbone, [0, 2, 3]), data)
    static = RoutedModel(backbone, StaticPolicy(4, [1]), tokenizer=byte_tokenizer()).eval()
    metrics = accuracy.solve(BuddyLM(static, batch_size=2, max_length=512), 3 / 4, SETTINGS, data)
    assert written == [texts[number] for number in range(5)]
    assert written != [said for _, _, said, *_ in ITEMS]  # without that block it has forgotten some
    assert metrics["executed_mean"] == 3
    assert metrics["tasks"]["gsm8k"]["exact_match"]["strict-match"] == expected["exact_match,strict-match"]


def test_no_answer_is_longer_than_asked(backbone, data, written):
    for new in (1, 6):
        accuracy.solve(BuddyLM(routed(backbone)), 1.0, SETTINGS.model_copy(update={"new_tokens": new}), data)
        assert written == [said[:new] for _, _, said, *_ in ITEMS]  # a token is a byte
    lm = BuddyLM(routed(backbone), max_length=64)
    with pytest.raises(UserError, match="--new-tokens: 64 leaves no room for a prompt in a context of 64"):
        accuracy.solve(lm, 1.0, SETTINGS.model_copy(update={"new_tokens": 64}), data)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(backbone, data, tmp_path):
    """A static run on disk, and the command's arguments for it."""
    place, run = tmp_path / "backbones/tiny", tmp_path / "run"
    backbone.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    policy = StaticPolicy(4, [2, 1])
    variant = {"removed": 2, "lora": "none"}
    info = runs.RunInfo("sleb", "static", policy.settings(), "tiny", runs.relative(place, run), variant, 3, "small")
    runs.save(run, info, policy)
    given = {"run": run, "data": data, "removed": "2,0", "out": tmp_path / "out"}
    rest = {"study": "", "name": "", "device": "cpu", "dtype": "auto"}
    return given | rest | SETTINGS.model_dump(exclude={"backbones"})


def test_what_a_record_says(arguments, backbone, data, capsys):
    command(**arguments)
    out = arguments["out"]
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == ["removed~0.json", "removed~2.json"]
    whole, cut = (Record.read(out / f"removed~{removed}.json") for removed in (0, 2))
    for record in (whole, cut):
        assert (record.kind, record.study, record.backbone, record.seed) == ("generation", "small", "tiny", 3)
        assert (record.method, record.variant) == ("sleb", {"removed": 2, "lora": "none", "kv": "zero"})
        assert record.n == record.metrics["tasks"]["gsm8k"]["n"] == 5
        assert record.metrics["executed_mean"] == record.budget.executed
    assert whole.metrics["tasks"]["gsm8k"]["items"] == {"strict-match": STRICT, "flexible-extract": FLEXIBLE}
    expected, _ = by_the_harness(sliced(backbone, [0, 3]), data)
    assert cut.metrics["tasks"]["gsm8k"]["items"] != whole.metrics["tasks"]["gsm8k"]["items"]
    for name, value in cut.metrics["tasks"]["gsm8k"]["exact_match"].items():
        assert value == expected[f"exact_match,{name}"]
    assert "0 of 4 blocks removed: gsm8k/strict-match 60.0, gsm8k/flexible-extract 60.0" in capsys.readouterr().out


def test_a_limit_is_marked(arguments):
    command(**arguments | {"removed": "0", "limit": 2})
    record = Record.read(arguments["out"] / "removed~0.json")
    assert (record.n, record.metrics["limit"]) == (2, 2)
    assert record.metrics["tasks"]["gsm8k"]["items"] == {"strict-match": STRICT[:2], "flexible-extract": FLEXIBLE[:2]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"removed": "0,3"}, "--removed: [0-9]+ is not"),
        ({"tasks": "gsm8k,piqa"}, "--tasks: 'piqa'"),
        ({"new_tokens": 600}, "--new-tokens: 600"),
    ],
)
def test_a_mistake_leaves_no_record(arguments, wrong, message):
    with pytest.raises((BudgetError, UserError), match=message):
        command(**arguments | wrong)
    assert not arguments["out"].exists()
