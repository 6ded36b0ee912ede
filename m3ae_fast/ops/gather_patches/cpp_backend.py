"""gather_patches on the CPU: csrc/ops/gather_patches."""

import torch

from m3ae_fast._backends import accumulator
from m3ae_fast._cpp import _C


def forward(images, ids, cu, patch_size, scale, shift, dtype, out):
    _C.gather_patches(images=images, ids=ids, cu=cu, patch_size=patch_size, scale=scale, shift=shift, out=out)


def backward(dout, ids, cu, shape, patch_size, scale, dtype, dimages):
    accumulate = accumulator(torch.promote_types(dtype, dout.dtype))
    sums = dimages.zero_() if dtype == accumulate else dout.new_zeros(shape, dtype=accumulate)
    _C.gather_patches_backward(dout=dout, ids=ids, cu=cu, patch_size=patch_size, scale=scale, dimages=sums)
    if sums is not dimages:
        dimages.copy_(sums)
