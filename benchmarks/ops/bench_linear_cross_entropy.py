"""linear_cross_entropy against eager logits and against torch's own chunked op."""

import measure
import memory
import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import linear_cross_entropy
from m3ae_fast.ops.linear_cross_entropy import cases


def eager(x, weight, target, bias=None):
    return F.cross_entropy(F.linear(x, weight, bias).float(), target)


def torch_chunked(x, weight, target, bias=None):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, linear_bias=bias, options=options)


def reduced_to_mean(case, dtype):
    call = cases.make(case, dtype)
    call.kwargs = {}  # peers know no sample_mean
    return call


PROVIDERS = {"m3ae_fast": linear_cross_entropy, "eager": eager}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    PROVIDERS["torch chunked"] = torch_chunked


def owned(case, dtype, provider):
    """For memory.peak_beyond: a forward and a backward pass, and the bytes of its gradients."""
    call = reduced_to_mean(case, getattr(torch, dtype))

    def run():
        torch.autograd.grad(PROVIDERS[provider](*call.args, **call.kwargs), call.leaves())

    return run, sum(x.nbytes for x in call.leaves())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_linear_cross_entropy(benchmark, case, mode, dtype):
    calls = measure.copies(lambda: reduced_to_mean(case, dtype), 40 << 20)
    first = calls[0]
    ours, theirs = (f(*first.args, **first.kwargs) for f in (linear_cross_entropy, eager))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    _, weight, target = first.args[:3]
    flops = 2 * int((target >= 0).sum()) * weight.numel()  # of the rows that count
    rows = measure.compare_op(
        benchmark, "linear_cross_entropy", f"{case} {str(dtype)[6:]}", calls, mode, PROVIDERS, flops=flops
    )
    if mode == "forward+backward":
        for name, row in rows.items():
            extra = memory.peak_beyond("bench_linear_cross_entropy:owned", case, str(dtype)[6:], name)
            row.extra = f"{extra / 2**20:.0f} MiB beyond inputs and gradients"
