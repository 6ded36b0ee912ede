"""linear_cross_entropy against eager logits and torch's own chunked op; on a GPU against Liger's, too."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure, memory
from m3ae_fast import linear_cross_entropy
from m3ae_fast.ops.linear_cross_entropy import cases


def eager(x, weight, target, bias=None):
    return F.cross_entropy(F.linear(x, weight, bias).float(), target)


def torch_chunked(x, weight, target, bias=None):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, linear_bias=bias, options=options)


def liger(x, weight, target, bias=None):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if not torch.is_grad_enabled():
        x = x.detach()  # or it makes gradients: it asks the tensor, not the mode
    return liger_fused_linear_cross_entropy(x, weight, target.long(), bias)


def reduced_to_mean(case, dtype):
    call = measure.make(cases, case, dtype)
    call.kwargs = {}  # peers know no sample_mean
    return call


PROVIDERS = {"m3ae_fast": linear_cross_entropy, "eager": eager}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    PROVIDERS["torch chunked"] = torch_chunked
if measure.SETTINGS.gpu:
    PROVIDERS["Liger"] = liger


def owned(case, dtype, provider):
    """For memory: a forward and a backward pass, and the bytes of its gradients."""
    call = reduced_to_mean(case, getattr(torch, dtype))
    if measure.SETTINGS.gpu:
        call = call.on("cuda")

    def run():
        torch.autograd.grad(PROVIDERS[provider](*call.args, **call.kwargs), call.leaves())

    return run, sum(x.nbytes for x in call.leaves())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_linear_cross_entropy(benchmark, case, mode, dtype):
    calls = measure.copies(reduced_to_mean(case, dtype))
    first = calls[0]
    ours, theirs = (f(*first.args, **first.kwargs) for f in (linear_cross_entropy, eager))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    _, weight, target = first.args[:3]
    flops = 2 * int((target >= 0).sum()) * weight.numel()  # of the rows that count
    name = f"{case} {str(dtype)[6:]}"
    rows = measure.compare_op(benchmark, "linear_cross_entropy", name, calls, mode, PROVIDERS, flops=flops)
    if mode == "forward":
        return
    for provider in [p for p in PROVIDERS if p in rows]:
        if measure.SETTINGS.gpu:
            extra = memory.peak_on_gpu(*owned(case, str(dtype)[6:], provider))
        else:
            extra = memory.peak_beyond(owned, case, str(dtype)[6:], provider)
        rows[provider].extra = f"{extra / 2**20:.0f} MiB beyond inputs and gradients"
