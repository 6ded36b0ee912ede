"""take_rows: some rows of a packed batch."""

import torch
from torch import Tensor

from m3ae_fast.ops import restore_tokens


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, D], rows [R] distinct row numbers -> [R, D]; the gradient is written in one pass, not scattered."""
    return restore_tokens(x, rows, torch.full_like(rows, -1))
