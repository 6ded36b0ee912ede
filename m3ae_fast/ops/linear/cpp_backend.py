"""linear on the CPU: products of our own (csrc/ops/linear), or torch's where those are the faster ones."""

import torch
import torch.nn.functional as F

from m3ae_fast._backends import accumulator
from m3ae_fast._cpp import _C, products

FP32_PARAMETERS = (torch.bfloat16,)  # see _backends.for_product
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # torch's names
WHO = (  # by Products of csrc/cpu/isa.h
    "torch's F.linear, whose bits may change with the number of threads",
    "m3ae_fast, the same bits for any thread count",
    "m3ae_fast rounded to bf16, the same bits for any thread count",
    "m3ae_fast as sums of two bf16, the same bits for any thread count",
)


def library():
    """For explain(): who multiplies, with the precision that torch's settings ask for now."""
    names = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)):
        names.setdefault(products(dtype), []).append(name)
    return "; ".join(f"{' and '.join(names[kind])} by {WHO[kind]}" for kind in sorted(names, reverse=True))


def forward(x, weight, bias, activation, input_activation, training, y, z):
    ours = products(x.dtype)
    if ours:
        _C.linear(
            x=x, weight=weight, bias=bias, activation=activation, input_activation=input_activation, products=ours, y=y,
            z=z,
        )  # fmt: skip
        return
    before = y if z is None else z
    if bias is None:
        torch.mm(activate(x, input_activation), weight.to(x.dtype).t(), out=before)
    else:
        torch.addmm(bias.to(x.dtype), activate(x, input_activation), weight.to(x.dtype).t(), out=before)
    if activation:
        torch.ops.aten.gelu.out(before, approximate=APPROXIMATE[activation], out=y)


def backward(dy, x, weight, z, activation, input_activation, need_x, need_weight, need_bias, dx, dweight, dbias):
    dz = torch.empty_like(dy) if activation else dy
    accumulate = accumulator(dy.dtype)
    sums = dbias if dbias is None or dbias.dtype == accumulate else dbias.new_empty(dbias.shape[0], dtype=accumulate)
    ours = products(dy.dtype)
    _C.linear_backward(
        dy=dy, x=x, weight=weight, z=z, activation=activation, input_activation=input_activation, products=ours, dz=dz,
        dx=dx if ours else None, dweight=dweight if ours else None, dbias=sums,
    )  # fmt: skip
    if sums is not dbias:
        dbias.copy_(sums)
    if ours:
        return
    if need_x:
        torch.mm(dz, weight.to(dz.dtype), out=dx)
        if input_activation:
            torch.ops.aten.gelu_backward.grad_input(
                dx, x, approximate=APPROXIMATE[input_activation], grad_input=dx
            )  # fmt: skip
    if need_weight:
        dweight.copy_(dz.t() @ activate(x, input_activation))


def activate(x, activation):
    return F.gelu(x, approximate=APPROXIMATE[activation]) if activation else x
