"""gather_patches against the chain it replaces: normalise the whole image, patchify it, gather the kept patches."""

import measure
import pytest
import torch

from m3ae_fast import gather_patches
from m3ae_fast.ops.gather_patches import cases


def eager(images, ids, seqlens, *, patch_size, mean, std, dtype):
    """As users write it: ToTensor, Normalize, MAE's patchify, then x[ids_keep] of a batch with equal counts."""
    n, c, h, w = images.shape
    mean, std = (torch.tensor(each, device=images.device)[:, None, None] for each in (mean, std))
    x = ((images.float() / 255 - mean) / std).to(dtype)
    x = x.reshape(n, c, h // patch_size, patch_size, w // patch_size, patch_size)
    x = torch.einsum("nchpwq->nhwpqc", x).reshape(n, -1, patch_size**2 * c)
    kept = ids.view(n, -1, 1).expand(-1, -1, x.shape[2]).long()
    return torch.gather(x, 1, kept).flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
def bench_gather_patches(benchmark, case, dtype):
    calls = measure.copies(cases.make(case, dtype))
    first = calls[0]
    ours, theirs = (f(*first.args, **first.kwargs) for f in (gather_patches, eager))
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    once = ours.numel() * (1 + dtype.itemsize)  # read the kept pixels, write the output
    providers = {"m3ae_fast": gather_patches, "eager": eager}
    measure.compare_op(benchmark, "gather_patches", f"{case} {str(dtype)[6:]}", calls, "forward", providers, once)
