"""linear against F.linear and F.gelu."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure
from m3ae_fast import linear, testing
from m3ae_fast.ops.linear import cases


def eager(x, weight, bias, *, activation=None, input_activation=None):
    y = F.linear(F.gelu(x) if input_activation else x, weight, bias)
    return F.gelu(y) if activation else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_linear(benchmark, case, mode, dtype):
    calls = measure.copies(measure.make(cases, case, dtype))
    first = calls[0]
    ours, theirs = (f(*first.args, **first.kwargs) for f in (linear, eager))
    truth = first.to(torch.float64)
    testing.assert_error_rule("y", ours, theirs, eager(*truth.args, **truth.kwargs), 2)
    providers = {"m3ae_fast": linear, "eager": eager}
    flops = 2 * first.args[0].numel() * first.args[1].shape[0]
    measure.compare_op(benchmark, "linear", f"{case} {str(dtype)[6:]}", calls, mode, providers, flops=flops)
