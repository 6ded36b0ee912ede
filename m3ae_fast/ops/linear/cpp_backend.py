"""linear on the CPU: products of our own (csrc/ops/linear), or torch's where those are the faster ones."""

import torch
import torch.nn.functional as F

from m3ae_fast._backends import DTYPE_CODE, address, code
from m3ae_fast._cpp import _C

ACTIVATION_CODE = {"": 0, "gelu": 1, "gelu_tanh": 2}  # csrc/ops/linear/linear.h
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # torch's names


def ours(dtype):
    """Whether products of this dtype are ours on this machine, or torch's."""
    return _C.own_products(DTYPE_CODE[dtype])


def library():
    """For explain(): who multiplies."""
    ours_are = [name for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)) if ours(dtype)]
    theirs = [name for name in ("fp32", "bf16", "fp64") if name not in ours_are]
    return "; ".join(
        f"{' and '.join(names)} by {who}"
        for names, who in ((ours_are, "m3ae_fast, the same bits for any thread count"), (theirs, "torch's F.linear"))
        if names
    )


def forward(x, weight, bias, activation, input_activation, training):
    rows, inner = x.shape
    keep_z = training and bool(activation)
    if not ours(x.dtype):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        z = F.linear(activate(x, input_activation), weight, bias)
        return activate(z, activation), z if keep_z else z.new_empty(0, z.shape[1])
    y = x.new_empty(rows, weight.shape[0])
    z = x.new_empty(rows if keep_z else 0, weight.shape[0])
    _C.linear(
        *map(address, (x, weight, bias, z, y)), rows, inner, weight.shape[0],
        ACTIVATION_CODE[input_activation], ACTIVATION_CODE[activation], code(x), code(weight),
    )  # fmt: skip
    return y, z


def backward(dy, x, weight, z, activation, input_activation, need_x, need_weight, need_bias):
    dx, dweight = (each.new_empty(0, weight.shape[1]) for each in (dy, weight))
    dz = torch.empty_like(dy) if activation else dy
    dbias = dy.new_empty(dy.shape[1] if need_bias else 0, dtype=torch.promote_types(dy.dtype, torch.float32))
    if activation or need_bias:
        _C.linear_activation_backward(
            *map(address, (dy, z, dz if activation else None, dbias if need_bias else None)),
            *dy.shape, ACTIVATION_CODE[activation], code(dy),
        )  # fmt: skip
    if ours(dy.dtype):
        sizes = (*x.shape, weight.shape[0], ACTIVATION_CODE[input_activation], code(x), code(weight))
        if need_x:
            dx = x.new_empty(x.shape)
            _C.linear_backward_x(*map(address, (dz, weight, x, dx)), *sizes)
        if need_weight:
            dweight = weight.new_empty(weight.shape)
            _C.linear_backward_weight(*map(address, (dz, x, dweight)), *sizes)
    else:
        if need_x:
            dx = dz @ weight.to(dz.dtype)
            if input_activation:
                dx = torch.ops.aten.gelu_backward(dx, x, approximate=APPROXIMATE[input_activation])
        if need_weight:
            dweight = (dz.t() @ activate(x, input_activation)).to(weight.dtype)
    return dx, dweight, dbias.to(weight.dtype)


def activate(x, activation):
    return F.gelu(x, approximate=APPROXIMATE[activation]) if activation else x
