"""Images of any channels and of rectangular sizes, from the command line to the picture and the probe."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast import ImageTextBatch, M3AEFastWarning
from m3ae_fast.downstream.tasks.finetune import Classifier, load_classifier
from m3ae_fast.models import MAE, M3AEConfig
from m3ae_fast.nn.positions import resample_positions, sincos_2d
from m3ae_fast.train import RunConfig, load_run, pictures, pretrain

SMALL = ["--steps", "2", "--batch-size", "2", "--device", "cpu", "--objective", "mae", "--set", "depth=1"]


@pytest.fixture
def tiles(tmp_path):
    """A folder of two classes, .npy files of [9, 40, 48] uint8."""
    folder = tmp_path / "tiles"
    for number in range(8):
        rng = np.random.default_rng(number)
        image = rng.integers(0, 128, (9, 40, 48), dtype=np.uint8) + np.uint8(100 * (number % 2))
        path = folder / "ab"[number % 2] / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, image)
    return folder


@pytest.mark.parametrize("kind", ["nine channels", "rectangle"])
def test_any_image_trains_resumes_and_is_drawn_and_probed(tiles, tmp_path, command_line, kind):
    out, picture, results = tmp_path / "run", tmp_path / "out.png", tmp_path / "results.json"
    if kind == "rectangle":
        shape, channels, data, options = (32, 64), 3, "cluttered", ["--image-size", "32x64"]
    else:
        shape, channels, data = (32, 32), 9, tiles
        options = ["--image-size", "32", "--set", "channels=9"]
    train = ["pretrain", *SMALL, *options, "--data", data, "--out", out, "--picture-every", "0"]
    for more in (["--stop-after", "1"], ["--resume"]):
        status, _, err = command_line(*train, *more)
        assert status == 0, err
    run = load_run(out)
    assert (run.step, run.model.config.channels, run.model.config.image_shape) == (2, channels, shape)
    assert json.loads((out / "run.json").read_text())["image_size"] == (list(shape) if kind == "rectangle" else 32)
    assert list((out / "pictures").glob("reconstruction-*.png"))
    images = [] if kind == "rectangle" else [tiles / "a" / "0.npy"]
    for command in (["reconstruct", out, *images], ["attend", out, *images]):
        status, _, err = command_line(*command, "--out", picture)
        assert status == 0, err
        assert np.asarray(Image.open(picture).convert("RGB")).std() > 5
    scored = ["--data", data, "--train", data, "--samples", "8"]
    for command in (
        ["probe", out, *scored, "--train-samples", "8", "--out", results],
        ["finetune", out, *scored, "--steps", "1", "--batch-size", "2"],
    ):
        status, table, err = command_line(*command)
        assert status == 0 and "accuracy" in table, err


def test_a_rectangle_is_the_same_run_from_python_and_the_command_line(tmp_path, command_line):
    from_python = RunConfig(image_size=(32, 64)).resolved()
    assert from_python.image_size == [32, 64] and from_python == RunConfig(image_size=[32, 64]).resolved()
    pretrain(
        RunConfig(objective="mae", steps=2, batch_size=2, image_size=(32, 64), device="cpu", options={"depth": 1}),
        tmp_path / "run", stop_after=1, progress=False,
    )  # fmt: skip
    status, _, err = command_line("pretrain", *SMALL, "--image-size", "32x64", "--out", tmp_path / "run", "--resume")
    assert status == 0, err
    status, _, err = command_line("pretrain", *SMALL, "--image-size", "64x32", "--out", tmp_path / "run", "--resume")
    assert status == 2 and "image_size: [32, 64] there, [64, 32] asked for" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--image-size", "32x"],
            "argument --image-size: must be pixels a side, at least 1, or two such numbers as 128",
        ),
        (
            ["--image-size", "0x32"],
            "argument --image-size: must be pixels a side, at least 1, or two such numbers as 128",
        ),
        (["--image-size", "30x32"], "image_size must be a multiple of patch_size 8, got (30, 32)"),
        (["--set", "channels=17"], "channels must be in [1, 17), got 17"),
        (
            ["--set", "channels=9", "--set", "image_std=[1,1]"],
            "image_std must have 9 values, one a channel, got (1, 1)",
        ),
        (
            ["--data", "TILES"],
            "data must have images of 3 channels, as the model takes (pretrain --set channels=N), got",
        ),
        (["--set", "channels=9"], "data must have 9 channels, as the model takes, got 3 in shapes"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(tiles, tmp_path, command_line, options, message):
    options = [str(tiles) if each == "TILES" else each for each in options]
    status, _, err = command_line("pretrain", *SMALL, *options, "--out", tmp_path / "run")
    assert status == 2 and message in err.splitlines()[-1] and not (tmp_path / "run/run.json").exists()


@pytest.fixture
def first(tmp_path):
    """first(objective): the folder of a run of one step on 32 pixels, 4 x 4 patches."""

    def make(objective):
        config = RunConfig(objective=objective, steps=1, batch_size=2, image_size=32, device="cpu", picture_every=0)
        pretrain(config, tmp_path / "first", progress=False)
        return tmp_path / "first"

    return make


def tables_of(model):
    """Those of patches: not of words, nor of the rows and columns of mixed sizes."""
    own = {name: table for name, table in model.named_buffers() if name.endswith("position")}
    return {name: table for name, table in own.items() if "text" not in name and "side" not in name}


@pytest.mark.parametrize("objective", ["m3ae", "mamo", "clip"])
def test_a_trained_model_runs_at_another_size(first, objective):
    folder = first(objective)
    with pytest.warns(M3AEFastWarning, match="positions of 4 x 4 patches are resampled to 6 x 8"):
        run = load_run(folder, image_size=(48, 64))
    model, before = run.model, load_run(folder).model
    assert model.config.image_shape == (48, 64) and model.config.positions == "given" and not model.training
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in before.state_dict().items())
    tables = tables_of(model)
    assert tables and tables.keys() == tables_of(before).keys()
    for table in tables.values():
        expected = resample_positions(sincos_2d(4, 4, table.shape[1]), (4, 4), (6, 8))
        assert torch.equal(table, expected)
    batch = pictures.held_out(model.config, run.tokenizer, run.config, count=2)
    assert model.encode_cls(batch).isfinite().all()
    assert load_run(folder, image_size=32).model.config == before.config  # without a warning, which is an error here


def test_a_classifier_of_another_size_is_read_back_at_that_size(first, tmp_path, command_line):
    folder, file = first("mae"), tmp_path / "c.safetensors"
    tuned = ["--steps", "1", "--batch-size", "2", "--samples", "4", "--save", file, "--image-size", "48"]
    with warnings.catch_warnings():
        warnings.simplefilter("always", M3AEFastWarning)
        status, _, err = command_line("finetune", folder, *tuned)
    assert status == 0 and "positions of 4 x 4 patches are resampled to 6 x 6" in err
    with pytest.warns(M3AEFastWarning):
        model = load_run(folder, image_size=48).model
    classifier, classes = load_classifier(file, model)
    assert isinstance(classifier, Classifier) and len(classes) == 12
    with pytest.raises(ValueError, match="must be a classifier fine-tuned from a model like this one"):
        load_classifier(file, load_run(folder).model)


@pytest.mark.parametrize(
    ("channels", "note"),
    [(1, ""), (2, "channel 1 of 2 is shown"), (3, ""), (9, "channels 1, 2 and 3 of 9 are shown")],
)
def test_a_picture_says_which_channels_it_shows(monkeypatch, tmp_path, channels, note):
    drawn = []
    monkeypatch.setattr(pictures.Cards, "__init__", lambda self, cards, titles, note: drawn.append((cards, note)))
    monkeypatch.setattr(pictures.Cards, "save", lambda self, path: None)
    config = M3AEConfig.tiny(image_size=(16, 32), channels=channels, depth=1)
    images = torch.randint(0, 256, (2, channels, 16, 32), dtype=torch.uint8)
    pictures.draw_reconstruction(MAE(config), None, ImageTextBatch(images), tmp_path / "x.png")
    ((card, _), said) = drawn[0]
    assert said == note and [panel.shape for panel in card.panels] == [(16, 32, 3)] * 3
    shown = (0, 1, 2) if channels >= 3 else (0, 0, 0)
    assert np.array_equal(card.panels[0], images[0, list(shown)].permute(1, 2, 0).numpy())
