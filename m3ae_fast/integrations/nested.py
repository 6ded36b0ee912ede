"""Jagged nested tensors, PyTorch's own packed batches, in and out: their values are our rows, and are not copied."""

from __future__ import annotations

import torch
from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast._backends import Impl
from m3ae_fast.ops import varlen_attention
from m3ae_fast.seqlens import SeqLens


def from_nested(nested: Tensor) -> tuple[Tensor, SeqLens]:
    """The rows of a jagged nested tensor and their lengths.

    Args:
        nested: [B, j, ...] with layout torch.jagged. On a GPU its offsets are copied to the host: a sync.

    Returns:
        rows [T, ...], its values (a view; a copy where it has holes, as torch.nested.narrow leaves them), and their
        SeqLens on its device. Differentiable.

    Raises:
        TypeError: not a jagged nested tensor. ValueError: another dimension than the second is ragged.
    """
    nested = _packed("nested", nested)
    return nested.values(), SeqLens(nested.offsets().diff(), nested.device)


def to_nested(rows: Tensor, seqlens: SeqLens | Tensor) -> Tensor:
    """A jagged nested tensor of packed rows.

    Args:
        rows: [T, ...].
        seqlens: SeqLens of B sequences of T rows in all, on rows' device; or a jagged nested tensor [B, j, ...] of
            such lengths. PyTorch adds up nested tensors of one j only: those made by one SeqLens, or by one tensor.

    Returns:
        [B, j, ...], whose values are `rows`, not a copy. Differentiable.

    Raises:
        TypeError: of other types. ValueError: other rows than lengths, or devices disagree.
    """
    _checks.tensor("rows", rows)
    if isinstance(seqlens, SeqLens):
        offsets, total, longest = seqlens.cu, seqlens.total, seqlens.max
    else:
        like = _packed("seqlens", seqlens)
        offsets, total, longest = like.offsets(), like.values().shape[0], _longest(like)
    _checks.device("seqlens", offsets, "rows", rows)
    if rows.dim() < 1 or rows.shape[0] != total:
        raise ValueError(f"rows must be the {total} rows of seqlens, got shape {tuple(rows.shape)}")
    return torch.nested.nested_tensor_from_jagged(rows, offsets, max_seqlen=longest)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, impl: Impl | None = None
) -> Tensor:
    """Softmax attention within each of B sequences: no mask, not causal.

    Args:
        q: [B, j, H, D], jagged, of float16, bfloat16, float32 or float64. Heads come after the ragged dimension, as a
            projection makes them: not transposed, as for scaled_dot_product_attention.
        k, v: [B, i, Hk, D], jagged; H is a multiple of Hk. Where v has not the very offsets of k, the two are
            compared: on a GPU a sync.
        softmax_scale: None is D ** -0.5.
        impl: see `varlen_attention`.

    Returns:
        [B, j, H, D], jagged, with the offsets of q, so that the two add up. Sequences without keys: 0.
        Differentiable, the same bits on every run.

    Raises:
        TypeError: not jagged nested tensors, or dtypes. ValueError: shapes, lengths or devices disagree.

    Source: `varlen_attention`.
    """
    q, k, v = (_packed(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must hold as many sequences as q, {q.shape[0]}, got {k.shape[0]}")
    if v.offsets() is not k.offsets() and not torch.equal(v.offsets(), k.offsets()):
        raise ValueError("v must have the lengths of k, got others")
    out = varlen_attention(
        q.values(), k.values(), v.values(), q.offsets(), k.offsets(), _longest(q), _longest(k),
        softmax_scale=softmax_scale, impl=impl,
    )  # fmt: skip
    return to_nested(out, q)


def _packed(name: str, x: Tensor) -> Tensor:
    """A jagged nested tensor whose values are rows without holes: x itself where it is one."""
    if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged:
        got = "a strided nested tensor" if isinstance(x, Tensor) and x.is_nested else type(x).__name__
        raise TypeError(f"{name} must be a nested tensor with layout torch.jagged, got {got}")
    if x._ragged_idx != 1:
        raise ValueError(f"{name} must be ragged in dimension 1, got dimension {x._ragged_idx}: transpose it back")
    return x if x.lengths() is None else x.contiguous()


def _longest(nested: Tensor) -> int:
    """Cached by the tensor; on a GPU the first call synchronizes if the length was not given."""
    return nested._get_max_seqlen() if nested.shape[0] else 0
