"""xformers' memory_efficient_attention under a BlockDiagonalMask. xformers itself is never imported: its mask is read.

The attributes read are those its `_SeqLenInfo`, `_PaddedSeqLenInfo` and `_GappySeqInfo` document: seqstart_py (a list),
seqstart (int32, on the device), max_seqlen and, of keys with room between them, seqlen (int32, on the device).
"""

from __future__ import annotations

import itertools

from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast.integrations._layers import offsets, without_unused
from m3ae_fast.ops import varlen_attention
from m3ae_fast.seqlens import SeqLens

# By their exact names: a causal or windowed mask is a subclass with the same attributes, and would be read as plain.
PLAIN, WITH_ROOM = "BlockDiagonalMask", ("BlockDiagonalPaddedKeysMask", "BlockDiagonalGappyKeysMask")


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
        query: [1, Tq, H, D] float16, bfloat16, float32 or float64 with a mask, [B, S, H, D] without. Or, of one head,
            [1, Tq, D]; or, of G groups of H heads, [1, Tq, G, H, D].
        key, value: [1, Tk, Hk, D], or [B, Sk, Hk, D]; H is a multiple of Hk. Beside a query of three dimensions
            [1, Tk, D]; of five [1, Tk, G, H, D]: those expanded over H are read once for a group, not copied.
        attn_bias: an xformers BlockDiagonalMask on query's device, which covers all rows; a BlockDiagonalPaddedKeysMask
            or BlockDiagonalGappyKeysMask, of whose keys the first of each block count; None: every query reads all
            keys of its sample. Nothing else, its causal and windowed children included.
        scale: of the scores; None is D ** -0.5.
        p, op, output_dtype: nothing but their defaults.

    Returns:
        Of query's shape. Queries without keys: 0. Differentiable, the same bits on every run; keys that do not count
        have gradients 0.

    Raises:
        NotImplementedError: what is not supported was asked for. ValueError, TypeError: shapes, devices, dtypes.

    Source: arXiv:2112.05682; the arguments of xformers.ops.memory_efficient_attention, xformers 0.0.35.
    """
    for name, given, only in (("p", p, 0.0), ("op", op, None), ("output_dtype", output_dtype, None)):
        if given != only:
            raise NotImplementedError(f"{name} must be {only}, got {given!r}")
    shape = query.shape
    query, key, value = _with_heads(query, key, value)
    if attn_bias is None:
        longest = [query.shape[1], key.shape[1]]
        cu = [offsets(query.shape[0], length, query.device) for length in longest]
    else:
        cu, longest = _offsets_of(attn_bias, query, key)
    rows = (x.flatten(0, 1) for x in (query, key, value))
    return varlen_attention(*rows, *cu, *longest, softmax_scale=scale).view(shape)


def _with_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, H, D], [B, Sk, Hk, D] twice, whichever of the three shapes they come in."""
    dims = _checks.tensor("key", key).dim()
    if dims not in (3, 4, 5):
        raise ValueError(f"key must have 3, 4 or 5 dimensions, got shape {tuple(key.shape)}")
    _checks.shape("query", query, (None,) * dims)
    heads = {3: (), 4: (None,), 5: query.shape[2:4]}[dims]
    _checks.shape("key", key, (query.shape[0], None, *heads, query.shape[-1]))
    _checks.shape("value", value, key.shape)
    if dims == 3:
        return query[:, :, None], key[:, :, None], value[:, :, None]
    if dims == 4:
        return query, key, value
    if key.stride(3) == value.stride(3) == 0:  # one head for all of a group, expanded
        return query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def _offsets_of(mask, query: Tensor, key: Tensor) -> tuple[list[Tensor], list[int]]:
    """(cu_seqlens, the longest length) of queries and keys. Of a plain mask its own offsets, already on the device:
    nothing is copied, however many layers share it."""
    kind = type(mask).__name__
    if kind not in (PLAIN, *WITH_ROOM):
        raise NotImplementedError(f"attn_bias must be None or a {', '.join((PLAIN, *WITH_ROOM))}, got {kind}")
    if query.shape[0] != 1:
        raise ValueError(f"query must have batch size 1 with a {kind}, got {query.shape[0]}")
    infos = mask.q_seqinfo, mask.k_seqinfo
    for name, x, info in zip(("query", "key"), (query, key), infos, strict=True):
        _checks.device("attn_bias", info.seqstart, "query", query)
        starts = info.seqstart_py
        if starts[0] != 0 or starts[-1] != x.shape[1]:
            wanted = f"rows 0 to {x.shape[1]} of {name}, all of them"
            raise ValueError(f"attn_bias must cover {wanted}, got blocks of rows {starts[0]} to {starts[-1]}")
    cu = [info.seqstart for info in infos]
    longest = [max(info.max_seqlen, 0) for info in infos]  # -1 where there are no blocks
    if kind in WITH_ROOM:
        keys = mask.k_seqinfo
        longest[1] = max((end - start for start, end in itertools.pairwise(keys.seqstart_py)), default=0)
        cu = list(without_unused(*cu, keys.seqlen))
    return cu, longest


def seqlens_of(mask) -> tuple[SeqLens, SeqLens]:
    """The lengths of a BlockDiagonalMask's blocks of queries and of keys, on the mask's device. Nothing syncs.

    Raises:
        NotImplementedError: another mask.
    """
    if type(mask).__name__ != PLAIN:
        raise NotImplementedError(f"attn_bias must be a {PLAIN} or None, got {type(mask).__name__}")
    return tuple(
        SeqLens([end - start for start, end in itertools.pairwise(info.seqstart_py)], info.seqstart.device)
        for info in (mask.q_seqinfo, mask.k_seqinfo)
    )
