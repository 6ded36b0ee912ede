"""varlen_attention in CUDA: csrc/ops/varlen_attention/varlen_attention_cuda.cu and _backward_cuda.cu."""

import functools

import torch

from m3ae_fast import seqlens
from m3ae_fast._backends import EMULATED, address, code, strided
from m3ae_fast._cuda_module import _cuda, place

FLOATS = (torch.bfloat16, torch.float16)
WIDEST = 128


def refusal(q):
    return f"its heads are at most {WIDEST} channels wide, got {q.shape[-1]}" if q.shape[-1] > WIDEST else None


@functools.cache
def shared_limit(device):
    """Bytes of shared memory that a block may have; the emulator's: an H200's."""
    return 227 << 10 if EMULATED else torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _sizes(q, k, cu_q, cu_k, max_q, max_k, scale):
    longest = seqlens.longest(cu_q, max_q), seqlens.longest(cu_k, max_k)
    (rows, heads, width), (key_rows, key_heads, _) = q.shape, k.shape
    sizes = cu_q.shape[0] - 1, rows, key_rows, heads, key_heads, width
    return *sizes, *longest, scale, code(q), shared_limit(q.device), *place(q)


def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _cuda.varlen_attention(
        *map(strided, (q, k, v)), address(cu_q), address(cu_k), address(out), address(lse),
        *_sizes(q, k, cu_q, cu_k, max_q, max_k, scale),
    )  # fmt: skip
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, dq, dk, dv):
    _cuda.varlen_attention_backward(
        *map(strided, (dout, q, k, v)), address(out), address(lse), address(dlse), address(cu_q), address(cu_k),
        *map(strided, (dq, dk, dv)), *_sizes(q, k, cu_q, cu_k, max_q, max_k, scale),
    )  # fmt: skip
