"""Checkpoints: whole or refused, and never in the way of an older one."""

import errno
import os
import random
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from m3ae_fast.train import checkpoint
from m3ae_fast.train.average import Average

CONFIG = {"steps": 12, "model_config": {"width": 8}}


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 7)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_everything_comes_back_to_the_bit(trained, tmp_path):
    model, optimizer = trained
    path = checkpoint.step_path(tmp_path, 5)
    checkpoint.save(path, 5, CONFIG, model, optimizer)
    saved = checkpoint.load(path)
    assert (saved.step, saved.config) == (5, CONFIG)
    other = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
    fresh = torch.optim.AdamW(other.parameters())
    checkpoint.restore(saved, other, fresh)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        before, after = optimizer.state[ours], fresh.state[theirs]
        assert before.keys() == after.keys() >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(
            torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
        )


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="what is mapped is told by /proc")
def test_what_is_restored_does_not_keep_the_file_in_memory(trained, tmp_path):
    model, optimizer = trained
    path, average = checkpoint.step_path(tmp_path, 5), Average(model, 0.9)
    checkpoint.save(path, 5, CONFIG, model, optimizer, average=average)
    saved = checkpoint.load(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    checkpoint.restore(saved, model, optimizer, average)
    del saved
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_file_cut_anywhere_is_refused(trained, tmp_path):
    path = checkpoint.step_path(tmp_path, 5)
    checkpoint.save(path, 5, CONFIG, *trained)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"step-00000005.safetensors is not a whole checkpoint"):
            checkpoint.load(path)


def test_one_flipped_bit_anywhere_is_refused(trained, tmp_path):
    path = checkpoint.step_path(tmp_path, 5)
    checkpoint.save(path, 5, CONFIG, *trained)
    whole = path.read_bytes()
    for position in random.Random(0).sample(range(len(whole)), 300):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"step-00000005.safetensors is"):
            checkpoint.load(path)


def test_a_full_disk_names_the_file_and_leaves_the_old_one(trained, tmp_path):
    path = checkpoint.step_path(tmp_path, 5)
    checkpoint.save(path, 5, CONFIG, *trained)
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))  # as near to a full disk as one gets without root
    try:
        with pytest.raises(OSError, match=r"step-00000005.safetensors cannot be written"):
            checkpoint.save(path, 5, CONFIG, *trained)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_disk_that_fills_at_the_last_moment_does_the_same(trained, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*step-00000005.safetensors'"):
        checkpoint.save(checkpoint.step_path(tmp_path, 5), 5, CONFIG, *trained)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"other.safetensors is a safetensors file, but not a checkpoint of m3ae_fast"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match=r"missing.safetensors is not a checkpoint: no such file"):
        checkpoint.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    "header, name", [({"config": {}}, "step"), ({"step": "5", "config": {}}, "step"), ({"step": 5}, "config")]
)
def test_a_header_that_lacks_something_is_refused(tmp_path, header, name):
    path = checkpoint.step_path(tmp_path, 5)
    checkpoint._save_file(path, {"format": checkpoint.FORMAT, **header}, {"model.x": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"is not a whole checkpoint: its {name} must be"):
        checkpoint.load(path)


def test_the_newest_two_are_kept(trained, tmp_path):
    for step in (3, 20, 100):
        checkpoint.save(checkpoint.step_path(tmp_path, step), step, CONFIG, *trained)
    for name in (".step-00000007.safetensors.tmp", ".tmpQ4Ge76"):
        (tmp_path / name).write_text("left by a process that was killed")
    checkpoint.keep_last(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020.safetensors", "step-00000100.safetensors"]
    assert checkpoint.latest(tmp_path).name == "step-00000100.safetensors"


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.latest(tmp_path)


def test_differences_are_listed_by_field():
    found = checkpoint.differences({"a": 1, "m": {"width": 8, "depth": 2}}, {"a": 1, "m": {"width": 9, "depth": 2}})
    assert found == ["m.width: 8 there, 9 asked for"]
