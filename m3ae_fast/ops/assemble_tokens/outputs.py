"""What assemble_tokens fills in, for every backend and for the fakes."""

from __future__ import annotations

import torch
from torch import Tensor


def samples(cu_image: Tensor | None, cu_text: Tensor | None) -> int:
    """How many the offsets are of; one of them may be None."""
    return (cu_text if cu_image is None else cu_image).shape[0] - 1


def empty_output(
    image_tokens: Tensor, text_tokens: Tensor, cu_image: Tensor | None, cu_text: Tensor | None,
    cls_token: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[rows, D] of the forward pass."""
    total = (0 if cls_token is None else samples(cu_image, cu_text)) + image_tokens.shape[0] + text_tokens.shape[0]
    return image_tokens.new_empty(total, image_tokens.shape[1], dtype=dtype)


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
