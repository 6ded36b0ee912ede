"""linear_cross_entropy on the CPU: csrc/ops/linear_cross_entropy."""

import torch

from m3ae_fast._cpp import _C, products

FP32_PARAMETERS = (torch.bfloat16,)  # see _backends.for_product


def forward(
    x, weight, bias, target, cu_seqlens, dloss, ignore_index, reduction, label_smoothing, need, loss, hit, dx, dweight,
    dbias,
):  # fmt: skip
    sums = dbias if dbias is None or dbias.dtype == loss.dtype else loss.new_empty(dbias.shape[0])
    _C.linear_cross_entropy(
        x=x, weight=weight, bias=bias, target=target, cu_seqlens=cu_seqlens, dloss=dloss, ignore_index=ignore_index,
        reduction=reduction, label_smoothing=label_smoothing, products=products(x.dtype), loss=loss, hit=hit, dx=dx,
        dweight=dweight, dbias=sums,
    )  # fmt: skip
    if sums is not dbias:
        dbias.copy_(sums)
