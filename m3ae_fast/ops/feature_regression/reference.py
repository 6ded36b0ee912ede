"""feature_regression, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_regression(
    pred: Tensor,
    target: Tensor,
    rows: Tensor | None,
    cu: Tensor | None,
    distance: str,
    normalize: bool,
    eps: float,
    reduction: str,
) -> Tensor:
    """Distance of pred[r] to target[rows[r]], normalized, in fp32 (fp64 for fp64), then the reduction."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    count, width = pred.shape
    at = torch.arange(count, device=pred.device)
    cu = torch.tensor([0, count], device=pred.device) if cu is None else cu
    samples = cu.shape[0] - 1
    sample = torch.bucketize(at, cu[1:], right=True)
    named = sample < samples  # rows past the last sample count nowhere; what they name is not looked at
    target = F.pad(target.to(dtype), (0, 0, 0, 1))[torch.where(named, at if rows is None else rows, target.shape[0])]
    pred = torch.where(named[:, None], pred.to(dtype), 0)
    if normalize:
        target = F.layer_norm(target, (width,), eps=eps)
    if distance == "cosine":
        loss = 1 - F.cosine_similarity(pred, target, dim=1)
    else:
        loss = (F.mse_loss if distance == "l2" else F.l1_loss)(pred, target, reduction="none").mean(1)
    loss = torch.where(named, loss, 0)
    if reduction == "mean":
        return loss.sum() / cu[-1].clamp(min=1)
    if reduction == "sample_mean":
        rows_of = torch.cat([cu.diff(), cu.new_ones(1)]).clamp(min=1)  # the last: of rows of no sample
        return (loss / rows_of[sample]).sum() / max(samples, 1)
    return loss.sum() if reduction == "sum" else loss
