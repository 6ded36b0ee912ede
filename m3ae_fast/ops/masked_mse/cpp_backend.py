"""masked_mse on the CPU: csrc/ops/masked_mse."""

from m3ae_fast._cpp import _C


def forward(pred, images, ids_mask, cu_mask, patch_size, norm_pix, scale, shift, reduction, need_error, loss, error):
    _C.masked_mse(
        pred=pred, images=images, ids_mask=ids_mask, cu_mask=cu_mask, patch_size=patch_size, norm_pix=norm_pix,
        scale=scale, shift=shift, reduction=reduction, loss=loss, error=error,
    )  # fmt: skip


def backward(dloss, error, cu_mask, reduction, dpred):
    _C.masked_mse_backward(dloss=dloss, error=error, cu_mask=cu_mask, reduction=reduction, dpred=dpred)
