"""Files of a run folder are complete or absent."""

import os

import pytest
import torch
from torch import nn

from qat.errors import CheckpointError, ConfigError
from qat.pipeline.storage import AtomicCheckpointIO, claim, load_weights, read_json, save_weights, write, write_text


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(path, half)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]


def test_weights_round_trip_with_ties_and_say_what_is_wrong(tmp_path):
    def network():
        one = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        one[2].weight = one[0].weight
        return one

    first, second = network(), network()
    path = tmp_path / "part" / "weights.safetensors"
    with pytest.raises(CheckpointError, match="is missing"):
        load_weights(second, path)
    save_weights(first, path)
    load_weights(second, path)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert second[0].weight is second[2].weight
    with pytest.raises(CheckpointError, match="of this network"):
        load_weights(nn.Linear(2, 2), path)
    whole = path.read_bytes()
    for damaged in (whole[:-7], b"", whole[8:], flipped(whole, len(whole) - 9), flipped(whole, 12)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_weights(second, path)


def test_checkpoints_are_atomic_and_load_weights_only(tmp_path):
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"step": 1}, tmp_path / "a" / "last.ckpt")
    with pytest.raises(Exception, match="pickle"):
        plugin.save_checkpoint({"step": lambda: 0}, tmp_path / "a" / "last.ckpt")
    assert plugin.load_checkpoint(tmp_path / "a" / "last.ckpt", weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path / "a") == ["last.ckpt"]


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]


@pytest.mark.parametrize("damage", [lambda c: c[:-300], lambda c: b"", lambda c: b"hello" * 50, lambda c: c[64:],
                                    lambda c: flipped(c, len(c) // 2)])
def test_a_damaged_checkpoint_is_said_to_be(tmp_path, damage):
    plugin, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    plugin.save_checkpoint({"weights": torch.zeros(300)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged .* Delete it"):
        plugin.load_checkpoint(path, weights_only=True)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        plugin.load_checkpoint(path, weights_only=True)


def test_json_that_is_missing_or_damaged_is_said_to_be(tmp_path):
    path = tmp_path / "coverage.json"
    with pytest.raises(CheckpointError, match="missing"):
        read_json(path)
    for content in (b"{", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            read_json(path)


def test_one_process_per_folder(tmp_path):
    with claim(tmp_path), pytest.raises(ConfigError, match="Another process"), claim(tmp_path):
        pass
    with claim(tmp_path):
        pass
