"""sample_mask in CUDA: csrc/ops/sample_mask/sample_mask_cuda.cu."""

from m3ae_fast._backends import address
from m3ae_fast._cuda_module import _cuda, place


def forward(cu, cu_keep, sample_ids, total, total_keep, max_length, seed, step, stream, shared):
    ids_keep, ids_mask = cu.new_empty(total_keep), cu.new_empty(total - total_keep)
    _cuda.sample_mask(
        address(cu), address(cu_keep), address(sample_ids), address(ids_keep), address(ids_mask),
        sample_ids.shape[0], seed % 2**64, step, stream, *place(cu),
    )  # fmt: skip
    return ids_keep, ids_mask
