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
    total = (0 if cls_token is None else batch) + image_tokens.shape[0] + text_tokens.shape[0]
    out = image_tokens.new_empty(total, image_tokens.shape[1], dtype=dtype)
    tensors = (image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding,
               image_position, text_position, image_type, text_type)  # fmt: skip
    _C.assemble_tokens(
        *map(address, tensors), address(out), batch, total, image_tokens.shape[0], text_tokens.shape[0],
        _rows(text_embedding), _rows(image_position), _rows(text_position), out.shape[1], code(image_tokens),
        code(text_tokens if text_embedding is None else text_embedding), code(out),
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
