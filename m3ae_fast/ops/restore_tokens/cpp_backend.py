"""restore_tokens on the CPU: csrc/ops/restore_tokens."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C

CHUNKS = 32  # partial sums of the token gradients: fixed, so that the bits do not depend on the thread count


def forward(kept, rows, slots, *params):
    image_position, text_position = params[2:4]
    dtype = next((p.dtype for p in params if p is not None), kept.dtype)
    out = kept.new_empty(rows.shape[0], kept.shape[1], dtype=dtype)
    _C.restore_tokens(
        address(kept), address(rows), address(slots), *map(address, params), address(out),
        rows.shape[0], kept.shape[0], kept.shape[1],
        0 if image_position is None else image_position.shape[0],
        0 if text_position is None else text_position.shape[0],
        code(kept), code(out),
    )  # fmt: skip
    return out


def backward(dout, rows, slots, kept_rows, kept_dtype, patches, words, need_kept, need_vectors, need_position):
    count, width = dout.shape
    accumulate = torch.float64 if dout.dtype == torch.float64 else torch.float32
    dkept = dout.new_zeros(kept_rows if need_kept else 0, width, dtype=kept_dtype)
    partial = dout.new_zeros(CHUNKS, 4, width, dtype=accumulate) if need_vectors else None
    dposition = dout.new_empty(patches + words if need_position else 0, width)
    if need_kept or need_vectors:
        _C.restore_tokens_backward(
            address(dout), address(rows), address(slots), address(dkept) if need_kept else 0, address(partial),
            CHUNKS, count, width, patches, code(dkept), code(dout),
        )  # fmt: skip
    if need_position:
        _C.sum_rows(
            address(dout),
            code(dout),
            address(slots),
            count,
            0,
            patches + words,
            width,
            address(dposition),
            code(dposition),
        )
    dvectors = dout.new_zeros(4, width, dtype=accumulate) if partial is None else partial.sum(0)
    return dkept, dvectors, dposition
