"""restore_tokens in CUDA: csrc/ops/restore_tokens/restore_tokens_cuda.cu."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cuda_module import _cuda, chunks, place, tickets, tile_tickets
from m3ae_fast._groups import group
from m3ae_fast.ops.restore_tokens.outputs import empty_gradients, empty_output


def forward(kept, rows, slots, *params):
    out, image_position = empty_output(kept, rows, params), params[2]
    _cuda.restore_tokens(
        *map(address, (kept, rows, slots, *params, out)), *out.shape,
        0 if image_position is None else image_position.shape[0], code(kept), code(out), *place(kept),
    )  # fmt: skip
    return out


def backward(dout, rows, slots, kept_rows, kept_dtype, patches, words, need):
    count, width = dout.shape
    need_kept, need_sums, need_image_position, need_text_position = need
    dkept, dsums, dimage_position, dtext_position = empty_gradients(dout, kept_rows, kept_dtype, patches, words, need)
    dkept.zero_()  # rows that are not named
    number = chunks(count, width * dout.element_size())
    partials = dout.new_empty(number if need_sums else 0, 2, 2, width, dtype=torch.float32)
    if need_kept or need_sums:
        ticket, _owner = tickets(dout, tile_tickets(number, width) if need_sums else 0)
        _cuda.restore_tokens_backward(
            *map(address, (dout, rows, slots, dkept, partials, dsums)), ticket, number, count, width, patches,
            code(dkept), code(dout), *place(dout),
        )  # fmt: skip
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
