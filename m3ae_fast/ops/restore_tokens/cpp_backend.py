"""restore_tokens on the CPU: csrc/ops/restore_tokens."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C


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


def backward(dout, rows, slots, kept_rows, kept_dtype, patches, words, need):
    count, width = dout.shape
    accumulate = torch.float64 if dout.dtype == torch.float64 else torch.float32
    need_kept, need_sums, need_image_position, need_text_position = need
    dkept = dout.new_empty(kept_rows if need_kept else 0, width, dtype=kept_dtype)
    dsums = dout.new_empty(2 if need_sums else 0, 2, width, dtype=accumulate)
    dimage_position = dout.new_empty(patches if need_image_position else 0, width)
    dtext_position = dout.new_empty(words if need_text_position else 0, width)
    _C.restore_tokens_backward(
        *map(address, (dout, rows, slots, dkept, dsums, dimage_position, dtext_position)),
        count, kept_rows, width, patches, words, code(dkept), code(dout),
    )  # fmt: skip
    return dkept, dsums, dimage_position, dtext_position
