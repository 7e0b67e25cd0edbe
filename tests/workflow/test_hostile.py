"""Names in a study that a shell could run: each reaches its command as the one word that it is, by the real Snakemake."""

import json

import pytest
import yaml
from checkout import clone, snakemake

RECORDER = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
given = dict(zip(words, words[1:]))
named = {name: os.environ.get(name) for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DIR")}
said = pathlib.Path("said"); said.mkdir(exist_ok=True)
(said / f"{time.time_ns()}.json").write_text(json.dumps([words, named]))
files = {"backbone": "backbone.json", "data": "data.json", "encoder": "encoder.json", "train": "run.json", "adapt": "run.json"}
out = pathlib.Path(given["--out"])
for file in [out / files[words[0]] if words[0] in files else out, given.get("--record")]:
    if file is not None:
        pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(file).write_text("{}")
"""
"""In place of `buddy`: what each command was given, and an empty file where its output would be."""

HOSTILE = [
    "$(touch RAN)",
    "`touch RAN`",
    "; touch RAN #",
    "x && touch RAN",
    "a' ; touch RAN ; '",
    'a" ; touch RAN ; "',
    "| tee RAN",
    "> RAN",
    "-rRAN",
    "--out=RAN",
    "my book",
    "$HOME * ~ !! \\ %s",
    "Bücher 💥",
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = clone(tmp_path_factory.mktemp("clone"))
    (folder / "buddy/__main__.py").write_text(RECORDER)
    return folder


def study(name, turn):
    """A study whose every free text is hostile, and the words that its commands must get: (overlay, {command: words})."""
    word = lambda place: HOSTILE[(turn + place) % len(HOSTILE)]  # noqa: E731 - every place gets every name in turn
    hub, revision, folder, file, tokenizer = (word(place) for place in range(5))
    source, corpus, other, encoder, project, entity = (word(place) for place in range(5, 11))
    sized = {"blocks": 6, "removed": [1]}
    overlay = {
        "study": {
            "name": name,
            "backbones": ["hub", "folder", "wheel", "random"],
            "methods": ["sleb", "pudding", "buddy"],
            "ablations": [],
            "tables": {"table2": {"kind": "accuracy", "backbone": "hub"}},
        },
        "backbones": {
            "hub": {"source": {"hub": hub, "revision": revision}, **sized},
            "folder": {"source": {"folder": folder}, **sized},
            "wheel": {"source": {"wheel": "x", "version": "1", "file": file, "sha256": "0" * 64}, **sized},
            "random": {"source": {"random": "tiny-llama", "tokenizer": tokenizer}, **sized},
        },
        "data": {"source": source},
        "importance": {"corpus": f"{corpus}.txt"},
        "orders": {"backbones": ["hub"], "indicators": ["taylor"], "corpora": [f"{other}/extra.txt"], "lengths": []},
        "peers": {"corpus": f"{other}/peers.txt"},
        "pudding": {"tasks": ["piqa"], "encoder": encoder},
        "tracking": {"project": project, "entity": entity},
        **{section: {"backbones": ["hub"]} for section in ("generation", "trace", "summaries", "latency", "breakdown")},
    }
    expected = {
        "backbone": [["--hub", hub], ["--revision", revision], ["--folder", folder], ["--file", file], ["--tokenizer", tokenizer]],
        "data": [["--source", source]],
        "importance": [["--corpus", f"{corpus}.txt"], ["--corpus", f"{other}/extra.txt"]],
        "calibrate": [["--corpus", f"{other}/peers.txt"]],
        "encoder": [["--source", encoder]],
    }  # fmt: skip
    return overlay, expected, project, entity


def _apart(words):
    """Options and values apart: a value that begins with a dash comes in one word with its option."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]


@pytest.mark.parametrize("turn", [0, 5, 10])
def test_no_name_of_a_study_is_run_by_a_shell(checkout, turn):
    name = f"hostile-{turn}"
    overlay, expected, project, entity = study(name, turn)
    for text in (overlay["importance"]["corpus"], *overlay["orders"]["corpora"], overlay["peers"]["corpus"]):
        (checkout / text).parent.mkdir(exist_ok=True)
        (checkout / text).write_text("prose")
    (checkout / "study.yaml").write_text(yaml.safe_dump(overlay, allow_unicode=True))
    for file in (checkout / "said").glob("*"):
        file.unlink()
    results = f"results/{name}"
    records = f"{results}/records"
    targets = [
        *(f"{results}/backbones/{kind}/backbone.json" for kind in ("folder", "wheel", "random")),
        f"{records}/importance/backbone~hub/indicator~taylor.json",
        f"{records}/importance/backbone~hub/corpus~extra/indicator~taylor.json",
        f"{records}/calibration/backbone~hub/method~sleb/criterion~ppl.json",
        f"{results}/runs/backbone~hub/method~pudding/removed~1/lora~trained/seed~0/run.json",
    ]
    ran = snakemake(checkout, "--cores", "2", "--configfile", "study.yaml", "--", *targets)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not list(checkout.rglob("RAN"))
    commands = [json.loads(file.read_text()) for file in sorted((checkout / "said").glob("*.json"))]
    for command, pairs in expected.items():
        words = [_apart(given) for given, _ in commands if given[0] == command]
        for pair in pairs:
            assert any(pair in [given[i : i + 2] for i in range(len(given))] for given in words), (command, pair, words)
    for _, named in commands:
        assert named == {"WANDB_PROJECT": project, "WANDB_ENTITY": entity, "WANDB_DIR": f"{results}/wandb"}


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ({"importance": {"corpus": "book.txt"}}, "importance.corpus: 'book.txt' is neither a prose set"),
        ({"peers": {"corpus": "piqa"}}, "peers.corpus: 'piqa' is neither a prose set"),
    ],
)
def test_a_corpus_that_is_not_there_is_told_while_planning(checkout, overlay, said):
    (checkout / "wrong.yaml").write_text(yaml.safe_dump(overlay))
    ran = snakemake(checkout, "-n", "--configfile", "wrong.yaml")
    assert ran.returncode != 0
    assert said in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
