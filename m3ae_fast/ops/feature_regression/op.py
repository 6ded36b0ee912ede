"""feature_regression: the loss of a model that predicts the features of another."""

from __future__ import annotations

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks
from m3ae_fast._autograd import Function, differentiable_once, kept, link, scaled
from m3ae_fast._backends import Impl
from m3ae_fast.ops.feature_regression import reference
from m3ae_fast.seqlens import SeqLens
from m3ae_fast.seqlens import cu_seqlens as offsets

BACKENDS = _backends.load(__package__, "cpp", "triton")
DISTANCES = ("l2", "l1", "cosine")
REDUCTIONS = ("mean", "sum", "none", "sample_mean")


def feature_regression(
    pred: Tensor,
    target: Tensor,
    rows: Tensor | None = None,
    *,
    distance: str = "l2",
    normalize: bool = True,
    eps: float = 1e-6,
    reduction: str = "mean",
    cu_seqlens: SeqLens | Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Distance of predicted features to those of another network, whose selected rows are read in place, without a
    copy.

        loss[r] = distance(pred[r], t), t = target[rows[r]], or with normalize (t - mean(t)) / sqrt(var(t) + eps)

    Args:
        pred: [R, D] float32, bfloat16, float16 or float64, D at least 1.
        target: [T, D], any of these dtypes. A constant: it is detached and gets no gradient.
        rows: [R] int32 or int64, the row of target that each row of pred predicts; several may predict the same.
            None: T is R, row by row.
        distance: "l2", mean((pred - t)^2); "l1", mean(|pred - t|), of gradient 0 at equality; "cosine",
            1 - <pred, t> / (|pred| |t|) with norms of at least 1e-8, as F.cosine_similarity has it.
        normalize: LayerNorm without parameters of each target row, by its biased variance.
        eps: added to that variance; positive.
        reduction: over the rows that count: "mean" of them all; "sum"; "none", a value a row; "sample_mean", the mean
            over all B samples of the mean over a sample's rows (0 for one without).
        cu_seqlens: SeqLens or [B + 1] int32 or int64, how many rows of pred each sample has: "sample_mean" needs it.
            Rows past its last entry count nowhere: loss and gradient are 0. None: all rows count.
        impl: "reference", "cpp", "triton"; None selects the preferred one for the device.

    Returns:
        The loss, float32 (float64 where pred is): a scalar, or [R] with reduction "none". Without any row it is 0, with
        a zero gradient. Computed in fp32 (fp64) from the inputs as they come, under autocast too; sums over rows in
        fp64 in a fixed order.

    Raises:
        ValueError: sizes or devices disagree, an option is out of range, a row or an offset is outside its range (the
            C++ backend checks; a GPU would have to sync for it). TypeError: dtypes.

    Source: arXiv:2210.04183, section 3 (masked representation and masked image modeling).
    """
    _checks.shape("pred", pred, (None, None))
    count, width = pred.shape
    if width < 1:
        raise ValueError(f"pred must have a last dimension of at least 1, got shape {tuple(pred.shape)}")
    _checks.dtype("pred", pred, _checks.FLOATS)
    _checks.floating("target", target, (count if rows is None else None, width), "pred", pred)
    if rows is not None:
        rows = _checks.ids("rows", rows, count)
        _checks.device("rows", rows, "pred", pred)
    _checks.choice("distance", distance, DISTANCES)
    _checks.choice("reduction", reduction, REDUCTIONS)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    cu = None
    if cu_seqlens is not None:
        cu = offsets("cu_seqlens", cu_seqlens)
        _checks.device("cu_seqlens", cu, "pred", pred)
    elif reduction == "sample_mean":
        raise ValueError('cu_seqlens must be given for reduction="sample_mean", got None')
    target = target.detach()
    if pred.dtype != target.dtype and torch.float64 in (pred.dtype, target.dtype):  # kernels mix what fp32 holds
        target = target.to(torch.float64 if pred.dtype == torch.float64 else torch.float32)
    options = (distance, bool(normalize), float(eps), reduction)

    impl = _backends.pick(BACKENDS, impl, pred, target.dtype)
    if impl == "reference":
        if cu is not None:
            _checks.offsets("cu_seqlens", cu, count)
        if rows is not None:
            _checks.within("rows", rows, 0, target.shape[0], None if cu is None else cu[-1])
        return reference.feature_regression(pred, target, rows, cu, *options)
    dpred_dtype = None
    if pred.requires_grad and torch.is_grad_enabled():  # float16 cannot hold 1 / (R D) before it meets its loss scale
        dpred_dtype = torch.float32 if pred.dtype == torch.float16 else pred.dtype
    args = (rows, cu, *options, dpred_dtype)
    return _FeatureRegression.apply(impl, pred.contiguous(), target.contiguous(), *args)[0]


@_backends.operator(BACKENDS, "forward")
def _feature_regression(
    pred: Tensor, target: Tensor, rows: Tensor | None, cu_seqlens: Tensor | None, distance: str, normalize: bool,
    eps: float, reduction: str, dpred_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """loss; with a dtype dpred: the gradient of the loss, with reduction "none" of the sum of the losses."""
    size = pred.shape[:1] if reduction == "none" else ()
    loss = pred.new_empty(size, dtype=_backends.accumulator(pred.dtype))
    return loss, None if dpred_dtype is None else _backends.like(pred, dpred_dtype)


class _FeatureRegression(Function):
    """One for all backends. The forward pass makes the gradient, the backward pass only scales it."""

    @staticmethod
    def forward(impl, pred, target, rows, cu, distance, normalize, eps, reduction, dpred_dtype):
        args = (target, rows, cu, distance, normalize, eps, reduction, dpred_dtype)
        return *_feature_regression(impl, pred, *args), link(pred)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype, ctx.inputs = inputs[1].dtype, len(inputs)
        loss, dpred, to_pred = output
        cu = inputs[4] if loss.dim() else None
        ctx.save_for_backward(dpred, None if cu is None else cu[-1].clone(), to_pred)  # cu may be written to
        kept(ctx, dpred)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dloss, *_):
        dpred, named, _ = saved
        if dloss.dim() == 0:
            dpred = scaled(dpred, dloss)
        else:
            if named is not None:  # nothing flows into rows that count nowhere, not even NaN
                dloss = torch.where(torch.arange(len(dloss), device=dloss.device) < named, dloss, 0)
            dpred = dpred * dloss[:, None]
        return None, dpred.to(ctx.dtype), *(None,) * (ctx.inputs - 2)
