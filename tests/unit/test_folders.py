"""What a command may write into: a folder that is absent, empty, or of its own making; never a user's."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import buddy
from models import saved, tiny, with_router

from buddy import runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.errors import UserError
from buddy.storage import folders

ROW = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny backbone, a data set, prose and a run with its importance record: what commands read."""
    root = tmp_path_factory.mktemp("parts")
    assert buddy("backbone", "--random", "tiny-llama", "--layers", 4, "--out", root / "backbone").status == 0
    for name in ("alpaca", "piqa"):
        assert buddy("data", "--name", name, "--source", "embedded", "--out", root / "data" / name).status == 0
    (root / "book.txt").write_text("A long day by the sea. " * 200)
    return root


def makers(parts):
    """The commands that make a folder, each with all that it needs but ``--out``."""
    training = ("--backbone", parts / "backbone", "--data", parts / "data/alpaca", "--device", "cpu", "--examples", 1)
    training = (*training, "--epochs", 1, "--batch-size", 1, "--max-length", 256, "--lora-rank", 1, "--warmup-steps", 0)
    return {
        "backbone": ("backbone", "--random", "tiny-llama", "--layers", 3),
        "data": ("data", "--name", "piqa", "--source", "embedded"),
        "encoder": ("encoder", "--source", parts / "backbone"),
        "train": ("train", *training, "--most-removed", 1, "--router-rank", 2),
        "adapt": ("adapt", "--method", "dense_lora", *training),
    }


MAKERS = ("backbone", "data", "encoder", "train", "adapt")


def tree(folder: Path):
    """Every file below a folder with its content, links as links."""
    return {
        path.relative_to(folder).as_posix(): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def users_model(folder):
    """A model of the user's in Hugging Face format: exactly the names that a backbone has."""
    tiny("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def users_rows(folder):
    folder.mkdir()
    (folder / "mine.jsonl").write_text(json.dumps(ROW) + "\n")


def users_named_rows(folder):
    """Exactly the names that a data set has, and a data.json of the user's own."""
    folder.mkdir()
    (folder / "validation.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "data.json").write_text('{"name": "mine"}')


def users_checkpoints(folder):
    """What another trainer left: a folder that ours has, too."""
    (folder / "checkpoints/checkpoint-500").mkdir(parents=True)
    (folder / "checkpoints/checkpoint-500/trainer_state.json").write_text("{}")
    (folder / "checkpoints/checkpoint-500/model.safetensors").write_bytes(b"weeks of work")


def users_run(folder):
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"weeks of work")
    (folder / "run.json").write_text('{"learning_rate": 1}')


def users_mark(folder):
    """A file of the mark's name that says nothing."""
    folder.mkdir()
    (folder / folders.MARK).write_text("[]")
    (folder / "thesis.tex").write_text("precious")


FOREIGN = (users_model, users_rows, users_named_rows, users_checkpoints, users_run, users_mark)


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("command", MAKERS)
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_of_the_users_stays_as_it_is(parts, tmp_path, command, foreign, linked):
    theirs = tmp_path / "theirs"
    foreign(theirs)
    before = tree(theirs)
    out = theirs
    if linked:
        out = tmp_path / "link"
        out.symlink_to(theirs)
    said = buddy(*makers(parts)[command], "--out", out)
    assert str(out) in said.mistake
    assert "nothing was touched" in said.mistake
    assert tree(theirs) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["link", "theirs"] if linked else ["theirs"])


@pytest.mark.parametrize("command", MAKERS)
def test_absent_empty_and_its_own_are_written(parts, tmp_path, command):
    out = tmp_path / "deep" / "out"
    assert buddy(*makers(parts)[command], "--out", out).status == 0  # absent
    made = tree(out)
    assert buddy(*makers(parts)[command], "--out", out).status == 0  # its own
    assert tree(out).keys() == made.keys()
    for name in ("backbone.json", "data.json", "encoder.json", "run.json"):  # as Snakemake does before a job runs again
        (out / name).unlink(missing_ok=True)
    assert buddy(*makers(parts)[command], "--out", out).status == 0
    assert tree(out).keys() == made.keys()
    shutil.rmtree(out)
    out.mkdir()
    assert buddy(*makers(parts)[command], "--out", out).status == 0  # empty
    assert tree(out).keys() == made.keys()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("command", MAKERS)
@pytest.mark.parametrize("other", MAKERS)
def test_one_command_never_takes_the_folder_of_another(parts, tmp_path, command, other):
    if {command, other} <= {"train", "adapt"} or command == other:
        return  # both make runs
    out = tmp_path / "out"
    assert buddy(*makers(parts)[other], "--out", out).status == 0
    before = tree(out)
    assert "holds other files" in buddy(*makers(parts)[command], "--out", out).mistake
    assert tree(out) == before


@pytest.mark.parametrize("command", ["backbone", "data", "encoder"])
def test_what_a_user_put_beside_is_not_replaced(parts, tmp_path, command):
    out = tmp_path / "out"
    words = list(map(str, makers(parts)[command]))
    assert buddy(*words, "--out", out).status == 0
    (out / "tokenizer_notes.jsonl").write_text("precious")  # a name that a backbone's or a data set's file could have
    other = {"backbone": ["--seed", 1], "data": [], "encoder": ["--revision", "other"]}[command]
    assert "tokenizer_notes.jsonl" in buddy(*words, *other, "--out", out).mistake
    assert (out / "tokenizer_notes.jsonl").read_text() == "precious"


def test_a_run_keeps_what_lies_beside_it(parts, tmp_path):
    out = tmp_path / "run"
    assert buddy(*makers(parts)["adapt"], "--out", out).status == 0
    (out / "notes.txt").write_text("precious")
    assert buddy(*makers(parts)["adapt"], "--out", out).status == 0
    assert (out / "notes.txt").read_text() == "precious"


def test_a_backbone_is_never_linked_to_itself(parts, tmp_path):
    out = tmp_path / "out"
    assert buddy("backbone", "--folder", parts / "backbone", "--out", out).status == 0
    before = tree(out)
    assert "is the folder to link" in buddy("backbone", "--folder", out, "--out", out).mistake
    assert tree(out) == before


def test_folders_made_before_there_were_marks_are_known(parts, tmp_path):
    for command in ("backbone", "data"):
        out = tmp_path / command
        assert buddy(*makers(parts)[command], "--out", out).status == 0
        (out / folders.MARK).unlink()
        assert buddy(*makers(parts)[command], "--out", out).status == 0
        (out / folders.MARK).unlink(missing_ok=True)
        (out / "validation.csv").write_text("precious")
        before = tree(out)
        assert "holds other files" in buddy(*makers(parts)[command], "--out", out).mistake
        assert tree(out) == before


def test_runs_made_before_there_were_marks_are_known(tmp_path):
    model = with_router(tiny("llama"))
    model.tokenizer = byte_tokenizer()
    run = saved(model, tmp_path)
    (run / folders.MARK).unlink()
    runs.claim(run)
    killed = tmp_path / "killed"
    (killed / "checkpoints/checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match="holds other files than a run"):
        runs.claim(killed)
    (killed / "checkpoints/checkpoint-3" / runs.ROUTER_FILE).touch()
    runs.claim(killed)
    (killed / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex"):
        runs.claim(killed)


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with folders.fresh(out, "a thing") as draft:
        (draft / "first").touch()
    real = folders.os.rename

    def fails_to_place(old, new):
        if ".partial-" in str(old):
            raise OSError("no space left")
        real(old, new)

    monkeypatch.setattr(folders.os, "rename", fails_to_place)
    with pytest.raises(OSError, match="no space"), folders.fresh(out, "a thing") as draft:
        (draft / "second").touch()
    assert sorted(path.name for path in out.iterdir()) == [folders.MARK, "first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Records are files, and so is a user's book


def recorders(parts):
    """The commands that write a record to a file, with the option that names it."""
    training, run = makers(parts), ["--out", "RUN"]
    ranked = ("--backbone", parts / "backbone", "--corpus", parts / "book.txt", "--samples", 1, "--length", 16)
    return {
        "importance": ("importance", *ranked, "--indicator", "cosine", "--out"),
        "calibrate": ("calibrate", *ranked, "--method", "shortgpt", "--removed", 1, "--out"),
        "train": (*training["train"], *run, "--record"),
        "adapt": (*training["adapt"], *run, "--record"),
    }


@pytest.mark.parametrize("command", ["importance", "calibrate", "train", "adapt"])
def test_a_file_of_the_users_is_no_record_to_replace(parts, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    words = recorders(parts)[command]
    for name, content in {"book.txt": "precious", "mine.json": '{"name": "mine"}', "weights": "\0\1"}.items():
        (tmp_path / name).write_text(content)
        assert "is a file that is no record" in buddy(*words, tmp_path / name).mistake
        assert (tmp_path / name).read_text() == content
    (tmp_path / "folder").mkdir()
    assert "is a folder; name a file" in buddy(*words, tmp_path / "folder").mistake
    assert "is not a folder" in buddy(*words, tmp_path / "book.txt" / "record.json").mistake
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "folder", "mine.json", "weights"]


def test_a_record_is_replaced_even_if_it_was_cut_short(parts, tmp_path):
    words, out = recorders(parts)["importance"], tmp_path / "record.json"
    assert buddy(*words, out).status == 0
    whole = out.read_text()
    for length in (0, 20, len(whole)):
        out.write_text(whole[:length])
        assert buddy(*words, out).status == 0
        assert json.loads(out.read_text())["metrics"] == json.loads(whole)["metrics"]


def test_folders_of_records_are_checked_before_the_work(parts, tmp_path):
    words = ("evaluate", "--run", parts / "backbone", "--data", parts / "data", "--tasks", "piqa", "--limit", 2)
    (tmp_path / "removed~0.json").write_text("precious")
    assert "is a file that is no record" in buddy(*words, "--out", tmp_path).mistake
    assert "is a file; name a folder" in buddy(*words, "--out", tmp_path / "removed~0.json").mistake
    assert "is not a folder" in buddy(*words, "--out", tmp_path / "removed~0.json" / "deep").mistake
    assert (tmp_path / "removed~0.json").read_text() == "precious"
