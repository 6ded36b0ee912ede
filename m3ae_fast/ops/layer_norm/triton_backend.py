"""layer_norm in Triton: a program a row forward; backward, a program a chunk of rows, a few rows at a time."""

import torch
import triton.language as tl

from m3ae_fast import _triton
from m3ae_fast._triton import Resource, inverse_root, load_or_zero

TILE = 2048  # values that a program of the backward pass takes at a time, in whole rows


def forward(x, residual, weight, bias, eps, dtype, y, s, stats):
    count, width = x.shape
    block = _triton.next_power_of_2(width)
    _forward_kernel[(count,)](
        x, residual, weight, bias, y, s, stats, eps, count, width, block, **_triton.row_options(block)
    )  # fmt: skip


def backward(dy, ds, s, weight, stats, need_input, need_params, dx, dparams):
    count, width = s.shape
    number, per_chunk = _triton.chunks(count, 4)  # dy, s, ds and dx are tiles of TILE values each
    partials = s.new_empty(number, 2, width, dtype=torch.float32) if need_params else None
    block, rows, options = _backward_tile(width)
    _backward_kernel[(number,)](
        dy, ds, s, weight, stats, dx, partials, count, per_chunk, width, rows, block, **options
    )  # fmt: skip
    if need_params:
        _triton.sum_partials(partials, dparams)


def _backward_tile(width):
    """(values of a row with their padding, rows at a time, launch options)."""
    block = _triton.next_power_of_2(width)
    rows = max(TILE // block, 1)
    return block, rows, {"num_warps": min(max(rows * block // 256, 4), 16), "num_stages": 1}


@_triton.jit(do_not_specialize=["count", "eps"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, s_ptr, stats_ptr, eps, count, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    s = tl.load(x_ptr + t * WIDTH + d, mask=inside, other=0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + t * WIDTH + d, mask=inside, other=0).to(tl.float32)
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + t * WIDTH + d, rounded, mask=inside)
        s = rounded.to(tl.float32)  # what is normalized is what was rounded and stored
    mean = tl.div_rn(tl.sum(s, 0), WIDTH * 1.0)
    offset = tl.where(inside, s - mean, 0.0)
    rstd = inverse_root(offset, WIDTH, eps)
    tl.store(stats_ptr + t, mean)
    tl.store(stats_ptr + count + t, rstd)
    y = offset * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + d, mask=inside, other=0)
    y += load_or_zero(bias_ptr, d, inside)
    tl.store(y_ptr + t * WIDTH + d, y, mask=inside)


# With h = (s - mean) * rstd and g = dy * weight: dx = rstd * (g - mean(g) - h * mean(g * h)) + ds.
@_triton.jit(do_not_specialize=["count", "per_chunk"])
def _backward_kernel(
    dy_ptr, ds_ptr, s_ptr, weight_ptr, stats_ptr, dx_ptr, partials_ptr, count, per_chunk, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    end = tl.minimum((chunk + 1) * per_chunk, count)
    dweight, dbias = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + d, mask=d < WIDTH, other=0)[None, :]
    for start in tl.range(chunk * per_chunk, end, ROWS, num_stages=2):
        t = start + tl.arange(0, ROWS)
        inside = (t < end)[:, None] & (d < WIDTH)[None, :]
        at = t.to(tl.int64)[:, None] * WIDTH + d[None, :]
        mean = tl.load(stats_ptr + t, mask=t < end, other=0)[:, None]
        rstd = tl.load(stats_ptr + count + t, mask=t < end, other=0)[:, None]
        h = (tl.load(s_ptr + at, mask=inside, other=0).to(tl.float32) - mean) * rstd
        g = tl.load(dy_ptr + at, mask=inside, other=0).to(tl.float32)  # lanes outside are 0: they add nothing
        if partials_ptr is not None:
            dweight += g * h
            dbias += g
        if dx_ptr is not None:
            if weight_ptr is not None:
                g *= weight
            mean_g = (tl.sum(g, 1) / WIDTH)[:, None]
            mean_gh = (tl.sum(g * h, 1) / WIDTH)[:, None]
            dx = (g - (mean_g + h * mean_gh)) * rstd
            if ds_ptr is not None:
                dx += tl.load(ds_ptr + at, mask=inside, other=0).to(tl.float32)
            tl.store(dx_ptr + at, dx, mask=inside)
    if partials_ptr is not None:
        out = partials_ptr + chunk.to(tl.int64) * 2 * WIDTH + d
        tl.store(out, tl.sum(dweight, 0), mask=d < WIDTH)
        tl.store(out + WIDTH, tl.sum(dbias, 0), mask=d < WIDTH)


def resources():
    for case, width in (("m3ae_small", 384), ("mae_base", 768), ("m3ae_huge", 1280), ("decoder", 512)):
        block, rows, options = _backward_tile(width)
        # autocast: fp32 rows, a bf16 residual, bf16 out; and everything in one dtype
        for x, residual, y in (("*fp32", "*bf16", "*bf16"), ("*fp32",) * 3, ("*bf16",) * 3):
            params = {"weight_ptr": "*fp32", "stats_ptr": "*fp32", "count": "i32"}
            yield Resource(
                f"layer_norm forward {case} {x} + {residual} -> {y}".replace("*", ""),
                _forward_kernel,
                params
                | {"x_ptr": x, "residual_ptr": residual, "bias_ptr": "*fp32", "y_ptr": y, "s_ptr": x, "eps": "fp32"},
                {"WIDTH": width, "BLOCK": block},
                _triton.row_options(block),
            )
            yield Resource(
                f"layer_norm backward {case} {x} + {residual} -> {y}".replace("*", ""),
                _backward_kernel,
                params
                | {"dy_ptr": y, "ds_ptr": x, "s_ptr": x, "dx_ptr": x, "partials_ptr": "*fp32", "per_chunk": "i32"},
                {"WIDTH": width, "ROWS": rows, "BLOCK": block},
                options,
            )
