"""masked_mse on the CPU: csrc/ops/masked_mse."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C


def forward(pred, images, ids_mask, cu_mask, patch_size, norm_pix, scale, shift, reduction, need_error):
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    loss = pred.new_empty(pred.shape[:1] if reduction == "none" else (), dtype=dtype)
    error = pred.new_empty(pred.shape if need_error else (0, 0))
    _C.masked_mse(
        address(pred), code(pred), pred.shape[0], address(images), code(images), images.shape, images.stride(),
        patch_size, scale, shift, address(ids_mask), address(cu_mask), norm_pix, reduction,
        address(loss), address(error) if need_error else 0,
    )  # fmt: skip
    return loss, error


def backward(dloss, error, cu_mask, reduction):
    dpred = torch.empty_like(error)
    _C.masked_mse_backward(
        address(dloss), address(error), code(error), *error.shape, address(cu_mask), cu_mask.shape[0] - 1, reduction,
        address(dpred),
    )  # fmt: skip
    return dpred
