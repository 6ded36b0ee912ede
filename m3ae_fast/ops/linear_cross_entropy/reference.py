"""linear_cross_entropy, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Per row: cross entropy of x W^T + b in at least fp32, and 1 where the largest logit is the target's.

    Rows whose target is ignore_index give 0 and 0.
    """
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target = target.long()
    loss = F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing)
    hit = (logits.detach().argmax(1) == target) & (target != ignore_index)
    return loss, hit.to(loss.dtype)
