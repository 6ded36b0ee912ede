"""metrics.jsonl and TensorBoard."""

import numpy as np
import pytest
from PIL import Image

from m3ae_fast import M3AEFastWarning
from m3ae_fast.train import pretrain
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


@pytest.fixture
def board():
    """board(folder): everything that TensorBoard reads there."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder):
        return accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()

    return read


def test_tensorboard_has_the_pictures_of_a_run(config, tmp_path, board):
    pretrain(config(steps=4, picture_every=2), tmp_path / "run", progress=False)
    found = board(tmp_path / "run")
    assert found.Tags()["images"] == ["reconstruction"]
    shown = found.Images("reconstruction")
    assert [each.step for each in shown] == [2, 4]
    drawn = Image.open(tmp_path / "run" / "pictures" / "reconstruction-00000004.png").convert("RGB")
    (tmp_path / "shown.png").write_bytes(shown[-1].encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "shown.png").convert("RGB")), np.asarray(drawn))


def test_tensorboard_compares_runs_by_their_settings(config, tmp_path, board):
    """As its plugin reads them; also after a resume."""
    plugin = pytest.importorskip("tensorboard.plugins.hparams.metadata")
    for resume, stop in ((False, 1), (True, None)):
        given = config(steps=2, lr=0.003, data=["shapes", "cluttered=3"], val_data="shapes", picture_every=0)
        pretrain(given, tmp_path / "run", resume=resume, stop_after=stop, progress=False)
    content = board(tmp_path / "run").summary_metadata
    start = plugin.parse_session_start_info_plugin_data(
        content["_hparams_/session_start_info"].plugin_data.content
    ).hparams
    assert start["lr"].number_value == 0.003 and start["model.width"].number_value == 128
    assert start["objective"].string_value == "m3ae" and start["data"].string_value == '["shapes", "cluttered=3"]'
    experiment = plugin.parse_experiment_plugin_data(content["_hparams_/experiment"].plugin_data.content)
    names = [each.name.tag for each in experiment.metric_infos]
    assert names == ["loss", "image_loss", "text_loss", "text_accuracy", "val_loss"]
