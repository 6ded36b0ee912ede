"""varlen_attention in CUDA: csrc/ops/varlen_attention/varlen_attention_cuda.cu and _backward_cuda.cu."""

import functools

import torch

from m3ae_fast import seqlens
from m3ae_fast._backends import EMULATED
from m3ae_fast._cuda_module import _cuda

FLOATS = (torch.bfloat16, torch.float16)
WIDEST = 128


@functools.cache
def shared_limit(device):
    """Bytes of shared memory that a block may have; the emulator's: an H200's."""
    return 227 << 10 if EMULATED else torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _lengths(q, cu_q, cu_k, max_q, max_k):
    longest_q, longest_k = seqlens.longest(cu_q, max_q), seqlens.longest(cu_q if cu_k is None else cu_k, max_k)
    return dict(cu_q=cu_q, cu_k=cu_k, max_q=longest_q, max_k=longest_k, shared_limit=shared_limit(q.device))


def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, out, stats):
    _cuda.varlen_attention(q=q, k=k, v=v, **_lengths(q, cu_q, cu_k, max_q, max_k), scale=scale, out=out, stats=stats)


def backward(dout, dlse, q, k, v, out, stats, cu_q, cu_k, max_q, max_k, scale, dq, dk, dv):
    _cuda.varlen_attention_backward(
        dout=dout, dlse=dlse, q=q, k=k, v=v, out=out, stats=stats, **_lengths(q, cu_q, cu_k, max_q, max_k), scale=scale,
        dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
