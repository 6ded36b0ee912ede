"""sample_mask on the CPU: csrc/ops/sample_mask."""

import torch

from m3ae_fast._backends import address
from m3ae_fast._cpp import _C


def forward(cu, cu_keep, sample_ids, total, total_keep, max_length, seed, step, stream, shared):
    ids_keep = torch.empty(total_keep, dtype=torch.int32)
    ids_mask = torch.empty(max(total - total_keep, 0), dtype=torch.int32)  # the kernel's checks refuse a negative one
    _C.sample_mask(
        address(cu), address(cu_keep), address(sample_ids), address(ids_keep), address(ids_mask),
        sample_ids.shape[0], total, total_keep, seed % 2**64, step, stream, shared,
    )  # fmt: skip
    return ids_keep, ids_mask
