"""Linear and LayerNorm: torch's parameters and state dict, our ops."""

from __future__ import annotations

import contextlib
import functools

from torch import Tensor, nn

from m3ae_fast._backends import product_dtype
from m3ae_fast.nn.recompute import recomputed
from m3ae_fast.ops import layer_norm, linear


class Linear(nn.Linear):
    """`torch.nn.Linear` (same parameters) with optional activations on the way into and out of the product.

    Args:
        activation, input_activation: None, "gelu" (erf) or "gelu_tanh"; see `m3ae_fast.linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        input_activation: str | None = None,
    ):
        super().__init__(in_features, out_features, bias)
        self.activation, self.input_activation = activation, input_activation

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        options = {"activation": self.activation, "input_activation": self.input_activation}
        return linear(x, self.weight, self.bias, **options)

    def extra_repr(self) -> str:
        options = {"activation": self.activation, "input_activation": self.input_activation}
        return super().extra_repr() + "".join(f", {name}={value!r}" for name, value in options.items() if value)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension (same parameters) that can add a residual in the same pass.

    Under autocast the normalized rows come out in the autocast dtype, ready for the product that reads them: the
    cast that autocast would do there, without its pass over memory.

    Args:
        width: of the last dimension. eps: added to the variance.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x [T, D] -> norm(x), or (norm(x + residual), x + residual)."""
        dtype = product_dtype(x) if residual is None else product_dtype(x, residual)
        return layer_norm(x, self.weight, self.bias, residual=residual, eps=self.eps, dtype=dtype)

    def recomputed(self, y: Tensor, x: Tensor) -> contextlib.AbstractContextManager:
        """Operations in this context that save y, which is this layer of x [T, D], save nothing: see `nn.recompute`.
        Where something hooks into its call y may be something else, and is kept."""
        if self._forward_pre_hooks or self._forward_hooks:
            return contextlib.nullcontext()
        make = functools.partial(layer_norm, eps=self.eps, dtype=y.dtype)
        return recomputed(y, make, x, self.weight, self.bias)
