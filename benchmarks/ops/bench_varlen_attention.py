"""varlen_attention against what users have on a CPU: scaled_dot_product_attention.

`padded` is handed a batch that is already padded, and its mask: padding and unpadding cost it nothing here.
`loop` runs one sequence at a time, without padding.
"""

import measure
import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import SeqLens, testing, varlen_attention
from m3ae_fast.ops.varlen_attention import cases


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_varlen_attention(benchmark, case, mode, dtype):
    first = cases.make(case, dtype)
    assert_at_most_twice_the_error(first)
    calls = measure.copies(lambda: cases.make(case, dtype), sum(x.nbytes for x in first.leaves()) * 2)
    padded = [padded_call(call) for call in calls]

    def runner(function, calls):
        def forward(i):
            with torch.no_grad():
                return function(*calls[i].args, **calls[i].kwargs)

        douts = [torch.randn_like(forward(i)) for i in range(len(calls))]

        def both(i):
            return torch.autograd.grad(function(*calls[i].args, **calls[i].kwargs), calls[i].leaves(), douts[i])

        return forward if mode == "forward" else both

    providers = {
        "m3ae_fast": runner(varlen_attention, calls),
        "SDPA, padded + mask": runner(F.scaled_dot_product_attention, padded),
        "SDPA, a loop": runner(loop, calls),
    }
    name = f"{case} {'fp32' if dtype == torch.float32 else 'bf16'}"
    q = first.args[0]
    products = 2 if mode == "forward" else 7
    flops = 2 * products * q.shape[1] * q.shape[2] * sum(a * b for a, b in zip(*lengths(first), strict=True))
    measure.compare(benchmark, f"varlen_attention {mode}", name, providers, inputs=len(calls), flops=flops, dtype=dtype)
