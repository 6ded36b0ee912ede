"""assemble_tokens: the encoder's input in one write."""

from __future__ import annotations

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks
from m3ae_fast._autograd import Function, differentiable_once
from m3ae_fast._backends import Impl
from m3ae_fast.ops.assemble_tokens import reference
from m3ae_fast.seqlens import SeqLens, cu_seqlens

BACKENDS = _backends.load(__package__, "cpp", "triton", "cuda")


def assemble_tokens(
    image_tokens: Tensor | None,
    text_tokens: Tensor | None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    cu_image: SeqLens | Tensor | None = None,
    cu_text: SeqLens | Tensor | None = None,
    cls_token: Tensor | None = None,
    text_embedding: Tensor | None = None,
    image_position: Tensor | None = None,
    text_position: Tensor | None = None,
    image_type: Tensor | None = None,
    text_type: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Put each sample's tokens together, [class token; image rows; text rows], with positions and types: one write.

        image row k: image_tokens[k] + (image_position[image_ids[k]] + image_type)
        text row k:  text_embedding[text_tokens[k]] + (text_position[text_ids[k]] + text_type)

    The output is packed like its parts: cu_out[b] = b * (cls_token is given) + cu_image[b] + cu_text[b]. Models know
    the lengths on the host: `SeqLens(1 + i + t for i, t in zip(image_lengths, text_lengths))`.

    Args:
        image_tokens: [Ki, D] float32, bfloat16, float16 or float64, embedded patches, packed; None: none.
        text_tokens: [Kt] int32 or int64 vocabulary ids, packed, or [Kt, D] float rows; None: none.
            Without tokens a modality's other arguments may stay: they get zero gradients.
        image_ids: [Ki] int32 or int64, the row of `image_position` for each image row. text_ids: [Kt] likewise.
        cu_image, cu_text: SeqLens, or [B + 1] int32 or int64 cumulative offsets, of image_tokens and text_tokens.
            Rows past the last offset are not read and get zero gradients.
        cls_token: [D], first in every sample, without position and type; None: none.
        text_embedding: [V, D], looked up where text_tokens are ids; None where they are float rows.
        image_position: [P, D], text_position: [L, D]; None: no position.
        image_type, text_type: [D]; None: none is added.
        impl: "reference", "cpp", "triton", "cuda"; None selects the preferred one for the device.

    Returns:
        [(B if cls_token is given) + Ki + Kt, D] in the widest of the dtypes given; rows past the last sample are zero.
        Summed in fp32 (fp64 for fp64) in the order of the formula and rounded once, so that all backends agree bit for
        bit; bfloat16 rows with float32 parameters (autocast) are read as they are.

    Raises:
        ValueError: shapes or devices disagree, an argument misses its companion, an id is outside its table or offsets
            decrease (the C++ backend checks; a GPU would have to sync for it). TypeError: dtypes.

    Source: arXiv:2205.14204, section 3.
    """
    if image_tokens is None and text_tokens is None:
        raise ValueError("image_tokens and text_tokens must not both be None")
    looked_up = text_tokens is not None and not _checks.tensor("text_tokens", text_tokens).is_floating_point()
    if text_tokens is not None and looked_up != (text_embedding is not None):
        raise ValueError(
            "text_embedding must be given where text_tokens are vocabulary ids, and only there, got "
            f"{'None' if text_embedding is None else 'a table'} with text_tokens of {text_tokens.dtype}"
        )
    like_name, like = ("text_embedding", text_embedding) if looked_up else ("text_tokens", text_tokens)
    if image_tokens is not None:
        like_name, like = "image_tokens", image_tokens
    _checks.shape(like_name, like, (None, None))
    width = like.shape[1]
    image_ids, cu_image = _companions("image", image_tokens, image_ids, cu_image, image_position)
    text_ids, cu_text = _companions("text", text_tokens, text_ids, cu_text, text_position)
    if image_tokens is None:
        image_tokens = like.new_empty(0, width)
    if text_tokens is None:
        looked_up = text_embedding is not None
        text_tokens = like.new_empty(0, dtype=torch.int32) if looked_up else like.new_empty(0, width)
    if looked_up:
        text_tokens = _checks.ids("text_tokens", text_tokens)
    if cu_image is not None and cu_text is not None:
        _checks.shape("cu_text", cu_text, (cu_image.shape[0],))

    vector, table = (width,), (None, width)
    out_dtype = like.dtype
    for name, value, shape in (
        ("image_tokens", image_tokens, table), ("text_tokens", None if looked_up else text_tokens, table),
        ("text_embedding", text_embedding, table), ("image_position", image_position, table),
        ("text_position", text_position, table), ("cls_token", cls_token, vector), ("image_type", image_type, vector),
        ("text_type", text_type, vector),
    ):  # fmt: skip
        if value is None:
            continue
        _checks.floating(name, value, shape, like_name, like)
        if value.dtype != out_dtype:
            out_dtype = torch.promote_types(out_dtype, value.dtype)
    for name, value in (
        ("text_tokens", text_tokens), ("image_ids", image_ids), ("text_ids", text_ids), ("cu_image", cu_image),
        ("cu_text", cu_text),
    ):  # fmt: skip
        if value is not None and value.device != like.device:
            _checks.device(name, value, like_name, like)

    def param(x):
        return x if x is None else (x if x.dtype == out_dtype else x.to(out_dtype)).contiguous()

    def source(x):  # the kernels read bfloat16 rows for a float32 output as they are
        as_it_is = x is not None and x.dtype == torch.bfloat16 and out_dtype == torch.float32
        return x.contiguous() if as_it_is else param(x)

    impl = _backends.pick(BACKENDS, impl, like, out_dtype)
    args = (image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding,
            image_position, text_position, image_type, text_type)  # fmt: skip
    if impl == "reference":
        return reference.assemble_tokens(*args, out_dtype)
    return _AssembleTokens.apply(
        impl, source(image_tokens), text_tokens if looked_up else source(text_tokens), *args[2:6], param(cls_token),
        source(text_embedding), *map(param, args[8:]), out_dtype,
    )  # fmt: skip


def _companions(name, tokens, ids, cu, position):
    """Checks that one modality's arguments belong together; returns ids and cu as contiguous int32 or None."""
    if tokens is not None and cu is None:
        raise ValueError(f"cu_{name} must be given with {name}_tokens, got None")
    if tokens is not None and (ids is None) != (position is None):
        given, missing = ("position", "ids") if ids is None else ("ids", "position")
        raise ValueError(f"{name}_{missing} must be given with {name}_{given}, got None")
    if tokens is None and ids is None and position is not None:
        ids = _checks.tensor(f"{name}_position", position).new_empty(0, dtype=torch.int32)
    if ids is not None:
        ids = _checks.ids(f"{name}_ids", ids, 0 if tokens is None else tokens.shape[0])
    return ids, cu if cu is None else cu_seqlens(f"cu_{name}", cu)


@_backends.operator(BACKENDS, "forward")
def _assemble_tokens(
    image_tokens: Tensor, text_tokens: Tensor, image_ids: Tensor | None, text_ids: Tensor | None,
    cu_image: Tensor | None, cu_text: Tensor | None, cls_token: Tensor | None, text_embedding: Tensor | None,
    image_position: Tensor | None, text_position: Tensor | None, image_type: Tensor | None, text_type: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[rows, D]."""
    samples = 0 if cls_token is None else (cu_text if cu_image is None else cu_image).shape[0] - 1
    total = samples + image_tokens.shape[0] + text_tokens.shape[0]
    return image_tokens.new_empty(total, image_tokens.shape[1], dtype=dtype)


@_backends.operator(BACKENDS, "backward")
def _assemble_tokens_backward(
    dout: Tensor, text_tokens: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None,
    cu_image: Tensor | None, cu_text: Tensor | None, has_cls: bool, image_rows: int, text_rows: int, vocabulary: int,
    patches: int, words: int, image_dtype: torch.dtype, text_dtype: torch.dtype, need: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients as `need` asks for them: of image rows, of float text rows, [3, D] sums of class tokens, image rows and
    text rows in the accumulation dtype, of the text embedding, of the image position, of the text position."""
    sizes = (image_rows, text_rows, 3, vocabulary, patches, words)
    dtypes = (image_dtype, text_dtype, _backends.accumulator(dout.dtype), text_dtype, dout.dtype, dout.dtype)
    return tuple(
        dout.new_empty(rows, dout.shape[1], dtype=dtype) if needed else None
        for rows, dtype, needed in zip(sizes, dtypes, need, strict=True)
    )


class _AssembleTokens(Function):
    """One for all backends."""

    @staticmethod
    def forward(impl, image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding,
                image_position, text_position, image_type, text_type, dtype):  # fmt: skip
        return _assemble_tokens(
            impl, image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding,
            image_position, text_position, image_type, text_type, dtype,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        (ctx.impl, image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding,
         image_position, text_position, _, _, _) = inputs  # fmt: skip
        words, text = (None, text_tokens) if text_embedding is None else (text_tokens, text_embedding)
        float_rows = text_tokens if words is None else None
        sized = (image_tokens, float_rows, text_embedding, image_position, text_position)
        ctx.has_cls = cls_token is not None
        ctx.rows = tuple(0 if x is None else x.shape[0] for x in sized)
        ctx.dtypes = image_tokens.dtype, text.dtype
        ctx.save_for_backward(words, image_ids, text_ids, cu_image, cu_text)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout):
        (_, image, text, _, _, _, _, cls, embedding, image_position, text_position, image_type, text_type,
         _) = ctx.needs_input_grad  # fmt: skip
        need = [image, text, cls or image_type or text_type, embedding, image_position, text_position]
        dimage, dtext, dparts, dembedding, dimage_position, dtext_position = _assemble_tokens_backward(
            ctx.impl, dout.contiguous(), *saved, ctx.has_cls, *ctx.rows, *ctx.dtypes, need
        )
        dcls, dimage_type, dtext_type = dparts.to(dout.dtype).unbind(0) if need[2] else (None, None, None)
        grads = (None, dimage, dtext, None, None, None, None, dcls, dembedding, dimage_position, dtext_position,
                 dimage_type, dtext_type, None)  # fmt: skip
        return tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=True))
