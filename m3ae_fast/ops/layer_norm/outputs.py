"""What layer_norm's forward pass fills in, for every backend and for the fake."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_outputs(x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(y [T, D], s [T, D], without rows where there is no residual, stats [2, T] in the accumulation dtype)."""
    count, width = x.shape
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    accumulate = torch.float64 if sum_dtype == torch.float64 else torch.float32
    y = x.new_empty(count, width, dtype=dtype)
    s = x.new_empty(0 if residual is None else count, width, dtype=sum_dtype)
    return y, s, x.new_empty(2, count, dtype=accumulate)
