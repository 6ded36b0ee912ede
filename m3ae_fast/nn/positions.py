"""Fixed sine-cosine position tables, exactly those of the MAE and M3AE code."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """[N] positions -> [N, width] float32: [sin, cos] of position * 10000^(-2i/width), i < width/2.

    Raises:
        ValueError: width is odd.
    """
    if width % 2:
        raise ValueError(f"width must be even, got {width}")
    omega = 10000 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = positions.to(torch.float64).flatten()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_2d(rows: int, columns: int, width: int) -> Tensor:
    """[rows * columns, width] float32 for a grid read row by row; the first half of the width encodes the column.

    Raises:
        ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}")
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([sincos_1d(x, width // 2), sincos_1d(y, width // 2)], dim=1)
