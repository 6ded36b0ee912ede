"""xformers' memory_efficient_attention under a BlockDiagonalMask. xformers itself is never imported: its mask is read.

The attributes read are those its `_SeqLenInfo` documents: seqstart_py (a list), seqstart (int32, on the device) and
max_seqlen.
"""

from __future__ import annotations

import itertools

from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast.integrations._layers import offsets
from m3ae_fast.ops import varlen_attention
from m3ae_fast.seqlens import SeqLens


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias=None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op=None,
    output_dtype=None,
) -> Tensor:
    """Attention within each block of a BlockDiagonalMask, or within each sample of a batch of equal lengths.

    Args:
        query: [1, Tq, H, D] float16, bfloat16, float32 or float64 with a mask, [B, S, H, D] without.
        key, value: [1, Tk, Hk, D], or [B, Sk, Hk, D]; H is a multiple of Hk.
        attn_bias: an xformers BlockDiagonalMask on query's device, which covers all rows; None: every query reads all
            keys of its sample. Nothing else, its causal and windowed children included.
        scale: of the scores; None is D ** -0.5.
        p, op, output_dtype: nothing but their defaults.

    Returns:
        [1, Tq, H, D], or [B, S, H, D]. Queries without keys: 0. Differentiable, the same bits on every run.

    Raises:
        NotImplementedError: what is not supported was asked for. ValueError, TypeError: shapes, devices, dtypes.

    Source: arXiv:2112.05682; the arguments of xformers.ops.memory_efficient_attention, xformers 0.0.35.
    """
    for name, given, only in (("p", p, 0.0), ("op", op, None), ("output_dtype", output_dtype, None)):
        if given != only:
            raise NotImplementedError(f"{name} must be {only}, got {given!r}")
    _checks.shape("query", query, (None, None, None, None))
    batch, width = query.shape[0], query.shape[3]
    _checks.shape("key", key, (batch, None, None, width))
    _checks.shape("value", value, key.shape)
    if attn_bias is None:
        longest = [query.shape[1], key.shape[1]]
        cu = [offsets(batch, length, query.device) for length in longest]
    else:
        infos = _infos(attn_bias)
        if batch != 1:
            raise ValueError(f"query must have batch size 1 with a BlockDiagonalMask, got {batch}")
        for name, x, info in zip(("query", "key"), (query, key), infos, strict=True):
            _checks.device("attn_bias", info.seqstart, "query", query)
            if info.seqstart_py[-1] != x.shape[1]:
                raise ValueError(
                    f"attn_bias must cover all {x.shape[1]} rows of {name}, got blocks of {info.seqstart_py[-1]} rows"
                )
        # The mask's own offsets, already on the device: nothing is copied, however many layers share it.
        cu = [info.seqstart for info in infos]
        longest = [max(info.max_seqlen, 0) for info in infos]  # -1 where there are no blocks
    rows = (x.flatten(0, 1) for x in (query, key, value))
    return varlen_attention(*rows, *cu, *longest, softmax_scale=scale).unflatten(0, query.shape[:2])


def seqlens_of(mask) -> tuple[SeqLens, SeqLens]:
    """The lengths of a BlockDiagonalMask's blocks of queries and of keys, on the mask's device. Nothing syncs.

    Raises:
        NotImplementedError: another mask.
    """
    return tuple(_seqlens(info) for info in _infos(mask))


def _seqlens(info) -> SeqLens:
    return SeqLens([end - start for start, end in itertools.pairwise(info.seqstart_py)], info.seqstart.device)


def _infos(mask):
    # By its exact name: a causal or windowed mask is a subclass with the same attributes, and would be read as plain.
    if type(mask).__name__ != "BlockDiagonalMask":
        raise NotImplementedError(f"attn_bias must be a BlockDiagonalMask or None, got {type(mask).__name__}")
    return mask.q_seqinfo, mask.k_seqinfo
