"""layer_norm in CUDA: csrc/ops/layer_norm/layer_norm_cuda.cu."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cuda_module import _cuda, place, tickets
from m3ae_fast.ops.layer_norm.outputs import empty_outputs

PARTIALS, ROWS = 256, 8  # partial sums at most, rows of each at least: the same for a count, whatever the machine


def forward(x, residual, weight, bias, eps, dtype):
    count, width = x.shape
    y, s, stats = empty_outputs(x, residual, dtype)
    _cuda.layer_norm(
        address(x), address(residual), address(weight), address(bias), address(y), address(s), address(stats),
        count, width, eps, code(x), code(x if residual is None else residual), code(y), *place(x),
    )  # fmt: skip
    return y, s, stats


def backward(dy, ds, s, weight, stats, need_input, need_params):
    count, width = s.shape
    dx = torch.empty_like(s) if need_input else s.new_empty(0, width)
    dparams = s.new_empty(2 if need_params else 0, width, dtype=torch.float32)
    number = max(min(-(-count // ROWS), PARTIALS), 1)
    partials = s.new_empty(number if need_params else 0, 2, width, dtype=torch.float32)
    ticket, _owner = tickets(s, _cuda.sum_tickets(number) if need_params else 0)
    _cuda.layer_norm_backward(
        address(dy), address(ds), address(s), address(weight), address(stats), address(dx), address(partials),
        address(dparams), ticket, number, count, width, code(s), code(dy), *place(s),
    )  # fmt: skip
    return dx, dparams
