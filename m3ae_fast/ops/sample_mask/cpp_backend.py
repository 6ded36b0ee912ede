"""sample_mask on the CPU: csrc/ops/sample_mask."""

from m3ae_fast._cpp import _C


def forward(
    cu, cu_keep, sample_ids, total, total_keep, max_length, seed, step, stream, shared, ids_keep, ids_mask
):  # fmt: skip
    _C.sample_mask(
        cu=cu, cu_keep=cu_keep, sample_ids=sample_ids, seed=seed % 2**64, step=step, stream=stream, shared=shared,
        ids_keep=ids_keep, ids_mask=ids_mask,
    )  # fmt: skip
