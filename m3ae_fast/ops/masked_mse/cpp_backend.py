"""masked_mse on the CPU: csrc/ops/masked_mse."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C


def _arguments(pred, images, ids_mask, cu_mask, patch_size, norm_pix, scale, shift, reduction):
    return (
        address(pred), code(pred), pred.shape[0], address(images), code(images), images.shape, images.stride(),
        patch_size, scale, shift, address(ids_mask), address(cu_mask), norm_pix, reduction,
    )  # fmt: skip


def forward(pred, *args):
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    loss = pred.new_empty(pred.shape[:1] if args[-1] == "none" else (), dtype=dtype)
    _C.masked_mse(*_arguments(pred, *args), address(loss))
    return loss


def backward(dloss, pred, *args):
    dpred = pred.new_empty(pred.shape)
    _C.masked_mse_backward(*_arguments(pred, *args), address(dloss), address(dpred))
    return dpred
