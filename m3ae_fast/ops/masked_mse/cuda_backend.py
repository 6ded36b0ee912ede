"""masked_mse in CUDA: csrc/ops/masked_mse/masked_mse_cuda.cu."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cuda_module import _cuda, place, tickets


def forward(pred, images, ids_mask, cu_mask, patch_size, norm_pix, scale, shift, reduction, need_error):
    rows = pred.shape[0]
    loss = pred.new_empty(rows if reduction == "none" else (), dtype=torch.float32)
    partials = pred.new_empty(0 if reduction == "none" else max(rows, 1), dtype=torch.float64)
    ticket, _owner = tickets(pred, 0 if reduction == "none" else 1)
    error = pred.new_empty(pred.shape if need_error else (0, 0))
    _cuda.masked_mse(
        address(pred), code(pred), rows, address(images), code(images), images.shape, images.stride(), patch_size,
        scale, shift, address(ids_mask), address(cu_mask), norm_pix, reduction, address(loss),
        address(error) if need_error else 0, address(partials), ticket, *place(pred),
    )  # fmt: skip
    return loss, error


def backward(dloss, error, cu_mask, reduction):
    dpred = torch.empty_like(error)
    _cuda.masked_mse_backward(
        address(dloss), address(error), code(error), *error.shape, address(cu_mask), cu_mask.shape[0] - 1, reduction,
        address(dpred), *place(error),
    )  # fmt: skip
    return dpred
