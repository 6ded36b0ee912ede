"""FlashAttention-2's functions under its names: `flash_attn` and `flash_attn.bert_padding`.

Same arguments in the same order with the same defaults as flash_attn 2.7 and 2.8, on the CPU too and in fp32 and fp64.
What `varlen_attention` does not support (dropout, causal and sliding-window masks, soft-capping, ALiBi, paged keys) is
refused.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast import _checks, seqlens
from m3ae_fast.integrations._layers import offsets, without_unused
from m3ae_fast.ops import varlen_attention, varlen_attention_qkvpacked

_OutLseProbs: TypeAlias = tuple[Tensor, Tensor, Tensor]  # of return_attn_probs


@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, *, return_attn_probs: Literal[True],
) -> _OutLseProbs: ...  # fmt: skip
@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | _OutLseProbs: ...  # fmt: skip
def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention of a batch without padding: every query reads all keys of its sample.

    Args:
        q: [B, S, H, D] float16, bfloat16, float32 or float64. A batch whose samples are not adjacent in memory is
            copied, as is one whose last dimension is not contiguous.
        k, v: [B, Sk, Hk, D]; H is a multiple of Hk.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as of
            `flash_attn_varlen_func`.

    Returns:
        out [B, S, H, D]; with return_attn_probs also softmax_lse [B, H, S] float32 (float64 for float64) and S_dmask,
        an empty tensor.

    Raises:
        NotImplementedError: what is not supported was asked for. ValueError, TypeError: shapes, devices, dtypes.

    Source: arXiv:2307.08691; the arguments of flash_attn_func, flash_attn 2.8.
    """
    _plain(dropout_p, causal, window_size, softcap, alibi_slopes)
    _checks.shape("q", q, (None, None, None, None))
    _checks.shape("k", k, (q.shape[0], None, None, q.shape[3]))
    _checks.shape("v", v, k.shape)
    lengths = q.shape[1], k.shape[1]
    result = varlen_attention(
        *(x.flatten(0, 1) for x in (q, k, v)), *(offsets(len(q), length, q.device) for length in lengths), *lengths,
        softmax_scale=softmax_scale, return_lse=return_attn_probs,
    )  # fmt: skip
    return _by_sample(result, q.shape[:2])


@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, *, return_attn_probs: Literal[True],
) -> _OutLseProbs: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | _OutLseProbs: ...  # fmt: skip
def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` of k, v = kv.unbind(2).

    Args:
        kv: [B, Sk, 2, Hk, D]. The others, what is returned and what is raised: see `flash_attn_func`.
    """
    _checks.shape("kv", kv, (None, None, 2, None, None))
    return flash_attn_func(
        q, *kv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, *, return_attn_probs: Literal[True],
) -> _OutLseProbs: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | _OutLseProbs: ...  # fmt: skip
def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` of q, k, v = qkv.unbind(2), whose gradient is written in one buffer.

    Args:
        qkv: [B, S, 3, H, D]. The others, what is returned and what is raised: see `flash_attn_func`.
    """
    _plain(dropout_p, causal, window_size, softcap, alibi_slopes)
    _checks.shape("qkv", qkv, (None, None, 3, None, None))
    batch, length = qkv.shape[:2]
    result = varlen_attention_qkvpacked(
        qkv.flatten(0, 1), offsets(batch, length, qkv.device), length, softmax_scale=softmax_scale,
        return_lse=return_attn_probs,
    )  # fmt: skip
    return _by_sample(result, (batch, length))


@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: seqlens.SeqLens | Tensor, cu_seqlens_k: seqlens.SeqLens | Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: Literal[False] = False,
    block_table: None = None, *, seqused_k: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: seqlens.SeqLens | Tensor, cu_seqlens_k: seqlens.SeqLens | Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, *, return_attn_probs: Literal[True],
    block_table: None = None, seqused_k: Tensor | None = None,
) -> _OutLseProbs: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: seqlens.SeqLens | Tensor, cu_seqlens_k: seqlens.SeqLens | Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: None = None, *, seqused_k: Tensor | None = None,
) -> Tensor | _OutLseProbs: ...  # fmt: skip
def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    *,
    seqused_k=None,
):
    """Attention of packed queries to the packed keys of the same sequence.

    Args:
        q: [Tq, H, D] float16, bfloat16, float32 or float64.
        k, v: [Tk, Hk, D]; H is a multiple of Hk.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32 or int64, cumulative offsets; a SeqLens will do.
        max_seqlen_q, max_seqlen_k: int, at least the longest length.
        softmax_scale: None is D ** -0.5.
        deterministic: accepted, and always the case: the gradients are the same bits on every run.
        return_attn_probs: return (out, softmax_lse, S_dmask).
        dropout_p, causal, window_size, softcap, alibi_slopes, block_table: must have their defaults (or a softcap below
            0, which means none).
        seqused_k: [B] int32 or int64, at most the lengths: only the first seqused_k[b] keys of sequence b are used. The
            others may hold anything, also NaN; their gradients are 0. Nothing is copied: there are twice as many
            sequences internally, every other one without queries. max_seqlen_k includes the unused keys.

    Returns:
        out [Tq, H, D]; with return_attn_probs also softmax_lse [H, Tq] float32 (float64 for float64), the natural log
        of the sum of exp(scores), and S_dmask, an empty tensor: FlashAttention fills it under dropout only.
        A query without keys: out 0, gradients 0, and softmax_lse -inf, as the formula and FlashAttention-3 have it
        (FlashAttention-2's kernel writes +inf). Gradients through softmax_lse are supported; FlashAttention ignores
        them.

    Raises:
        NotImplementedError: what is not supported was asked for. ValueError, TypeError: as `varlen_attention`; more
            keys are used than there are (the CPU checks; a GPU would have to sync for it).

    Source: arXiv:2307.08691; the arguments of flash_attn_varlen_func, flash_attn 2.8; seqused_k as in FlashAttention-3.
    """
    _plain(dropout_p, causal, window_size, softcap, alibi_slopes, block_table)
    if seqused_k is not None:
        max_seqlen_q = _longest(cu_seqlens_q, max_seqlen_q)
        max_seqlen_k = _longest(cu_seqlens_k, max_seqlen_k)
        cu_seqlens_q, cu_seqlens_k = _of_used(cu_seqlens_q, cu_seqlens_k, seqused_k)
    result = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, return_lse=return_attn_probs,
    )  # fmt: skip
    return _with_empty_probs(*result) if return_attn_probs else result


@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: seqlens.SeqLens | Tensor, cu_seqlens_k: seqlens.SeqLens | Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: seqlens.SeqLens | Tensor, cu_seqlens_k: seqlens.SeqLens | Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, *, return_attn_probs: Literal[True],
) -> _OutLseProbs: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: seqlens.SeqLens | Tensor, cu_seqlens_k: seqlens.SeqLens | Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | _OutLseProbs: ...  # fmt: skip
def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` of k, v = kv.unbind(1).

    Args:
        kv: [Tk, 2, Hk, D]. The others, what is returned and what is raised: see `flash_attn_varlen_func`.
    """
    _checks.shape("kv", kv, (None, 2, None, None))
    return flash_attn_varlen_func(
        q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: seqlens.SeqLens | Tensor, max_seqlen: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: seqlens.SeqLens | Tensor, max_seqlen: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False, *,
    return_attn_probs: Literal[True],
) -> _OutLseProbs: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: seqlens.SeqLens | Tensor, max_seqlen: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | _OutLseProbs: ...  # fmt: skip
def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` of q, k, v = qkv.unbind(1), whose gradient is written in one buffer.

    Args:
        qkv: [T, 3, H, D]. cu_seqlens, max_seqlen: of queries and keys alike.
            The others, what is returned and what is raised: see `flash_attn_varlen_func`.
    """
    _plain(dropout_p, causal, window_size, softcap, alibi_slopes)
    result = varlen_attention_qkvpacked(
        qkv, cu_seqlens, max_seqlen, softmax_scale=softmax_scale, return_lse=return_attn_probs
    )
    return _with_empty_probs(*result) if return_attn_probs else result


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of a padded batch that a mask selects, packed. It reads the mask's values: on a GPU that is a sync.

    Args:
        hidden_states: [B, S, ...], any dtype.
        attention_mask: [B, S] bool or number, not zero where a token is valid; anywhere, not just in front.
        unused_mask: [B, S], not zero where room is to be left for a token that is not valid; None: nowhere.

    Returns:
        rows [T, ...]; indices [T] int64, their places among the B * S; cu_seqlens [B + 1] int32; the longest length,
        an int; seqused [B] int32, how many tokens of each sequence are valid (unused ones not counted).

    Raises:
        ValueError: shapes disagree.

    Source: flash_attn.bert_padding.unpad_input, flash_attn 2.7 and later (before, it returned the first four).
    """
    _check_padded(hidden_states, "attention_mask", attention_mask)
    valid = taken = attention_mask != 0
    if unused_mask is not None:
        _checks.shape("unused_mask", unused_mask, hidden_states.shape[:2])
        taken = valid | (unused_mask != 0)
    lengths = taken.sum(1, dtype=torch.int32)
    indices = taken.flatten().nonzero().flatten()
    longest = int(lengths.max()) if len(lengths) else 0
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows = hidden_states.flatten(0, 1).index_select(0, indices)
    return rows, indices, cu_seqlens, longest, valid.sum(1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The rows of a padded batch whose samples hold several sequences each, packed: attention stays within a sequence.

    It reads the lengths' values: on a GPU that is a sync.

    Args:
        hidden_states: [B, S, ...], any dtype; the sequences of a sample follow one another from its first row.
        attention_mask_in_length: [B, S] integers: the lengths of the sample's sequences, in their order, and zeros.

    Returns:
        rows [T, ...]; indices [T] int64, their places among the B * S; cu_seqlens [N + 1] int32 of the N sequences; the
        longest length, an int. `pad_input` takes rows and indices back.

    Raises:
        ValueError: shapes disagree, or lengths are negative or more than S in a sample. TypeError: no integers.

    Source: flash_attn.bert_padding.unpad_input_for_concatenated_sequences, flash_attn 2.8.
    """
    name, lengths = "attention_mask_in_length", attention_mask_in_length
    _check_padded(hidden_states, name, lengths)
    _checks.dtype(name, lengths, (torch.int64, torch.int32, torch.int16, torch.uint8))
    lengths = lengths.to(torch.int64)
    totals = lengths.sum(1, keepdim=True)
    indices = (torch.arange(lengths.shape[1], device=lengths.device) < totals).flatten().nonzero().flatten()
    lengths = lengths[lengths != 0]
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    if len(indices) != cu_seqlens[-1] or (lengths < 0).any():
        most = hidden_states.shape[1]
        raise ValueError(f"{name} must hold lengths of at most {most} rows in all in each sample, not negative")
    return hidden_states.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed rows back in their places, zeros elsewhere: the inverse of `unpad_input`.

    Args:
        hidden_states: [T, ...], any dtype.
        indices: [T] int32 or int64, distinct, in [0, batch * seqlen).

    Returns:
        [batch, seqlen, ...].

    Raises:
        ValueError: shapes disagree, or an index is out of range (the CPU checks; a GPU would have to sync for it).

    Source: flash_attn.bert_padding.pad_input.
    """
    _checks.integer("batch", batch, 0)
    _checks.integer("seqlen", seqlen, 0)
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Rows in their places of [first_axis_dim, ...], zeros elsewhere: `pad_input` without a batch's dimensions.

    Args:
        values: [T, ...], any dtype.
        indices: [T] int32 or int64, distinct, in [0, first_axis_dim).

    Raises:
        ValueError: as `pad_input`.

    Source: flash_attn.bert_padding.index_put_first_axis.
    """
    _checks.integer("first_axis_dim", first_axis_dim, 0)
    _check_indices(indices, (_checks.tensor("values", values).shape[0],), first_axis_dim)
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy_(0, indices.long(), values)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices].

    Args:
        input: [N, ...], any dtype.
        indices: [T] int32 or int64, in [0, N). The gradients of a row that is named twice are summed.

    Returns:
        [T, ...].

    Raises:
        ValueError: shapes disagree, or an index is out of range (the CPU checks; a GPU would have to sync for it).

    Source: flash_attn.bert_padding.index_first_axis.
    """
    _check_indices(indices, (None,), _checks.tensor("input", input).shape[0])
    return input.index_select(0, indices)


def _check_padded(hidden_states, name, mask):
    if _checks.tensor("hidden_states", hidden_states).dim() < 2:
        raise ValueError(f"hidden_states must have shape (B, S, ...), got {tuple(hidden_states.shape)}")
    _checks.shape(name, mask, hidden_states.shape[:2])


def _check_indices(indices, shape, rows):
    _checks.shape("indices", indices, shape)
    _checks.dtype("indices", indices, _checks.INTEGERS)
    _checks.within("indices", indices, 0, rows)


def _longest(cu: seqlens.SeqLens | Tensor, longest: int | None) -> int | None:
    return cu.max if longest is None and isinstance(cu, seqlens.SeqLens) else longest


def _of_used(cu_q: seqlens.SeqLens | Tensor, cu_k: seqlens.SeqLens | Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """The offsets of queries and keys, the keys that are not used in sequences of their own."""
    cu_q, cu_k = seqlens.cu_seqlens("cu_seqlens_q", cu_q), seqlens.cu_seqlens("cu_seqlens_k", cu_k)
    _checks.shape("cu_seqlens_k", cu_k, cu_q.shape)
    used = _checks.ids("seqused_k", _checks.tensor("seqused_k", used), len(cu_k) - 1)
    _checks.device("seqused_k", used, "cu_seqlens_k", cu_k)
    if used.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = cu_k.diff()
        if (used < 0).any() or (used > lengths).any():
            raise ValueError(
                f"seqused_k must be at most the lengths of the sequences, {lengths.tolist()}, got {used.tolist()}"
            )
    return without_unused(cu_q, cu_k, used)


def _by_sample(result, shape):
    """What `varlen_attention` returned of a batch of (B, S) equal lengths, with the batch's dimensions."""
    if isinstance(result, Tensor):
        return result.unflatten(0, shape)
    out, lse = result
    return _with_empty_probs(out.unflatten(0, shape), lse.unflatten(1, shape).transpose(0, 1))


def _with_empty_probs(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return out, lse, out.new_empty(0)


def _plain(dropout_p, causal, window_size, softcap, alibi_slopes, block_table=None):
    """Refuse what varlen_attention has not: ignored, it would be another attention than the one asked for."""
    for name, value, only, supported in (
        ("dropout_p", dropout_p, 0.0, dropout_p == 0),
        ("causal", causal, False, not causal),
        ("window_size", window_size, (-1, -1), window_size in ((-1, -1), [-1, -1])),
        ("softcap", softcap, 0.0, softcap is not None and softcap <= 0),
        ("alibi_slopes", alibi_slopes, None, alibi_slopes is None),
        ("block_table", block_table, None, block_table is None),
    ):
        if not supported:
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{name} must be {only} (varlen_attention has nothing else), got {got}")
