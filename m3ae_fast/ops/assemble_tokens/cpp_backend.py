"""assemble_tokens on the CPU: csrc/ops/assemble_tokens."""

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C
from m3ae_fast.ops.assemble_tokens.gradients import empty_gradients


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
    sizes = (image_rows, text_rows, vocabulary, patches, words)
    grads = empty_gradients(dout, *sizes, image_dtype, text_dtype, need)
    _C.assemble_tokens_backward(
        address(dout), *map(address, (text_tokens, image_ids, text_ids, cu_image, cu_text)), *map(address, grads),
        (cu_text if cu_image is None else cu_image).shape[0] - 1, count, *sizes, width, has_cls,
        code(grads[0]), code(grads[1]), code(grads[3]), code(dout),
    )  # fmt: skip
    return grads
