"""varlen_attention on the CPU: csrc/ops/varlen_attention."""

import torch

from m3ae_fast._backends import address, code, strided
from m3ae_fast._cpp import _C


def _sizes(q, k, cu_q, max_q, max_k, scale):
    most = (-1 if longest is None else longest for longest in (max_q, max_k))
    return cu_q.shape[0] - 1, q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], *most, scale, code(q)


def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    _C.varlen_attention(
        *map(strided, (q, k, v)), address(cu_q), address(cu_k), address(out), address(lse),
        *_sizes(q, k, cu_q, max_q, max_k, scale),
    )  # fmt: skip
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, dq, dk, dv):
    _C.varlen_attention_backward(
        *map(strided, (dout, q, k, v)), address(out), address(lse), address(dlse), address(cu_q), address(cu_k),
        *map(strided, (dq, dk, dv)), *_sizes(q, k, cu_q, max_q, max_k, scale),
    )  # fmt: skip
