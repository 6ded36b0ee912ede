"""Fixed sine-cosine position tables, exactly those of the MAE and M3AE code, and modules that hold such tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """[N] positions -> [N, width] float32: [sin, cos] of position * 10000^(-2i/width), i < width/2.

    Raises:
        ValueError: width is odd.
    """
    if width % 2:
        raise ValueError(f"width must be even, got {width}")
    omega = 10000 ** -(torch.arange(width // 2, dtype=torch.float64, device=positions.device) / (width // 2))
    angles = positions.to(torch.float64).flatten()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_2d(rows: int, columns: int, width: int) -> Tensor:
    """[rows * columns, width] float32 on the CPU, for a grid read row by row.

    The first half of the width encodes the column.

    Raises:
        ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}")
    y, x = torch.meshgrid(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij")
    return torch.cat([sincos_1d(x, width // 2), sincos_1d(y, width // 2)], dim=1)


def at_places(sides: Tensor, places: Tensor) -> Tensor:
    """The rows that `sincos_2d` has at some places, bitwise, whatever the grids that these are in.

    Args:
        sides: [S, D / 2], `sincos_1d` of 0 .. S-1. places: [P, 2] int32 or int64, row and column of each, below S.

    Returns:
        [P, D] in the dtype of sides.
    """
    rows, columns = places.unbind(1)
    return torch.cat([sides.index_select(0, columns), sides.index_select(0, rows)], dim=1)


def resample_positions(table: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """A table of another grid, bicubic, as MAE's fine-tuning makes it.

    Args:
        table: [rows * columns, D] of `grid`, (rows, columns). wanted: the other grid.

    Returns:
        [rows * columns, D] of `wanted`.
    """
    image = table.unflatten(0, grid).permute(2, 0, 1)[None]  # 1, D, rows, columns
    image = nn.functional.interpolate(image, size=wanted, mode="bicubic", align_corners=False)
    return image[0].flatten(1).T.contiguous()


class FixedPositions(nn.Module):
    """A module with position tables: buffers that no state dict holds, since they follow from the module's sizes, but
    for those that are given.

    They are right however the module gets its weights: made as usual, or made on the meta device, then initialized or
    loaded.
    """

    def position_tables(self) -> dict[str, Tensor | None]:
        """Each table by the name of its buffer, [N, D] float32 on the CPU; None: the module does without."""
        raise NotImplementedError

    def given_tables(self) -> dict[str, Tensor]:
        """Those that the weights hold instead, as a new module starts with them."""
        return {}

    def start_positions(self) -> None:
        """Write all tables of a new module."""
        for name, table in self.given_tables().items():
            if name in self._buffers:
                self._buffers[name].copy_(table)
            else:
                self.register_buffer(name, table)
        self.reset_positions()

    def reset_positions(self) -> None:
        """Write the tables, where the module's own parameters are. A buffer of another shape than its table stays."""
        device = next((parameter.device for parameter in self.parameters(recurse=False)), None)
        for name, table in self.position_tables().items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.is_meta:
                dtype = None if buffer is None else buffer.dtype
                self.register_buffer(name, None if table is None else table.to(device, dtype), persistent=False)
            elif buffer.shape == table.shape:
                buffer.copy_(table)

    def _apply(self, fn, recurse=True):
        was_meta = any(buffer.is_meta for buffer in self.buffers(recurse=False))
        super()._apply(fn, recurse)
        if was_meta:  # to_empty leaves memory as it finds it
            self.reset_positions()
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.reset_positions()
