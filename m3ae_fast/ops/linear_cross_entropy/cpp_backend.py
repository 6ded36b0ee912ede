"""linear_cross_entropy on the CPU: csrc/ops/linear_cross_entropy."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C


def forward(x, weight, bias, target, dloss, ignore_index, label_smoothing, need_x, need_weight, need_bias):
    (count, width), vocab = x.shape, weight.shape[0]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    loss, hit = (x.new_zeros(count, dtype=accumulate) for _ in range(2))
    dx = x.new_zeros(count if need_x else 0, width)
    dweight = weight.new_empty(vocab if need_weight else 0, width)
    dbias = x.new_empty(vocab if need_bias else 0, dtype=accumulate)
    found = _C.linear_cross_entropy(
        address(x), address(weight), address(bias), address(target),
        address(dloss) if need_x or need_weight or need_bias else 0, address(loss), address(hit),
        address(dx) if need_x else 0, address(dweight) if need_weight else 0, address(dbias) if need_bias else 0,
        count, width, vocab, ignore_index, label_smoothing, code(x), code(weight),
    )  # fmt: skip
    if not found:
        dweight.zero_()
        dbias.zero_()
    return loss, hit, dx, dweight, dbias.to(weight.dtype)
