"""Weights of the papers' public code in and out."""

from m3ae_fast.convert.flax import config_from_flax, convert_flax_checkpoint, flax_to_torch, load_flax_checkpoint

__all__ = ["config_from_flax", "convert_flax_checkpoint", "flax_to_torch", "load_flax_checkpoint"]
