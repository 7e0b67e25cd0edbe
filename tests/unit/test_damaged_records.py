"""A record that cannot be used is named in the note of its table, and stops no other record."""

import json

import pytest
from records_factory import Maker, demo

from buddy.reporting import render, study, tables


@pytest.fixture
def made(tmp_path):
    maker = Maker(tmp_path, demo())
    maker.everything()
    return maker


def edited(*keys, value):
    """A change of one value deep in a record."""

    def change(content):
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return json.dumps(content)

    return change


DAMAGE = {
    "percent for a fraction": (
        edited("metrics", "tasks", "piqa", "acc_norm", value=62.5),
        "62.5 is not between 0 and 1",
    ),
    "negative": (edited("metrics", "tasks", "boolq", "acc", value=-0.1), "-0.1 is not between 0 and 1"),
    "text": (edited("metrics", "tasks", "boolq", "acc", value="high"), "not a complete record"),
    "NaN": (edited("metrics", "tasks", "boolq", "acc", value=float("nan")), "NaN, which is no number"),
    "huge": (edited("metrics", "tasks", "boolq", "acc", value=10**400), "not a complete record"),
    "error": (edited("metrics", "tasks", "boolq", "acc_stderr", value=-1), "its standard error -1"),
    "no items": (edited("metrics", "tasks", "boolq", "n", value=0), "of 0 items"),
    "another score than its items": (
        edited("metrics", "tasks", "boolq", value={"acc": 0.9, "n": 4, "items": {"acc": "0001"}}),
        "0.9, but 1 of its 4 items are right",
    ),
    "budget a number": (edited("budget", value=5), "budget: 5 is not a budget"),
    "budget that does not add up": (edited("budget", "removed", value=29), "does not add up"),
    "budget of text": (edited("budget", "executed", value="all"), "not a complete record"),
    "metrics a list": (edited("metrics", value=[1]), "metrics: [1] is not an object"),
    "tasks a list": (edited("metrics", "tasks", value=[1]), "not a complete record"),
    "a seed of text": (edited("seed", value="0"), "seed: '0' is not a whole number"),
    "truth for a count": (edited("n", value=True), "n: True is not a whole number"),
    "a foreign key": (edited("mine", value=1), "not a complete record"),
    "an unknown kind": (edited("kind", value="accurracy"), "did you mean accuracy?"),
    "newer": (edited("schema", value=99), "newer"),
    "cut short": (lambda content: json.dumps(content)[:200], "not a readable record"),
    "empty": (lambda content: "", "not a readable record"),
    "zeros": (lambda content: "\0" * 300, "not a readable record"),
    "nested": (lambda content: "[" * 100_000, "not a readable record"),
    "a list": (lambda content: "[]", "not a record"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_others_are_drawn_and_the_note_names_it(made, kind):
    damage, reason = DAMAGE[kind]
    before = tables.build(study.load(made.folder), "table2")
    path = next(
        path for path in sorted((made.records / "accuracy").rglob("removed~8.json")) if "prior~taylor" in str(path)
    )
    path.write_text(damage(json.loads(path.read_text())))
    after = tables.build(study.load(made.folder), "table2")
    told = [note for note in after.notes if path.relative_to(made.records).as_posix() in note]
    assert len(told) == 1, after.notes
    assert reason in told[0]
    assert told[0] in render.to_markdown(after)
    lost = [one for one, other in zip(before.records(), after.records(), strict=True) if one["value"] != other["value"]]
    assert lost
    assert {(row["method"], row["removed"]) for row in lost} == {("buddy", 8)}
    assert {row["note"] for row in after.records() if row["value"] is None} >= {"not measured"}


def test_every_table_stands_beside_damaged_records_of_every_kind(made):
    opened = study.load(made.folder)
    named = tables.names(opened)
    for path in sorted(made.records.rglob("*.json")):
        path.write_text('{"kind": ')
    after = study.load(made.folder)
    for name in named:
        built = tables.build(after, name)
        assert {row["value"] for row in built.records()} == {None}
        assert any("Left out" in note for note in built.notes), name
        assert max(map(len, built.notes)) < 1500


def test_a_kind_without_damage_has_no_such_note(made):
    path = next(iter(sorted((made.records / "latency").rglob("*.json"))))
    path.write_text("")
    opened = study.load(made.folder)
    assert not any("Left out" in note for note in tables.build(opened, "table2").notes)
    assert any("Left out" in note for note in tables.build(opened, "table4").notes)
