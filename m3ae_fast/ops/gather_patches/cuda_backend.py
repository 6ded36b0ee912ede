"""gather_patches in CUDA: csrc/ops/gather_patches/gather_patches_cuda.cu."""

from m3ae_fast._cuda_module import _cuda


def forward(images, ids, cu, patch_size, scale, shift, dtype, out):
    _cuda.gather_patches(images=images, ids=ids, cu=cu, patch_size=patch_size, scale=scale, shift=shift, out=out)


def backward(dout, ids, cu, shape, patch_size, scale, dtype, dimages):
    _cuda.gather_patches_backward(dout=dout, ids=ids, cu=cu, patch_size=patch_size, scale=scale, dimages=dimages)
