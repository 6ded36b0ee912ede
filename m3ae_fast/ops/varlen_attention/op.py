"""varlen_attention: softmax attention within each of many packed sequences."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks, seqlens
from m3ae_fast._autograd import Function, differentiable_once, kept
from m3ae_fast._backends import Impl, like
from m3ae_fast.ops.varlen_attention import choice, reference

BACKENDS = _backends.load(__package__, "cpp", "triton", "cuda")
BACKENDS.remarks += choice.remarks()


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: seqlens.SeqLens | Tensor,
    cu_seqlens_k: seqlens.SeqLens | Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, *, softmax_scale: float | None = None, return_lse: Literal[False] = False,
    impl: Impl | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: seqlens.SeqLens | Tensor,
    cu_seqlens_k: seqlens.SeqLens | Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, *, softmax_scale: float | None = None, return_lse: Literal[True],
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: seqlens.SeqLens | Tensor,
    cu_seqlens_k: seqlens.SeqLens | Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, *, softmax_scale: float | None = None, return_lse: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: seqlens.SeqLens | Tensor,
    cu_seqlens_k: seqlens.SeqLens | Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed queries to the packed keys of the same sequence; no mask, not causal, no padding.

        out[i] = sum_j softmax_j(q[i] . k[j] * softmax_scale) v[j],  i and j in the same sequence

    Args:
        q: [Tq, H, D] float32, bfloat16, float16 or float64. A view of a fused qkv is read as it is: only the last
            dimension has to be contiguous (else it is copied).
        k, v: [Tk, Hk, D]; H is a multiple of Hk (grouped heads: query head h reads key head h * Hk // H).
        cu_seqlens_q, cu_seqlens_k: SeqLens of B sequences, or their cumulative offsets [B + 1], int32 or int64,
            ascending from 0. Keys' None: the queries' (self attention).
        max_seqlen_q, max_seqlen_k: at least the longest length, an integer (numpy's, or a tensor on the CPU that holds
            one, will do); None takes it from the SeqLens. With bare offsets they must be given on a GPU, where reading
            the offsets would synchronize; the CPU reads them.
        softmax_scale: None is D ** -0.5.
        return_lse: return (out, lse).
        impl: "reference", "cpp", "triton" (D up to 512), "cuda" (bfloat16 and float16, D up to 128); None selects the
            preferred one for the device, on a GPU by the shape, where that was measured (`choice.py`). float16 on the
            CPU, and wider heads on a GPU: the reference.

    If q, k and v have different dtypes, the widest is used; under autocast, autocast's. Products are summed and the
    softmax is taken in fp32 (fp64 for fp64). Differentiable, through lse too, and the same bits on every run. In bf16
    and fp16 the backward pass reads out as it was rounded: where one weight is nearly 1, gradients of q and k, which
    are nearly 0 there, are as wrong as that rounding times dout . v (as in FlashAttention).

    Returns:
        out [Tq, H, D]; with return_lse also lse [H, Tq] float32 (float64 for float64): the natural log of the sum of
        exp(scores). Without keys, and in rows past cu_seqlens[-1]: out 0, lse -inf, gradients 0.

    Raises:
        ValueError: shapes or devices disagree, or offsets do not ascend, run past the rows or past max_seqlen (the
            C++ backend checks; a GPU would have to sync for it). TypeError: dtypes.

    Source: arXiv:2205.14135 (FlashAttention), algorithm 1; names as in flash_attn_varlen_func.
    """
    _checks.shape("q", q, (None, None, None))
    heads, width = q.shape[1:]
    _checks.shape("k", k, (None, None, width))
    _checks.shape("v", v, k.shape)
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.dtype(name, value, _checks.FLOATS)
        _checks.device(name, value, "q", q)
    if heads < 1 or width < 1:
        raise ValueError(f"q must have at least one head and one channel, got shape {tuple(q.shape)}")
    if k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"k must have a number of heads that divides q's {heads}, got {k.shape[1]}")

    softmax_scale = _no_integer(softmax_scale)
    cu_q, max_q = _lengths("q", cu_seqlens_q, max_seqlen_q, q)
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"cu_seqlens_k must be given where k has other rows than q, got None for {k.shape[0]} and {q.shape[0]}"
            )
        cu_k, max_k = None, max_q
    else:
        cu_k, max_k = _lengths("k", cu_seqlens_k, max_seqlen_k, q)
    if cu_k is not None and cu_k.shape[0] != cu_q.shape[0]:
        raise ValueError(
            f"cu_seqlens_k must hold as many sequences as cu_seqlens_q, {cu_q.shape[0] - 1}, got {cu_k.shape[0] - 1}"
        )

    dtype = _backends.product_dtype(q, k, v)
    q, k, v = (_dense_rows(x.to(dtype)) for x in (q, k, v))
    impl = choice.pick(BACKENDS, impl, q, max_q, max_k)
    if impl == "reference":
        cu_k = cu_q if cu_k is None else cu_k
        out, lse = reference.varlen_attention(
            q,
            k,
            v,
            cu_q,
            cu_k,
            seqlens.longest(cu_q, max_q),
            seqlens.longest(cu_k, max_k),
            _scale(softmax_scale, width),
        )
        return (out, lse) if return_lse else out
    # torch.compile takes no tensor twice in one apply.
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is k else v
    cu_k = None if cu_k is cu_q else cu_k
    out, _, *lse = _VarlenAttention.apply(impl, return_lse, q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale)
    return (out, *lse) if return_lse else out


@overload
def varlen_attention_qkvpacked(
    qkv: Tensor, cu_seqlens: seqlens.SeqLens | Tensor, max_seqlen: int | None = None, *,
    softmax_scale: float | None = None, return_lse: Literal[False] = False, impl: Impl | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def varlen_attention_qkvpacked(
    qkv: Tensor, cu_seqlens: seqlens.SeqLens | Tensor, max_seqlen: int | None = None, *,
    softmax_scale: float | None = None, return_lse: Literal[True], impl: Impl | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def varlen_attention_qkvpacked(
    qkv: Tensor, cu_seqlens: seqlens.SeqLens | Tensor, max_seqlen: int | None = None, *,
    softmax_scale: float | None = None, return_lse: bool = False, impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def varlen_attention_qkvpacked(
    qkv: Tensor,
    cu_seqlens: seqlens.SeqLens | Tensor,
    max_seqlen: int | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`varlen_attention` of q, k, v = qkv.unbind(1): the same bits, and the gradient is written in one buffer.

    Args:
        qkv: [T, 3, H, D], what one projection makes; only the last dimension has to be contiguous.
        cu_seqlens, max_seqlen, softmax_scale, return_lse, impl: see `varlen_attention`.

    Returns:
        out [T, H, D]; with return_lse also lse [H, T].

    Raises:
        ValueError, TypeError: as `varlen_attention`.
    """
    _checks.shape("qkv", qkv, (None, 3, None, None))
    _checks.dtype("qkv", qkv, _checks.FLOATS)
    if qkv.shape[2] < 1 or qkv.shape[3] < 1:
        raise ValueError(f"qkv must have at least one head and one channel, got shape {tuple(qkv.shape)}")
    softmax_scale = _no_integer(softmax_scale)
    cu, longest = _lengths("", cu_seqlens, max_seqlen, qkv)
    qkv = _dense_rows(qkv.to(_backends.product_dtype(qkv)))
    impl = choice.pick(BACKENDS, impl, qkv, longest)
    if impl == "reference":
        longest = seqlens.longest(cu, longest)
        scale = _scale(softmax_scale, qkv.shape[3])
        out, lse = reference.varlen_attention(*qkv.unbind(1), cu, cu, longest, longest, scale)
        return (out, lse) if return_lse else out
    out, _, *lse = _VarlenAttentionPacked.apply(impl, return_lse, qkv, cu, longest, softmax_scale)
    return (out, *lse) if return_lse else out


def _lengths(suffix: str, value: seqlens.SeqLens | Tensor, longest: int | None, like: Tensor):
    """(cu, the longest length: None where it was not given and the CPU can compute it)."""
    name, max_name = (f"{stem}_{suffix}".rstrip("_") for stem in ("cu_seqlens", "max_seqlen"))
    cu = seqlens.cu_seqlens(name, value)
    _checks.device(name, cu, "q" if suffix else "qkv", like)
    if longest is not None:
        longest = _checks.as_integer(max_name, longest, 0)
    elif isinstance(value, seqlens.SeqLens):
        longest = value.max
    elif like.device.type != "cpu":
        raise ValueError(
            f"{max_name} must be given with a bare {name} on {like.device.type} (to look would be a sync; a SeqLens "
            "knows it), got None"
        )
    return cu, longest


def _no_integer(softmax_scale: float | None) -> float | None:
    """An integer may be larger than int64, which is as large as backends take them."""
    return float(softmax_scale) if isinstance(softmax_scale, int) else softmax_scale


def _scale(softmax_scale: float | None, width: int) -> float:
    return width**-0.5 if softmax_scale is None else softmax_scale


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@_backends.operator(BACKENDS, "forward")
def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, max_q: int | None, max_k: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out; stats [2, H, Tq], of which the weights can be made again however large the scores are, as lse would not do:
    the score that weighs most, without the scale, and log2 of the sum of exp((score - that) * scale); 0 and -inf
    without keys. cu_k None: cu_q, for torch.compile takes no tensor twice."""
    return like(q), q.new_empty(2, q.shape[1], q.shape[0], dtype=_backends.accumulator(q.dtype))


def _lse(stats: Tensor, softmax_scale: float | None, width: int) -> Tensor:
    peak, log_total = stats.unbind(0)
    return torch.add(peak * _scale(softmax_scale, width), log_total, alpha=math.log(2))


@_backends.operator(BACKENDS, "backward")
def _varlen_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, cu_q: Tensor,
    cu_k: Tensor | None, max_q: int | None, max_k: int | None, softmax_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv: filled whole, rows past cu[-1] included."""
    return like(q), like(k), like(v)


def _fill_packed(backend, dout, dlse, qkv, out, stats, cu, longest, softmax_scale, dqkv):
    backend.backward(
        dout, dlse, *qkv.unbind(1), out, stats, cu, None, longest, longest, softmax_scale, *dqkv.unbind(1)
    )  # fmt: skip


@_backends.operator(BACKENDS, _fill_packed)
def _varlen_attention_packed_backward(
    dout: Tensor, dlse: Tensor | None, qkv: Tensor, out: Tensor, stats: Tensor, cu: Tensor, longest: int | None,
    softmax_scale: float | None,
) -> Tensor:  # fmt: skip
    """dqkv."""
    return like(qkv)


def _gradients(out: Tensor, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dout and dlse as the operators take them."""
    return torch.zeros_like(out) if dout is None else _dense_rows(dout), None if dlse is None else dlse.contiguous()


class _VarlenAttention(Function):
    """One for all backends."""

    @staticmethod
    def forward(impl, return_lse, q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale):
        out, stats = _varlen_attention(impl, q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale)
        return (out, stats, _lse(stats, softmax_scale, q.shape[2])) if return_lse else (out, stats)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, _, q, k, v, cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.softmax_scale = inputs
        out, stats, *_ = output
        ctx.save_for_backward(q, k, v, out, stats, cu_q, cu_k)
        kept(ctx, stats)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout, _, dlse=None):
        q, k, v, out, stats, cu_q, cu_k = saved
        gradients = _varlen_attention_backward(
            ctx.impl, *_gradients(out, dout, dlse), q, k, v, out, stats, cu_q, cu_k, ctx.max_q, ctx.max_k,
            ctx.softmax_scale,
        )  # fmt: skip
        return None, None, *gradients, None, None, None, None, None


class _VarlenAttentionPacked(Function):
    """The same with q, k, v in one buffer, and their gradients too."""

    @staticmethod
    def forward(impl, return_lse, qkv, cu, longest, softmax_scale):
        out, stats = _varlen_attention(impl, *qkv.unbind(1), cu, None, longest, longest, softmax_scale)
        return (out, stats, _lse(stats, softmax_scale, qkv.shape[3])) if return_lse else (out, stats)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, _, qkv, cu, ctx.longest, ctx.softmax_scale = inputs
        out, stats, *_ = output
        ctx.save_for_backward(qkv, out, stats, cu)
        kept(ctx, stats)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout, _, dlse=None):
        qkv, out, stats, cu = saved
        dqkv = _varlen_attention_packed_backward(
            ctx.impl, *_gradients(out, dout, dlse), qkv, out, stats, cu, ctx.longest, ctx.softmax_scale
        )
        return None, None, dqkv, None, None, None
