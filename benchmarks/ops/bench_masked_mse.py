"""masked_mse against MAE's chain, on padded predictions of every patch, and against the same at masked patches only."""

import pytest
import torch

from benchmarks import measure
from m3ae_fast import masked_mse
from m3ae_fast.ops.masked_mse import cases
from m3ae_fast.testing import Call


def with_tensors(call):
    """mean and std as [C, 1, 1], as transforms keep them."""
    tensors = {name: torch.tensor(call.kwargs[name])[:, None, None] for name in ("mean", "std")}
    return Call(call.args, call.kwargs | tensors)


def patchify(images, patch_size, mean, std, dtype):
    n, c, h, w = images.shape
    x = ((images.float() / 255 - mean) / std).reshape(n, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(n, -1, patch_size**2 * c)


def normalized(target, norm_pix):
    if not norm_pix:
        return target
    mean = target.mean(dim=-1, keepdim=True)
    var = target.var(dim=-1, keepdim=True)
    return (target - mean) / (var + 1.0e-6) ** 0.5


def mae(pred, images, ids_mask, cu_mask, *, patch_size, mean, std, norm_pix, reduction):
    """forward_loss of MAE's public code; its decoder predicts every patch, which here is given for the masked ones."""
    n, masked = images.shape[0], cu_mask.max
    target = normalized(patchify(images, patch_size, mean, std, pred.dtype), norm_pix)
    places = ids_mask.view(n, masked).long()
    every = pred.new_zeros(target.shape).scatter(
        1, places[..., None].expand(-1, -1, pred.shape[1]), pred.view(n, masked, -1)
    )
    mask = torch.zeros(target.shape[:2], device=pred.device).scatter_(1, places, 1.0)
    loss = ((every - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def gathered(pred, images, ids_mask, cu_mask, *, patch_size, mean, std, norm_pix, reduction):
    """Only the masked patches are normalized and compared."""
    n, masked = images.shape[0], cu_mask.max
    target = patchify(images, patch_size, mean, std, pred.dtype)
    places = ids_mask.view(n, masked, 1).expand(-1, -1, pred.shape[1]).long()
    target = normalized(torch.gather(target, 1, places), norm_pix)
    return ((pred.view(n, masked, -1) - target) ** 2).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_masked_mse(benchmark, case, mode, dtype):
    call = measure.make(cases, case, dtype)
    calls = measure.copies(call)
    peers = measure.copies(with_tensors(call), len(calls))
    ours = masked_mse(*calls[0].args, **calls[0].kwargs)  # equal counts, so that both means are the same
    for peer in (mae, gathered):
        theirs = peer(*peers[0].args, **peers[0].kwargs)
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=0)
    pred = call.args[0]
    once = pred.numel() * (dtype.itemsize + 1)  # read predictions and pixels
    if mode != "forward":
        once -= pred.numel() // 2  # of twice that: the gradient is written, pixels are read once
    providers = {"m3ae_fast": masked_mse, "eager (MAE)": (mae, peers), "eager, gathered": (gathered, peers)}
    measure.compare_op(benchmark, "masked_mse", f"{case} {str(dtype)[6:]}", calls, mode, providers, once)
