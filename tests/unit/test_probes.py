"""Probes of a router: figures against brute force, the scores against a prefill, and where they are told."""

import json
import logging
import math
import statistics

import pytest
import torch
from models import tiny, with_router
from typer.testing import CliRunner

from buddy.backbones.untrained import byte_tokenizer
from buddy.cli import build
from buddy.data import materialise
from buddy.policies.static import StaticPolicy
from buddy.routing.engine import Routing, routed
from buddy.runs import RunInfo
from buddy.settings import Training
from buddy.study.records import Record
from buddy.training import sft
from buddy.training.examples import encode
from buddy.training.probes import PROMPTS, Probes, figures
from buddy.training.recipe import Recipe, drawn

PAIRS = [(f"question {i}: what follows {i}?", f"{i + 1} follows") for i in range(6)]
SETTINGS = Training(
    epochs=1, batch_size=2, warmup_steps=0, max_length=64, logging_steps=1, learning_rate=1e-2, lora_rank=2,
    router_rank=4,
)  # fmt: skip


def by_hand(scores, prior, kept):
    """The figures by loops over lists."""

    def route(row):
        return frozenset(sorted(range(len(row)), key=lambda block: (-row[block], block))[:kept])

    def entropy(row):
        weights = [math.exp(value - max(row)) for value in row]
        shares = [weight / sum(weights) for weight in weights]
        return -sum(share * math.log(share) for share in shares if share > 0)

    routes = [route(row) for row in scores]
    found = {
        "paths": len(set(routes)),
        "off_prior": statistics.mean(one != route(prior) for one in routes),
        "spread_prompts": statistics.mean(statistics.pstdev(column) for column in zip(*scores, strict=True)),
        "spread_blocks": statistics.mean(statistics.pstdev(row) for row in scores),
        "entropy": statistics.mean(map(entropy, scores)),
    }
    if 0 < kept < len(prior):
        found["margin"] = statistics.mean(sorted(row)[-kept] - sorted(row)[-kept - 1] for row in scores)
    return found


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("coarse", [False, True])
def test_figures_are_those_of_brute_force(kept, coarse):
    generator = torch.Generator().manual_seed(kept)
    scores, prior = torch.randn(7, 5, generator=generator), torch.randn(5, generator=generator)
    if coarse:  # ties go to the earlier block
        scores, prior = scores.round(), prior.round()
    found = figures(scores, prior, kept)
    assert found == pytest.approx(by_hand(scores.double().tolist(), prior.double().tolist(), kept))


def test_without_a_prior_there_is_no_route_to_leave():
    found = figures(torch.randn(4, 5), torch.zeros(5), 2)
    assert "off_prior" not in found
    assert found["paths"] >= 1


def test_one_score_for_every_prompt_is_one_path():
    row = torch.tensor([3.0, 1.0, 2.0, 0.0])
    found = figures(row.expand(9, 4), row, 2)
    assert (found["paths"], found["off_prior"], found["spread_prompts"], found["margin"]) == (1, 0, 0, 1)


def router(source_block=1):
    """A router that tells prompts apart, with a prior."""
    policy = with_router(tiny("llama"), source_block=source_block).policy
    policy.prior += torch.randn(policy.prior.shape, generator=torch.Generator().manual_seed(3))
    return policy


@pytest.mark.parametrize("source_block", [1, 2])
def test_a_look_sees_the_routes_that_prefills_take_and_changes_nothing(source_block):
    backbone, policy = tiny("llama"), router(source_block)
    prompts = [torch.randint(1, 97, (5 + index % 4,)).tolist() for index in range(20)]
    backbone.train()
    found = Probes([(prompt, range(len(prompt))) for prompt in prompts], removed=2).look(backbone, policy)
    assert backbone.training
    backbone.eval()
    paths, scores = set(), []
    with torch.no_grad():
        for prompt in prompts:
            with routed(backbone, routing := Routing(policy, 5 / 7)):
                backbone(torch.tensor([prompt]))
            paths |= set(routing.trace.paths())
            scores.append(policy.scores(routing.state.policy_state)[0].tolist())
    expected = by_hand(scores, (policy.omega * policy.prior.double()).tolist(), 7 - 2 - policy.always)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found["paths"] == len(paths) > 2


def test_probes_are_the_first_different_prompts():
    pairs = [(f"prompt {i // 2}", f"answer {i}") for i in range(3 * PROMPTS)]
    probes = Probes.of(encode(byte_tokenizer(), pairs, 64), removed=2)
    assert len(probes.prompts) == PROMPTS
    assert [byte_tokenizer().decode(ids, skip_special_tokens=True) for ids, _ in probes.prompts[:3]] == [
        "prompt 0", "prompt 1", "prompt 2",
    ]  # fmt: skip


def trained(folder, policy, recipe, stop_after=None):
    backbone = tiny("llama")
    backbone.resize_token_embeddings(300)

    def on_log(step, _values):
        if step == stop_after:
            raise KeyboardInterrupt

    settings = SETTINGS.model_copy(update={"save_steps": 1})
    return sft.train(backbone, byte_tokenizer(), policy, PAIRS, settings, recipe, folder, 0, on_log)


def test_training_tells_what_the_router_did_before_at_every_log_line_and_after(tmp_path):
    recipe = Recipe(drawn(3, 7), trains_policy=True, probed=3)
    whole = trained(tmp_path / "whole", router(), recipe)
    assert {name: whole.probes[name] for name in ("prompts", "removed")} == {"prompts": 6, "removed": 3}
    names = {f"probe_{name}" for name in whole.probes["first"]}
    assert all(names <= set(point) for point in whole.curve)
    assert len({point["probe_spread_blocks"] for point in whole.curve}) == 3
    # A line is written after its update: the last one is the state that is left.
    assert whole.probes["last"] == {name.removeprefix("probe_"): whole.curve[-1][name] for name in names}
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", router(), recipe, stop_after=2)
    assert trained(tmp_path / "cut", router(), recipe).probes == whole.probes


def test_a_method_without_a_router_has_none_of_it(tmp_path):
    found = trained(tmp_path, StaticPolicy(7, [2, 3]), Recipe())
    assert found.probes == {}
    assert not any(name.startswith("probe") for point in found.curve for name in point)


def test_a_run_on_one_path_says_so_in_its_log_its_record_and_the_list_of_runs(tmp_path, caplog):
    def run(*arguments):
        result = CliRunner().invoke(build(), [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    run("backbone", "--random", "tiny-llama", "--layers", 6, "--dtype", "float32", "--out", tmp_path / "backbone")
    materialise("alpaca", "embedded", tmp_path / "alpaca")
    common = [
        *("train", "--backbone", tmp_path / "backbone", "--data", tmp_path / "alpaca", "--most-removed", 2),
        *("--examples", 4, "--epochs", 1, "--batch-size", 4, "--lora-rank", 0, "--warmup-steps", 0),
        *("--out", tmp_path / "runs/a", "--record", tmp_path / "a.json"),
    ]
    with caplog.at_level(logging.WARNING):
        run(*common)
    assert "the router ends on one path: with 2 blocks removed, all 4 probe prompts take it" in caplog.text
    assert RunInfo.read(tmp_path / "runs/a").probes == {"paths": 1, "prompts": 4, "removed": 2}
    metrics = Record.read(tmp_path / "a.json").metrics
    assert metrics["probes"]["last"]["paths"] == metrics["curve"][-1]["probe_paths"] == 1
    assert "one path over 4 probe prompts" in run("runs", "--results", tmp_path / "runs")
    # One that takes several says how many.
    saved = json.loads((tmp_path / "runs/a/run.json").read_text())
    saved["probes"]["paths"] = 3
    (tmp_path / "runs/a/run.json").write_text(json.dumps(saved))
    assert "3 paths over 4 probe prompts" in run("runs", "--results", tmp_path / "runs")
