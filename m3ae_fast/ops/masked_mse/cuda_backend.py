"""masked_mse in CUDA: csrc/ops/masked_mse/masked_mse_cuda.cu."""

import torch

from m3ae_fast._cuda_module import _cuda, counters


def forward(pred, images, ids_mask, cu_mask, patch_size, norm_pix, scale, shift, reduction, need_error, loss, error):
    summed = reduction != "none"
    partials = pred.new_empty(max(pred.shape[0], 1), dtype=torch.float64) if summed else None
    counter, _owner = counters(pred, 1 if summed else 0)
    _cuda.masked_mse(
        pred=pred, images=images, ids_mask=ids_mask, cu_mask=cu_mask, patch_size=patch_size, norm_pix=norm_pix,
        scale=scale, shift=shift, reduction=reduction, partials=partials, counter=counter, loss=loss,
        error=error,
    )  # fmt: skip


def backward(dloss, error, cu_mask, reduction, dpred):
    _cuda.masked_mse_backward(dloss=dloss, error=error, cu_mask=cu_mask, reduction=reduction, dpred=dpred)
