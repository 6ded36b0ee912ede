"""Pictures: their pixels come from the right places."""

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast import ImageTextBatch, SeqLens, _drawing, gather_patches, masked_mse
from m3ae_fast.data import BadSample
from m3ae_fast.models import OBJECTIVES, M3AEConfig
from m3ae_fast.train import load_run, pictures, pretrain


def test_a_run_draws_both_pictures(config, tmp_path):
    pretrain(config(steps=4, picture_every=2), tmp_path / "run", progress=False)
    names = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert names == ["losses.png", "reconstruction-00000002.png", "reconstruction-00000004.png"]
    for name in names:
        image = np.asarray(Image.open(tmp_path / "run" / "pictures" / name).convert("RGB"))
        assert min(image.shape[:2]) > 500 and image.std() > 10


def test_words_of_a_card_start_a_line_where_they_are_told_to():
    words = [(word, "", False) for word in ("a", "red", "star")]
    cards = [_drawing.Card([], text) for text in (words, [*words[:2], _drawing.NEXT_LINE, words[2]])]
    heights = [_drawing.Cards([card], ("x",)).image.size[1] for card in cards]
    assert heights[1] - heights[0] == _drawing.LOW


def test_unpatchify_undoes_patches_and_normalization():
    config = M3AEConfig.tiny(image_size=(16, 32))
    image = torch.randint(0, 256, (2, 16, 32, 3), dtype=torch.uint8)
    normalized = (image / 255 - torch.tensor(config.image_mean)) / torch.tensor(config.image_std)
    rows, columns = config.grid
    patches = torch.stack(
        [normalized[:, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].flatten(1) for r in range(rows) for c in range(columns)], 1
    )
    assert torch.equal(pictures.unpatchify(patches, config), image)
    mask = torch.zeros(8, dtype=torch.bool)
    mask[5] = True  # row 1, column 1
    hidden = pictures.pixel_mask(mask, config)
    assert hidden.shape == (16, 32) and hidden.sum() == 64 and hidden[8:, 8:16].all()


def test_hidden_pixels_are_the_models_and_visible_ones_the_originals(config, tmp_path):
    pretrain(config(steps=1, picture_every=0), tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    batch = pictures.held_out(run.model.config, run.tokenizer, run.config, count=1)
    pictures.draw_reconstruction(run.model, run.tokenizer, batch, tmp_path / "out.png", seed=3)
    drawn = np.asarray(Image.open(tmp_path / "out.png"))
    side, gap = _drawing.SIDE, _drawing.GAP
    left, top = _drawing.MARGIN + gap, _drawing.MARGIN + gap + _drawing.LINE
    panels = [drawn[top : top + side, left + i * (side + gap) :][:, :side] for i in range(3)]
    original, masked, rebuilt = (panel[3::6, 3::6] for panel in panels)  # 32 pixels were enlarged to 192
    with torch.no_grad():
        result = run.model.reconstruct(batch, seed=3, step=0)
    hidden = pictures.pixel_mask(result.image_mask[0], run.model.config).numpy()
    predicted = pictures.unpatchify(result.image, run.model.config)[0].numpy()
    assert np.array_equal(original, batch.images[0].permute(1, 2, 0).numpy())
    assert np.array_equal(masked[~hidden], original[~hidden])
    assert np.array_equal(rebuilt[~hidden], original[~hidden])
    assert np.array_equal(rebuilt[hidden], predicted[hidden])
    assert set(map(tuple, masked[hidden].tolist())) == set(pictures.STRIPES)
    assert 0 < hidden.sum() < hidden.size


def test_a_right_prediction_of_norm_pix_is_drawn_as_the_original():
    config = M3AEConfig.tiny(image_size=(16, 32), norm_pix=True)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 16, 32, 3), dtype=torch.uint8)
    images[1] = torch.tensor([219, 30, 30], dtype=torch.uint8)  # a plain one
    batch = ImageTextBatch(images.permute(0, 3, 1, 2))
    c = {"patch_size": config.patch_size, "mean": config.image_mean, "std": config.image_std}
    ids, lengths = torch.arange(config.patches).repeat(3).int(), SeqLens([config.patches] * 3)
    rows = gather_patches(batch.images, ids, lengths, **c)
    right = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True) + 1e-6).sqrt()
    loss = masked_mse(right, batch.images, ids, lengths, norm_pix=True, **c)
    assert loss < 1e-9
    shown = pictures.with_patch_statistics(right.view(3, config.patches, -1), images, config)
    assert torch.equal(pictures.unpatchify(shown, config), images)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_picture_says_that_it_has_the_contrast_of_the_original(config, tmp_path, monkeypatch, norm_pix):
    said, draw = [], pictures.Cards
    monkeypatch.setattr(pictures, "Cards", lambda cards, *rest: (said.append(rest[-1]), draw(cards, *rest))[1])
    pretrain(config(steps=1, options={"norm_pix": norm_pix}), tmp_path / "run", progress=False)
    assert ["the original's (norm_pix)" in note for note in said] == [norm_pix]


def test_a_picture_of_held_out_scenes_is_not_of_training_scenes(config, tmp_path):
    pretrain(config(steps=1, picture_every=0), tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    batch = pictures.held_out(run.model.config, run.tokenizer, run.config, count=2)
    trained_on = pictures.open_dataset("shapes", image_size=32, seed=run.config.seed)
    assert not np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), trained_on[0].image)


def test_files_keep_their_order_and_captions(config, photos, tmp_path):
    pretrain(config(data=str(photos), steps=1, picture_every=0), tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    files = [photos / "2.jpg", photos / "0.jpg"]
    batch = pictures.batch_of_files(files, None, run.model.config, run.tokenizer)
    first = batch.text[: batch.text_lengths.lengths[0]].tolist()
    assert run.tokenizer.decode(first) == "noise number 2 with all its colors"
    batch = pictures.batch_of_files(files, ["all", "colors"], run.model.config, run.tokenizer)
    assert run.tokenizer.tokens(batch.text.tolist()) == run.tokenizer.tokens(run.tokenizer.encode("all colors"))
    assert pictures.batch_of_files(files, None, run.model.config, None).text_lengths.total == 0
    (photos / "0.jpg").write_bytes(b"")
    with pytest.raises(BadSample, match=r"0\.jpg"):
        pictures.batch_of_files(files, None, run.model.config, run.tokenizer)


def test_texts_alone_and_images_alone_are_drawn(config, photos, tmp_path):
    (photos / "0.jpg").unlink()
    (photos / "1.txt").unlink()
    pretrain(config(data=str(photos), steps=1, picture_every=0), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "pictures" / "reconstruction-00000001.png").is_file()


def test_running_mean():
    assert pictures.running_mean(np.array([1.0, 3.0, 5.0, 9.0]), 2).tolist() == [1.0, 2.0, 4.0, 7.0]


@pytest.mark.parametrize(
    "objective, zeros, titles",
    [
        ("m3ae", (), ["image loss", "text loss", "text accuracy"]),
        ("mae", ("text_loss", "text_accuracy"), ["image loss"]),
        ("clip", (), ["loss", "image accuracy", "text accuracy"]),
        ("supervised", (), ["loss", "accuracy"]),
    ],
)
def test_every_objective_shows_its_losses(tmp_path, monkeypatch, objective, zeros, titles):
    shown = []
    from matplotlib.axes import Axes

    set_title = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **o: (shown.append(text), set_title(axes, text, **o)))
    known = OBJECTIVES[objective][0].METRICS
    row = dict.fromkeys(("step", *known, "lr"), 1) | dict.fromkeys(zeros, 0)
    pictures.draw_losses([row], tmp_path / "losses.png", known)
    assert shown[::2] == [*titles, "learning rate"]
    assert ("images whose text is found in the batch" in shown) == (objective == "clip")


def test_losses_of_one_step_and_of_none(tmp_path):
    known = OBJECTIVES["m3ae"][0].METRICS
    pictures.draw_losses([], tmp_path / "none.png", known)
    assert not (tmp_path / "none.png").exists()
    pictures.draw_losses([dict.fromkeys(("step", *known, "lr"), 1)], tmp_path / "one.png", known)
    assert (tmp_path / "one.png").is_file()
