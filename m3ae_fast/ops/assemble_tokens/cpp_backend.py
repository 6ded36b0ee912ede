"""assemble_tokens on the CPU: csrc/ops/assemble_tokens."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C


def _rows(tensor):
    return -1 if tensor is None else tensor.shape[0]


def forward(
    image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding, image_position,
    text_position, image_type, text_type, dtype,
):  # fmt: skip
    batch = (cu_text if cu_image is None else cu_image).shape[0] - 1
    image_rows, text_rows = (0 if x is None else x.shape[0] for x in (image_tokens, text_tokens))
    total = (0 if cls_token is None else batch) + image_rows + text_rows
    text = text_tokens if text_embedding is None else text_embedding
    like = text if image_tokens is None else image_tokens
    out = like.new_empty(total, like.shape[1], dtype=dtype)
    tensors = (image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding,
               image_position, text_position, image_type, text_type)  # fmt: skip
    _C.assemble_tokens(
        *map(address, tensors), address(out), batch, total, image_rows, text_rows, _rows(text_embedding),
        _rows(image_position), _rows(text_position), out.shape[1], code(out if image_tokens is None else image_tokens),
        code(out if text is None else text), code(out),
    )  # fmt: skip
    return out


def backward(
    dout, text_tokens, image_ids, text_ids, cu_image, cu_text, has_cls, image_rows, text_rows, vocabulary, patches,
    words, image_dtype, text_dtype, need,
):  # fmt: skip
    count, width = dout.shape
    accumulate = torch.float64 if dout.dtype == torch.float64 else torch.float32
    sizes = (image_rows, text_rows, 3, vocabulary, patches, words)
    dtypes = (image_dtype, text_dtype, accumulate, text_dtype, dout.dtype, dout.dtype)
    grads = tuple(
        dout.new_empty(rows if needed else 0, width, dtype=dtype)
        for rows, dtype, needed in zip(sizes, dtypes, need, strict=True)
    )
    _C.assemble_tokens_backward(
        address(dout), *map(address, (text_tokens, image_ids, text_ids, cu_image, cu_text)), *map(address, grads),
        (cu_text if cu_image is None else cu_image).shape[0] - 1, count, *sizes[:2], *sizes[3:], width, has_cls,
        code(grads[0]), code(grads[1]), code(grads[3]), code(dout),
    )  # fmt: skip
    return grads
