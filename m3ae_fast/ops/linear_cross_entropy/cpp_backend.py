"""linear_cross_entropy on the CPU: csrc/ops/linear_cross_entropy."""

from m3ae_fast._cpp import _C


def forward(
    x, weight, bias, target, dloss, ignore_index, label_smoothing, need_x, need_weight, need_bias, loss, hit, dx,
    dweight, dbias,
):  # fmt: skip
    sums = dbias if dbias is None or dbias.dtype == loss.dtype else loss.new_empty(dbias.shape[0])
    _C.linear_cross_entropy(
        x=x, weight=weight, bias=bias, target=target, dloss=dloss, ignore_index=ignore_index,
        label_smoothing=label_smoothing, loss=loss, hit=hit, dx=dx, dweight=dweight, dbias=sums,
    )  # fmt: skip
    if sums is not dbias:
        dbias.copy_(sums)
