"""layer_norm against F.layer_norm(x + residual), which writes the sum, reads it back and keeps both."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure
from m3ae_fast import layer_norm
from m3ae_fast.ops.layer_norm import cases


def eager(x, weight, bias, *, residual):
    s = x + residual
    return F.layer_norm(s, s.shape[-1:], weight, bias, 1e-6), s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_layer_norm(benchmark, case, mode, dtype):
    calls = measure.copies(measure.make(cases, case, dtype))
    first = calls[0]
    ours, theirs = (f(*first.args, **first.kwargs) for f in (layer_norm, eager))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=3 * eps, atol=16 * eps)
    once = 4 * first.args[0].nbytes  # forward: x, residual -> y, s; backward: dy, ds, s -> dx
    providers = {"m3ae_fast": layer_norm, "eager": eager}
    measure.compare_op(benchmark, "layer_norm", f"{case} {str(dtype)[6:]}", calls, mode, providers, once)
