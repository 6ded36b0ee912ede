"""sample_mask in CUDA: csrc/ops/sample_mask/sample_mask_cuda.cu."""

from m3ae_fast._cuda_module import _cuda


def forward(
    cu, cu_keep, sample_ids, total, total_keep, max_length, seed, step, stream, shared, ids_keep, ids_mask
):  # fmt: skip
    _cuda.sample_mask(
        cu=cu, cu_keep=cu_keep, sample_ids=sample_ids, seed=seed % 2**64, step=step, stream=stream, ids_keep=ids_keep,
        ids_mask=ids_mask,
    )  # fmt: skip
