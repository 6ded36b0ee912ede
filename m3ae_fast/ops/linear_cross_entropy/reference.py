"""linear_cross_entropy, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cu_seqlens: Tensor | None, ignore_index: int,
    reduction: str, label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross entropy of x W^T + b in at least fp32, and 1 where the largest logit is the target's, reduced alike.

    Rows whose target is ignore_index, which those past the last sequence are, give 0 and 0.
    """
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target = target.long()
    loss = F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing)
    counts = target != ignore_index
    hit = ((logits.detach().argmax(1) == target) & counts).to(loss.dtype)
    if reduction == "none":
        return loss, hit
    share = _shares(counts, reduction, cu_seqlens)
    return _total(loss, share), _total(hit, share)


def _shares(counts: Tensor, reduction: str, cu_seqlens: Tensor | None) -> Tensor:
    """[T] fp64: what each row weighs in the reduced loss, 0 for ignored rows."""
    share = counts.double()
    if reduction == "mean":
        return share / counts.sum().clamp(min=1)
    if reduction == "sample_mean":
        before = torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)])  # rows that count before t
        batch, last = cu_seqlens.shape[0] - 1, counts.shape[0]
        cu = cu_seqlens.long().clamp(max=last)
        each = (before[cu[1:]] - before[cu[:-1]]).clamp(min=1)
        sequence = torch.searchsorted(cu[1:], torch.arange(last, device=cu.device), right=True)
        padded = torch.cat([each, each.new_ones(1)])  # rows past the last sequence
        return share / (padded[sequence] * max(batch, 1))
    return share


def _total(values: Tensor, share: Tensor) -> Tensor:
    """sum(values * share), in fp64 and the same bits for any thread count (torch splits a long sum by threads)."""
    block = 4096
    weighted = torch.nn.functional.pad(values.double() * share, (0, -values.shape[0] % block))
    return weighted.view(-1, block).sum(1).sum().to(values.dtype)
