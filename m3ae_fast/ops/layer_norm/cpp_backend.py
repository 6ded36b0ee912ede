"""layer_norm on the CPU: csrc/ops/layer_norm."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C
from m3ae_fast.ops.layer_norm.outputs import empty_outputs


def forward(x, residual, weight, bias, eps, dtype):
    count, width = x.shape
    y, s, stats = empty_outputs(x, residual, dtype)
    _C.layer_norm(
        address(x), address(residual), address(weight), address(bias), address(y), address(s), address(stats),
        count, width, eps, code(x), code(x if residual is None else residual), code(y), code(s),
    )  # fmt: skip
    return y, s, stats


def backward(dy, ds, s, weight, stats, need_input, need_params):
    count, width = s.shape
    dx = torch.empty_like(s) if need_input else s.new_empty(0, width)
    dparams = s.new_empty(2 if need_params else 0, width, dtype=stats.dtype)
    _C.layer_norm_backward(
        address(dy), address(ds), address(s), address(weight), address(stats), address(dx),
        address(dparams), count, width, code(s), code(dy),
    )  # fmt: skip
    return dx, dparams
