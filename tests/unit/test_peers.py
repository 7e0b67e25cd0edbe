"""Removal orders against brute force: blocks deleted from the Hugging Face model, hooks, autograd by hand."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from models import VOCABULARY, tiny
from torch.nn.functional import cosine_similarity, cross_entropy
from typer.testing import CliRunner

from buddy.backbones.untrained import byte_tokenizer
from buddy.baselines import calibrate
from buddy.baselines.removal import lowest
from buddy.cli import build
from buddy.errors import UserError
from buddy.extensions import named
from buddy.importance import TAYLOR, estimate, windows
from buddy.methods import METHODS, of_kind
from buddy.policies.static import StaticPolicy
from buddy.routing.model import RoutedModel
from buddy.study.records import Record

IDS = torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))


def without(backbone, blocks):
    """A copy of the model with blocks deleted from it."""
    smaller = copy.deepcopy(backbone)
    for block in sorted(blocks, reverse=True):
        del smaller.model.layers[block]
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    for place, layer in enumerate(smaller.model.layers):
        layer.self_attn.layer_idx = place
    return smaller


@torch.no_grad()
def perplexity(model, ids=IDS):
    return cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()


def ascending(scores, candidates):
    return sorted(candidates, key=lambda block: scores[block])


def greedy(backbone, removed, candidates):
    """SLEB the slow way: every model that lacks one more block, built and scored."""
    gone, rounds = [], []
    for _ in range(removed):
        scores = {b: perplexity(without(backbone, [*gone, b])) for b in candidates if b not in gone}
        rounds.append(scores)
        gone.append(min(scores, key=scores.get))
    return gone, rounds


# ---- the methods -----------------------------------------------------------------------------------------------------


def test_shortgpt_by_hooks(backbone):
    seen = {}
    for block, layer in enumerate(backbone.model.layers):
        layer.register_forward_hook(
            lambda _m, args, _k, out, block=block: seen.update(
                {block: 1 - cosine_similarity(args[0], out, dim=-1).mean().item()}
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        backbone(IDS)
    expected = dict(seen)
    found = calibrate(backbone, IDS, "shortgpt", 5, batch_size=2)
    assert found.order == ascending(expected, range(7))[:5]  # no block is protected
    assert found.rounds == [pytest.approx(expected, rel=1e-4)]


def test_shortened_llama_deletes_each_block_once(backbone):
    expected = {block: perplexity(without(backbone, [block])) for block in range(7)}
    found = calibrate(backbone, IDS, "shortened_llama", 6, criterion="ppl_unprotected", batch_size=2)
    assert found.order == ascending(expected, range(7))[:6]
    assert found.rounds == [pytest.approx(expected, rel=1e-4)]
    assert found.ppl == pytest.approx(perplexity(backbone), rel=1e-4)
    middle = calibrate(backbone, IDS, "shortened_llama", 5, protect=[0, -1])
    assert middle.order == ascending(expected, range(1, 6))


def test_shortened_llama_keeps_the_first_four_and_last_two_blocks(deep_backbone):
    expected = {block: perplexity(without(deep_backbone, [block])) for block in range(12)}
    assert calibrate(deep_backbone, IDS, "shortened_llama", 6).order == ascending(expected, range(4, 10))
    with pytest.raises(UserError, match="1 to 6 can be removed"):
        calibrate(deep_backbone, IDS, "shortened_llama", 7)


def test_shortened_llama_taylor_adds_up_gradients_first(deep_backbone):
    model = copy.deepcopy(deep_backbone)
    model(IDS, labels=IDS).loss.backward()  # one batch, as its authors do
    expected = {
        block: sum((p * p.grad).abs().sum().item() for n, p in layer.named_parameters() if n.endswith("weight"))
        for block, layer in enumerate(model.model.layers)
    }
    found = calibrate(deep_backbone, IDS, "shortened_llama", 6, criterion="taylor")
    assert found.rounds == [pytest.approx(expected, rel=1e-4)]
    assert found.order == ascending(expected, range(4, 10))  # the first four and the last two stay
    everywhere = calibrate(deep_backbone, IDS, "shortened_llama", 11, criterion="taylor", protect=[])
    assert everywhere.order == ascending(expected, range(12))[:11]


def test_sleb_is_the_exhaustive_greedy(backbone):
    order, rounds = greedy(backbone, 4, range(1, 6))  # the first and the last block stay
    found = calibrate(backbone, IDS, "sleb", 4, batch_size=2)
    assert found.order == order
    assert found.rounds == [pytest.approx(scores, rel=1e-4) for scores in rounds]
    assert found.ppl == pytest.approx(perplexity(backbone), rel=1e-4)


def test_sleb_may_remove_the_ends_where_it_is_told(backbone):
    order, _ = greedy(backbone, 6, range(7))
    assert calibrate(backbone, IDS, "sleb", 6, protect=[]).order == order


def test_sleb_measures_again_after_each_removal():
    """On a model where that matters: the two most dispensable blocks of the full model are not the best pair."""
    backbone = next(
        model
        for model in map(lambda seed: tiny("llama", seed=seed), range(20))
        if calibrate(model, IDS, "shortened_llama", 2, protect=[0, -1]).order != greedy(model, 2, range(1, 6))[0]
    )
    found = calibrate(backbone, IDS, "sleb", 2)
    once = calibrate(backbone, IDS, "shortened_llama", 2, protect=[0, -1])
    assert found.order[0] == once.order[0]
    assert found.order[1] != once.order[1]
    assert perplexity(without(backbone, found.order)) < perplexity(without(backbone, once.order))


def test_blocks_before_the_removed_one_run_once(backbone):
    calls = []
    for layer in backbone.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    calibrate(backbone, IDS, "sleb", 2, batch_size=3)
    first, second = 7 + sum(6 - place for place in range(1, 6)), 6 + sum(5 - place for place in range(1, 5))
    assert len(calls) == first + second


def test_ties_go_to_the_earlier_block_and_gaps_are_refused():
    assert lowest({0: 2.0, 1: 1.0, 2: 1.0}, [2, 1, 0], 3) == [1, 2, 0]
    with pytest.raises(UserError, match="block 2: its score is nan"):
        lowest({1: 1.0, 2: float("nan")}, [1, 2], 1)


# ---- what the order is for -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("method", ["shortgpt", "shortened_llama", "sleb"])
def test_a_static_policy_equals_the_sliced_model(backbone, method):
    order = calibrate(backbone, IDS, method, 5, protect=[0, -1]).order
    routed = RoutedModel(backbone, StaticPolicy(7, order)).eval()
    for removed in (1, 3, 5):
        sliced = without(backbone, order[:removed])
        torch.testing.assert_close(routed(IDS, budget=1 - removed / 7).logits, sliced(IDS).logits)
        new = routed.generate(IDS, budget=1 - removed / 7, max_new_tokens=5, do_sample=False)
        assert torch.equal(new, sliced.generate(IDS, max_new_tokens=5, do_sample=False))


@torch.no_grad()
def test_a_static_policy_may_leave_out_the_first_and_the_last_block(backbone):
    routed = RoutedModel(backbone, StaticPolicy(7, [0, 6, 3])).eval()
    for removed in (1, 2, 3):
        sliced = without(backbone, [0, 6, 3][:removed])
        torch.testing.assert_close(routed(IDS, budget=1 - removed / 7).logits, sliced(IDS).logits)
        new = routed.generate(IDS, budget=1 - removed / 7, max_new_tokens=5, do_sample=False)
        assert torch.equal(new, sliced.generate(IDS, max_new_tokens=5, do_sample=False))


# ---- Taylor variants and windows -------------------------------------------------------------------------------------


def gradients(backbone, ids):
    """Weight times gradient of the mean loss, per block and weight."""
    model = copy.deepcopy(backbone)
    cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return [
        {name: (p * p.grad).detach() for name, p in layer.named_parameters() if name.endswith("weight")}
        for layer in model.model.layers
    ]


@pytest.mark.parametrize("variant", [name for name in TAYLOR if name != "window"])
def test_taylor_variants_against_their_formulas(backbone, variant):
    for name, parameter in backbone.named_parameters():
        if name.endswith("bias"):  # of qwen2, zero until it is trained
            torch.nn.init.normal_(parameter)
    whole, windowed = gradients(backbone, IDS), [gradients(backbone, IDS[row : row + 1]) for row in range(3)]

    def score(first, squares):
        return {
            "corpus": lambda: sum(x.abs().sum().item() for x in first.values()),
            "net": lambda: abs(sum(x.sum().item() for x in first.values())),
            "second": lambda: sum((first[n] - 0.5 * squares[n]).abs().sum().item() for n in first),
        }[variant]()

    found = estimate(backbone, IDS, "taylor", taylor=variant)
    assert all(p.grad is None and p.requires_grad for p in backbone.parameters())  # nothing is left behind
    for block in range(7):
        squares = {n: sum(row[block][n] ** 2 for row in windowed) / 3 for n in whole[block]}
        assert found.values[block].item() == pytest.approx(score(whole[block], squares), rel=1e-3)
        for row in range(3):
            alone = windowed[row][block]
            expected = score(alone, {n: x**2 for n, x in alone.items()})
            assert found.per_window[row, block].item() == pytest.approx(expected, rel=1e-3)


def test_an_unknown_taylor_variant_is_refused(backbone):
    with pytest.raises(UserError, match="did you mean corpus"):
        estimate(backbone, IDS, "taylor", taylor="corpse")


def test_random_windows_are_drawn_without_overlap_and_reproducibly():
    tokenizer = byte_tokenizer()
    text = "".join(chr(33 + index % 90) for index in range(101))
    every = windows(tokenizer, text, 12, 8)
    drawn = windows(tokenizer, text, 5, 8, seed=3)
    assert torch.equal(drawn, windows(tokenizer, text, 5, 8, seed=3))
    assert not torch.equal(drawn, windows(tokenizer, text, 5, 8, seed=4))
    places = [next(place for place, window in enumerate(every) if torch.equal(window, row)) for row in drawn]
    assert len(set(places)) == 5
    assert sorted(places) != list(range(5))
    with pytest.raises(UserError, match="corpus holds 12"):
        windows(tokenizer, text, 13, 8, seed=3)


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A tiny backbone and a text on disk, and the windows that the commands below cut from it."""
    folder = tmp_path_factory.mktemp("peers")
    backbone = tiny("llama")
    backbone.resize_token_embeddings(300)
    backbone.save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    text = "The quick brown fox jumps over the lazy dog, again and again. " * 6
    (folder / "book.txt").write_text(text)
    return SimpleNamespace(
        backbone=backbone,
        folder=folder / "tiny",
        corpus=folder / "book.txt",
        ids=windows(byte_tokenizer(), text, 4, 16),
    )


def call(disk, *options):
    start = ["calibrate", "--backbone", disk.folder, "--corpus", disk.corpus, "--samples", 4, "--length", 16]
    return CliRunner().invoke(build(), [*map(str, [*start, "--device", "cpu", *options])])


def test_the_command_prints_and_records_what_brute_force_finds(disk, tmp_path):
    out = tmp_path / "sleb.json"
    result = call(disk, "--method", "sleb", "--removed", 3, "--json", "--out", out)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    gone = []
    for _ in range(3):
        scores = {b: perplexity(without(disk.backbone, [*gone, b]), disk.ids) for b in range(1, 6) if b not in gone}
        assert printed["scores"][len(gone)] == pytest.approx({str(b): x for b, x in scores.items()}, rel=1e-4)
        gone.append(min(scores, key=scores.get))
    assert printed["removed"] == gone
    assert (printed["method"], printed["criterion"], printed["protected"]) == ("sleb", "ppl", [0, 6])
    record = Record.read(out)
    assert (record.kind, record.method, record.backbone, record.n) == ("calibration", "sleb", "tiny", 4)
    assert (record.budget.removed, record.budget.executed) == (3, 4)
    assert {"backbone": "tiny", **record.metrics} == printed
    assert record.metrics["corpus"] == "book.txt"
    assert record.metrics["window_seed"] is None


@pytest.mark.parametrize("options", [["--method", "sleb"], ["--method", "shortgpt", "--protect", "0,-1"]])
def test_the_table_ends_with_the_list(disk, options):
    listed = json.loads(call(disk, *options, "--removed", 3, "--json").stdout)["removed"]
    result = call(disk, *options, "--removed", 3)
    assert result.stdout.splitlines()[-1] == "removed: " + ",".join(map(str, listed))
    assert not {0, 6} & set(listed)


def test_a_seed_draws_other_windows(disk):
    scores = [
        json.loads(call(disk, "--method", "shortgpt", "--removed", 1, "--json", *more).stdout)["scores"]
        for more in ([], ["--seed", 1], ["--seed", 1], ["--seed", 2])
    ]
    assert scores[1] == scores[2]
    assert scores[0] != scores[1] != scores[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "slep", "--removed", 2], "--method: 'slep'.*did you mean sleb"),
        (["--method", "sleb", "--removed", 2, "--criterion", "taylor"], "of sleb.: 'taylor' is not one of ppl"),
        (["--method", "sleb", "--removed", 6], "--removed: 6 of 7 blocks asked for, 1 to 5 .*protected: 0,6"),
        (["--method", "shortgpt", "--removed", 7], "1 to 6 can be removed .one has to stay"),
        (["--method", "sleb", "--removed", 0], "--removed: 0"),
        (["--method", "sleb", "--removed", 1, "--protect", "7"], "--protect: 7 is not a block from 0 to 6"),
        (["--method", "sleb", "--removed", 1, "--protect", "a"], "--protect: 'a' is neither"),
        (["--method", "sleb", "--removed", 1, "--samples", "999"], "corpus holds"),
    ],
)
def test_wrong_inputs_are_one_line_and_leave_nothing(disk, tmp_path, options, message):
    result = call(disk, *options, "--out", tmp_path / "record.json")
    assert isinstance(result.exception, UserError)
    assert "\n" not in str(result.exception)
    with pytest.raises(UserError, match=message):
        raise result.exception
    assert not list(tmp_path.iterdir())


def test_importance_records_variant_and_seed(disk, tmp_path):
    out = tmp_path / "taylor.json"
    start = ["importance", "--backbone", disk.folder, "--corpus", disk.corpus, "--samples", 4, "--length", 16]
    options = ["--indicator", "taylor", "--taylor", "corpus", "--seed", 5, "--out", out, "--device", "cpu"]
    result = CliRunner().invoke(build(), [*map(str, [*start, *options])])
    assert result.exit_code == 0, result.output
    metrics = Record.read(out).metrics
    ids = windows(byte_tokenizer(), disk.corpus.read_text(), 4, 16, seed=5)
    assert metrics["values"] == pytest.approx(estimate(disk.backbone, ids, "taylor", taylor="corpus").values.tolist())
    assert (metrics["taylor"], metrics["window_seed"], metrics["indicator"]) == ("corpus", 5, "taylor")


def test_every_method_names_what_its_authors_keep():
    kept = {
        (method, criterion): peer.protected
        for method in of_kind("static")
        for criterion, peer in named(METHODS[method].ranking).items()
    }
    assert kept == {
        ("shortgpt", "block_influence"): (),
        ("shortened_llama", "ppl"): (0, 1, 2, 3, -2, -1),
        ("shortened_llama", "taylor"): (0, 1, 2, 3, -2, -1),
        ("shortened_llama", "ppl_unprotected"): (),
        ("sleb", "ppl"): (0, -1),
    }
