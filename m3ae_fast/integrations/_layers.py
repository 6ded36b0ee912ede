"""What the fast modules of several libraries share: torch's layers, run by our ops."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from m3ae_fast import ops
from m3ae_fast._backends import product_dtype
from m3ae_fast.integrations._swap import bare
from m3ae_fast.nn.recompute import recomputed

DROPOUT = (nn.Dropout, nn.Identity)


def offsets(batch: int, length: int, device: torch.device) -> Tensor:
    """[batch + 1] int32: where sequences of one length start. Made on the device: nothing is copied."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def without_unused(cu_q: Tensor, cu_k: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of 2 B sequences for B of which only the first keys count: the queries of one with its used keys, then no
    query with its other keys. Nothing is copied but offsets: keys that no query reads have gradients 0.

    Args:
        cu_q, cu_k: [B + 1] int32. used: [B] int32, how many keys count, at most as many as there are.

    Returns:
        (cu_q, cu_k), [2 B + 1] int32 each.
    """
    twice_q = cu_q[:, None].expand(-1, 2).flatten()[1:]
    split_k = torch.stack([cu_k[:-1], cu_k[:-1] + used], 1).flatten()
    return twice_q, torch.cat([split_k, cu_k[-1:]])


def drops(dropout: nn.Module) -> bool:
    """Whether one of DROPOUT drops anything. Its own mode counts: some let it drop in a model that is evaluated."""
    return dropout.training and getattr(dropout, "p", 0) > 0


def project(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), by `linear` where the module is torch's Linear and nothing else hangs on its call."""
    if bare(nn.Linear, module):
        return ops.linear(x, module.weight, module.bias)
    return module(x)


def embed_patches(conv: nn.Conv2d, images: Tensor, ids: Tensor, cu: Tensor) -> Tensor:
    """[K, D]: the patches `ids` [K] of images [B, C, H, W], `cu` [B + 1] offsets of each image's, under the convolution
    of a patch embedding (square, side by side). No other patch is read."""
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # as gather_patches has a patch: row, column, channel
    rows = ops.gather_patches(images, ids, cu, patch_size=conv.kernel_size[0], dtype=product_dtype(weight))
    return ops.linear(rows, weight, conv.bias)


def layer_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor | None = None) -> tuple:
    """(y, unsaved), or with residual (y, x + residual, unsaved): y is normalized, in the dtype of the product that
    reads it; `unsaved` is the context in which nothing saves it, `recomputed`."""
    options = {"eps": norm.eps, "dtype": product_dtype(x)}
    y = ops.layer_norm(x, norm.weight, norm.bias, residual=residual, **options)
    if residual is not None:
        y, x = y
    unsaved = recomputed(y, functools.partial(ops.layer_norm, **options), x, norm.weight, norm.bias)
    return (y, unsaved) if residual is None else (y, x, unsaved)
