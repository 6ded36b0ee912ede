"""The ops. A folder each: op.py (public function, validation, autograd), reference.py (the definition), backends."""

from m3ae_fast.ops.gather_patches import gather_patches
from m3ae_fast.ops.masked_mse import masked_mse
from m3ae_fast.ops.restore_tokens import restore_tokens
from m3ae_fast.ops.sample_mask import SampledMask, sample_mask

__all__ = [
    "SampledMask",
    "gather_patches",
    "masked_mse",
    "restore_tokens",
    "sample_mask",
]
