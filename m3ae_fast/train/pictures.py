"""Pictures of a run: its loss curves, and what the model makes of the patches and words it cannot see."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m3ae_fast._drawing import FAINT, INK, Card, Cards, heat, new_figure, note_of_channels, save_figure, visible
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.data import DRAWN, Loader, MixedDataset, Sample, Tokenizer, open_dataset
from m3ae_fast.data.folder import read_captions
from m3ae_fast.data.images import open_image
from m3ae_fast.data.specs import listed, split_weight
from m3ae_fast.models import Metric, Model, ModelConfig
from m3ae_fast.models.ground import ground, to_pixels
from m3ae_fast.models.m3ae import Reconstruction
from m3ae_fast.train import metrics
from m3ae_fast.train.config import RunConfig
from m3ae_fast.train.validation import open_held_out

SAMPLES = 6  # of a picture
# Colors as #rrggbb, by `Metric.of`
COLORS = {"image": "#2f6fde", "text": "#d9632b", "pair": "#7a4fc0", "share": "#178a4c", "watch": "#6b7280"}
NORM_PIX_EPS = 1e-6  # as in masked_mse
STRIPES = ((223, 226, 232), (240, 242, 245))  # a masked patch: unlike any plain patch of an image


def draw_pictures(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer | None,
    config: RunConfig,
    step: int,
    device: torch.device,
    shown: Callable[[], Shown],
) -> Path | None:
    """Write pictures/losses.png of a run and, of a model that rebuilds what it cannot see, a picture of that, named by
    its kind (`Model.PICTURE`): pictures/reconstruction-<step>.png or pictures/words-<step>.png. Returns the latter's
    path, None where there is none.

    Args:
        shown: gives the samples of those, and is asked for them only then.
    """
    (folder / "pictures").mkdir(exist_ok=True)
    draw_losses(metrics.read(folder / "metrics.jsonl"), folder / "pictures" / "losses.png", model.METRICS)
    if model.PICTURE is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", M3AEFastWarning)  # the training loader has told of files it cannot read
        batch, labels = shown()
    draw = {"reconstruction": draw_reconstruction, "words": draw_words}[model.PICTURE]
    path = folder / "pictures" / f"{model.PICTURE}-{step:08d}.png"
    draw(model, tokenizer, batch, path, seed=config.seed, device=device, labels=labels)
    return path


class Shown(NamedTuple):
    """The samples of a run's pictures, and of each whether the run trains on it: "seen" or "unseen"."""

    batch: ImageTextBatch
    labels: list[str]


def samples_to_show(
    model_config: ModelConfig, tokenizer: Tokenizer | None, config: RunConfig, dataset, unseen
) -> Shown:
    """Six samples, uncropped: of a run that holds samples out, three of its data and three of those.

    Args:
        dataset: that the run trains on. unseen: what it holds out, or None.
    """
    if unseen is None:
        batch, specs = held_out(model_config, tokenizer, config), listed(config.data)
        at = dataset.at if isinstance(dataset, MixedDataset) else lambda *_: (0,)
        drawn = [split_weight(specs[at(place, config.seed + 1)[0]])[0] in DRAWN for place in range(len(batch))]
        return Shown(batch, ["unseen" if each else "seen" for each in drawn])
    halves = [_some_of(each, tokenizer, model_config, config, SAMPLES // 2) for each in (dataset, unseen)]
    return Shown(_joined(halves), ["seen"] * len(halves[0]) + ["unseen"] * len(halves[1]))


def held_out(
    model_config: ModelConfig,
    tokenizer: Tokenizer | None,
    config: RunConfig,
    *,
    data: str | None = None,
    count: int = SAMPLES,
) -> ImageTextBatch:
    """`count` samples, uncropped: of other `data`, or of what the run holds out, or else of its data; of `shapes`,
    scenes it was not trained on."""
    options = {"seed": config.seed + 1, **model_config.images}
    if data is not None:
        dataset = open_dataset(data, **options)
    else:
        dataset = open_dataset(config.data, val_share=config.val_share, **options)
        unseen = open_held_out(config, dataset, model_config.images)
        dataset = dataset if unseen is None else unseen
    return _some_of(dataset, tokenizer, model_config, config, count)


def _some_of(dataset, tokenizer, model_config: ModelConfig, config: RunConfig, count: int) -> ImageTextBatch:
    options = {"seed": config.seed + 1, "pairs_only": config.model_class.CAPTIONS == "required"}
    return _first_batch(dataset, tokenizer, model_config, min(count, len(dataset)), **options)


def _joined(batches: list[ImageTextBatch]) -> ImageTextBatch:
    """One of them all, numbered anew."""
    images = [batch.images for batch in batches if batch.images is not None]
    return ImageTextBatch(
        torch.cat(images) if images else None,
        torch.cat([batch.text for batch in batches]),
        [length for batch in batches for length in batch.text_lengths.lengths],
        has_image=[has for batch in batches for has in batch.has_image],
        grids=[grid for batch in batches for grid in batch.grids or ()] or None,
    )


def batch_of_files(
    images: Sequence[Path], captions: Sequence[str] | None, model_config: ModelConfig, tokenizer: Tokenizer | None
) -> ImageTextBatch:
    """Image files, with the captions given or those of name.txt beside name.jpg.

    Raises:
        BadSample: a file that cannot be read.
    """
    samples = []
    for i, path in enumerate(images):
        beside = path.with_suffix(".txt")
        lines = [captions[i]] if captions else read_captions(beside, str(beside))[:1] if beside.is_file() else []
        image = open_image(path, str(path), model_config.channels).decoded()
        samples.append(Sample(image, tuple(lines), str(path)))
    return _first_batch(_InOrder(samples), tokenizer, model_config, len(samples), strict=True)


class _InOrder(list):
    """A list of samples that Loader does not shuffle."""

    endless = True


class _NoWords:
    """The tokenizer of a model of images alone."""

    def encode(self, text: str) -> list[int]:
        return []


def _first_batch(dataset, tokenizer, model_config: ModelConfig, count: int, **options) -> ImageTextBatch:
    loader = Loader(
        dataset, tokenizer or _NoWords(), image_size=model_config.image_size, batch_size=count,
        max_text_length=model_config.max_text_length, max_patches=model_config.max_patches,
        patch_size=model_config.patch_size, augment=False, **options,
    )  # fmt: skip
    return next(loader)[1]


def draw_losses(rows: list[dict], path: Path, known: Mapping[str, Metric]) -> None:
    """Loss, accuracy and learning rate over the steps, each step thin and their running mean thick, beside what
    validation says of the same.

    Args:
        rows: of metrics.jsonl; nothing is drawn where there are none, nor of steps that were not finite.
        path: of the PNG. known: the metrics to draw, `Model.METRICS`; "loss", their sum, where there is no other.
    """
    rows = [row for row in rows if None not in row.values()]
    if not rows:
        return
    validated = [row for row in rows if "val_loss" in row]
    known = {**known, "lr": Metric("learning rate", of="watch")}
    shown = [name for name in known if name in ("loss", "lr") or any(row[name] for row in rows)]
    if any(known[name].of in ("image", "text", "pair") for name in shown[1:]):
        del shown[0]
    columns = 2 if len(shown) <= 4 else 3
    lines = -(-len(shown) // columns)
    figure = new_figure(5 * columns, 3 * lines)
    steps = np.array([row["step"] for row in rows])
    grid = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel()
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    for axes, name in zip(grid, shown, strict=False):
        title, subtitle, of = known[name]
        values = np.array([row[name] for row in rows])
        mean = running_mean(values, max(len(values) // 50, 1))
        if name != "lr":
            axes.plot(steps, values, color=COLORS[of], alpha=0.22, linewidth=0.7)
        axes.plot(steps, mean if name != "lr" else values, color=COLORS[of], linewidth=2)
        if validated and name != "lr":
            points = [row["step"] for row in validated], [row[f"val_{name}"] for row in validated]
            axes.plot(*points, color=INK, linewidth=1, marker="o", markersize=3, label="validation")
            axes.legend(frameon=False, fontsize=9, loc="upper center")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.set_title(subtitle, loc="right", fontsize=9, color=FAINT)
        axes.grid(color="#e7e9ee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c9cdd6")
        axes.tick_params(colors="#5b6270", labelsize=9)
        axes.set_xlim(0, 1.16 * steps[-1])  # room for the last value
        low = 0.0 if of in ("share", "watch") else None
        axes.set_ylim(bottom=low, top=np.quantile(values, 0.995) * 1.05 if len(values) > 100 and low is None else None)
        if name != "lr":
            axes.annotate(
                f"{mean[-1]:.3f}", (steps[-1], mean[-1]), xytext=(7, -4), textcoords="offset points",
                fontsize=10, fontweight="bold", color=COLORS[of],
            )  # fmt: skip
    for axes in grid[-columns:]:
        axes.set_xlabel("step", fontsize=9, color="#5b6270")
    save_figure(figure, path)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values at each place, of fewer at the start."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - width, 0)
    return (total[end] - total[begin]) / (end - begin)


@torch.no_grad()
def draw_reconstruction(
    model: Model,
    tokenizer: Tokenizer | None,
    batch: ImageTextBatch,
    path: Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    labels: Sequence[str] | None = None,
) -> Reconstruction:
    """Original | masked | reconstruction of every sample, and its caption: masked words on gray, guesses below; returns
    what the model predicted.

    The reconstruction shows visible patches as they are; a model of norm_pix predicts no patch's mean and contrast, so
    each gets those of the original, which the picture says. A guess is green where it is right.

    Args:
        batch: images as uint8. seed: of the masks. labels: of the samples, shown beside them.
    """
    training = model.training
    model.eval()
    result = model.reconstruct(batch.to(device), seed=seed, step=0)
    model.train(training)
    config = model.config
    image_mask, text_mask = result.image_mask.cpu(), result.text_mask.cpu()
    originals = iter(batch.whole_images())
    captions = iter(_captions(batch, tokenizer, result.text_logits, text_mask) if tokenizer else ())
    cards = []
    for i, (rows, columns) in enumerate(batch.sample_grids(config.grid)):
        panels, patches = [], rows * columns
        if patches:
            original, predicted = next(originals).permute(1, 2, 0).cpu()[None], result.image[i : i + 1, :patches]
            predicted = predicted.float().cpu()
            if result.norm_pix:
                predicted = with_patch_statistics(predicted, original, config)
            rebuilt = unpatchify(predicted, config, (rows, columns))
            hidden = pixel_mask(image_mask[i, :patches], config, (rows, columns))[..., None].numpy()
            image, rebuilt = visible(original[0].numpy()), visible(rebuilt[0].numpy())
            panels = [image, np.where(hidden, striped(*image.shape[:2]), image), np.where(hidden, rebuilt, image)]
        cards.append(Card(panels, next(captions, []), labels[i] if labels else ""))
    notes = [note_of_channels(config.channels)]
    if result.norm_pix:
        notes.append("mean and contrast of reconstructed patches are the original's (norm_pix)")
    Cards(cards, ("original", "masked", "reconstruction"), "; ".join(filter(None, notes))).save(path)
    return result


@torch.no_grad()
def draw_words(
    model: Model,
    tokenizer: Tokenizer,
    batch: ImageTextBatch,
    path: Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    labels: Sequence[str] | None = None,
) -> None:
    """A model's view of pairs: the image, where in it the caption is found (`models.ground`), and the guesses of masked
    words, green where right.

    Args:
        batch: pairs, images as uint8. seed: of the masked words. labels: of the samples, shown beside them.
    """
    training = model.training
    model.eval()
    batch = batch.to(device)
    logits, text_mask = model.fill_words(batch, seed=seed)
    maps = to_pixels(ground(model, batch), model.config).cpu()
    model.train(training)
    images = visible(batch.images.cpu().permute(0, 2, 3, 1).numpy())
    captions = _captions(batch, tokenizer, logits, text_mask)
    parts = zip(images, maps, captions, labels or [""] * len(batch), strict=True)
    cards = [Card([image, heat(image, map)], text, label) for image, map, text, label in parts]
    Cards(cards, ("original", "where the caption is found"), note_of_channels(model.config.channels)).save(path)


def _captions(
    batch: ImageTextBatch, tokenizer: Tokenizer, logits: Tensor, text_mask: Tensor
) -> list[list[tuple[str, str, bool]]]:
    """(word, guess, whether it was masked) of each word of each sample."""
    lengths, found = batch.text_lengths.lengths, []
    parts = zip(batch.text.cpu().split(lengths), logits.argmax(-1).cpu().split(lengths), text_mask, strict=True)
    for words, guesses, masked in parts:
        ids = (words.tolist(), guesses.tolist())
        found.append(list(zip(*map(tokenizer.tokens, ids), masked[: len(words)].tolist(), strict=True)))
    return found


def unpatchify(patches: Tensor, config: ModelConfig, grid: tuple[int, int] | None = None) -> Tensor:
    """[B, P, patch_dim] normalized pixels (row, column, channel) -> [B, H, W, C] uint8; grid: None: the config's."""
    (rows, columns), size = grid or config.grid, config.patch_size
    image = patches.view(-1, rows, columns, size, size, config.channels).transpose(2, 3)
    image = image.reshape(-1, rows * size, columns * size, config.channels)
    mean, std = (torch.tensor(each, device=patches.device) for each in (config.image_mean, config.image_std))
    image = image * std + mean
    return (image.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)


def with_patch_statistics(patches: Tensor, images: Tensor, config: ModelConfig) -> Tensor:
    """What a model of norm_pix predicts, as normalized pixels: with the mean and deviation of the original's patches.

    Args:
        patches: [B, P, patch_dim]. images: [B, H, W, C] uint8, the originals.
    """
    size = config.patch_size
    rows, columns = (side // size for side in images.shape[1:3])
    mean, std = (torch.tensor(each, device=images.device) for each in (config.image_mean, config.image_std))
    pixels = (images / 255 - mean) / std
    target = pixels.view(-1, rows, size, columns, size, config.channels).transpose(2, 3).reshape(patches.shape)
    variance, level = torch.var_mean(target, -1, keepdim=True)
    return patches * (variance + NORM_PIX_EPS).sqrt() + level


def pixel_mask(mask: Tensor, config: ModelConfig, grid: tuple[int, int] | None = None) -> Tensor:
    """[P] bool -> [H, W] bool; grid: None: the config's."""
    mask = mask.view(grid or config.grid)
    return mask.repeat_interleave(config.patch_size, 0).repeat_interleave(config.patch_size, 1)


def striped(height: int, width: int) -> np.ndarray:
    """[H, W, 3] uint8, diagonal stripes: what a hole is filled with."""
    diagonal = np.arange(height)[:, None] + np.arange(width)
    return np.uint8(STRIPES)[diagonal // max(width // 64, 1) // 2 % 2]
