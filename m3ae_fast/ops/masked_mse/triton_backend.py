"""masked_mse in Triton: a program a row that reads its pixels straight from the image; one program adds the rows up."""

import torch
import triton
import triton.language as tl

from m3ae_fast import _triton
from m3ae_fast._triton import Resource, element, inverse_root, sequence_of
from m3ae_fast.ops.gather_patches.triton_backend import EXACT, load_patch, source_signature

REDUCTIONS = {"none": 0, "sum": 0, "mean": 1, "sample_mean": 2}  # how a row is weighted: not, by all rows, by its image


def forward(pred, images, ids_mask, cu_mask, patch_size, norm_pix, scale, shift, reduction, need_error, loss, error):
    rows, width = pred.shape
    count, channels = images.shape[:2]
    row_loss = loss if reduction == "none" else pred.new_empty(rows, dtype=torch.float64)
    block = _triton.next_power_of_2(width)
    _forward_kernel[(rows,)](
        pred, images, ids_mask, cu_mask, row_loss, error, count, *images.stride(), tuple(scale), tuple(shift),
        images.shape[3] // patch_size, patch_size, channels, bool(norm_pix), REDUCTIONS[reduction], block,
        **_triton.row_options(block), **EXACT,
    )  # fmt: skip
    if reduction != "none":
        _triton.sum_values(row_loss, loss)


def backward(dloss, error, cu_mask, reduction, dpred):
    rows, width = error.shape
    block = _triton.next_power_of_2(width)
    _backward_kernel[(rows,)](
        dloss, error, cu_mask, dpred, cu_mask.shape[0] - 1, width, REDUCTIONS[reduction], reduction == "none", block,
        **_triton.row_options(block),
    )  # fmt: skip


@triton.jit
def _row_weight(cu_ptr, count, image, REDUCTION: tl.constexpr):
    """fp64: what the loss of a row of this image, one of `count`, is multiplied with before all are added up."""
    rows = tl.full([], 1, tl.int32)
    if REDUCTION == 1:
        rows = tl.load(cu_ptr + count)
    elif REDUCTION == 2:
        rows = tl.load(cu_ptr + image + 1, mask=image < count, other=1) - tl.load(cu_ptr + image)
    weight = 1.0 / tl.maximum(rows, 1).to(tl.float64)
    if REDUCTION == 2:
        weight /= tl.maximum(count, 1).to(tl.float64)
    return weight


@_triton.jit(do_not_specialize=["count"])
def _forward_kernel(
    pred_ptr, images_ptr, ids_mask_ptr, cu_mask_ptr, row_loss_ptr, error_ptr, count, stride_n, stride_c, stride_h,
    stride_w, scale, shift, COLUMNS: tl.constexpr, PATCH: tl.constexpr, CHANNELS: tl.constexpr,
    NORM_PIX: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = PATCH * PATCH * CHANNELS
    t = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    image = sequence_of(cu_mask_ptr, count, t)
    inside = (d < WIDTH) & (image < count)  # rows past the last belong to no image: error and loss 0
    patch = tl.load(ids_mask_ptr + t)
    target = load_patch(
        images_ptr, image, patch, d, inside, stride_n, stride_c, stride_h, stride_w, scale, shift, COLUMNS, PATCH,
        CHANNELS,
    )  # fmt: skip
    if NORM_PIX:  # of differences from the first value, so that flat patches come out flat
        first = tl.sum(tl.where(d == 0, target, 0.0), 0)
        offset = tl.where(inside, target - first, 0.0)
        offset = tl.where(inside, offset - tl.sum(offset, 0) / WIDTH, 0.0)
        target = offset * inverse_root(offset, WIDTH - 1, 1e-6)
    at = t.to(tl.int64) * WIDTH + d
    error = tl.where(inside, tl.load(pred_ptr + at, mask=inside, other=0).to(tl.float32) - target, 0.0)
    if error_ptr is not None:
        tl.store(error_ptr + at, error, mask=d < WIDTH)
    loss = tl.sum(error * error, 0).to(tl.float64) / WIDTH
    tl.store(row_loss_ptr + t, loss * _row_weight(cu_mask_ptr, count, image, REDUCTION))


@_triton.jit(do_not_specialize=["count"])
def _backward_kernel(
    dloss_ptr, error_ptr, cu_mask_ptr, dpred_ptr, count, WIDTH: tl.constexpr, REDUCTION: tl.constexpr,
    A_LOSS_EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    image = sequence_of(cu_mask_ptr, count, t)
    dloss = tl.load(dloss_ptr + t if A_LOSS_EACH else dloss_ptr).to(tl.float64)
    factor = (dloss * _row_weight(cu_mask_ptr, count, image, REDUCTION) * 2 / WIDTH).to(tl.float32)
    factor = tl.where(image < count, factor, 0.0)
    at = t * WIDTH + d
    named = (d < WIDTH) & (image < count)  # an error of no image is 0, but its dloss may be NaN
    error = tl.load(error_ptr + at, mask=named, other=0).to(tl.float32)
    tl.store(dpred_ptr + at, error * factor, mask=d < WIDTH)


def resources():
    signature, constants = source_signature("*u8")
    for dtype in (torch.bfloat16, torch.float32):
        name, pred = str(dtype).removeprefix("torch."), element(dtype)
        types = signature | {"pred_ptr": pred, "error_ptr": pred, "row_loss_ptr": "*fp64"}
        types |= {"ids_mask_ptr": "*i32", "cu_mask_ptr": "*i32"}
        del types["stride_c"]
        for norm_pix in (False, True):
            yield Resource(
                f"masked_mse {'norm_pix ' if norm_pix else ''}{name}",
                _forward_kernel,
                types,
                constants | {"stride_c": 1, "NORM_PIX": norm_pix, "REDUCTION": 2},
                _triton.row_options(1024) | EXACT,
            )
        yield Resource(
            f"masked_mse backward {name}",
            _backward_kernel,
            {"dloss_ptr": "*fp32", "error_ptr": pred, "cu_mask_ptr": "*i32", "dpred_ptr": pred, "count": "i32"},
            {"WIDTH": 768, "REDUCTION": 2, "A_LOSS_EACH": False, "BLOCK": 1024},
            _triton.row_options(1024),
        )
    yield from _triton.sum_values_resources()
