"""assemble_tokens on the CPU: csrc/ops/assemble_tokens."""

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C
from m3ae_fast.ops.assemble_tokens.outputs import empty_gradients, empty_output, samples


def _rows(tensor):
    return -1 if tensor is None else tensor.shape[0]


def forward(
    image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding, image_position,
    text_position, image_type, text_type, dtype,
):  # fmt: skip
    out = empty_output(image_tokens, text_tokens, cu_image, cu_text, cls_token, dtype)
    tensors = (image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding,
               image_position, text_position, image_type, text_type)  # fmt: skip
    _C.assemble_tokens(
        *map(address, tensors), address(out), samples(cu_image, cu_text), out.shape[0], image_tokens.shape[0],
        text_tokens.shape[0], _rows(text_embedding), _rows(image_position), _rows(text_position), out.shape[1],
        code(image_tokens), code(text_tokens if text_embedding is None else text_embedding), code(out),
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
        samples(cu_image, cu_text), count, *sizes, width, has_cls,
        code(grads[0]), code(grads[1]), code(grads[3]), code(dout),
    )  # fmt: skip
    return grads
