"""masked_mse: the pixel loss of a masked autoencoder, against pixels read straight from the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks
from m3ae_fast._autograd import Function, differentiable_once, kept, link
from m3ae_fast._backends import Impl
from m3ae_fast.ops.gather_patches import patches
from m3ae_fast.ops.masked_mse import reference
from m3ae_fast.seqlens import SeqLens, cu_seqlens

BACKENDS = _backends.load(__package__, "cpp", "triton", "cuda")
REDUCTIONS = ("sample_mean", "mean", "sum", "none")


def masked_mse(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    cu_mask: SeqLens | Tensor,
    *,
    patch_size: int,
    norm_pix: bool = False,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    reduction: str = "sample_mean",
    impl: Impl | None = None,
) -> Tensor:
    """Mean squared error of predicted patches.

        loss[t] = mean((pred[t] - target[t]) ** 2), target[t] = patch ids_mask[t] of its image, normalized

    Args:
        pred: [M, patch_size * patch_size * C] float32, bfloat16, float16 or float64: a row for each masked patch, in
            (row, column, channel) order.
        images: [N, C, H, W] uint8 or float of any strides, as gather_patches takes them. They get no gradient.
        ids_mask: [M] int32 or int64, patches within an image, counted row by row.
        cu_mask: how many rows each image has: SeqLens of N lengths, or cumulative offsets [N + 1] int32 or int64.
        norm_pix: normalize each target patch by its own mean and unbiased variance: (x - mean) / sqrt(var + 1e-6).
        mean, std: C numbers in the units of 0 .. 1, as in gather_patches; None: 0 and 1.
        reduction: "sample_mean": the mean over all N images of the mean over an image's rows (0 for one without rows),
            "mean": over the rows that cu_mask names, "sum": of them, "none": [M].
        impl: "reference", "cpp", "triton", "cuda"; None selects the preferred one for the device.

    Returns:
        The loss, float32 (float64 for float64): a scalar, or [M] with reduction "none". Rows past the end of cu_mask
        count nowhere: loss and gradient are 0. Without any row the loss is 0, with a zero gradient. Computed in fp32,
        sums over rows in fp64 in a fixed order.

    Raises:
        ValueError: sizes disagree, images require a gradient, or an id or offset is outside its range (the C++ backend
            looks; a GPU would have to sync for it). TypeError: dtypes.

    Source: arXiv:2111.06377, sections 3 and 4 ("mean", norm_pix); arXiv:2205.14204 ("sample_mean").
    """
    patches.check_images(images, patch_size)
    if images.requires_grad:
        raise ValueError("images must not require a gradient: the loss has one with respect to pred alone")
    values = patch_size * patch_size * images.shape[1]
    _checks.floating("pred", pred, (None, values), "images", images)
    ids_mask = _checks.ids("ids_mask", ids_mask, pred.shape[0])
    _checks.device("ids_mask", ids_mask, "images", images)
    cu_mask = cu_seqlens("cu_mask", cu_mask)
    patches.check_sequences("cu_mask", cu_mask, images)
    _checks.choice("reduction", reduction, REDUCTIONS)
    if norm_pix and values < 2:
        raise ValueError(f"norm_pix must be False for patches of one value, got {norm_pix!r}: they have no variance")
    scale, shift = patches.affine(images, mean, std)
    args = (images, ids_mask, cu_mask, patch_size, bool(norm_pix), scale, shift, reduction)

    impl = _backends.pick(BACKENDS, impl, pred, images.dtype)
    if impl == "reference":
        patches.check_ids("ids_mask", ids_mask, "cu_mask", cu_mask, images, patch_size)
        return reference.masked_mse(pred, *args)
    need_error = pred.requires_grad and torch.is_grad_enabled()
    return _MaskedMse.apply(impl, pred.contiguous(), *args, need_error)[0]


@_backends.operator(BACKENDS, "forward")
def _masked_mse(
    pred: Tensor, images: Tensor, ids_mask: Tensor, cu_mask: Tensor, patch_size: int, norm_pix: bool,
    scale: list[float], shift: list[float], reduction: str, need_error: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """loss; error, pred - target, where it is needed."""
    size = pred.shape[:1] if reduction == "none" else ()
    loss = pred.new_empty(size, dtype=_backends.accumulator(pred.dtype))
    return loss, _backends.like(pred) if need_error else None


@_backends.operator(BACKENDS, "backward")
def _masked_mse_backward(dloss: Tensor, error: Tensor, cu_mask: Tensor, reduction: str) -> Tensor:
    """dpred."""
    return _backends.like(error)


class _MaskedMse(Function):
    """One for all backends. The forward pass leaves pred - target, so that the backward pass only multiplies. (Not yet
    with the factor of the reduction, which would be below what float16 can hold.)"""

    @staticmethod
    def forward(impl, pred, images, ids_mask, cu_mask, patch_size, norm_pix, scale, shift, reduction, need_error):
        args = (images, ids_mask, cu_mask, patch_size, norm_pix, scale, shift, reduction, need_error)
        return *_masked_mse(impl, pred, *args), link(pred)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, ctx.reduction, ctx.inputs = inputs[0], inputs[-2], len(inputs)
        _, error, to_pred = output
        ctx.save_for_backward(error, inputs[4], to_pred)
        kept(ctx, error)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dloss, *_):
        error, cu_mask, _ = saved
        dpred = _masked_mse_backward(ctx.impl, dloss.contiguous(), error, cu_mask, ctx.reduction)
        return None, dpred, *(None,) * (ctx.inputs - 2)
