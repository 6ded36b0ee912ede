"""Transformers' activations under the names that `linear` has for them."""

from torch import nn
from transformers import activations

_GELU = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
}


def activation(module: nn.Module) -> str | None:
    """The name that `linear` has for an activation of Transformers'; None where it has none."""
    return _GELU.get(type(module))
