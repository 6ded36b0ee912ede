"""linear, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, input_activation: str | None
) -> Tensor:
    """y = act(f(x) W^T + b)."""
    return apply(activation, F.linear(apply(input_activation, x), weight, bias))


def apply(activation: str | None, z: Tensor) -> Tensor:
    """act(z)."""
    if activation is None:
        return z
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
