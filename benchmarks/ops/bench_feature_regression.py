"""feature_regression against the chain of MAMO's replications, eager and compiled: normalize, select, compare."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure
from m3ae_fast import feature_regression
from m3ae_fast.ops.feature_regression import cases


def distance_of(pred, target, distance):
    if distance == "cosine":
        return 1 - F.cosine_similarity(pred, target, dim=1).mean()
    return (F.mse_loss if distance == "l2" else F.l1_loss)(pred, target)


def normalized_first(pred, target, rows, *, distance, normalize, reduction):
    target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
    return distance_of(pred, target.index_select(0, rows), distance)


def selected_first(pred, target, rows, *, distance, normalize, reduction):
    target = F.layer_norm(target.index_select(0, rows), target.shape[-1:], eps=1e-6)
    return distance_of(pred, target, distance)


def halved(*args, **options):
    """A loss among others, with a weight of its own: its gradient is scaled once more."""
    return 0.5 * feature_regression(*args, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_feature_regression(benchmark, case, mode, dtype):
    calls = measure.copies(measure.make(cases, case, dtype))
    first = calls[0]
    torch._dynamo.reset()  # beyond eight versions of one function it would give up
    compiled = torch.compile(selected_first)
    providers = {
        "m3ae_fast": feature_regression, "m3ae_fast, times 0.5": halved, "eager": normalized_first,
        "eager, selected first": selected_first, "compiled": compiled,
    }  # fmt: skip
    ours = feature_regression(*first.args, **first.kwargs)
    for theirs in (normalized_first, selected_first, compiled):
        torch.testing.assert_close(ours, theirs(*first.args, **first.kwargs).float(), rtol=4e-3, atol=0)

    def runner(function):  # back from the loss itself, whose gradient is 1
        def forward(i):
            with torch.no_grad():
                return function(*calls[i].args, **calls[i].kwargs)

        def both(i):
            return torch.autograd.grad(function(*calls[i].args, **calls[i].kwargs), calls[i].leaves())

        return forward if mode == "forward" else both

    size = first.args[0].numel() * dtype.itemsize
    least = 2 * size if mode == "forward" else 3 * size  # predictions, the targets they name; the gradient
    runners = {name: runner(function) for name, function in providers.items()}
    op, name = f"feature_regression {mode}", f"{case} {str(dtype)[6:]}"
    measure.compare(benchmark, op, name, runners, inputs=len(calls), bytes_moved=least)
