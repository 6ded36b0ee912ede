"""restore_tokens: rebuild the token sequence the decoder reads."""

from __future__ import annotations

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks
from m3ae_fast._autograd import Function, differentiable_once
from m3ae_fast._backends import Impl
from m3ae_fast.ops.restore_tokens import reference

BACKENDS = _backends.load(__package__, "cpp", "triton", "cuda")
PARAMS = ("image_mask_token", "text_mask_token", "image_position", "text_position", "image_type", "text_type")


def restore_tokens(
    kept: Tensor,
    rows: Tensor,
    slots: Tensor,
    *,
    image_mask_token: Tensor | None = None,
    text_mask_token: Tensor | None = None,
    image_position: Tensor | None = None,
    text_position: Tensor | None = None,
    image_type: Tensor | None = None,
    text_type: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Put kept tokens back in sequence order, fill the holes with mask tokens, add positions and types: one write.

        out[t] = (kept[rows[t]] if rows[t] >= 0 else mask_token) + (position[slots[t]] + type)

    The output may be the whole sequence or any part of it, in any order.

    Args:
        kept: [K, D] float32, bfloat16, float16 or float64, the encoder's rows, packed.
        rows: [T] int32 or int64, the row of `kept` that stands at t, or -1 where it was masked. A kept row is named
            at most once; one that is not named gets a zero gradient.
        slots: [T] int32 or int64, the row of [image_position; text_position] that belongs at t: it says the position
            and, by the table it falls in, the modality. -1: neither (CLS): no position, no type, no mask token.
        image_mask_token, text_mask_token: [D] or None (zero).
        image_position: [P, D] or None (no images). text_position: [L, D] or None (no texts).
        image_type, text_type: [D] or None (none is added).
        impl: "reference", "cpp", "triton", "cuda"; None selects the preferred one for the device.

    Returns:
        [T, D] in the widest of the dtypes given; summed in fp32 (fp64 for fp64) in the order of the formula and
        rounded once, so that all backends agree bit for bit.

    Raises:
        ValueError: shapes or devices disagree, an index is outside its table or a kept row is named twice (the C++
            backend checks; a GPU would have to sync for it). TypeError: dtypes.

    Source: arXiv:2205.14204, section 3; the unshuffle of arXiv:2111.06377, section 3.
    """
    _checks.shape("kept", kept, (None, None))
    _checks.dtype("kept", kept, _checks.FLOATS)
    rows = _checks.ids("rows", rows)
    slots = _checks.ids("slots", slots, rows.shape[0])
    width = kept.shape[1]
    vector, table = (width,), (None, width)
    params = (image_mask_token, text_mask_token, image_position, text_position, image_type, text_type)
    shapes = (vector, vector, table, table, vector, vector)
    out_dtype = kept.dtype
    for name, value, shape in zip(PARAMS, params, shapes, strict=True):
        if value is None:
            continue
        _checks.floating(name, value, shape, "kept", kept)
        if value.dtype != out_dtype:
            out_dtype = torch.promote_types(out_dtype, value.dtype)
    _checks.device("rows", rows, "kept", kept)
    _checks.device("slots", slots, "kept", kept)

    impl = _backends.pick(BACKENDS, impl, kept, out_dtype)
    if impl == "reference":
        tables = sum(table.shape[0] for table in (image_position, text_position) if table is not None)
        _checks.within("rows", rows, -1, kept.shape[0])
        _checks.within("slots", slots, -1, tables)
        return reference.restore_tokens(kept, rows, slots, *params)
    if kept.dtype != out_dtype and not (kept.dtype == torch.bfloat16 and out_dtype == torch.float32):
        kept = kept.to(out_dtype)  # bfloat16 for float32 the kernels read as it is
    return _RestoreTokens.apply(
        impl,
        kept.contiguous(),
        rows,
        slots,
        *(v if v is None else (v if v.dtype == out_dtype else v.to(out_dtype)).contiguous() for v in params),
    )


@_backends.operator(BACKENDS, "forward")
def _restore_tokens(
    kept: Tensor, rows: Tensor, slots: Tensor, image_mask_token: Tensor | None, text_mask_token: Tensor | None,
    image_position: Tensor | None, text_position: Tensor | None, image_type: Tensor | None, text_type: Tensor | None,
) -> Tensor:  # fmt: skip
    """[T, D], in the dtype of the parameters where there are any."""
    params = (image_mask_token, text_mask_token, image_position, text_position, image_type, text_type)
    dtype = next((p.dtype for p in params if p is not None), kept.dtype)
    return kept.new_empty(rows.shape[0], kept.shape[1], dtype=dtype)


@_backends.operator(BACKENDS, "backward")
def _restore_tokens_backward(
    dout: Tensor, rows: Tensor, slots: Tensor, kept_rows: int, kept_dtype: torch.dtype, patches: int, words: int,
    need: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dkept, dsums, dimage_position, dtext_position, as `need` asks for them.

    dsums [2, 2, D] in the accumulation dtype: sums of dout's rows by modality (image, text), then by masked or kept. A
    mask token's gradient is the first, a type's is both.
    """
    width = dout.shape[1]
    need_kept, need_sums, need_image_position, need_text_position = need
    return (
        dout.new_empty(kept_rows, width, dtype=kept_dtype) if need_kept else None,
        dout.new_empty(2, 2, width, dtype=_backends.accumulator(dout.dtype)) if need_sums else None,
        dout.new_empty(patches, width) if need_image_position else None,
        dout.new_empty(words, width) if need_text_position else None,
    )


class _RestoreTokens(Function):
    """One for all backends."""

    @staticmethod
    def forward(impl, kept, rows, slots, image_mask_token, text_mask_token, image_position, text_position, image_type,
                text_type):  # fmt: skip
        return _restore_tokens(
            impl, kept, rows, slots, image_mask_token, text_mask_token, image_position, text_position, image_type,
            text_type,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, kept, rows, slots, _, _, *tables = inputs
        ctx.kept_dtype, ctx.kept_rows = kept.dtype, kept.shape[0]
        ctx.patches, ctx.words = (0 if table is None else table.shape[0] for table in tables[:2])
        ctx.save_for_backward(rows, slots)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout):
        rows, slots = saved
        need_kept, _, _, *need = ctx.needs_input_grad[1:]
        image_mask, text_mask, image_position, text_position, image_type, text_type = need
        dkept, dsums, dimage_position, dtext_position = _restore_tokens_backward(
            ctx.impl, dout.contiguous(), rows, slots, ctx.kept_rows, ctx.kept_dtype, ctx.patches, ctx.words,
            [need_kept, image_mask or text_mask or image_type or text_type, image_position, text_position],
        )  # fmt: skip
        dmask = dsums[:, 0].to(dout.dtype).unbind(0) if image_mask or text_mask else (None, None)
        dtype = dsums.sum(1).to(dout.dtype).unbind(0) if image_type or text_type else (None, None)
        grads = (None, dkept, None, None, *dmask, dimage_position, dtext_position, *dtype)
        return tuple(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=True))
