"""The models: M3AE and its images-only special case MAE, MAMO, and the baselines of their papers' tables."""

import torch

from m3ae_fast.models.clip import CLIP, CLIPOutput
from m3ae_fast.models.config import EncoderForm, EncodersConfig, M3AEConfig, MAMOConfig, ModelConfig, SupervisedConfig
from m3ae_fast.models.graphs import GraphedStep
from m3ae_fast.models.m3ae import M3AE, Encoded, M3AEOutput, Reconstruction
from m3ae_fast.models.mae import MAE
from m3ae_fast.models.mamo import MAMO, MAMOOutput
from m3ae_fast.models.masking import Masked, Plan, TokenLayout
from m3ae_fast.models.masks import block_mask, dirichlet_masks, multi_block_mask, random_mask, score_mask
from m3ae_fast.models.model import Metric, Model
from m3ae_fast.models.supervised import Supervised, SupervisedOutput

# What `m3ae-fast pretrain --objective` knows: the model, and its configuration. The first is the default.
OBJECTIVES: dict[str, tuple[type[Model], type[ModelConfig]]] = {
    "m3ae": (M3AE, M3AEConfig),
    "mae": (MAE, M3AEConfig),
    "mamo": (MAMO, MAMOConfig),
    "clip": (CLIP, EncodersConfig),
    "supervised": (Supervised, SupervisedConfig),
}


def objectives_offering(*methods: str) -> tuple[str, ...]:
    """The objectives whose models have all of these methods (see `Model.offers`)."""
    return tuple(name for name, (model, _) in OBJECTIVES.items() if model.offers(*methods))


# Containers of tensors, to torch: DDP with static_graph=True, which looks for the loss in them, would find none, add up
# no gradients, and say nothing. torch.export takes plans, too.
for held in (CLIPOutput, Encoded, M3AEOutput, MAMOOutput, Masked, Plan, Reconstruction, SupervisedOutput, TokenLayout):
    torch.export.register_dataclass(held, serialized_type_name=f"{held.__module__}.{held.__name__}")

__all__ = [
    "CLIP",
    "M3AE",
    "MAE",
    "MAMO",
    "OBJECTIVES",
    "CLIPOutput",
    "Encoded",
    "EncoderForm",
    "EncodersConfig",
    "GraphedStep",
    "M3AEConfig",
    "M3AEOutput",
    "MAMOConfig",
    "MAMOOutput",
    "Metric",
    "Model",
    "ModelConfig",
    "Reconstruction",
    "Supervised",
    "SupervisedConfig",
    "SupervisedOutput",
    "block_mask",
    "dirichlet_masks",
    "multi_block_mask",
    "objectives_offering",
    "random_mask",
    "score_mask",
]
