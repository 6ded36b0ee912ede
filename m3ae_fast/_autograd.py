"""Gradients that a forward pass made: what is left to do in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

# Private to torch, so it may be missing: then every graph is taken to be kept.
keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled(gradient: Tensor, dloss: Tensor) -> Tensor:
    """gradient * dloss, one number; in place on the CPU where the graph goes with this backward pass: it is large."""
    if torch.compiler.is_compiling() or gradient.device.type != "cpu" or keep_graph():
        return gradient * dloss
    return gradient if dloss.item() == 1 else gradient.mul_(dloss)
