"""Runs on images of mixed sizes: trained, stopped, resumed, drawn, validated and probed from the command line."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast import M3AEFastWarning
from m3ae_fast.train import RunConfig, Trainer, load_bad_step, load_run, metrics, pictures, pretrain, run
from m3ae_fast.train.bad_steps import save_bad_step

SIZES = [(40, 20), (16, 64), (33, 33), (50, 37), (24, 48), (8, 90)]  # pixels
SETTINGS = ["--steps", 4, "--batch-size", 3, "--max-patches", 12, "--device", "cpu", "--picture-every", 0]


@pytest.fixture
def folder(tmp_path):
    """A folder of captioned photos of two classes and six sizes."""
    for number, (height, width) in enumerate(SIZES * 2):
        place = tmp_path / "photos" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"noise number {number}\n", encoding="utf-8")
    return tmp_path / "photos"


def losses(path):
    return [(row["step"], row["loss"], row["image_loss"]) for row in metrics.read(path / "metrics.jsonl")]


@pytest.mark.parametrize("objective", ["m3ae", "mae"])
def test_train_resume_draw_and_probe(command_line, folder, tmp_path, objective):
    start = ["pretrain", "--data", folder, "--objective", objective, *SETTINGS, "--val-share", 0.2]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command_line(*start, "--out", whole)[0] == 0
    assert command_line(*start, "--out", stopped, "--stop-after", 2)[0] == 0
    assert command_line("pretrain", "--out", stopped, "--resume", "--workers", 1)[0] == 0
    assert losses(whole) == losses(stopped) and len(losses(whole)) == 4
    assert "val_loss" in metrics.read(whole / "metrics.jsonl")[-1]
    assert Image.open(whole / "pictures" / "reconstruction-00000004.png").size[0] > 500

    status, out, _ = command_line("reconstruct", whole, folder / "a" / "0.png", "--out", tmp_path / "a.png")
    assert status == 0 and "1 samples" in out
    assert command_line("probe", whole, "--data", folder, "--train", folder)[0] == 0
    assert command_line("finetune", whole, "--data", folder, "--train", folder, "--steps", 1, "--batch-size", 4)[0] == 0
    status, _, err = command_line("attend", whole, folder / "a" / "0.png")
    assert status == 2 and "batch must have images of one size, got mixed sizes (a run of --max-patches)" in err
    assert (
        command_line(*start[:5], *SETTINGS[:4], "--device", "cpu", "--init", whole, "--out", tmp_path / "next")[0] == 0
    )
    assert load_run(tmp_path / "next").model.config.max_patches == 12


def test_a_run_trains_on_whole_images(folder, tmp_path):
    """Those of the command line's batches, and of its pictures, are of their own grids."""
    config = RunConfig(data=str(folder), steps=1, batch_size=12, max_patches=12, device="cpu", picture_every=0)
    pretrain(config, tmp_path / "run", progress=False)
    found = load_run(tmp_path / "run")
    dataset = run.open_data(found.config, found.model.config.images)
    _, batch = next(run.make_loader(dataset, found.tokenizer, found.model, found.config, batch_size=12))
    assert set(batch.grids) == {(4, 2), (2, 6), (3, 3), (4, 3), (2, 4), (1, 12)}
    assert len(batch.grids) == 12 and batch.images.shape[2:] == (8, 8)
    shown = pictures.samples_to_show(found.model.config, found.tokenizer, found.config, dataset, None)
    assert len(shown.batch.grids) == 6 and set(shown.batch.grids) <= set(batch.grids)


def test_a_probe_beside_training_sees_whole_images(folder, tmp_path):
    config = RunConfig(
        data=str(folder), steps=1, batch_size=3, max_patches=12, device="cpu", picture_every=0, val_data=str(folder),
        knn_every=1,
    )  # fmt: skip
    with Trainer(config, tmp_path / "run") as trainer:
        batches = [batch for part in (trainer._knn._train, trainer._knn._test) for batch in part]
        assert {grid for batch in batches for grid in batch.grids or ()} == {
            (4, 2), (2, 6), (3, 3), (4, 3), (2, 4), (1, 12),
        }  # fmt: skip
        assert trainer.step()["knn_accuracy"] is not None


def test_another_image_size_leaves_features_of_whole_images(folder, tmp_path):
    config = RunConfig(data=str(folder), steps=1, batch_size=4, max_patches=12, device="cpu", picture_every=0)
    pretrain(config, tmp_path / "run", progress=False)
    found = load_run(tmp_path / "run")
    side = found.model.config.image_shape[0] // 2
    with pytest.warns(M3AEFastWarning, match="are computed anew for"):
        smaller = load_run(tmp_path / "run", image_size=side).model
    assert smaller.config.image_shape == (side, side)
    batch = pictures.batch_of_files([folder / "a" / "0.png", folder / "b" / "1.png"], None, found.model.config, None)
    assert torch.equal(smaller.encode_cls(batch), found.model.encode_cls(batch))

    with pytest.warns(M3AEFastWarning, match="are computed anew for"):
        pretrain(dataclasses.replace(config, init=str(tmp_path / "run"), image_size=side), tmp_path / "next")
    assert load_run(tmp_path / "next").model.config.positions == "sincos"


def test_a_picture_shows_each_image_at_its_aspect(folder, tmp_path, monkeypatch):
    config = RunConfig(data=str(folder), steps=1, batch_size=4, max_patches=12, device="cpu", picture_every=0)
    pretrain(config, tmp_path / "run", progress=False)
    found, cards = load_run(tmp_path / "run"), []
    batch = pictures.batch_of_files([folder / "a" / "0.png", folder / "b" / "1.png"], None, found.model.config, None)
    monkeypatch.setattr(pictures.Cards, "__init__", lambda self, given, *_: cards.extend(given))
    monkeypatch.setattr(pictures.Cards, "save", lambda *_: None)
    pictures.draw_reconstruction(found.model, None, batch, tmp_path / "p.png", seed=3)
    result = found.model.reconstruct(batch, seed=3)
    for i, (card, image) in enumerate(zip(cards, batch.whole_images(), strict=True)):
        grid, original = batch.grids[i], image.permute(1, 2, 0).numpy()
        count = grid[0] * grid[1]
        hidden = pictures.pixel_mask(result.image_mask[i, :count], found.model.config, grid).numpy()
        rebuilt = pictures.unpatchify(result.image[i : i + 1, :count], found.model.config, grid)[0].numpy()
        assert original.shape == (8 * grid[0], 8 * grid[1], 3) and 0 < hidden.sum() < hidden.size
        assert np.array_equal(card.panels[0], original)
        assert np.array_equal(card.panels[1][~hidden], original[~hidden])
        assert np.array_equal(card.panels[2], np.where(hidden[..., None], rebuilt, original))


def test_a_bad_step_keeps_the_grids(folder, tmp_path):
    config = RunConfig(data=str(folder), steps=1, batch_size=4, max_patches=12, device="cpu", picture_every=0)
    pretrain(config, tmp_path / "run", progress=False)
    found = load_run(tmp_path / "run")
    dataset = run.open_data(found.config, found.model.config.images)
    _, batch = next(run.make_loader(dataset, found.tokenizer, found.model, found.config, batch_size=5))
    save_bad_step(tmp_path / "bad" / "step.safetensors", 1, found.config, "it is bad", [batch])
    (again,) = load_bad_step(tmp_path / "bad" / "step.safetensors").batches
    assert again.grids == batch.grids and all(map(torch.equal, again.whole_images(), batch.whole_images()))
    assert torch.equal(found.model(again, seed=0).loss, found.model(batch, seed=0).loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "mamo"], "max_patches must be None for mamo, which reads images of one size"),
        (["--objective", "clip"], "max_patches must be None for clip, which reads images of one size"),
        (["--objective", "supervised"], "max_patches must be None for supervised, which reads images of one size"),
        (["--cuda-graphs"], "cuda_graphs must be False with max_patches: every batch has images of other sizes"),
        (["--masking", "shared"], "masking must not be 'shared' with max_patches"),
        (["--set", "max_patches=3"], "options must not hold max_patches"),
    ],
)
def test_what_does_not_go_with_mixed_sizes(command_line, folder, tmp_path, arguments, message):
    status, _, err = command_line("pretrain", "--data", folder, *SETTINGS, *arguments, "--out", tmp_path / "run")
    assert status == 2 and message in err and not (tmp_path / "run" / "run.json").exists()
