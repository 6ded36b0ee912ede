"""An exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn


class Average:
    """average = d * average + (1 - d) * weights after every step, with d = min(decay, (1 + step) / (10 + step)): the
    weights at the start count for little from the first steps on.

    Args:
        model: of which the parameters that require a gradient are averaged; the rest is the model's own.
        decay: in [0, 1); 0.9999 averages over the last 10,000 steps or so.

    Attributes:
        weights: by the parameter's name, float32, sharded where the parameter is.

    Source: tf.train.ExponentialMovingAverage with num_updates.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After step number `step`, counted from 1: a function of the step, so that a resumed run goes on exactly."""
        decay = min(self.decay, (1 + step) / (10 + step))
        trained = [p for p in model.parameters() if p.requires_grad]
        torch._foreach_lerp_(list(self.weights.values()), trained, 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Give the model the averaged weights and keep its own meanwhile; a second call undoes it exactly."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                held = parameter.detach().clone()
                parameter.copy_(self.weights[name])
                self.weights[name].copy_(held)
