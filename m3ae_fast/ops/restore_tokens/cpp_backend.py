"""restore_tokens on the CPU: csrc/ops/restore_tokens."""

from m3ae_fast._cpp import _C


def forward(
    kept, rows, slots, image_mask_token, text_mask_token, image_position, text_position, image_type, text_type, out
):
    _C.restore_tokens(
        kept=kept, rows=rows, slots=slots, image_mask_token=image_mask_token, text_mask_token=text_mask_token,
        image_position=image_position, text_position=text_position, image_type=image_type, text_type=text_type, out=out,
    )  # fmt: skip


def backward(
    dout, rows, slots, kept_rows, kept_dtype, patches, words, need, dkept, dsums, dimage_position, dtext_position
):
    _C.restore_tokens_backward(
        dout=dout, rows=rows, slots=slots, kept_rows=kept_rows, patches=patches, words=words, dkept=dkept, dsums=dsums,
        dimage_position=dimage_position, dtext_position=dtext_position,
    )  # fmt: skip
