"""restore_tokens in CUDA: csrc/ops/restore_tokens/restore_tokens_cuda.cu."""

import torch

from m3ae_fast._cuda_module import _cuda, chunks, counters, tile_counters
from m3ae_fast._groups import group


def forward(
    kept, rows, slots, image_mask_token, text_mask_token, image_position, text_position, image_type, text_type, out
):
    _cuda.restore_tokens(
        kept=kept, rows=rows, slots=slots, image_mask_token=image_mask_token, text_mask_token=text_mask_token,
        image_position=image_position, text_position=text_position, image_type=image_type, text_type=text_type, out=out,
    )  # fmt: skip


def backward(
    dout, rows, slots, kept_rows, kept_dtype, patches, words, need, dkept, dsums, dimage_position, dtext_position
):
    count, width = dout.shape
    if dkept is not None:
        dkept.zero_()  # rows that are not named
    if dkept is not None or dsums is not None:
        number, partials = chunks(count, width * dout.element_size()), None
        if dsums is not None:
            partials = dout.new_empty(number, 2, 2, width, dtype=torch.float32)
        counter, _owner = counters(dout, 0 if dsums is None else tile_counters(number, width))
        _cuda.restore_tokens_backward(
            dout=dout, rows=rows, slots=slots, patches=patches, partials=partials, counters=counter, number=number,
            dkept=dkept, dsums=dsums,
        )  # fmt: skip
    if dimage_position is not None or dtext_position is not None:
        order, starts = group(slots, patches + words)
        for first, dposition in ((0, dimage_position), (patches, dtext_position)):
            if dposition is not None:
                _cuda.restore_tokens_backward_position(
                    dout=dout, order=order, starts=starts[first:], dposition=dposition
                )
