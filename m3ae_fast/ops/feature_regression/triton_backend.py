"""feature_regression in Triton: a program a row, both of its rows read once; one program adds the losses up."""

import torch
import triton
import triton.language as tl

from m3ae_fast import _triton
from m3ae_fast._triton import FAR, Resource, element, inverse_root, sequence_of
from m3ae_fast.ops.masked_mse.triton_backend import REDUCTIONS

DISTANCES = {"l2": 0, "l1": 1, "cosine": 2}


def forward(pred, target, rows, cu, distance, normalize, eps, reduction, dpred_dtype, loss, dpred):
    count, width = pred.shape
    row_loss = loss if reduction == "none" else pred.new_empty(count, dtype=torch.float64)
    block = _triton.next_power_of_2(width)
    _forward_kernel[(count,)](
        pred, target, rows, cu, row_loss, dpred, eps, count, 0 if cu is None else cu.shape[0] - 1, width,
        DISTANCES[distance], normalize, REDUCTIONS[reduction], block, **_triton.row_options(block),
    )  # fmt: skip
    if reduction != "none":
        _triton.sum_values(row_loss, loss)


@triton.jit
def _row_weight(cu_ptr, count, samples, r, REDUCTION: tl.constexpr):
    """(fp64, what the loss of row r is multiplied with before all are added up; does the row count at all?)"""
    named = count
    if cu_ptr is not None:
        named = tl.load(cu_ptr + samples)
    weight = tl.full([], 1, tl.float64)
    if REDUCTION == 1:
        weight /= tl.maximum(named, 1)
    elif REDUCTION == 2:
        sample = sequence_of(cu_ptr, samples, r)
        rows = tl.load(cu_ptr + sample + 1, mask=sample < samples, other=1) - tl.load(cu_ptr + sample)
        weight /= tl.maximum(rows, 1).to(tl.float64) * tl.maximum(samples, 1)
    return weight, r < named


@triton.jit
def _with_norm(x):
    """(x, its norm, 1); where the squares overflow, of a row that is FAR as large, and FAR."""
    norm = tl.sqrt(tl.sum(x * x, 0))
    size = tl.full([], 1.0, tl.float32)
    if norm == float("inf"):
        x *= FAR
        norm = tl.sqrt(tl.sum(x * x, 0))
        size = tl.full([], FAR, tl.float32)
    return x, norm, size


@_triton.jit(do_not_specialize=["eps", "count", "samples"])
def _forward_kernel(
    pred_ptr, target_ptr, rows_ptr, cu_ptr, row_loss_ptr, dpred_ptr, eps, count, samples, WIDTH: tl.constexpr,
    DISTANCE: tl.constexpr, NORMALIZE: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    weight, named = _row_weight(cu_ptr, count, samples, r, REDUCTION)
    inside = (d < WIDTH) & named  # rows past the last sample: loss and gradient 0
    at = r.to(tl.int64) * WIDTH + d
    row = r
    if rows_ptr is not None:
        row = tl.load(rows_ptr + r)
    p = tl.load(pred_ptr + at, mask=inside, other=0).to(tl.float32)
    t = tl.load(target_ptr + row.to(tl.int64) * WIDTH + d, mask=inside, other=0).to(tl.float32)
    if NORMALIZE:  # of differences from the first value, so that flat rows come out flat
        first = tl.sum(tl.where(d == 0, t, 0.0), 0)
        offset = tl.where(inside, t - first, 0.0)
        offset = tl.where(inside, offset - tl.sum(offset, 0) / WIDTH, 0.0)
        t = offset * inverse_root(offset, WIDTH, eps)
    if DISTANCE == 2:
        p, norm, size = _with_norm(p)
        t, target_norm, _ = _with_norm(t)
        bounded = tl.maximum(norm, 1e-8)
        t /= tl.maximum(target_norm, 1e-8)  # the products of norms or of rows might overflow
        cos = tl.sum(p / bounded * t, 0)
        loss = tl.where(named, 1.0 - cos, 0.0)
        slope = (p / tl.where(norm > 0, norm, 1.0) * cos - t) / bounded * size
    elif DISTANCE == 1:
        loss = tl.sum(tl.abs(p - t), 0) / WIDTH
        slope = tl.where(p > t, 1.0, tl.where(p < t, -1.0, 0.0)) / WIDTH
    else:
        loss = tl.sum((p - t) * (p - t), 0) / WIDTH
        slope = 2.0 * (p - t) / WIDTH
    if dpred_ptr is not None:
        tl.store(dpred_ptr + at, slope * weight.to(tl.float32), mask=d < WIDTH)
    tl.store(row_loss_ptr + r, loss.to(tl.float64) * weight)


def resources():
    for pred, target in ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2):
        for distance, code in DISTANCES.items():
            types = {
                "pred_ptr": element(pred), "target_ptr": element(target), "rows_ptr": "*i32", "cu_ptr": "*i32",
                "row_loss_ptr": "*fp64", "dpred_ptr": element(pred), "eps": "fp32", "count": "i32", "samples": "i32",
            }  # fmt: skip
            yield Resource(
                f"feature_regression {distance} {element(pred)[1:]} to {element(target)[1:]}",
                _forward_kernel,
                types,
                {"WIDTH": 768, "DISTANCE": code, "NORMALIZE": True, "REDUCTION": 2, "BLOCK": 1024},
                _triton.row_options(1024),
            )
