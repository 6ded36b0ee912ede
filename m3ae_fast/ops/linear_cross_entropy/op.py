"""linear_cross_entropy: the loss of a vocabulary head, whose logits are never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks
from m3ae_fast._autograd import Function, differentiable_once, kept, link, scaled
from m3ae_fast.ops.linear_cross_entropy import reference
from m3ae_fast.seqlens import SeqLens
from m3ae_fast.seqlens import cu_seqlens as offsets

BACKENDS = _backends.load(__package__, "cpp", "triton")
REDUCTIONS = ("mean", "sum", "none", "sample_mean")


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
    return_accuracy: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """cross_entropy(x W^T + b, target): ignored rows leave before the product, logits exist a block at a time.

    On a GPU, where the host does not know how many they are, ignored rows go through the products as zeros.

    Where gradients are wanted and the result is one number, they are made in the forward pass, from the same logits.
    reduction="none" makes them in the backward pass, from logits computed again, and so does float16: it cannot hold
    softmax / T before the loss scale multiplies it.

    Args:
        x: [T, K] float32, bfloat16, float16 or float64.
        weight: [V, K]. bias: [V] or None.
        target: [T] int32 or int64, a class in [0, V), or `ignore_index`: that row counts nowhere.
        reduction: over the rows that count: "mean" of them all; "sum"; "none", a value a row (ignored ones 0);
            "sample_mean", the mean over all B sequences of the mean over a sequence's rows (0 for one without).
        cu_seqlens: SeqLens or [B + 1] int32 or int64: "sample_mean" needs it; rows past its last entry are ignored.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        return_accuracy: also return argmax == target, reduced alike, detached. As in torch.argmax the first of equal
            logits counts, and NaN is larger than any number.
        impl: "reference", "cpp", "triton"; None takes the fastest for the device.

    Returns:
        The loss, or (loss, accuracy): scalars, [T] for "none"; float32 (float64 for float64). No row that counts
        gives 0, with zero gradients. Under autocast the product runs in the autocast dtype, the loss in float32.
        Products of float32 obey torch.set_float32_matmul_precision (docs/trainers.md).

    Raises:
        ValueError: shapes or devices disagree, an option is out of range, a target names no class or offsets decrease
            (the C++ backend looks; a GPU would have to sync for it). TypeError: dtypes.

    Source: arXiv:2205.14204, section 3 (masked word prediction); label smoothing: arXiv:1512.00567.
    """
    _checks.shape("x", x, (None, None))
    rows, width = x.shape
    _checks.dtype("x", x, _checks.FLOATS)
    _checks.floating("weight", weight, (None, width), "x", x)
    if bias is not None:
        _checks.floating("bias", bias, (weight.shape[0],), "x", x)
    target = _checks.indices("target", target, rows)
    _checks.device("target", target, "x", x)
    _checks.integer("ignore_index", ignore_index, -(2**31), 2**31)
    _checks.choice("reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if cu_seqlens is not None:
        cu_seqlens = offsets("cu_seqlens", cu_seqlens)
        _checks.device("cu_seqlens", cu_seqlens, "x", x)
    elif reduction == "sample_mean":
        raise ValueError('cu_seqlens must be given for reduction="sample_mean", got None')
    impl, x, weight, bias = _backends.for_product(BACKENDS, impl, x, weight, bias)

    if impl == "reference":
        if cu_seqlens is not None:
            _checks.offsets("cu_seqlens", cu_seqlens, rows)
            target = torch.where(torch.arange(rows, device=x.device) < cu_seqlens[-1], target, ignore_index)
        _checks.within("target", target[target != ignore_index], 0, weight.shape[0])
        loss, hit = reference.linear_cross_entropy(
            x, weight, bias, target, cu_seqlens, ignore_index, reduction, label_smoothing
        )
    else:
        need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
        loss, hit, *_ = _LinearCrossEntropy.apply(
            impl, x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), target, cu_seqlens,
            ignore_index, reduction, label_smoothing, [return_accuracy, *need],
        )  # fmt: skip
    return (loss, hit) if return_accuracy else loss


@_backends.operator(BACKENDS, "forward")
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cu_seqlens: Tensor | None, dloss: Tensor | None,
    ignore_index: int, reduction: str, label_smoothing: float, need: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The loss; as `need` asks for them the hits, 1 where the argmax is the target, reduced alike, and the gradients
    dx, dweight and dbias: of the loss, or of sum(dloss * loss) where there is a dloss. It must be there with reduction
    "none", [T], and may be there, a number, in float16.

    Beside a backend's FP32_PARAMETERS of x, weight and bias may be fp32; their gradients are fp32 then.
    """
    need_hit, need_x, need_weight, need_bias = need
    size = x.shape[:1] if reduction == "none" else ()
    loss = x.new_empty(size, dtype=_backends.accumulator(x.dtype))
    return (
        loss,
        _backends.like(loss) if need_hit else None,
        _backends.like(x) if need_x else None,
        _backends.like(weight) if need_weight else None,
        weight.new_empty(weight.shape[0]) if need_bias else None,
    )


def _made_at_once(x, reduction):
    """Whether the forward pass makes the gradients, which the backward pass then scales."""
    return reduction != "none" and x.dtype != torch.float16


class _LinearCrossEntropy(Function):
    """One for all backends."""

    @staticmethod
    def forward(impl, x, weight, bias, target, cu_seqlens, ignore_index, reduction, label_smoothing, need):
        made = need if _made_at_once(x, reduction) else [need[0], False, False, False]
        outputs = _linear_cross_entropy(
            impl, x, weight, bias, target, cu_seqlens, None, ignore_index, reduction, label_smoothing, made
        )
        return *outputs, link(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, x, weight, bias, target, cu_seqlens, *ctx.options, need = inputs
        ctx.need, ctx.made = need[1:], _made_at_once(x, ctx.options[1])
        _, hit, *gradients, to_x = output
        if ctx.made:
            ctx.save_for_backward(*gradients, to_x)
        else:
            ctx.save_for_backward(x, weight, bias, target, cu_seqlens)
        kept(ctx, hit, *gradients)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dloss, *_):
        if ctx.made:
            gradients = [scaled(g, dloss) if n else None for g, n in zip(saved[:3], ctx.need, strict=True)]
        else:
            need = [False, *ctx.need]
            _, _, *gradients = _linear_cross_entropy(ctx.impl, *saved, dloss.contiguous(), *ctx.options, need)
        dx, dweight, dbias = (g if n else None for g, n in zip(gradients, ctx.need, strict=True))
        return None, dx, dweight, dbias, None, None, None, None, None, None
