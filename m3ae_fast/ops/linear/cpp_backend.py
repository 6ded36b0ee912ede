"""linear on the CPU: the products through oneDNN."""

import torch
import torch.nn.functional as F

from m3ae_fast._cpp import _C  # noqa: F401


def product(a, b, bias=None):
    """a [M, K] times b [N, K] transposed."""
    if a.dtype == torch.float64 or 0 in (*a.shape, *b.shape):
        return F.linear(a, b, bias)
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def forward(x, weight, bias, activation, training):
    z = product(x, weight, bias)
    if not activation:
        return z, z.new_empty(0, z.shape[1])
    y = F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y, z if training else z.new_empty(0, z.shape[1])


def backward(dy, x, weight, z, activation, need_x, need_weight, need_bias):
    dz = dy
    if activation:
        dz = torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    dx = product(dz, weight.t()) if need_x else dz.new_empty(0, weight.shape[1])
    dweight = product(dz.t(), x.t()) if need_weight else dz.new_empty(0, weight.shape[1])
    dbias = dz.sum(0) if need_bias else dz.new_empty(0)
    return dx, dweight, dbias
