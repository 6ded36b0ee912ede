"""What the ops that read patches straight from images share: checks, and normalization as a scale and a shift."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3ae_fast import _checks


def check_images(images: Tensor, patch_size: int) -> None:
    """[N, C, H, W], uint8 or float, of whole patches."""
    _checks.shape("images", images, (None, None, None, None))
    _checks.dtype("images", images, (torch.uint8, *_checks.FLOATS))
    _checks.integer("patch_size", patch_size, 1)
    height, width = images.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"images must be multiples of patch_size {patch_size} high and wide, got {height} x {width}")


def check_sequences(name: str, cu: Tensor, images: Tensor) -> None:
    """One sequence of patches for each image."""
    if cu.shape[0] != images.shape[0] + 1:
        raise ValueError(f"{name} must have {images.shape[0]} sequences, one an image, got {cu.shape[0] - 1}")
    _checks.device(name, cu, "images", images)


def affine(
    images: Tensor, mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None
) -> tuple[list[float], list[float]]:
    """(scale, shift), a float a channel: normalized = pixel * scale + shift. Worked out in double."""
    channels = images.shape[1]
    mean = _per_channel("mean", mean, channels, 0.0)
    std = _per_channel("std", std, channels, 1.0)
    if any(s <= 0 for s in std):
        raise ValueError(f"std must be positive, got {tuple(std)}")
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    return [1 / (unit * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _per_channel(name: str, values: Sequence[float] | Tensor | None, channels: int, default: float) -> list[float]:
    if values is None:
        return [default] * channels
    if isinstance(values, Tensor) and values.shape == (channels,):
        values = _checks.numbers(name, values)
    if not isinstance(values, (list, tuple)) or len(values) != channels:
        raise ValueError(f"{name} must be {channels} numbers, one a channel, got {values!r}")
    return [float(value) for value in values]


def check_ids(name: str, ids: Tensor, cu_name: str, cu: Tensor, images: Tensor, patch_size: int) -> None:
    """What the C++ kernels check of patch numbers and offsets, for the reference: on the CPU, a GPU would sync."""
    height, width = images.shape[2:]
    _checks.offsets(cu_name, cu, ids.shape[0])
    _checks.within(name, ids, 0, (height // patch_size) * (width // patch_size), cu[-1])
