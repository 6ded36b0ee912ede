"""gather_patches: the pixels of just the named patches, normalized, as rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks
from m3ae_fast._autograd import Function, differentiable_once
from m3ae_fast._backends import Impl
from m3ae_fast.ops.gather_patches import patches, reference
from m3ae_fast.seqlens import SeqLens, cu_seqlens

BACKENDS = _backends.load(__package__, "cpp", "triton", "cuda")


def gather_patches(
    images: Tensor,
    ids: Tensor,
    seqlens: SeqLens | Tensor,
    *,
    patch_size: int,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Cut the named patches out of images and normalize them on the way: a dropped patch is never read.

        out[t] = (pixel - mean) / std, of patch ids[t] of the image that t belongs to, pixels in 0 .. 1

    Args:
        images: [N, C, H, W] uint8 (0 .. 255, divided by 255 first) or float (taken as it is), of any strides;
            channels-last is fastest, and contiguous with three channels. H and W are multiples of patch_size.
        ids: [T] int32 or int64, patches within an image, counted row by row. One named twice is read twice, and its
            gradients add up.
        seqlens: how many rows each image has: SeqLens of N lengths, or cumulative offsets [N + 1] int32 or int64.
        mean, std: C numbers in the units of 0 .. 1; None: 0 and 1. A tensor is read on the host: from a GPU that syncs,
            under torch.compile give numbers.
        dtype: of the result, any float; None: float32 for uint8 images, else the images' own.
        impl: "reference", "cpp", "triton", "cuda"; None selects the preferred one for the device.

    Returns:
        [T, patch_size * patch_size * C]; a patch lies in (row, column, channel) order. Computed as
        pixel * scale + shift in fp32 (fp64 where images or dtype are) and rounded once, so that all backends agree bit
        for bit. Rows past the end of seqlens are zero. Differentiable with respect to float images.

    Raises:
        ValueError: sizes disagree, or an id or offset is outside its range (the C++ backend checks; a GPU would have to
            sync for it). TypeError: dtypes.

    Source: the patchify of arXiv:2111.06377's public code, restricted to the patches an encoder sees.
    """
    patches.check_images(images, patch_size)
    ids = _checks.ids("ids", ids)
    _checks.device("ids", ids, "images", images)
    cu = cu_seqlens("seqlens", seqlens)
    patches.check_sequences("seqlens", cu, images)
    if dtype is None:
        dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    elif dtype not in _checks.FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    scale, shift = patches.affine(images, mean, std)

    impl = _backends.pick(BACKENDS, impl, images, dtype)
    if impl == "reference":
        patches.check_ids("ids", ids, "seqlens", cu, images, patch_size)
        return reference.gather_patches(images, ids, cu, patch_size, scale, shift, dtype)
    return _GatherPatches.apply(impl, images, ids, cu, patch_size, scale, shift, dtype)


@_backends.operator(BACKENDS, "forward")
def _gather_patches(
    images: Tensor, ids: Tensor, cu: Tensor, patch_size: int, scale: list[float], shift: list[float],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[T, patch_size * patch_size * C]."""
    return images.new_empty(ids.shape[0], patch_size * patch_size * images.shape[1], dtype=dtype)


@_backends.operator(BACKENDS, "backward")
def _gather_patches_backward(
    dout: Tensor, ids: Tensor, cu: Tensor, shape: list[int], patch_size: int, scale: list[float], dtype: torch.dtype
) -> Tensor:
    """The images' gradient."""
    return dout.new_empty(shape, dtype=dtype)


class _GatherPatches(Function):
    """One for all backends."""

    @staticmethod
    def forward(impl, images, ids, cu, patch_size, scale, shift, dtype):
        return _gather_patches(impl, images, ids, cu, patch_size, scale, shift, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, images, ids, cu, ctx.patch_size, ctx.scale, *_ = inputs
        ctx.shape, ctx.dtype = images.shape, images.dtype
        ctx.save_for_backward(ids, cu)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout):
        ids, cu = saved
        dimages = _gather_patches_backward(
            ctx.impl, dout.contiguous(), ids, cu, ctx.shape, ctx.patch_size, ctx.scale, ctx.dtype
        )
        return None, dimages, None, None, None, None, None, None
