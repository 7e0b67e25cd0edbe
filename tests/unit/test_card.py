"""A card says what the records say, and what there is no record of; the exported model's card and W&B's page say the same."""

from __future__ import annotations

import json
import re
from statistics import fmean
from types import SimpleNamespace

import pytest
from command_line import buddy
from records_factory import ENVIRONMENT, Maker, methods

from buddy.pages.page import Page
from buddy.reporting import cards
from buddy.reporting.render import MISSING
from buddy.reporting.study import load
from buddy.runs import RunInfo
from buddy.storage.files import write_json
from buddy.study.records import Record
from buddy.tasks import headline

BACKBONE = "smollm2-135m"


@pytest.fixture
def maker(tmp_path):
    """A finished study of every method on one backbone, whose card names a licence."""
    made = Maker(tmp_path / "results", methods())
    made.everything(items=40)
    folder = made.folder / "backbones" / BACKBONE
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return made


def saved(maker, run, place=None, digests=None) -> str:
    """The ``run.json`` of a run of the study, there or in another place."""
    folder = place or maker.folder / "runs" / run.path
    training = {"data": "alpaca", "examples": 64, "epochs": 2.0, "loss": "kl", "lora_rank": 8}
    info = RunInfo(
        *(run.method, "buddy", {"blocks": 30}, BACKBONE, str(maker.folder / "backbones" / BACKBONE)),
        variant=run.variant,
        training=training,
        digests=digests or {},
        backbone_source={"hub": "owner/model", "revision": "0123abc"},
        commit="fedcba9876543210",
    )
    write_json(folder / "run.json", vars(info))
    return str(folder)


def averaged(path) -> float:
    """Average of the headline scores of an accuracy record, from its items where it has them, in percent."""
    tasks = json.loads(path.read_text())["metrics"]["tasks"]
    shares = []
    for task, found in tasks.items():
        metric = headline(task, found)
        items = found.get("items", {}).get(metric)
        shares.append(items.count("1") / len(items) if items else found[metric])
    return 100 * fmean(shares)


def test_a_run_s_card_says_its_records_and_what_is_not_there(maker):
    run = maker.config.main_run(BACKBONE)
    maker.likelihood(run, 8, {"ptb": {"nll": [2.0, 4.0], "kl": [0.5, 1.5], "agreement": [0.5, 0.75]}})
    said = buddy("card", "--run", saved(maker, run), "--removed", "8")
    assert said.status == 0, said.err
    text = said.out
    scored = maker.records / "accuracy" / run.path / "removed~8.json"
    assert f"accuracy, average of 8 tasks: {averaged(scored):.2f} ±" in text
    assert "## 8 of 30 blocks removed" in text
    assert "LoRA of rank 8 was trained on alpaca (64 examples, 2 epochs) by KL divergence from the backbone" in text
    assert f"{BACKBONE} is owner/model on the Hugging Face Hub at 0123abc; its licence: apache-2.0." in text
    assert "(PTB, 2 pieces; K/V zero, recompute): 3.000 nats per token, 1.000 nats of KL" in text
    assert "the same most probable token for 62.5 %" in text
    assert "commit fedcba9876543210" in text
    assert f"Measured on {ENVIRONMENT['device']}, float32." in text
    timed = json.loads(
        next((maker.records / "latency" / run.path).rglob("execution~recompute/removed~8.json")).read_text()
    )
    assert f"decode {timed['metrics']['decode_tok_s']['median']:,.1f} tokens/s" in text
    gaps = next(line for line in text.splitlines() if line.startswith("Not measured"))
    assert "speed on a GPU" in gaps
    assert "accuracy" not in gaps
    scored.unlink()
    again = buddy("card", "--run", saved(maker, run), "--removed", "8").out
    assert "Not measured at this depth: accuracy on multiple-choice tasks" in again
    assert "accuracy, average" not in again
    assert (
        "Nothing was measured of the run at this depth."
        in buddy("card", "--run", saved(maker, run), "--removed", "3").out
    )


def test_a_run_outside_a_study_is_known_by_what_it_consists_of(maker, tmp_path):
    run = maker.config.main_run(BACKBONE)
    digests = {"router": "r", "adapter": "a", "backbone": "b"}
    place = saved(maker, run, tmp_path / "mine", digests)
    assert "Nothing was measured of it." in buddy("card", "--run", place).out
    source = maker.records / "accuracy" / run.path / "removed~8.json"
    for name, told in (("own", digests), ("other", {**digests, "router": "another"})):
        record = Record.read(source)
        record.digests = told
        record.metrics["tasks"] = {"piqa": {"n": 4, "acc": 0.5, "acc_norm": 0.25 if name == "own" else 0.75}}
        record.write(tmp_path / "records" / name / "removed~8.json")
    text = buddy("card", "--run", place, "--records", tmp_path / "records").out
    assert re.findall("average of 1 tasks: (.*) %", text) == ["25.00"]


def test_a_study_s_card_has_the_scores_and_the_gaps(maker):
    gone = maker.peer("sleb", 8, lora="trained")
    (maker.records / "accuracy" / gone.path / "removed~8.json").unlink()
    text = buddy("card", "--study", maker.folder).out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("| ")}
    heads = next(cells for name, cells in rows.items() if name.startswith("accuracy"))
    assert [head.split()[0] for head in heads] == ["0", "4", "8"]
    for method, depth in (("dense", 0), ("shortgpt", 4), ("buddy", 8)):
        run = maker.config.main_run(BACKBONE) if method == "buddy" else None
        run = run or (
            maker.peer(method, depth, lora="trained") if depth else maker.config.method_runs(BACKBONE, method)[0]
        )
        path = maker.records / "accuracy" / run.path / f"removed~{depth}.json"
        label = {"dense": "Dense", "shortgpt": "ShortGPT", "buddy": "BUDDY"}[method]
        assert rows[label][[0, 4, 8].index(depth)].split()[0] == f"{averaged(path):.2f}"
    assert rows["SLEB"][2].strip() == MISSING
    assert f"- accuracy of SLEB on {BACKBONE} with 8 blocks removed" in text
    assert "its licence: apache-2.0" in text
    assert "- speed on a GPU" in text


def test_the_page_of_the_study_begins_with_the_same_words(maker):
    study = load(maker.folder)
    blocks = Page(SimpleNamespace(MarkdownBlock=lambda text: text), study, "me", "buddy", {}).blocks()
    told = cards.provenance(study)
    assert next(blocks) == told
    assert told in buddy("card", "--study", maker.folder).out
    assert f"{len(study.records)} records" in told


def test_no_file_of_the_user_s_is_replaced(maker, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    asked = ("card", "--study", maker.folder, "--out")
    assert "is not a card that buddy made" in buddy(*asked, tmp_path / "README.md").mistake
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    for _ in range(2):
        assert buddy(*asked, tmp_path / "card.md").status == 0
    assert (tmp_path / "card.md").read_text().startswith(cards.MARK)
    assert "give --run or --study" in buddy("card").mistake
    assert "give --run or --study" in buddy("card", "--run", "x", "--study", "y").mistake
