"""assemble_tokens in CUDA: csrc/ops/assemble_tokens/assemble_tokens_cuda.cu."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cuda_module import _cuda, chunks, place, tickets, tile_tickets
from m3ae_fast._groups import group
from m3ae_fast.ops.assemble_tokens.outputs import empty_gradients, empty_output, samples


def forward(
    image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding, image_position,
    text_position, image_type, text_type, dtype,
):  # fmt: skip
    out = empty_output(image_tokens, text_tokens, cu_image, cu_text, cls_token, dtype)
    text, words = (text_tokens, None) if text_embedding is None else (text_embedding, text_tokens)
    tensors = (image_tokens, text, words, image_ids, text_ids, cu_image, cu_text, cls_token, image_position,
               text_position, image_type, text_type, out)  # fmt: skip
    _cuda.assemble_tokens(
        *map(address, tensors), samples(cu_image, cu_text), out.shape[0], image_tokens.shape[0], out.shape[1],
        code(image_tokens), code(text), code(out), *place(out),
    )  # fmt: skip
    return out


def backward(
    dout, text_tokens, image_ids, text_ids, cu_image, cu_text, has_cls, image_rows, text_rows, vocabulary, patches,
    words, image_dtype, text_dtype, need,
):  # fmt: skip
    count, width = dout.shape
    grads = empty_gradients(dout, image_rows, text_rows, vocabulary, patches, words, image_dtype, text_dtype, need)
    batch = samples(cu_image, cu_text)
    if any(need[:3]):  # image rows, text rows, sums
        number = chunks(count, width * dout.element_size())
        partials = dout.new_empty(number if need[2] else 0, 3, width, dtype=torch.float32)
        ticket, _owner = tickets(dout, tile_tickets(number, width) if need[2] else 0)
        _cuda.assemble_tokens_backward(
            *map(address, (dout, cu_image, cu_text, *grads[:2], partials, grads[2])), ticket, number, batch, count,
            image_rows, width, has_cls, code(grads[0]), code(grads[1]), code(dout), *place(dout),
        )  # fmt: skip
    tables = (text_tokens, False), (image_ids, True), (text_ids, False)  # embedding, positions
    for needed, (ids, images), grad in zip(need[3:], tables, grads[3:], strict=True):
        if needed:
            order, starts = group(ids, grad.shape[0])
            _cuda.assemble_tokens_backward_table(
                *map(address, (dout, order, starts, grad, cu_image, cu_text)), grad.shape[0], batch, width, has_cls,
                images, code(dout), code(grad), *place(dout),
            )  # fmt: skip
    return grads
