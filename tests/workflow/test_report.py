"""`snakemake --report` and the jobs that `buddy status` expects, against Snakemake itself."""

from __future__ import annotations

import base64
import collections
import json
import re
from pathlib import Path

import pytest
from checkout import ROOT, clone, planned, snakemake
from wandb_server import ENTITY, KEY, WandbServer

from buddy.study import config, progress


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("clone"))


REFERENCE = ("--configfile", "results/reference/epyc-2-cores/study.yaml")


@pytest.fixture(scope="module")
def study(checkout: Path) -> Path:
    """A study from records given, its jobs' W&B runs kept offline."""
    built = snakemake(checkout, "--cores", "2", *REFERENCE, WANDB_MODE="offline")
    assert built.returncode == 0, built.stderr[-3000:]
    return checkout / "results" / "epyc-2-cores"


def test_the_report_is_one_file_with_everything_in_it(checkout: Path, study: Path) -> None:
    written = snakemake(checkout, "--report", str(study / "report.html"), *REFERENCE, http_proxy="http://127.0.0.1:9")
    assert written.returncode == 0, written.stderr[-3000:]
    page = (study / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["']https?:""", page), "it needs the network"

    results = json.loads(re.search(r"var results = (\{.*\})", page)[1])  # type: ignore[index]
    assert {Path(path).name for path in results} == {"table4.html", "table8.html", "latency.png", "savings.png"}
    table = next(found for path, found in results.items() if path.endswith("table4.html"))
    content = base64.b64decode(table["data_uri"].partition("base64,")[2]).decode()
    markdown = (study / "tables" / "table4.md").read_text()
    shown = re.findall(r"^\|.*\|$", markdown, re.M)
    assert content.count("<tr") == len(shown) - 1  # all rows of the Markdown, without its ruler
    assert table["labels"]["removed blocks"] == "4, 8, 11, 15 of 30"
    assert "as numbered in the paper" in table["caption"]
    figure = next(found for path, found in results.items() if path.endswith("latency.png"))
    assert base64.b64decode(figure["data_uri"].partition("base64,")[2]) == (study / "figures/latency.png").read_bytes()
    assert "3 Speed" in page
    # It opens on a picture, the one that says most of what was measured.
    opened = json.loads(re.search(r"workflow_desc = (\".*\")", page)[1])  # type: ignore[index]
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]*)"', opened)
    assert base64.b64decode(picture) == (study / "figures/latency.png").read_bytes()


@pytest.mark.parametrize("overlay", [None, "workflow/demo.yaml", "tests/tiny.yaml"])
def test_the_summary_expects_the_jobs_that_snakemake_plans(checkout: Path, overlay: str | None) -> None:
    study = config.read(*[ROOT / name for name in ("config.yaml", overlay) if name])
    expected = collections.Counter(job.stage for job in dict.fromkeys(progress.jobs(study)))
    jobs = planned(checkout, *(["--configfile", overlay] if overlay else []))
    jobs.pop("all")
    assert expected == jobs


def test_without_a_key_wandb_targets_say_what_is_missing(checkout: Path, study: Path, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    for target in ("wandb", "wandb_sync", "wandb_report"):
        refused = snakemake(checkout, "--cores", "1", *REFERENCE, "--", target, **home)
        assert refused.returncode != 0
        assert "set WANDB_API_KEY" in (study / "logs" / f"{target}.log").read_text()


def test_wandb_sends_then_reports_and_ends_with_the_link(checkout: Path, study: Path, tmp_path: Path) -> None:
    kept = {path.name.rsplit("-", 1)[1] for path in (study / "wandb").glob("offline-run-*")}
    with WandbServer() as server:
        there = {"HOME": str(tmp_path), "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address}
        done = snakemake(checkout, "--cores", "1", *REFERENCE, "--", "wandb", **there)
    said = (study / "logs" / "wandb.log").read_text().splitlines()
    assert done.returncode == 0, said
    assert set(server.runs) == kept != set()
    (report,) = server.reports.values()
    assert any(line.startswith(f"{len(kept)} sent, 0 sent before") for line in said)
    assert said[-1].startswith(f"{server.address}/{ENTITY}/buddy/reports/")
    assert "epyc-2-cores" in report["displayName"]
