"""gather_patches in CUDA: csrc/ops/gather_patches/gather_patches_cuda.cu."""

from m3ae_fast._backends import address, code
from m3ae_fast._cuda_module import _cuda, place


def forward(images, ids, cu, patch_size, scale, shift, dtype):
    out = images.new_empty(ids.shape[0], patch_size * patch_size * images.shape[1], dtype=dtype)
    _cuda.gather_patches(
        address(images), code(images), images.shape, images.stride(), patch_size, scale, shift,
        address(ids), address(cu), address(out), ids.shape[0], code(out), *place(images),
    )  # fmt: skip
    return out


def backward(dout, ids, cu, shape, patch_size, scale, dtype):
    dimages = dout.new_empty(shape, dtype=dtype)
    _cuda.gather_patches_backward(
        address(dout), address(ids), address(cu), address(dimages), shape, patch_size, scale,
        code(dout), code(dimages), *place(dout),
    )  # fmt: skip
    return dimages
