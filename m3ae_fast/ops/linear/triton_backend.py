"""linear on the GPU: products by torch (cuBLAS), activations, their slopes and the bias gradient in Triton."""

import torch
import triton
import triton.language as tl

from m3ae_fast import _triton
from m3ae_fast._triton import Resource, element

BLOCK, OPTIONS = 1024, {"num_warps": 4, "num_stages": 1}  # of _forward_kernel
TANH = {"gelu": False, "gelu_tanh": True}


def forward(x, weight, bias, activation, input_activation, training, y, z):
    before = y if z is None else z
    if bias is None:
        torch.mm(activated(x, input_activation), weight.t(), out=before)
    else:
        torch.addmm(bias, activated(x, input_activation), weight.t(), out=before)
    if activation:
        activate(before, activation, y)


def backward(dy, x, weight, z, activation, input_activation, need_x, need_weight, need_bias, dx, dweight, dbias):
    dz = through(dy, z, activation, dbias)
    if need_x:
        torch.mm(dz, weight, out=dx)
        through(dx, x, input_activation, None, dx)
    if need_weight:
        torch.mm(dz.t(), activated(x, input_activation), out=dweight)


def activated(z, activation):
    return activate(z, activation, torch.empty_like(z)) if activation else z


def activate(z, activation, y):
    """y = act(z), which may be z itself."""
    _forward_kernel[(_triton.cdiv(z.numel(), BLOCK),)](z, y, z.numel(), TANH[activation], BLOCK, **OPTIONS)
    return y


def through(dy, z, activation, dbias, dz=None):
    """dy times the slope of the activation at z, in dz, which may be dy itself; dbias: the sum of its rows."""
    if not activation:
        if dbias is not None:
            _triton.sum_rows(dy, dbias)
        return dy
    (count, width), dz = dy.shape, torch.empty_like(dy) if dz is None else dz
    tiles = _triton.cdiv(width, _triton.COLUMNS)
    number, per_chunk = _triton.chunks(count, tiles)
    partials = None if dbias is None else dy.new_empty(number, width, dtype=torch.float32)
    _backward_kernel[(number, tiles)](
        dy, z, dz, partials, count, width, per_chunk, TANH[activation], _triton.ROWS, _triton.COLUMNS,
        **_triton.TILE_OPTIONS,
    )  # fmt: skip
    if dbias is not None:
        _triton.sum_partials(partials, dbias)
    return dz


@triton.jit
def _logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))  # exp may overflow: the quotient is 0 then, as it should be


@triton.jit
def _share(z, TANH: tl.constexpr):
    """GELU is z times this: Phi(z), or (1 + tanh u) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3), logistic of 2 u."""
    if TANH:
        return _logistic(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
    else:
        return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@_triton.jit(do_not_specialize=["count"])
def _forward_kernel(z_ptr, y_ptr, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + at, mask=at < count, other=0).to(tl.float32)
    tl.store(y_ptr + at, z * _share(z, TANH), mask=at < count)


@_triton.jit(do_not_specialize=["count", "per_chunk"])
def _backward_kernel(
    dy_ptr, z_ptr, dz_ptr, partials_ptr, count, width, per_chunk, TANH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum((chunk + 1) * per_chunk, count)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(chunk * per_chunk, end, ROWS):
        t = start + tl.arange(0, ROWS)
        inside = (t < end)[:, None] & (d < width)[None, :]
        at = t.to(tl.int64)[:, None] * width + d[None, :]
        z = tl.load(z_ptr + at, mask=inside, other=0).to(tl.float32)
        share = _share(z, TANH)
        if TANH:
            slope = share + z * share * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * z * z))
        else:
            slope = share + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        gradient = tl.load(dy_ptr + at, mask=inside, other=0).to(tl.float32) * slope
        tl.store(dz_ptr + at, gradient, mask=inside)
        total += gradient
    if partials_ptr is not None:
        tl.store(partials_ptr + chunk.to(tl.int64) * width + d, tl.sum(total, 0), mask=d < width)


def resources():
    for dtype in (torch.bfloat16, torch.float32):
        name, pointer = str(dtype).removeprefix("torch."), element(dtype)
        for tanh in (False, True):
            gelu = "gelu_tanh" if tanh else "gelu"
            yield Resource(
                f"linear {gelu} {name}",
                _forward_kernel,
                {"z_ptr": pointer, "y_ptr": pointer, "count": "i32"},
                {"TANH": tanh, "BLOCK": BLOCK},
                OPTIONS,
            )
            yield Resource(
                f"linear {gelu} backward, with the sum of rows, {name}",
                _backward_kernel,
                dict.fromkeys(("dy_ptr", "z_ptr", "dz_ptr"), pointer)
                | {"partials_ptr": "*fp32", "count": "i32", "width": "i32:16", "per_chunk": "i32"},
                {"TANH": tanh, "ROWS": _triton.ROWS, "COLUMNS": _triton.COLUMNS},
                _triton.TILE_OPTIONS,
            )
