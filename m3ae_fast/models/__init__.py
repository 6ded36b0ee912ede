"""The models: M3AE and its images-only special case MAE."""

from m3ae_fast.models.config import M3AEConfig
from m3ae_fast.models.m3ae import M3AE, Encoded, M3AEOutput, Reconstruction
from m3ae_fast.models.mae import MAE

__all__ = ["M3AE", "MAE", "Encoded", "M3AEConfig", "M3AEOutput", "Reconstruction"]
