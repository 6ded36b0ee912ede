"""masked_mse against MAE's chain, on padded predictions of every patch, and against the same at masked patches only."""

import measure
import pytest
import torch

from m3ae_fast import masked_mse
from m3ae_fast.ops.masked_mse import cases


def patchify(images, patch_size, mean, std, dtype):
    n, c, h, w = images.shape
    mean, std = (torch.tensor(each, device=images.device)[:, None, None] for each in (mean, std))
    x = ((images.float() / 255 - mean) / std).reshape(n, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(n, -1, patch_size**2 * c)


def normalised(target, norm_pix):
    if not norm_pix:
        return target
    mean = target.mean(dim=-1, keepdim=True)
    var = target.var(dim=-1, keepdim=True)
    return (target - mean) / (var + 1.0e-6) ** 0.5


def mae(pred, images, ids_mask, cu_mask, *, patch_size, mean, std, norm_pix, reduction):
    """forward_loss of MAE's public code; its decoder predicts every patch, which here is given for the masked ones."""
    n, masked = images.shape[0], cu_mask.max
    target = normalised(patchify(images, patch_size, mean, std, pred.dtype), norm_pix)
    places = ids_mask.view(n, masked).long()
    every = pred.new_zeros(target.shape).scatter(
        1, places[..., None].expand(-1, -1, pred.shape[1]), pred.view(n, masked, -1)
    )
    mask = torch.zeros(target.shape[:2], device=pred.device).scatter_(1, places, 1.0)
    loss = ((every - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def gathered(pred, images, ids_mask, cu_mask, *, patch_size, mean, std, norm_pix, reduction):
    """Only the masked patches are normalised and compared."""
    n, masked = images.shape[0], cu_mask.max
    target = patchify(images, patch_size, mean, std, pred.dtype)
    places = ids_mask.view(n, masked, 1).expand(-1, -1, pred.shape[1]).long()
    target = normalised(torch.gather(target, 1, places), norm_pix)
    return ((pred.view(n, masked, -1) - target) ** 2).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_masked_mse(benchmark, case, mode, dtype):
    calls = measure.copies(cases.make(case, dtype))
    first = calls[0]  # equal counts, so that both means are the same
    ours, *theirs = (f(*first.args, **first.kwargs) for f in (masked_mse, mae, gathered))
    for each in theirs:
        torch.testing.assert_close(ours, each.float(), rtol=1e-3, atol=0)
    pred = first.args[0]
    once = pred.numel() * (dtype.itemsize + 1)  # read predictions and pixels
    if mode != "forward":
        once -= pred.numel() // 2  # of twice that: the gradient is written, pixels are read once
    providers = {"m3ae_fast": masked_mse, "eager (MAE)": mae, "eager, gathered": gathered}
    measure.compare_op(benchmark, "masked_mse", f"{case} {str(dtype)[6:]}", calls, mode, providers, once)
