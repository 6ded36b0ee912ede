"""linear_cross_entropy on the CPU: csrc/ops/linear_cross_entropy."""

import torch

from m3ae_fast._cpp import _C, products

FP32_PARAMETERS = (torch.bfloat16,)  # see _backends.for_product


def forward(
    x, weight, bias, target, cu_seqlens, class_weight, dloss, dlse, ignore_index, reduction, label_smoothing,
    lse_square_scale, need, loss, hit, lse, z_loss, dx, dweight, dbias,
):  # fmt: skip
    sums = dbias if dbias is None or dbias.dtype == loss.dtype else loss.new_empty(dbias.shape[0])
    _C.linear_cross_entropy(
        x=x, weight=weight, bias=bias, target=target, cu_seqlens=cu_seqlens, class_weight=class_weight, dloss=dloss,
        dlse=dlse, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale, products=products(x.dtype), loss=loss, hit=hit, lse=lse, z_loss=z_loss,
        dx=dx, dweight=dweight, dbias=sums,
    )  # fmt: skip
    if sums is not dbias:
        dbias.copy_(sums)
