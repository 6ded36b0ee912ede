"""restore_tokens in CUDA: csrc/ops/restore_tokens/restore_tokens_cuda.cu."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cuda_module import _cuda, chunks, place
from m3ae_fast._groups import group


def forward(kept, rows, slots, *params):
    dtype = next((p.dtype for p in params if p is not None), kept.dtype)
    width, image_position = kept.shape[1], params[2]
    out = kept.new_empty(rows.shape[0], width, dtype=dtype)
    _cuda.restore_tokens(
        *map(address, (kept, rows, slots, *params, out)), rows.shape[0], width,
        0 if image_position is None else image_position.shape[0], code(kept), code(out), *place(kept),
    )  # fmt: skip
    return out


def backward(dout, rows, slots, kept_rows, kept_dtype, patches, words, need):
    count, width = dout.shape
    need_kept, need_sums, need_image_position, need_text_position = need
    dkept = dout.new_zeros(kept_rows if need_kept else 0, width, dtype=kept_dtype)  # rows that are not named
    dsums = dout.new_empty(2 if need_sums else 0, 2, width, dtype=torch.float32)
    number = chunks(count, width)
    partials = dout.new_empty(number if need_sums else 0, 2, 2, width, dtype=torch.float32)
    if need_kept or need_sums:
        _cuda.restore_tokens_backward(
            *map(address, (dout, rows, slots, dkept, partials, dsums)), number, count, width, patches, code(dkept),
            code(dout), *place(dout),
        )  # fmt: skip
    dimage_position = dout.new_empty(patches if need_image_position else 0, width)
    dtext_position = dout.new_empty(words if need_text_position else 0, width)
    if need_image_position or need_text_position:
        order, starts = group(slots, patches + words)
        for needed, first, grad in ((need_image_position, 0, dimage_position),
                                    (need_text_position, patches, dtext_position)):  # fmt: skip
            if needed:
                _cuda.restore_tokens_backward_position(
                    address(dout), address(order), address(starts[first:]), address(grad), grad.shape[0], width,
                    code(dout), *place(dout),
                )  # fmt: skip
    return dkept, dsums, dimage_position, dtext_position
