"""A MAE training step on images that keep their aspect: in one packed batch, padded to the largest, cropped to squares.

All three run on the same kernels. Of the padded batch nothing else is paid for: its attention has no mask.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure
from benchmarks.models.bench_m3ae import PRECISIONS, make_step
from m3ae_fast import ImageTextBatch
from m3ae_fast.data.images import native_grid
from m3ae_fast.models import MAE, M3AEConfig

PHOTOS = [(3, 4), (4, 3), (2, 3), (3, 2), (1, 1), (9, 16), (16, 9), (3, 4)]  # height : width, of COCO's most common
CONFIGS = {"mae_tiny": M3AEConfig.tiny(max_patches=64), "mae_small": M3AEConfig.small(max_patches=256)}
OURS, PADDED, SQUARES = "m3ae_fast, mixed sizes", "padded to the largest", "cropped to squares"


def make_images(config: M3AEConfig, seed: int) -> list[torch.Tensor]:
    generator, size = torch.Generator().manual_seed(seed), config.patch_size
    grids = [native_grid(*aspect, config.max_patches) for aspect in PHOTOS * measure.SETTINGS.batches]
    return [
        torch.randint(0, 256, (rows * size, columns * size, 3), generator=generator, dtype=torch.uint8).permute(2, 0, 1)
        for rows, columns in grids
    ]


def make_batches(config: M3AEConfig, seed: int) -> dict[str, tuple[ImageTextBatch, tuple[int, int]]]:
    """(batch, size of its images or of the model's squares) by provider."""
    images = make_images(config, seed)
    largest = tuple(max(image.shape[side] for image in images) for side in (1, 2))
    padded = torch.stack([F.pad(x, (0, largest[1] - x.shape[2], 0, largest[0] - x.shape[1])) for x in images])
    squares = torch.zeros(len(images), *config.image_shape, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    packed = ImageTextBatch.from_images(images, patch_size=config.patch_size)
    found = {OURS: (packed, config.image_shape), PADDED: (ImageTextBatch(padded), largest)}
    found[SQUARES] = ImageTextBatch(squares), config.image_shape
    return {name: (batch.to(measure.SETTINGS.device), size) for name, (batch, size) in found.items()}


def make_model(config: M3AEConfig, size: tuple[int, int]) -> MAE:
    torch.manual_seed(0)  # the same weights for any size
    return MAE(dataclasses.replace(config, image_size=size)).to(measure.SETTINGS.device)


@torch.no_grad()
def assert_right(config: M3AEConfig, batch: ImageTextBatch) -> None:
    """The loss is the mean of each image's own, of a model of its size."""
    alone = []
    for i, image in enumerate(batch.whole_images()):
        one = ImageTextBatch(image[None], sample_ids=batch.sample_ids[i : i + 1])
        alone.append(make_model(config, tuple(image.shape[1:]))(one, seed=0).loss)
    found = make_model(config, config.image_shape)(batch, seed=0).loss
    torch.testing.assert_close(found, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", CONFIGS)
def bench_mixed_sizes(benchmark, size, precision):
    config = CONFIGS[size]
    batches = [make_batches(config, seed) for seed in range(2)]
    assert_right(config, batches[0][OURS][0])
    steps, tokens = {}, {}
    for name, (batch, image_size) in batches[0].items():
        model = make_model(config, image_size)
        loss_of = lambda i, name=name, model=model: model(batches[i][name][0], seed=0, step=i).loss  # noqa: E731
        steps[name], tokens[name] = make_step(model, loss_of, precision), sum(batch.patch_counts(model.config.grid))
    case = f"{size} {precision}, batch {len(batches[0][OURS][0])}"
    for name, row in measure.compare(benchmark, "MAE step", case, steps, inputs=2, queued=False).items():
        row.extra = f"{tokens[name]:,} patches"
