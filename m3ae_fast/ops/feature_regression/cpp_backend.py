"""feature_regression on the CPU: csrc/ops/feature_regression."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C


def forward(pred, target, rows, cu, distance, normalize, eps, reduction, dpred_dtype):
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    loss = pred.new_empty(pred.shape[:1] if reduction == "none" else (), dtype=dtype)
    dpred = pred.new_empty((0, 0) if dpred_dtype is None else pred.shape)
    _C.feature_regression(
        address(pred), code(pred), address(target), code(target), *pred.shape, target.shape[0], address(rows),
        address(cu), 0 if cu is None else cu.shape[0] - 1, distance, normalize, eps, reduction,
        address(loss), 0 if dpred_dtype is None else address(dpred),
    )  # fmt: skip
    return loss, dpred
