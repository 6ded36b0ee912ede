"""gather_patches against the chain it replaces: normalize the whole image, patchify it, gather the kept patches."""

import pytest
import torch

from benchmarks import measure
from m3ae_fast import gather_patches
from m3ae_fast.ops.gather_patches import cases
from m3ae_fast.testing import Call


def with_tensors(call):
    """mean and std as [C, 1, 1], as transforms keep them."""
    tensors = {name: torch.tensor(call.kwargs[name])[:, None, None] for name in ("mean", "std")}
    return Call(call.args, call.kwargs | tensors)


def eager(images, ids, seqlens, *, patch_size, mean, std, dtype):
    """As users write it: ToTensor, Normalize, MAE's patchify, then x[ids_keep] of a batch with equal counts."""
    n, c, h, w = images.shape
    x = ((images.float() / 255 - mean) / std).to(dtype)
    x = x.reshape(n, c, h // patch_size, patch_size, w // patch_size, patch_size)
    x = torch.einsum("nchpwq->nhwpqc", x).reshape(n, -1, patch_size**2 * c)
    kept = ids.view(n, -1, 1).expand(-1, -1, x.shape[2]).long()
    return torch.gather(x, 1, kept).flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
def bench_gather_patches(benchmark, case, dtype):
    call = measure.make(cases, case, dtype)
    calls = measure.copies(call)
    peers = measure.copies(with_tensors(call), len(calls))
    ours, theirs = (f(*c.args, **c.kwargs) for f, c in ((gather_patches, calls[0]), (eager, peers[0])))
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    once = ours.numel() * (1 + dtype.itemsize)  # read the kept pixels, write the output
    providers = {"m3ae_fast": gather_patches, "eager": (eager, peers)}
    measure.compare_op(benchmark, "gather_patches", f"{case} {str(dtype)[6:]}", calls, "forward", providers, once)
