"""gather_patches on the CPU: csrc/ops/gather_patches."""

import torch

from m3ae_fast._backends import DTYPE_CODE, address, code
from m3ae_fast._cpp import _C


def forward(images, ids, cu, patch_size, scale, shift, dtype):
    out = images.new_empty(ids.shape[0], patch_size * patch_size * images.shape[1], dtype=dtype)
    _C.gather_patches(
        address(images), code(images), images.shape, images.stride(), patch_size, scale, shift,
        address(ids), address(cu), address(out), ids.shape[0], code(out),
    )  # fmt: skip
    return out


def backward(dout, ids, cu, shape, patch_size, scale, dtype):
    accumulate = torch.float64 if torch.float64 in (dtype, dout.dtype) else torch.float32
    dimages = dout.new_zeros(shape, dtype=accumulate)
    _C.gather_patches_backward(
        address(dout), address(ids), address(cu), address(dimages), shape, patch_size, scale,
        code(dout), DTYPE_CODE[accumulate],
    )  # fmt: skip
    return dimages.to(dtype)
