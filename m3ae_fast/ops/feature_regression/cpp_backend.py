"""feature_regression on the CPU: csrc/ops/feature_regression."""

from m3ae_fast._cpp import _C


def forward(pred, target, rows, cu, distance, normalize, eps, reduction, dpred_dtype, loss, dpred):
    _C.feature_regression(
        pred=pred, target=target, rows=rows, cu_seqlens=cu, distance=distance, normalize=normalize, eps=eps,
        reduction=reduction, loss=loss, dpred=dpred,
    )  # fmt: skip
