"""What is kept for a killed job: whole and of the same making, or not gone on from."""

import pytest
import torch

from buddy.storage.checkpoints import Checkpoints, Damaged, found_below, made_by
from buddy.training import fingerprints

MADE_BY = {"settings": {"rate": 0.1, "sets": [(1, 2), (3,)]}, "seed": 0}
CONTENT = b"binary \x00\n content"


def test_what_is_kept_is_found_again_by_the_same_making_alone(tmp_path, caplog):
    Checkpoints(tmp_path, MADE_BY).write("table.bin", CONTENT)
    assert Checkpoints(tmp_path, MADE_BY).read("table.bin") == CONTENT
    assert Checkpoints(tmp_path, MADE_BY).read("other.bin") is None
    assert caplog.messages == []
    other = Checkpoints(tmp_path, {**MADE_BY, "settings": {"rate": 0.2, "sets": [(1, 2), (3,)]}})
    assert other.read("table.bin") is None
    (line,) = caplog.messages
    assert "table.bin: not of this making (settings.rate is 0.1, here 0.2): set aside as " in line
    (aside,) = tmp_path.glob("aside-*/table.bin")
    assert made_by(aside)["settings"]["rate"] == 0.1
    other.write("table.bin", b"")
    assert other.read("table.bin") == b""


def test_a_file_cut_anywhere_or_changed_anywhere_is_damaged(tmp_path):
    kept = Checkpoints(tmp_path, MADE_BY)
    kept.write("whole", CONTENT)
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        assert kept.read("cut") is None, length
        assert not (tmp_path / "cut").exists()
    for place in range(whole.index(b"\n"), len(whole)):
        (tmp_path / "turned").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert kept.read("turned") is None, place
    assert kept.read("whole") == CONTENT


def test_the_last_two_steps_are_kept_and_the_last_whole_one_counts(tmp_path):
    kept = Checkpoints(tmp_path, MADE_BY)
    assert kept.last_step() is None
    for step in (90, 100, 1000):
        kept.write_step(step, str(step).encode())
    assert len(list(tmp_path.iterdir())) == 2
    last, before = sorted(tmp_path.iterdir(), reverse=True)
    assert kept.last_step() == b"1000"
    last.write_bytes(last.read_bytes()[:-2])
    assert kept.last_step() == b"100"
    before.write_bytes(b"")
    assert kept.last_step() is None


def test_a_folder_counts_once_it_is_sealed(tmp_path):
    kept = Checkpoints(tmp_path, MADE_BY)
    for step in (8, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_bytes(CONTENT)
        if step == 8:
            kept.seal(folder)
    with pytest.raises(Damaged, match="cut off before it was finished"):
        made_by(tmp_path / "checkpoint-10")
    assert [path.name for path in found_below(tmp_path)] == ["checkpoint-10", "checkpoint-8"]
    assert kept.last() == tmp_path / "checkpoint-8"
    (tmp_path / "checkpoint-8" / "adapter" / "weights").write_bytes(CONTENT[:-1])
    assert kept.last() is None


def test_weights_are_told_apart_and_known_again():
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(300, 300), torch.nn.Linear(300, 300)
    twin.load_state_dict(model.state_dict())
    assert fingerprints.of_weights(model) == fingerprints.of_weights(twin)
    assert fingerprints.of_weights(model.bfloat16()) != fingerprints.of_weights(twin)
    before = fingerprints.of_weights(twin)
    with torch.no_grad():
        twin.bias[7] += 1e-6
    assert fingerprints.of_weights(twin) != before


def test_examples_are_told_apart():
    rows = [{"input_ids": [1, 2, 3], "prompt_length": 2}, {"input_ids": [4, 5], "prompt_length": 1}]
    found = {fingerprints.of_examples(some) for some in (rows, rows[::-1], rows[:1], [{**rows[0], "prompt_length": 1}])}
    assert len(found) == 4
