"""gather_patches, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_patches(
    images: Tensor,
    ids: Tensor,
    cu: Tensor,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """out[t] = patch ids[t] of t's image, in (row, column, channel) order: pixel * scale + shift in fp32."""
    count, channels = images.shape[:2]
    rows = ids.shape[0]
    if images.numel() == 0:  # a patch to index: no row is its own
        images = torch.nn.functional.pad(images, (0, patch_size, 0, patch_size, 0, 0, 0, 1))
    accumulate = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    if images.is_floating_point():  # so that the gradients of a patch named twice add up in it
        images = images.to(accumulate)
    columns = images.shape[3] // patch_size
    image = torch.bucketize(torch.arange(rows, device=ids.device), cu[1:], right=True)
    named = image < count  # rows past cu[-1] belong to no image
    ids = torch.where(named, ids, 0)
    inside = torch.arange(patch_size, device=ids.device)
    y = (ids // columns * patch_size)[:, None] + inside
    x = (ids % columns * patch_size)[:, None] + inside
    pixels = images[torch.where(named, image, 0)[:, None, None], :, y[:, :, None], x[:, None, :]].to(accumulate)
    scale, shift = (torch.tensor(each, dtype=accumulate, device=images.device) for each in (scale, shift))
    values = (pixels * scale + shift).reshape(rows, patch_size * patch_size * channels)
    return torch.where(named[:, None], values, 0).to(dtype)
