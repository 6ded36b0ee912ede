"""The ops. A folder each: op.py (public function, validation, autograd), reference.py (the definition), backends."""

from m3ae_fast.ops.assemble_tokens import assemble_tokens
from m3ae_fast.ops.feature_regression import feature_regression
from m3ae_fast.ops.gather_patches import gather_patches
from m3ae_fast.ops.layer_norm import layer_norm
from m3ae_fast.ops.linear import linear
from m3ae_fast.ops.linear_cross_entropy import linear_cross_entropy
from m3ae_fast.ops.masked_mse import masked_mse
from m3ae_fast.ops.restore_tokens import restore_tokens
from m3ae_fast.ops.sample_mask import SampledMask, sample_mask
from m3ae_fast.ops.varlen_attention import varlen_attention, varlen_attention_qkvpacked

__all__ = [
    "SampledMask",
    "assemble_tokens",
    "feature_regression",
    "gather_patches",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "masked_mse",
    "restore_tokens",
    "sample_mask",
    "varlen_attention",
    "varlen_attention_qkvpacked",
]
