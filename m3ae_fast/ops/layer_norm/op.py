"""layer_norm: the residual sum and LayerNorm in one pass."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks
from m3ae_fast._autograd import Function, differentiable_once, kept
from m3ae_fast._backends import Impl, accumulator, like
from m3ae_fast.ops.layer_norm import reference

BACKENDS = _backends.load(__package__, "cpp", "triton", "cuda")


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, residual: None = None, eps: float = 1e-6,
    dtype: torch.dtype | None = None, impl: Impl | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, residual: Tensor, eps: float = 1e-6,
    dtype: torch.dtype | None = None, impl: Impl | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension, of x or of the sum that a pre-norm Transformer makes just before.

        s = x + residual
        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

    Args:
        x: [..., D] float32, bfloat16, float16 or float64, D at least 1.
        weight, bias: [D], any float dtype (also float32 with bfloat16 rows), or None.
        residual: the shape of x, any float dtype; None: s is x.
        eps: added to the variance, which is the biased one.
        dtype: of y; None: s's. Autocast changes nothing: float32 rows stay float32, as PyTorch keeps its norms.
        impl: "reference", "cpp", "triton", "cuda"; None selects the preferred one for the device.

    Returns:
        y [..., D]; with residual (y, s), s in the wider of x's and residual's dtypes: the sum is made in fp32, rounded
        once, and the statistics are those of what was rounded. Statistics and gradients of weight and bias are summed
        in fp32 (fp64 for fp64), the same bits for any thread count.

    Raises:
        ValueError: shapes or devices disagree. TypeError: dtypes.

    Source: arXiv:1607.06450; F.layer_norm.
    """
    _checks.dtype("x", x, _checks.FLOATS)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    width, sum_dtype = x.shape[-1], x.dtype
    if residual is not None:
        _checks.floating("residual", residual, x.shape, "x", x)
        sum_dtype = torch.promote_types(x.dtype, residual.dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _checks.floating(name, value, (width,), "x", x)
    if dtype is None:
        dtype = sum_dtype
    _checks.choice("dtype", dtype, _checks.FLOATS)

    impl = _backends.pick(BACKENDS, impl, x, sum_dtype)
    if impl == "reference":
        y, s = reference.layer_norm(x, residual, weight, bias, eps, dtype)
        return y if residual is None else (y, s)

    # What the kernels read: rows of fp32 and bf16 (on a GPU fp16 too) in any mix, or fp64 alone; weight and bias in the
    # accumulation dtype.
    accumulate = accumulator(sum_dtype)
    half = () if impl == "cpp" else (torch.float16,)
    kernels_write = (torch.float64,) if accumulate == torch.float64 else (torch.float32, torch.bfloat16, *half)

    def rows(value):
        if value is None:
            return None
        if value.dtype not in kernels_write:
            value = value.to(accumulate)
        return (value if value.dim() == 2 else value.reshape(-1, width)).contiguous()

    def param(value):  # a `.to` that changes nothing still costs a microsecond
        return value if value is None else (value if value.dtype == accumulate else value.to(accumulate)).contiguous()

    y_dtype = dtype if dtype in kernels_write else accumulate
    y, s, _ = _LayerNorm.apply(impl, rows(x), rows(residual), param(weight), param(bias), float(eps), y_dtype)
    if y_dtype != dtype:
        y = y.to(dtype)
    if x.dim() != 2:
        y, s = y.view(x.shape), s if residual is None else s.view(x.shape)
    return y if residual is None else (y, s)


@_backends.operator(BACKENDS, "forward")
def _layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y [T, D], s [T, D] where there is a residual, stats [2, T]: mean and 1 / sqrt(var + eps)."""
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    s = None if residual is None else like(x, sum_dtype)
    return like(x, dtype), s, x.new_empty(2, x.shape[0], dtype=accumulator(sum_dtype))


@_backends.operator(BACKENDS, "backward")
def _layer_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, stats: Tensor, need_input: bool, need_params: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx of s's dtype, the gradient of x and of residual; dparams [2, D] in the accumulation dtype: weight, bias."""
    dx = like(s) if need_input else None
    return dx, s.new_empty(2, s.shape[1], dtype=stats.dtype) if need_params else None


class _LayerNorm(Function):
    """One for all backends."""

    @staticmethod
    def forward(impl, x, residual, weight, bias, eps, dtype):
        return _layer_norm(impl, x, residual, weight, bias, eps, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, x, residual, weight, *_ = inputs
        _, s, stats = output
        ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
        ctx.save_for_backward(x if residual is None else s, weight, stats)
        kept(ctx, stats, *([s] if residual is None else []))

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy, ds, _):
        s, weight, stats = saved
        _, need_x, need_residual, need_weight, need_bias, _, _ = ctx.needs_input_grad
        if ctx.residual_dtype is None:
            ds = None  # a compiled graph makes one for the s without rows
        dx, dweight, dbias = ds, None, None
        if dy is not None:  # y was used; else only s's own gradient flows on
            dx, dparams = _layer_norm_backward(
                ctx.impl, dy.contiguous(), ds if ds is None else ds.contiguous(), s, weight, stats,
                need_x or need_residual, need_weight or need_bias,
            )  # fmt: skip
            if need_weight or need_bias:
                dweight, dbias = dparams.unbind(0)
        dx, dresidual = _cast(dx, need_x, ctx.x_dtype), _cast(dx, need_residual, ctx.residual_dtype)
        return None, dx, dresidual, dweight if need_weight else None, dbias if need_bias else None, None, None


def _cast(gradient, needed, dtype):
    if gradient is None or not needed:
        return None
    return gradient if gradient.dtype == dtype else gradient.to(dtype)
