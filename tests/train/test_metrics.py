"""metrics.jsonl and TensorBoard."""

import pytest

from m3ae_fast import M3AEFastWarning
from m3ae_fast.train.metrics import Metrics, read

FIELDS = ("step", "loss", "image_loss", "text_loss", "text_accuracy", "lr", "tokens_per_second")


def row(step):
    return {"step": step} | {name: step / 3 for name in FIELDS[1:]}


def test_a_row_a_step_readable_at_once(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write(row(step))
            assert read(tmp_path / "metrics.jsonl")[-1] == row(step)
    assert tuple(read(tmp_path / "metrics.jsonl")[0]) == FIELDS
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_resuming_drops_rows_past_the_checkpoint_and_a_broken_last_line(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.write(row(step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with Metrics(tmp_path, step=3) as metrics:
        metrics.write(row(4))
    assert read(tmp_path / "metrics.jsonl") == [row(step) for step in (1, 2, 3, 4)]


def test_rows_that_are_missing_are_told(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(row(1))
    with pytest.warns(M3AEFastWarning, match=r"metrics.jsonl has 1 of the 3 rows"), Metrics(tmp_path, step=3):
        pass


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = Metrics(tmp_path)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        metrics.write(row(1))
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        metrics.__exit__()
