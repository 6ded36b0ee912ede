"""masked_mse in Triton: programs of some rows, which read pixels straight from images; one program adds the rows up."""

import torch
import triton
import triton.language as tl

from m3ae_fast import _triton
from m3ae_fast._triton import Resource, element, inverse_root, sequence_of
from m3ae_fast.ops.gather_patches.triton_backend import EXACT, TILE, load_patch, runs, source_signature

REDUCTIONS = {"none": 0, "sum": 0, "mean": 1, "sample_mean": 2}  # how a row is weighted: not, by all rows, by its image


def forward(pred, images, ids_mask, cu_mask, patch_size, norm_pix, scale, shift, reduction, need_error, loss, error):
    rows, width = pred.shape
    count, channels = images.shape[:2]
    row_loss = loss if reduction == "none" else pred.new_empty(rows, dtype=torch.float64)
    each, block, options = _tile(width)
    _forward_kernel[(_triton.cdiv(rows, each),)](
        pred, images, ids_mask, cu_mask, row_loss, error, rows, count, *images.stride(), tuple(scale), tuple(shift),
        images.shape[3] // patch_size, patch_size, channels, runs(images), bool(norm_pix), REDUCTIONS[reduction],
        each, block, **options, **EXACT,
    )  # fmt: skip
    if reduction != "none":
        _triton.sum_values(row_loss, loss)


def backward(dloss, error, cu_mask, reduction, dpred):
    rows, width = error.shape
    each, block, options = _tile(width)
    _backward_kernel[(_triton.cdiv(rows, each),)](
        dloss, error, cu_mask, dpred, rows, cu_mask.shape[0] - 1, width, REDUCTIONS[reduction], reduction == "none",
        each, block, **options,
    )  # fmt: skip


def _tile(width):
    """(rows of a program, values of a row with their padding, launch options)."""
    block = _triton.next_power_of_2(width)
    rows = max(TILE // block, 1)
    return rows, block, _triton.row_options(rows * block)


@triton.jit
def _row_weight(cu_ptr, count, image, REDUCTION: tl.constexpr):
    """fp64: what the losses of rows of these images, of `count`, are multiplied with before all are added up."""
    rows = tl.full([], 1, tl.int32)
    if REDUCTION == 1:
        rows = tl.load(cu_ptr + count)
    elif REDUCTION == 2:
        rows = tl.load(cu_ptr + image + 1, mask=image < count, other=1) - tl.load(cu_ptr + image)
    weight = 1.0 / tl.maximum(rows, 1).to(tl.float64)
    if REDUCTION == 2:
        weight /= tl.maximum(count, 1).to(tl.float64)
    return weight


@_triton.jit(do_not_specialize=["total", "count"])
def _forward_kernel(
    pred_ptr, images_ptr, ids_mask_ptr, cu_mask_ptr, row_loss_ptr, error_ptr, total, count, stride_n, stride_c,
    stride_h, stride_w, scale, shift, COLUMNS: tl.constexpr, PATCH: tl.constexpr, CHANNELS: tl.constexpr,
    RUNS: tl.constexpr, NORM_PIX: tl.constexpr, REDUCTION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = PATCH * PATCH * CHANNELS
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    image = sequence_of(cu_mask_ptr, count, t)
    stored = (t < total)[:, None] & (d < WIDTH)[None, :]
    inside = stored & (image < count)[:, None]  # rows past the last belong to no image: error and loss 0
    patch = tl.load(ids_mask_ptr + t, mask=t < total, other=0)
    target = load_patch(
        images_ptr, image, patch, d, inside, stride_n, stride_c, stride_h, stride_w, scale, shift, COLUMNS, PATCH,
        CHANNELS, RUNS,
    )  # fmt: skip
    if NORM_PIX:  # of differences from the first value, so that flat patches come out flat
        first = tl.sum(tl.where((d == 0)[None, :], target, 0.0), 1)[:, None]
        offset = tl.where(inside, target - first, 0.0)
        offset = tl.where(inside, offset - (tl.sum(offset, 1) / WIDTH)[:, None], 0.0)
        target = offset * inverse_root(offset, WIDTH - 1, 1e-6)[:, None]
    at = t.to(tl.int64)[:, None] * WIDTH + d[None, :]
    error = tl.where(inside, tl.load(pred_ptr + at, mask=inside, other=0).to(tl.float32) - target, 0.0)
    if error_ptr is not None:
        tl.store(error_ptr + at, error, mask=stored)
    loss = tl.sum(error * error, 1).to(tl.float64) / WIDTH
    tl.store(row_loss_ptr + t, loss * _row_weight(cu_mask_ptr, count, image, REDUCTION), mask=t < total)


@_triton.jit(do_not_specialize=["total", "count"])
def _backward_kernel(
    dloss_ptr, error_ptr, cu_mask_ptr, dpred_ptr, total, count, WIDTH: tl.constexpr, REDUCTION: tl.constexpr,
    A_LOSS_EACH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    image = sequence_of(cu_mask_ptr, count, t)
    named = (t < total) & (image < count)  # an error of no image is 0, but its dloss may be NaN
    dloss = tl.load(dloss_ptr + t, mask=named, other=0) if A_LOSS_EACH else tl.load(dloss_ptr)
    factor = (dloss.to(tl.float64) * _row_weight(cu_mask_ptr, count, image, REDUCTION) * 2 / WIDTH).to(tl.float32)
    factor = tl.where(named, factor, 0.0)
    at = t.to(tl.int64)[:, None] * WIDTH + d[None, :]
    in_row = (d < WIDTH)[None, :]
    error = tl.load(error_ptr + at, mask=named[:, None] & in_row, other=0).to(tl.float32)
    tl.store(dpred_ptr + at, error * factor[:, None], mask=(t < total)[:, None] & in_row)


def resources():
    signature, constants = source_signature("*u8")
    rows, block, options = _tile(768)
    constants |= {"ROWS": rows, "BLOCK": block}
    for dtype in (torch.bfloat16, torch.float32):
        name, pred = str(dtype).removeprefix("torch."), element(dtype)
        types = signature | {"pred_ptr": pred, "error_ptr": pred, "row_loss_ptr": "*fp64"}
        types |= {"ids_mask_ptr": "*i32", "cu_mask_ptr": "*i32", "total": "i32"}
        del types["stride_c"]
        for norm_pix in (False, True):
            yield Resource(
                f"masked_mse {'norm_pix ' if norm_pix else ''}{name}",
                _forward_kernel,
                types,
                constants | {"stride_c": 1, "RUNS": True, "NORM_PIX": norm_pix, "REDUCTION": 2},
                options | EXACT,
            )
        yield Resource(
            f"masked_mse backward {name}",
            _backward_kernel,
            {"dloss_ptr": "*fp32", "error_ptr": pred, "cu_mask_ptr": "*i32", "dpred_ptr": pred}
            | {"total": "i32", "count": "i32"},
            {"WIDTH": 768, "REDUCTION": 2, "A_LOSS_EACH": False, "ROWS": rows, "BLOCK": block},
            options,
        )
    yield from _triton.sum_values_resources()
