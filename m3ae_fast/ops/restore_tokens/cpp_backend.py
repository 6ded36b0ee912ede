"""restore_tokens on the CPU: csrc/ops/restore_tokens."""

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C
from m3ae_fast.ops.restore_tokens.outputs import empty_gradients, empty_output


def forward(kept, rows, slots, *params):
    image_position, text_position = params[2:4]
    out = empty_output(kept, rows, params)
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
    grads = empty_gradients(dout, kept_rows, kept_dtype, patches, words, need)
    _C.restore_tokens_backward(
        *map(address, (dout, rows, slots, *grads)), count, kept_rows, width, patches, words, code(grads[0]), code(dout)
    )
    return grads
