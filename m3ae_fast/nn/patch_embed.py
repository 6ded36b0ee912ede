"""PatchEmbed: images to embedded patches, reading kept patches only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m3ae_fast._backends import product_dtype
from m3ae_fast.nn.linear import Linear
from m3ae_fast.ops import gather_patches
from m3ae_fast.seqlens import SeqLens


class PatchEmbed(nn.Module):
    """The patch embedding of a Vision Transformer, a Linear, applied to the selected patches only.

    Args:
        patch_size: pixels a side. width: D. channels: of the images.
        mean, std: a value a channel, of pixels in [0, 1]. They normalize uint8 images; float images are taken as
            normalized already.
    """

    def __init__(
        self,
        patch_size: int,
        width: int,
        *,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.patch_size, self.mean, self.std = patch_size, mean, std
        self.proj = Linear(channels * patch_size**2, width)

    def normalization(self, images: Tensor) -> dict[str, Sequence[float] | None]:
        """The mean and std that apply to these images."""
        raw = images.dtype == torch.uint8
        return {"mean": self.mean if raw else None, "std": self.std if raw else None}

    def forward(self, images: Tensor, ids: Tensor, seqlens: SeqLens) -> Tensor:
        """images [N, C, H, W], ids [K] patch numbers (row by row), seqlens over the N images -> [K, D]."""
        dtype = product_dtype(self.proj.weight)
        rows = gather_patches(
            images, ids, seqlens, patch_size=self.patch_size, dtype=dtype, **self.normalization(images)
        )
        return self.proj(rows)
