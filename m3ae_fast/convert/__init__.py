"""Published weights in and out: of the papers' public code, of Transformers and of timm."""

from m3ae_fast.convert.flax import config_from_flax, convert_flax_checkpoint, flax_to_torch, load_flax_checkpoint
from m3ae_fast.convert.mamo import convert_mamo, load_mamo
from m3ae_fast.convert.vit import convert_vit, load_vit, write_timm, write_vitmae

__all__ = [
    "config_from_flax",
    "convert_flax_checkpoint",
    "convert_mamo",
    "convert_vit",
    "flax_to_torch",
    "load_flax_checkpoint",
    "load_mamo",
    "load_vit",
    "write_timm",
    "write_vitmae",
]
