"""What restore_tokens fills in, for every backend and for the fakes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_output(kept: Tensor, rows: Tensor, params: Sequence[Tensor | None]) -> Tensor:
    """[T, D] of the forward pass, in the dtype of the parameters, where there are any."""
    dtype = next((p.dtype for p in params if p is not None), kept.dtype)
    return kept.new_empty(rows.shape[0], kept.shape[1], dtype=dtype)


def empty_gradients(
    dout: Tensor, kept_rows: int, kept_dtype: torch.dtype, patches: int, words: int, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the backward pass; what is not needed has no rows (see op.py)."""
    width = dout.shape[1]
    accumulate = torch.float64 if dout.dtype == torch.float64 else torch.float32
    need_kept, need_sums, need_image_position, need_text_position = need
    return (
        dout.new_empty(kept_rows if need_kept else 0, width, dtype=kept_dtype),
        dout.new_empty(2 if need_sums else 0, 2, width, dtype=accumulate),
        dout.new_empty(patches if need_image_position else 0, width),
        dout.new_empty(words if need_text_position else 0, width),
    )
