"""layer_norm, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(y, s): s = x + residual, summed in fp32 and rounded; y = F.layer_norm(s) in fp32, rounded to `dtype`."""
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    accumulate = torch.float64 if sum_dtype == torch.float64 else torch.float32
    s = x if residual is None else (x.to(accumulate) + residual.to(accumulate)).to(sum_dtype)
    weight, bias = (p if p is None else p.to(accumulate) for p in (weight, bias))
    return F.layer_norm(s.to(accumulate), s.shape[-1:], weight, bias, eps).to(dtype), s
