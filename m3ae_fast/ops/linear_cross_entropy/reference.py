"""linear_cross_entropy, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cu_seqlens: Tensor | None,
    class_weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float, lse_square_scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Of the logits x W^T + b in at least fp32: the loss, 1 where the largest is the target's, the log of the sum of
    their exp, and its square, scaled, which is part of the loss. All but the third are reduced alike.

    lse and z-loss are None where neither asks for them. Rows whose target is ignore_index, which those past the last
    sequence are, give 0.
    """
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target = target.long()
    options = dict(reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing)
    loss = F.cross_entropy(logits, target, class_weight, **options)
    counts = target != ignore_index
    hit = ((logits.detach().argmax(1) == target) & counts).to(loss.dtype)
    lse = z_loss = None
    if need_lse or lse_square_scale > 0:
        lse = torch.where(counts, logits.logsumexp(1), 0)
        z_loss = lse_square_scale * lse * lse
    if reduction == "none":
        return (loss, hit, None, None) if z_loss is None else (loss + z_loss, hit, lse, z_loss.detach())
    share = loss_share = _shares(counts.double(), counts, reduction, cu_seqlens)
    if class_weight is not None:
        of_targets = torch.where(counts, class_weight[torch.where(counts, target, 0)], 0)
        loss_share = _shares(of_targets.double(), counts, reduction, cu_seqlens)
    loss = loss.double() * loss_share
    if z_loss is not None:
        z_loss = z_loss.double() * share
        loss, z_loss = loss + z_loss, _total(z_loss.detach(), logits.dtype)
    return _total(loss, logits.dtype), _total(hit * share, logits.dtype), lse, z_loss


def _shares(parts: Tensor, counts: Tensor, reduction: str, cu_seqlens: Tensor | None) -> Tensor:
    """[T] fp64: what each row weighs in the reduced value, 0 for ignored rows. A mean is over the sum of the parts of
    its rows; without any it is 0."""
    if reduction == "sum":
        return counts.double()
    if reduction == "mean":
        whole, means = parts.sum(), 1
    else:
        last, means = counts.shape[0], max(cu_seqlens.shape[0] - 1, 1)
        cu = cu_seqlens.long().clamp(max=last)
        sequence = torch.searchsorted(cu[1:], torch.arange(last, device=cu.device), right=True)
        # one more for rows past the last sequence
        whole = parts.new_zeros(cu_seqlens.shape[0]).index_add(0, sequence, parts)[sequence]
    return torch.where(counts & (whole != 0), 1 / (whole * means), 0)


def _total(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of fp64 values, the same bits for any thread count (torch splits a long sum by threads)."""
    block = 4096
    padded = torch.nn.functional.pad(values, (0, -values.shape[0] % block))
    return padded.view(-1, block).sum(1).sum().to(dtype)
