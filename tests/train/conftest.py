"""A run that takes seconds."""

import warnings

import numpy as np
import pytest
from PIL import Image

from m3ae_fast import M3AEFastWarning
from m3ae_fast.train import RunConfig, metrics, pretrain, run, trainer

NUMBERS = ("loss", "image_loss", "text_loss", "text_accuracy", "lr")


@pytest.fixture(autouse=True)
def small_and_quiet(threads, monkeypatch):
    """One thread: these sizes are too small to share, and a busy machine makes threads wait for one another."""
    threads(1)
    monkeypatch.setattr(run, "LEARN_WORDS_FROM", 300)


@pytest.fixture
def config():
    """config(**changes): two-sample steps on 32-pixel scenes."""

    def make(**changes):
        settings = {"steps": 12, "batch_size": 2, "image_size": 32, "device": "cpu"}
        return RunConfig(**(settings | changes))

    return make


@pytest.fixture
def train(config, rows, tmp_path, monkeypatch):
    """train(out="run", **settings): the rows of metrics.jsonl that the run leaves, without time and pictures."""
    monkeypatch.setattr(trainer, "draw_pictures", lambda *_: None)

    def call(out="run", *, resume=False, stop_after=None, **changes):
        pretrain(config(**changes), tmp_path / out, resume=resume, stop_after=stop_after, progress=False)
        return rows(out)

    return call


@pytest.fixture
def rows(tmp_path):
    """rows(out="run"): what metrics.jsonl says, to the bit, without the rate."""

    def read(out="run"):
        found = metrics.read(tmp_path / out / "metrics.jsonl")
        return [(row["step"], *(row[name] for name in NUMBERS)) for row in found]

    return read


@pytest.fixture
def make_photos(tmp_path):
    """make_photos(name, count): a folder of images with captions."""

    def make(name, count):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
            (folder / f"{i}.txt").write_text(f"noise number {i} with all its colors\n", encoding="utf-8")
        return folder

    return make


@pytest.fixture
def photos(make_photos):
    """A folder of three images with captions."""
    return make_photos("photos", 3)


@pytest.fixture
def counted_warnings():
    """M3AEFastWarning is an error in tests: here it is collected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", M3AEFastWarning)
        yield caught
