"""What a bound costs and gains, as benchmarks/slack.py and benchmarks/targets.py tell it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from models import prompts, saved, tiny, with_router

from buddy.backbones.untrained import byte_tokenizer
from buddy.evaluation import likelihood
from buddy.evaluation.likelihood import Mode
from buddy.evaluation.passages import Passage
from buddy.routing.model import RoutedModel
from buddy.study.records import Budget, Record

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module


def items(count=4):
    ids, _ = prompts(batch=count, length=14, seed=2)
    return [Passage(row, tuple(ids[row].tolist()), 6) for row in range(count)]


def nll(found, mode):
    return torch.tensor([score.nll for score in found[mode]])


def test_items_are_scored_beside_their_batch():
    model = with_router(tiny(blocks=12), balanced=1)
    free, bound, loose = (Mode(0.5, "zero", "recompute", slack) for slack in (None, 0, 99))
    together = likelihood.measure(model, model.backbone, items(), [free, bound, loose], batch_size=4)
    assert torch.equal(nll(together, loose), nll(together, free))
    assert not torch.equal(nll(together, bound), nll(together, free))
    routes = torch.stack([score.routes for score in together[bound]])
    assert (routes == routes[0]).all()
    assert (routes.sum(-1) == 6).all()
    alone = likelihood.measure(model, model.backbone, items(), [free, bound], batch_size=1)
    torch.testing.assert_close(nll(alone, bound), nll(alone, free))


def test_one_command_measures_and_goes_on(tmp_path, capsys, monkeypatch):
    slack = script("slack")
    model = with_router(tiny(blocks=8))
    model.backbone.resize_token_embeddings(300)
    run = saved(RoutedModel(model.backbone, model.policy, tokenizer=byte_tokenizer()), tmp_path)
    data = tmp_path / "alpaca"
    data.mkdir()
    rows = [{"id": str(n), "instruction": "Say " * n, "input": "", "output": "one two"} for n in range(1, 4)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "data.json").write_text(json.dumps({"name": "alpaca"}))
    asked = ["--removed", "4", "--batch-sizes", "2", "--slack", "0,1", "--items", "2", "--prompts", "2"]
    asked += ["--new-tokens", "3", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["slack.py", str(run), "--data", str(data), *asked])
    slack.main()
    table = (tmp_path / "out/slack.md").read_text()
    assert capsys.readouterr().out.strip() == table.strip()
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["slack 0", "slack 1", "independent"]
    fast = json.loads((tmp_path / "out/speed/batch~2.json").read_text())
    assert fast["found"]["slack 0"]["called_mean"] == fast["found"]["slack 0"]["executed_mean"] == 4
    assert fast["found"]["independent"]["decode_of_independent"]["median"] == 1
    assert fast["environment"]["torch"]
    assert (tmp_path / "out/slack.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("batch~2.json")}
    slack.main()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("batch~2.json")} == before
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--items", "3"])
    with pytest.raises(SystemExit) as ended:
        slack.main()
    assert ended.value.code == 2
    assert "measured with other settings" in capsys.readouterr().err


def test_targets_are_told_apart_and_a_missed_one_is_a_failure(tmp_path, capsys, monkeypatch):
    targets = script("targets")

    def record(name, execution, size, slack=None, **ratios):
        metrics = {"execution": execution, "batch_size": size, "slack": slack, "called_mean": 15.0}
        metrics |= {"removed_per_sequence": [8, 15] if execution == "nested" else None}
        metrics |= {
            of: {"median": value, "p10": value, "p90": value, "values": [value]} for of, value in ratios.items()
        }
        Record(
            kind="latency", method="buddy", metrics=metrics, n=1, budget=Budget.of(15, 30), study="s", backbone="b"
        ).write(tmp_path / f"{name}.json")

    record("one", "varied", 1, decode_of_sliced=0.98, prefill_of_sliced=0.99)
    record("set", "varied", 8, 0, decode_of_sliced=0.96, decode_of_called=0.5)
    record("free", "varied", 16, decode_of_called=0.95, decode_of_sliced=0.4)
    record("four", "varied", 4, decode_of_called=0.1)
    monkeypatch.setattr(sys, "argv", ["targets.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        targets.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["met", "met", "met", "met", "not"]
    assert ended.value.code == 0
    record("nested", "nested", 16, 0, decode_of_called=0.94)
    with pytest.raises(SystemExit) as ended:
        targets.main()
    assert "MISSED" in capsys.readouterr().out.splitlines()[-1]
    assert ended.value.code == 1
