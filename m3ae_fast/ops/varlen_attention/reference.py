"""varlen_attention, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _pad(x: Tensor, cu: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """[T, H, D] -> ([B, longest, H, D] with zeros in the holes, [B, longest] True where a row is real)."""
    place = torch.arange(longest, device=x.device)
    real = place < (cu[1:] - cu[:-1])[:, None]
    rows = torch.where(real, cu[:-1, None] + place, x.shape[0])
    return F.pad(x, (0, 0, 0, 0, 0, 1))[rows], real


def _unpad(x: Tensor, cu: Tensor, total: int, hole: float) -> Tensor:
    """[B, longest, ...] -> [total, ...]; rows past cu[-1] are `hole`."""
    batch, longest = x.shape[:2]
    t = torch.arange(total, device=x.device, dtype=cu.dtype)
    sequence = torch.searchsorted(cu[1:], t, right=True)
    rows = torch.where(t < cu[-1], sequence * longest + t - cu[sequence], batch * longest)
    flat = x.reshape(batch * longest, *x.shape[2:])
    return torch.cat([flat, flat.new_full((1, *flat.shape[1:]), hole)])[rows]


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [Tq, H, D] in q's dtype, lse [H, Tq]): softmax(q k^T * scale) v within each sequence, in fp32 (or fp64)."""
    with torch.autocast(q.device.type, enabled=False):  # it would take the products in its own dtype
        return _attention(q, k, v, cu_q, cu_k, max_q, max_k, scale)


def _attention(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    total, heads = q.shape[:2]
    groups = heads // k.shape[1]
    q_BSHD, asked = _pad(q.to(accumulate), cu_q, max_q)
    k_BSHD, real = _pad(k.to(accumulate).repeat_interleave(groups, 1), cu_k, max_k)
    v_BSHD, _ = _pad(v.to(accumulate).repeat_interleave(groups, 1), cu_k, max_k)
    scores = torch.einsum("bqhd,bkhd->bhqk", q_BSHD, k_BSHD) * scale
    # The least finite number, not -inf: a sequence without keys would turn the gradient into NaN. In the holes of the
    # queries too: no key that is not asked gives its own gradient a NaN.
    scores = torch.where(asked[:, None, :, None] & real[:, None, None, :], scores, torch.finfo(accumulate).min)
    weights = torch.softmax(scores, -1) * real[:, None, None, :]
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v_BSHD)
    lse = torch.where(real.any(-1)[:, None, None], torch.logsumexp(scores, -1), -torch.inf).permute(0, 2, 1)
    return _unpad(out, cu_q, total, 0.0).to(q.dtype), _unpad(lse, cu_q, total, -torch.inf).t().contiguous()
