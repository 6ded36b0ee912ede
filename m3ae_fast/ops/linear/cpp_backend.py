"""linear on the CPU: products by oneDNN, as torch carries it; activation and bias gradient by csrc/ops/linear."""

import torch
import torch.nn.functional as F

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C

ACTIVATION_CODE = {"": 0, "gelu": 1, "gelu_tanh": 2}  # csrc/ops/linear/linear.h
# F.linear is oneDNN's for bfloat16, but MKL's for float32, and MKL leaves half of a Zen 5's AVX-512 unused
# (on a Zen 4 the two are equally fast) and changes its bits with the number of threads.
# The operator that TorchInductor calls reaches oneDNN; it is private to torch, so it may be missing.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
LIBRARY = (
    "oneDNN, as torch carries it: the same bits for any thread count"
    if ONEDNN
    else "torch's F.linear: its private oneDNN operator is missing"
)


TERMS = 512  # that oneDNN may add up in one chain: MKL, which is eager PyTorch, adds in blocks and rounds less


def product(a, b, bias=None):
    """a [M, K] times b [N, K] transposed, each contiguous or the transpose of such, plus bias [N]."""
    if not (ONEDNN and a.dtype == torch.float32 and a.numel() and b.numel()):
        return F.linear(a, b, bias)
    blocks = -(-a.shape[1] // TERMS)
    if blocks == 1:
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    out = None
    for i in range(blocks):
        some = slice(a.shape[1] * i // blocks, a.shape[1] * (i + 1) // blocks)
        right = b[:, some]
        if right.stride(1) == 1:  # oneDNN falls to its slow path for rows that are apart
            right = right.contiguous()
        part = torch.ops.mkldnn._linear_pointwise(a[:, some], right, bias if i == 0 else None, "none", [], "")
        out = part if out is None else out.add_(part)
    return out


def forward(x, weight, bias, activation, training):
    # GELU in the product's epilogue saves nothing that can be measured, and its backward pass needs z.
    z = product(x, weight, bias)
    none = z.new_empty(0, z.shape[1])
    if not activation:
        return z, none
    y = torch.empty_like(z) if training else z
    _C.linear_activation(address(z), address(y), z.numel(), ACTIVATION_CODE[activation], code(z))
    return y, z if training else none


def column_sums(dy):
    """[N] in fp32 (fp64 for fp64): the sum of rows, the same bits for any thread count."""
    sums = dy.new_empty(dy.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
    _C.linear_activation_backward(address(dy), 0, 0, address(sums), *dy.shape, 0, code(dy))
    return sums


def backward(dy, x, weight, z, activation, need_x, need_weight, need_bias):
    dz, dbias = dy, None
    if activation:
        dz = torch.empty_like(dy)
        dbias = dy.new_empty(dy.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32)) if need_bias else None
        _C.linear_activation_backward(
            address(dy), address(z), address(dz), address(dbias), *dy.shape, ACTIVATION_CODE[activation], code(dy)
        )
    elif need_bias:
        dbias = column_sums(dy)
    none = dy.new_empty(0, weight.shape[1])
    return (
        product(dz, weight.t()) if need_x else none,
        product(dz.t(), x.t()) if need_weight else none,
        dbias.to(dy.dtype) if need_bias else dy.new_empty(0),
    )
