"""linear_cross_entropy: the loss of a vocabulary head, whose logits are never stored."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks
from m3ae_fast._autograd import Function, differentiable_once, kept, link, scaled
from m3ae_fast._backends import Impl
from m3ae_fast.ops.linear_cross_entropy import reference
from m3ae_fast.seqlens import SeqLens
from m3ae_fast.seqlens import cu_seqlens as offsets

BACKENDS = _backends.load(__package__, "cpp", "triton")
REDUCTIONS = ("mean", "sum", "none", "sample_mean")


@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    reduction: str = "mean", cu_seqlens: SeqLens | Tensor | None = None, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None, lse_square_scale: float = 0.0, return_accuracy: Literal[False] = False,
    return_lse: Literal[False] = False, return_z_loss: Literal[False] = False, impl: Impl | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    reduction: str = "mean", cu_seqlens: SeqLens | Tensor | None = None, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None, lse_square_scale: float = 0.0, return_accuracy: Literal[True],
    return_lse: bool = False, return_z_loss: bool = False, impl: Impl | None = None,
) -> tuple[Tensor, ...]: ...  # fmt: skip
@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    reduction: str = "mean", cu_seqlens: SeqLens | Tensor | None = None, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None, lse_square_scale: float = 0.0, return_accuracy: bool = False,
    return_lse: Literal[True], return_z_loss: bool = False, impl: Impl | None = None,
) -> tuple[Tensor, ...]: ...  # fmt: skip
@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    reduction: str = "mean", cu_seqlens: SeqLens | Tensor | None = None, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None, lse_square_scale: float = 0.0, return_accuracy: bool = False,
    return_lse: bool = False, return_z_loss: Literal[True], impl: Impl | None = None,
) -> tuple[Tensor, ...]: ...  # fmt: skip
@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    reduction: str = "mean", cu_seqlens: SeqLens | Tensor | None = None, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None, lse_square_scale: float = 0.0, return_accuracy: bool = False,
    return_lse: bool = False, return_z_loss: bool = False, impl: Impl | None = None,
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    cu_seqlens: SeqLens | Tensor | None = None,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    lse_square_scale: float = 0.0,
    return_accuracy: bool = False,
    return_lse: bool = False,
    return_z_loss: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """cross_entropy(x W^T + b, target): ignored rows are removed before the product, and logits exist one block at a
    time.

    On a GPU, where the host does not know how many they are, ignored rows go through the products as zeros.

    Where gradients are wanted and the result is one number, they are made in the forward pass, from the same logits.
    With reduction="none", return_lse or float16 they are made in the backward pass, from recomputed logits; float16
    cannot represent softmax / T before the loss scale multiplies it. docs/cross_entropy.md has each option's formula.

    Args:
        x: [T, K], or [..., K] whose rows are those T, float32, bfloat16, float16 or float64.
        weight: [V, K]. bias: [V] or None.
        target: [T], or [...] as x's, int32 or int64, a class in [0, V), or `ignore_index`: that row counts nowhere.
        reduction: over the rows that count: "mean" of them all; "sum"; "none", a value a row (ignored ones 0);
            "sample_mean", the mean over all B sequences of the mean over a sequence's rows (0 for one without).
        cu_seqlens: SeqLens or [B + 1] int32 or int64: "sample_mean" needs it; rows past its last entry are ignored.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        class_weight: [V] floating, on x's device, or None, as `weight` in torch.nn.functional.cross_entropy: a mean
            divides by the weights of the targets (0 where they sum to 0). It is used in the loss's dtype and has no
            gradient.
        lse_square_scale: adds a z-loss, lse_square_scale * lse^2 of every row that counts, reduced as without a
            class_weight; lse is log(sum(exp(logits))).
        return_accuracy: also return argmax == target, reduced as without a class_weight, detached. As in torch.argmax
            the first of equal logits counts, and NaN is larger than any number.
        return_lse: also return lse, a value a row (ignored ones 0), differentiable.
        return_z_loss: also return the z-loss, which the loss includes, reduced, detached.
        impl: "reference", "cpp", "triton"; None selects the preferred one for the device.

    Returns:
        The loss, or a tuple of the loss and what was asked for: accuracy, lse, z-loss, in this order. Scalars, of
        target's shape for "none", as lse always is; float32 (float64 for float64). No row that counts gives 0, with
        zero gradients. Under autocast the product runs in the autocast dtype, the loss in float32.
        Products of float32 obey torch.set_float32_matmul_precision (docs/trainers.md).

    Raises:
        ValueError: shapes or devices disagree, an option is out of range, class_weight requires a gradient, a target
            names no class or offsets decrease (the C++ backend checks; a GPU would have to sync for it).
            TypeError: dtypes.

    Source: arXiv:2205.14204, section 3 (masked word prediction); label smoothing: arXiv:1512.00567; z-loss:
    arXiv:2204.02311, section 5.
    """
    leading = ()
    if _checks.tensor("x", x).dim() > 2:
        leading = x.shape[:-1]
        _checks.shape("target", target, leading)
        x, target = x.reshape(math.prod(leading), x.shape[-1]), target.reshape(-1)  # not -1: ambiguous where K is 0
    _checks.floating("x", x, (None, None), "x", x)
    rows, width = x.shape
    _checks.floating("weight", weight, (None, width), "x", x)
    if bias is not None:
        _checks.floating("bias", bias, (weight.shape[0],), "x", x)
    if class_weight is not None:
        _checks.floating("class_weight", class_weight, (weight.shape[0],), "x", x)
        if class_weight.requires_grad:
            raise ValueError("class_weight must not require a gradient, got one that does")
    target = _checks.indices("target", target, rows)
    _checks.device("target", target, "x", x)
    _checks.integer("ignore_index", ignore_index, -(2**31), 2**31)
    _checks.choice("reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if lse_square_scale != 0:
        _checks.real("lse_square_scale", lse_square_scale, "[0, inf)")
        lse_square_scale = float(lse_square_scale)
    if cu_seqlens is not None:
        cu_seqlens = offsets("cu_seqlens", cu_seqlens)
        _checks.device("cu_seqlens", cu_seqlens, "x", x)
    elif reduction == "sample_mean":
        raise ValueError('cu_seqlens must be given for reduction="sample_mean", got None')
    impl, x, weight, bias = _backends.for_product(BACKENDS, impl, x, weight, bias)
    if class_weight is not None:
        class_weight = class_weight.to(_backends.accumulator(x.dtype)).contiguous()

    options = (ignore_index, reduction, label_smoothing, lse_square_scale)
    if impl == "reference":
        if cu_seqlens is not None:
            _checks.offsets("cu_seqlens", cu_seqlens, rows)
            target = torch.where(torch.arange(rows, device=x.device) < cu_seqlens[-1], target, ignore_index)
        _checks.within("target", target[target != ignore_index], 0, weight.shape[0])
        outputs = reference.linear_cross_entropy(
            x, weight, bias, target, cu_seqlens, class_weight, *options, return_lse or return_z_loss
        )
    else:
        grad = torch.is_grad_enabled()
        need = [grad and t is not None and t.requires_grad for t in (x, weight, bias)]
        outputs = _LinearCrossEntropy.apply(
            impl, x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), target, cu_seqlens,
            class_weight, *options, [return_accuracy, return_lse, return_z_loss, *need],
        )  # fmt: skip
    if not (leading or return_accuracy or return_lse or return_z_loss):
        return outputs[0]
    wanted = (True, return_accuracy, return_lse, return_z_loss)
    outputs = [each for each, want in zip(outputs[:4], wanted, strict=True) if want]
    if leading:
        outputs = [each.view(leading) if each.dim() else each for each in outputs]
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


@_backends.operator(BACKENDS, "forward")
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cu_seqlens: Tensor | None,
    class_weight: Tensor | None, dloss: Tensor | None, dlse: Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, lse_square_scale: float, need: list[bool],
) -> tuple[
    Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]:  # fmt: skip
    """The loss; as `need` asks for them the hits, 1 where the argmax is the target, reduced alike, lse [T], the z-loss,
    and the gradients dx, dweight and dbias: of sum(dloss * loss) + sum(dlse * lse). A dloss, which is of the loss's
    shape, that is None is 1, a dlse, [T], is 0.

    Beside a backend's FP32_PARAMETERS of x, weight and bias may be fp32; their gradients are fp32 then. class_weight is
    of the loss's dtype.
    """
    need_hit, need_lse, need_z_loss, need_x, need_weight, need_bias = need
    loss = _new_loss(x, reduction)
    return (
        loss,
        _backends.like(loss) if need_hit else None,
        loss.new_empty(x.shape[0]) if need_lse else None,
        _backends.like(loss) if need_z_loss else None,
        _backends.like(x) if need_x else None,
        _backends.like(weight) if need_weight else None,
        weight.new_empty(weight.shape[0]) if need_bias else None,
    )


def _new_loss(x, reduction):
    return x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=_backends.accumulator(x.dtype))


def _made_at_once(x, reduction, need):
    """Whether the forward pass makes the gradients, which the backward pass then scales."""
    return reduction != "none" and x.dtype != torch.float16 and not need[1]


class _LinearCrossEntropy(Function):
    """One for all backends."""

    @staticmethod
    def forward(
        impl, x, weight, bias, target, cu_seqlens, class_weight, ignore_index, reduction, label_smoothing,
        lse_square_scale, need,
    ):  # fmt: skip
        made = need if _made_at_once(x, reduction, need) else [*need[:3], False, False, False]
        outputs = _linear_cross_entropy(
            impl, x, weight, bias, target, cu_seqlens, class_weight, None, None, ignore_index, reduction,
            label_smoothing, lse_square_scale, made,
        )  # fmt: skip
        return *outputs, link(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, x, weight, bias, target, cu_seqlens, class_weight, *ctx.options, need = inputs
        ctx.need, ctx.made = need[3:], _made_at_once(x, ctx.options[1], need)
        _, hit, lse, z_loss, *gradients, to_x = output
        if ctx.made:
            ctx.save_for_backward(*gradients, to_x)
        else:
            ctx.save_for_backward(x, weight, bias, target, cu_seqlens, class_weight)
        kept(ctx, hit, None if need[1] else lse, z_loss, *gradients)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dloss, _, dlse, *__):
        if ctx.made:
            gradients = [scaled(g, dloss) if n else None for g, n in zip(saved[:3], ctx.need, strict=True)]
        else:
            dloss = _new_loss(saved[0], ctx.options[1]).zero_() if dloss is None else dloss.contiguous()
            dlse = None if dlse is None else dlse.contiguous()
            need = [False, False, False, *ctx.need]
            _, _, _, _, *gradients = _linear_cross_entropy(ctx.impl, *saved, dloss, dlse, *ctx.options, need)
        dx, dweight, dbias = (g if n else None for g, n in zip(gradients, ctx.need, strict=True))
        return None, dx, dweight, dbias, *(None,) * 8
