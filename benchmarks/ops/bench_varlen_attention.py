"""varlen_attention against what users have: scaled_dot_product_attention; on a GPU its backends and the packed peers.

SDPA is handed a batch that is already padded, and its mask: padding and unpadding cost it nothing here. `loop` runs one
sequence at a time, without padding. The packed peers are handed what ours is handed.
"""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure
from m3ae_fast import SeqLens, testing, varlen_attention
from m3ae_fast.ops.varlen_attention import cases

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
if measure.SETTINGS.gpu:
    del DTYPES[torch.float32]  # most peers take none


def lengths(call):
    """(of queries, of keys)."""
    lens = [x.lengths for x in call.args if isinstance(x, SeqLens)]
    return lens[0], lens[-1]


def pad(x, lens):
    """[T, H, D] -> [B, H, longest, D], a leaf of its own."""
    padded = torch.nn.utils.rnn.pad_sequence(x.detach().split(lens), batch_first=True)
    return padded.transpose(1, 2).contiguous().requires_grad_()


def padded_call(call):
    q_lens, k_lens = lengths(call)
    q, k, v = (pad(x, lens) for x, lens in zip(call.args, (q_lens, k_lens, k_lens), strict=False))
    ragged = min(k_lens) < max(k_lens)
    mask = (torch.arange(max(k_lens)) < torch.tensor(k_lens)[:, None])[:, None, None, :] if ragged else None
    return testing.Call((q, k, v), {"attn_mask": mask})


def loop(q, k, v, *lens):
    parts = zip(q.split(lens[0].lengths), k.split(lens[-1].lengths), v.split(lens[-1].lengths), strict=True)
    return torch.cat([
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts
    ])  # fmt: skip


def assert_at_most_twice_the_error(call):
    """Against fp64: ours within twice of SDPA's own error, one rounding allowed (testing.assert_error_rule)."""
    truth, ours, theirs = (
        each.run(f) for each, f in ((call.to(torch.float64), loop), (call, varlen_attention), (call, loop))
    )
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), *([*x, *y] for x, y in (ours, theirs, truth)), strict=True):
        testing.assert_error_rule(name, a, b, c, factor=2)


def packed(out, lens):
    """A peer's output as ours: [T, H, D] as it is, [B, H, longest, D] without its padding."""
    return out if out.dim() == 3 else torch.cat([x[:n] for x, n in zip(out.transpose(1, 2), lens, strict=True)])


def sdpa(backend):
    """scaled_dot_product_attention by one backend of torch.nn.attention.SDPBackend."""

    def run(*args, **kwargs):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(*args, **kwargs)

    return run


def torch_varlen(q, k, v, *lens):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, lens[0].cu, lens[-1].cu, lens[0].max, lens[-1].max)


@functools.cache
def block_diagonal(q_lens, k_lens):
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(list(q_lens.lengths), list(k_lens.lengths))


def xformers(q, k, v, *lens):
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=block_diagonal(lens[0], lens[-1]))[0]


def flash_attn(module):
    """flash_attn_varlen_func of FlashAttention-2 (flash_attn) or 3 (flash_attn_interface); keywords: they differ."""

    def run(q, k, v, *lens):
        out = importlib.import_module(module).flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=lens[0].cu, cu_seqlens_k=lens[-1].cu, max_seqlen_q=lens[0].max,
            max_seqlen_k=lens[-1].max,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out  # FlashAttention-3 has handed lse along

    return run


def peers(calls, padded):
    if not measure.SETTINGS.gpu:
        return {"SDPA, padded + mask": (F.scaled_dot_product_attention, padded), "SDPA, a loop": (loop, calls)}
    backends = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return {f"SDPA {name.partition('_')[0].lower()}, padded": (sdpa(name), padded) for name in backends} | {
        "torch varlen_attn": (torch_varlen, calls),
        "xformers": (xformers, calls),
        "FlashAttention-2": (flash_attn("flash_attn"), calls),
        "FlashAttention-3": (flash_attn("flash_attn_interface"), calls),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: DTYPES[dtype])
@pytest.mark.parametrize("case", cases.GPU if measure.SETTINGS.gpu else cases.REAL)
@pytest.mark.parametrize("mode", ["forward+backward", "forward"])  # what the choice of a backend needs comes first
def bench_varlen_attention(benchmark, case, mode, dtype):
    call = measure.make(cases, case, dtype)
    calls = measure.copies(call)
    padded = measure.copies(padded_call(call), len(calls))
    assert_at_most_twice_the_error(calls[0])
    ours = varlen_attention(*calls[0].args)
    name = f"{case} {DTYPES[dtype]}"
    providers = {"m3ae_fast": varlen_attention}
    for peer, (function, its) in peers(calls, padded).items():

        def same_numbers(function=function, first=its[0]):
            out = packed(function(*first.args, **first.kwargs), lengths(call)[0])
            torch.testing.assert_close(out, ours, rtol=0.02, atol=0.02)
            return True

        if measure.attempt(peer, f"varlen_attention {mode} {name}", same_numbers):
            providers[peer] = (function, its)
    q = calls[0].args[0]
    flops = 4 * q.shape[1] * q.shape[2] * sum(a * b for a, b in zip(*lengths(call), strict=True))
    measure.compare_op(
        benchmark, "varlen_attention", name, calls, mode, providers, flops=flops, backward_flops=2.5
    )  # five products backward, two forward
