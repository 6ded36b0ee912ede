"""linear: a matrix product with its bias and activation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m3ae_fast import _backends, _checks
from m3ae_fast.ops.linear import reference

BACKENDS = _backends.load(__package__, "cpp")
ACTIVATIONS = (None, "gelu", "gelu_tanh")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """y = act(x W^T + b), forward and both backward products through the fastest matrix library of the machine.

    Args:
        x: [..., K] float32, bfloat16, float16 or float64.
        weight: [N, K]. bias: [N] or None.
        activation: None, "gelu" (x Phi(x), by erf) or "gelu_tanh" (its tanh approximation). The value before it is
            kept for the backward pass.
        impl: "reference", "cpp"; None takes the fastest for the device.

    Returns:
        [..., N] in the widest of the dtypes given, under autocast in the autocast dtype (float64 stays float64).

    Raises:
        ValueError: shapes or devices disagree. TypeError: dtypes.
    """
    _checks.tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, got a scalar")
    _checks.dtype("x", x, _checks.FLOATS)
    _checks.shape("weight", weight, (None, x.shape[-1]))
    _checks.choice("activation", activation, ACTIVATIONS)
    tensors = {"x": x, "weight": weight}
    if bias is not None:
        _checks.shape("bias", bias, (weight.shape[0],))
        tensors["bias"] = bias
    for name, value in tensors.items():
        _checks.dtype(name, value, _checks.FLOATS)
        _checks.device(name, value, "x", x)
    dtype = _backends.product_dtype(*tensors.values())
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)

    impl = _backends.pick(BACKENDS, impl, x)
    if impl == "reference":
        return reference.linear(x, weight, bias, activation)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias) if t is not None)
    leading = x.shape[:-1]
    x = x.reshape(math.prod(leading), x.shape[-1]).contiguous()  # not -1: it is ambiguous where K is 0
    y = _Linear.apply(
        impl, x, weight.contiguous(), None if bias is None else bias.contiguous(), activation or "",
        training,
    )  # fmt: skip
    return y.view(*leading, weight.shape[0])


class _Linear(torch.autograd.Function):
    """One for all backends."""

    @staticmethod
    def forward(ctx, impl, x, weight, bias, activation, training):
        ctx.impl, ctx.activation = impl, activation
        y, z = _linear(impl, x, weight, bias, activation, training)
        ctx.save_for_backward(x, weight, z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, z = ctx.saved_tensors
        _, need_x, need_weight, need_bias, _, _ = ctx.needs_input_grad
        dx, dweight, dbias = _linear_backward(
            ctx.impl, dy.contiguous(), x, weight, z, ctx.activation, need_x, need_weight, need_bias
        )
        return (
            None,
            dx if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            None,
        )


def _fake_forward(impl, x, weight, bias, activation, training):
    rows, width = x.shape[0], weight.shape[0]
    return x.new_empty(rows, width), x.new_empty(rows if training and activation else 0, width)


def _fake_backward(impl, dy, x, weight, z, activation, need_x, need_weight, need_bias):
    return (
        dy.new_empty(dy.shape[0] if need_x else 0, weight.shape[1]),
        dy.new_empty(dy.shape[1] if need_weight else 0, weight.shape[1]),
        dy.new_empty(dy.shape[1] if need_bias else 0),
    )


# activation "": none. z [M, N], the value before the activation, is empty where no backward pass will ask for it.
_linear = _backends.register(
    "linear(str impl, Tensor x, Tensor weight, Tensor? bias, str activation, bool training) -> (Tensor, Tensor)",
    lambda impl, *args: BACKENDS[impl].forward(*args),
    _fake_forward,
)
_linear_backward = _backends.register(
    "linear_backward(str impl, Tensor dy, Tensor x, Tensor weight, Tensor z, str activation, bool need_x, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    lambda impl, *args: BACKENDS[impl].backward(*args),
    _fake_backward,
)
