"""linear on the CPU: products of our own (csrc/ops/linear), or torch's where those are the faster ones."""

import torch
import torch.nn.functional as F

from m3ae_fast._backends import accumulator
from m3ae_fast._cpp import _C

FP32_PARAMETERS = (torch.bfloat16,)  # see _backends.for_product
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # torch's names
# _C reads a dtype from a tensor.
OF_DTYPE = {d: torch.empty(0, dtype=d, device="cpu") for d in (torch.float32, torch.bfloat16, torch.float64)}


def ours(dtype):
    """Whether products of this dtype are ours on this machine, or torch's."""
    return _C.own_products(OF_DTYPE[dtype])


def library():
    """For explain(): who multiplies."""
    ours_are = [name for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)) if ours(dtype)]
    theirs = [name for name in ("fp32", "bf16", "fp64") if name not in ours_are]
    return "; ".join(
        f"{' and '.join(names)} by {who}"
        for names, who in ((ours_are, "m3ae_fast, the same bits for any thread count"), (theirs, "torch's F.linear"))
        if names
    )


def forward(x, weight, bias, activation, input_activation, training, y, z):
    if ours(x.dtype):
        _C.linear(
            x=x, weight=weight, bias=bias, activation=activation, input_activation=input_activation, y=y, z=z
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
    products = dict(dx=dx, dweight=dweight) if ours(dy.dtype) else dict(dx=None, dweight=None)
    _C.linear_backward(
        dy=dy, x=x, weight=weight, z=z, activation=activation, input_activation=input_activation, dz=dz, **products,
        dbias=sums,
    )  # fmt: skip
    if sums is not dbias:
        dbias.copy_(sums)
    if products["dx"] is not dx:
        torch.mm(dz, weight.to(dz.dtype), out=dx)
        if input_activation:
            torch.ops.aten.gelu_backward.grad_input(
                dx, x, approximate=APPROXIMATE[input_activation], grad_input=dx
            )  # fmt: skip
    if products["dweight"] is not dweight:
        dweight.copy_(dz.t() @ activate(x, input_activation))


def activate(x, activation):
    return F.gelu(x, approximate=APPROXIMATE[activation]) if activation else x
