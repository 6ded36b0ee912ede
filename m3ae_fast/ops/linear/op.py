"""linear: a matrix product with its bias and activation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks
from m3ae_fast._autograd import Function, differentiable_once, kept
from m3ae_fast._backends import Impl
from m3ae_fast.ops.linear import reference

BACKENDS = _backends.load(__package__, "cpp", "triton")
ACTIVATIONS = (None, "gelu", "gelu_tanh")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    input_activation: str | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """y = act(f(x) W^T + b), with act and f applied on the way into and out of the product, not in passes of their own.

    Args:
        x: [..., K] float32, bfloat16, float16 or float64.
        weight: [N, K]. bias: [N] or None.
        activation: act: None, "gelu" (x Phi(x), by erf) or "gelu_tanh" (its tanh approximation). The value before it
            is kept for the backward pass.
        input_activation: f, one of the same. Only x is kept: the activated hidden rows of a block,
            linear(linear(x, W1), W2, input_activation="gelu"), are never stored.
        impl: "reference", "cpp", "triton"; None selects the preferred one for the device.

    Returns:
        [..., N] in the widest of the dtypes given, under autocast in the autocast dtype (float64 stays float64).
        Products of float32 obey torch.set_float32_matmul_precision (docs/trainers.md). On the CPU the same bits for any
        number of threads where the products of the dtype are m3ae_fast's: `m3ae-fast info` says for this machine which
        are torch's, which may differ from one number of threads to another.

    Raises:
        ValueError: shapes or devices disagree. TypeError: dtypes.
    """
    _checks.tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, got a scalar")
    _checks.dtype("x", x, _checks.FLOATS)
    _checks.floating("weight", weight, (None, x.shape[-1]), "x", x)
    _checks.choice("activation", activation, ACTIVATIONS)
    _checks.choice("input_activation", input_activation, ACTIVATIONS)
    if bias is not None:
        _checks.floating("bias", bias, (weight.shape[0],), "x", x)
    impl, x, weight, bias = _backends.for_product(BACKENDS, impl, x, weight, bias)
    if impl == "reference":
        return reference.linear(x, weight, bias, activation, input_activation)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias) if t is not None)
    leading = x.shape[:-1]
    x = x.reshape(math.prod(leading), x.shape[-1]).contiguous()  # not -1: it is ambiguous where K is 0
    y, _ = _Linear.apply(
        impl, x, weight.contiguous(), None if bias is None else bias.contiguous(), activation or "",
        input_activation or "", training,
    )  # fmt: skip
    return y if len(leading) == 1 else y.view(*leading, weight.shape[0])


@_backends.operator(BACKENDS, "forward")
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, input_activation: str, training: bool
) -> tuple[Tensor, Tensor | None]:
    """y [M, N]; z [M, N], the value before the activation, where a backward pass will ask for it.

    An activation of "" is none. "cpp" also takes fp32 parameters with bf16 rows.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, _backends.like(y) if training and activation else None


@_backends.operator(BACKENDS, "backward")
def _linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, activation: str, input_activation: str, need_x: bool,
    need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dweight, dbias, as they are needed."""
    return (
        _backends.like(x) if need_x else None,
        _backends.like(weight) if need_weight else None,
        weight.new_empty(weight.shape[0]) if need_bias else None,
    )


class _Linear(Function):
    """One for all backends."""

    @staticmethod
    def forward(impl, x, weight, bias, activation, input_activation, training):
        return _linear(impl, x, weight, bias, activation, input_activation, training)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, x, weight, _, *ctx.activations, _ = inputs
        z = output[1]
        # Without an activation a recorded or compiled call has a z without elements, a direct one has None: what is
        # saved is the same, or gradient checkpointing could not make it again where a profiler came or went.
        ctx.save_for_backward(x, weight, z if ctx.activations[0] else None)
        kept(ctx, z)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy, _):
        x, weight, z = saved
        need = ctx.needs_input_grad[1:4]
        grads = _linear_backward(ctx.impl, dy.contiguous(), x, weight, z, *ctx.activations, *need)
        return None, *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None, None
