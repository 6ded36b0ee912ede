"""assemble_tokens on the CPU: csrc/ops/assemble_tokens."""

from m3ae_fast._cpp import _C


def forward(
    image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding, image_position,
    text_position, image_type, text_type, dtype, out,
):  # fmt: skip
    _C.assemble_tokens(
        image_tokens=image_tokens, text_tokens=text_tokens, image_ids=image_ids, text_ids=text_ids, cu_image=cu_image,
        cu_text=cu_text, cls_token=cls_token, text_embedding=text_embedding, image_position=image_position,
        text_position=text_position, image_type=image_type, text_type=text_type, out=out,
    )  # fmt: skip


def backward(
    dout, text_tokens, image_ids, text_ids, cu_image, cu_text, has_cls, image_rows, text_rows, vocabulary, patches,
    words, image_dtype, text_dtype, need, dimage, dtext, dparts, dembedding, dimage_position, dtext_position,
):  # fmt: skip
    _C.assemble_tokens_backward(
        dout=dout, text_tokens=text_tokens, image_ids=image_ids, text_ids=text_ids, cu_image=cu_image, cu_text=cu_text,
        has_cls=has_cls, image_rows=image_rows, text_rows=text_rows if text_tokens is None else text_tokens.shape[0],
        dimage=dimage, dtext=dtext, dparts=dparts, dembedding=dembedding, dimage_position=dimage_position,
        dtext_position=dtext_position,
    )  # fmt: skip
