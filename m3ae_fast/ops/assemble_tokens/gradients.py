"""What a backward pass of assemble_tokens fills in, for every backend and for the fake."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_gradients(
    dout: Tensor, image_rows: int, text_rows: int, vocabulary: int, patches: int, words: int,
    image_dtype: torch.dtype, text_dtype: torch.dtype, need: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs in order, [rows, D]; what is not needed has no rows (see op.py)."""
    accumulate = torch.float64 if dout.dtype == torch.float64 else torch.float32
    sizes = (image_rows, text_rows, 3, vocabulary, patches, words)
    dtypes = (image_dtype, text_dtype, accumulate, text_dtype, dout.dtype, dout.dtype)
    return tuple(
        dout.new_empty(rows if needed else 0, dout.shape[1], dtype=dtype)
        for rows, dtype, needed in zip(sizes, dtypes, need, strict=True)
    )
