"""What the fast modules of several libraries share: torch's layers, run by our ops."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from m3ae_fast import ops
from m3ae_fast.integrations._swap import bare

DROPOUT = (nn.Dropout, nn.Identity)


def offsets(batch: int, length: int, device: torch.device) -> Tensor:
    """[batch + 1] int32: where sequences of one length start. Made on the device: nothing is copied."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def product_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which a product with `like` runs: its own, or autocast's, which leaves float64 alone."""
    device = like.device.type
    low = torch.is_autocast_enabled(device) and like.dtype != torch.float64
    return torch.get_autocast_dtype(device) if low else like.dtype


def drops(dropout: nn.Module) -> bool:
    """Whether one of DROPOUT drops anything. Its own mode counts: some let it drop in a model that is evaluated."""
    return dropout.training and getattr(dropout, "p", 0) > 0


def project(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), by `linear` where the module is torch's Linear and nothing else hangs on its call."""
    if bare(nn.Linear, module):
        return ops.linear(x, module.weight, module.bias)
    return module(x)


def layer_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor | None = None) -> tuple:
    """(y, again), or with residual (y, x + residual, again): y is normalised, in the dtype of the product that reads
    it; again is what `recomputed` takes to make it once more."""
    options = {"eps": norm.eps, "dtype": product_dtype(x)}
    y = ops.layer_norm(x, norm.weight, norm.bias, residual=residual, **options)
    if residual is not None:
        y, x = y
    again = functools.partial(ops.layer_norm, **options), x, norm.weight, norm.bias
    return (y, again) if residual is None else (y, x, again)
