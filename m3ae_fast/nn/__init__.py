"""Drop-in layers on the ops: packed rows [T, D] and SeqLens in place of padded batches and masks."""

from m3ae_fast.nn.attention import Attention, CrossAttention
from m3ae_fast.nn.linear import LayerNorm, Linear
from m3ae_fast.nn.losses import FeatureRegressionLoss, LinearCrossEntropyLoss, MaskedMSELoss
from m3ae_fast.nn.patch_embed import PatchEmbed
from m3ae_fast.nn.positions import sincos_1d, sincos_2d
from m3ae_fast.nn.rows import take_rows
from m3ae_fast.nn.transformer import (
    Block,
    CrossBlock,
    CrossTransformer,
    Mlp,
    Transformer,
    checkpoint_blocks,
    drop_paths,
)

__all__ = [
    "Attention",
    "Block",
    "CrossAttention",
    "CrossBlock",
    "CrossTransformer",
    "FeatureRegressionLoss",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MaskedMSELoss",
    "Mlp",
    "PatchEmbed",
    "Transformer",
    "checkpoint_blocks",
    "drop_paths",
    "sincos_1d",
    "sincos_2d",
    "take_rows",
]
