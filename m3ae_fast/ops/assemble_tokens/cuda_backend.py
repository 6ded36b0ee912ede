"""assemble_tokens in CUDA: csrc/ops/assemble_tokens/assemble_tokens_cuda.cu."""

import torch

from m3ae_fast._cuda_module import _cuda, chunks, counters, tile_counters
from m3ae_fast._groups import group


def forward(
    image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding, image_position,
    text_position, image_type, text_type, dtype, out,
):  # fmt: skip
    _cuda.assemble_tokens(
        image_tokens=image_tokens, text_tokens=text_tokens, image_ids=image_ids, text_ids=text_ids, cu_image=cu_image,
        cu_text=cu_text, cls_token=cls_token, text_embedding=text_embedding, image_position=image_position,
        text_position=text_position, image_type=image_type, text_type=text_type, out=out,
    )  # fmt: skip


def backward(
    dout, text_tokens, image_ids, text_ids, cu_image, cu_text, has_cls, image_rows, text_rows, vocabulary, patches,
    words, image_dtype, text_dtype, need, dimage, dtext, dparts, dembedding, dimage_position, dtext_position,
):  # fmt: skip
    count, width = dout.shape
    packing = dict(cu_image=cu_image, cu_text=cu_text, has_cls=has_cls)
    if any(need[:3]):  # image rows, text rows, sums
        number, partials = chunks(count, width * dout.element_size()), None
        if dparts is not None:
            partials = dout.new_empty(number, 3, width, dtype=torch.float32)
        counter, _owner = counters(dout, 0 if dparts is None else tile_counters(number, width))
        _cuda.assemble_tokens_backward(
            dout=dout, **packing, image_rows=image_rows, partials=partials, counters=counter, number=number,
            dimage=dimage, dtext=dtext, dparts=dparts,
        )  # fmt: skip
    tables = (text_tokens, False, dembedding), (image_ids, True, dimage_position), (text_ids, False, dtext_position)
    for ids, images, dtable in tables:
        if dtable is not None:
            order, starts = group(ids, dtable.shape[0])
            _cuda.assemble_tokens_backward_table(
                dout=dout, order=order, starts=starts, **packing, images=images, dtable=dtable
            )
