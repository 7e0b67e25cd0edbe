"""A budget curve says what the likelihood records of a folder say, of one run or several."""

from __future__ import annotations

import csv

import pytest
from command_line import buddy
from records_factory import Maker, methods

BACKBONE = "smollm2-135m"


@pytest.fixture
def records(tmp_path):
    """Records of BUDDY at three depths, and of a static peer at one."""
    maker = Maker(tmp_path / "results", methods())
    run = maker.config.main_run(BACKBONE)
    for removed in (8, 0, 4):
        nll = [2.0 + removed / 10, 3.0 + removed / 10]
        values = {"nll": nll, "kl": [removed / 5, removed / 10], "agreement": [1 - removed / 10, 1 - removed / 20]}
        maker.likelihood(run, removed, {"ptb": values}, paths=1 + removed)
    maker.likelihood(maker.peer("sleb", 8), 8, {"ptb": {"nll": [3.0, 4.5], "kl": [1.0, 1.0], "agreement": [0.5, 0.5]}})
    return maker.records


def test_every_depth_is_a_row_from_the_whole_model_down(records, tmp_path):
    done = buddy("curve", "--records", records, "--out", tmp_path / "curve")
    assert done.status == 0, done.err
    rows = [line.split() for line in done.out.splitlines() if line.startswith("  ")][1:]
    assert [row[:5] for row in rows] == [
        ["BUDDY", "PTB", "0", "1.00", "2.500"],
        ["BUDDY", "PTB", "4", "0.87", "2.900"],
        ["BUDDY", "PTB", "8", "0.73", "3.300"],
        ["SLEB", "PTB", "8", "0.73", "3.750"],
    ]
    assert rows[2][5:] == ["2.800-3.800", "1.200", "40.0", "%", "9"]
    kept = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [float(row["nll"]) for row in kept] == [2.5, 2.9, 3.3, 3.75]
    assert [float(row["budget"]) for row in kept][:3] == [1.0, round(26 / 30, 6), round(22 / 30, 6)]
    assert all((tmp_path / f"curve.{kind}").stat().st_size > 3000 for kind in ("png", "pdf"))


def test_modes_are_told_apart_where_there_are_several(records, tmp_path):
    maker = Maker(tmp_path / "results", methods())
    run = maker.config.main_run(BACKBONE)
    values = {"ptb": {"nll": [2.0, 3.0], "kl": [0.1, 0.1], "agreement": [0.5, 0.5]}}
    maker.likelihood(run, 8, values, kv="mask", decode="reuse")
    out = buddy("curve", "--records", records).out
    assert "BUDDY (mask, reuse)" in out
    assert "BUDDY (zero, recompute)" in out


def test_what_holds_no_curve_is_one_line(records, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no likelihood records; `buddy score" in buddy("curve", "--records", tmp_path / "empty").mistake
    assert "is not a folder" in buddy("curve", "--records", tmp_path / "none").mistake
    assert "is a folder" in buddy("curve", "--records", records, "--out", tmp_path).mistake
