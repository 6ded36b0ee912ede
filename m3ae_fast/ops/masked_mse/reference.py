"""masked_mse, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from m3ae_fast.ops.gather_patches import reference


def masked_mse(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    cu_mask: Tensor,
    patch_size: int,
    norm_pix: bool,
    scale: list[float],
    shift: list[float],
    reduction: str,
) -> Tensor:
    """loss[t] = mean((pred[t] - target[t]) ** 2) in fp32, then the reduction."""
    accumulate = torch.float64 if torch.float64 in (images.dtype, pred.dtype) else torch.float32
    target = reference.gather_patches(images, ids_mask, cu_mask, patch_size, scale, shift, accumulate)
    if norm_pix:
        target = target - target.mean(-1, keepdim=True)
        variance = target.square().sum(-1, keepdim=True) / (target.shape[1] - 1)
        target = target / (variance + 1e-6).sqrt()
    image = torch.bucketize(torch.arange(pred.shape[0], device=pred.device), cu_mask[1:], right=True)
    named = image < images.shape[0]  # rows past cu_mask[-1] belong to no image
    loss = torch.where(named[:, None], pred.to(accumulate) - target, 0).square().mean(-1)
    if reduction == "mean":
        loss = loss.sum() / cu_mask[-1].clamp(min=1)
    elif reduction == "sample_mean":
        counts = torch.cat([cu_mask.diff(), cu_mask.new_ones(1)]).clamp(min=1)  # the last: of rows of no image
        loss = (loss / counts[image]).sum() / max(images.shape[0], 1)
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(torch.float64 if pred.dtype == torch.float64 else torch.float32)
