"""recomputed: what autograd would keep for the backward pass, made again there instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from m3ae_fast._autograd import transformed

# Private to torch, so it may be missing: then nothing is taken to be nested in hooks of the user's.
top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)


def recomputed(y: Tensor, make: Callable[..., Tensor], *of: Tensor | None) -> contextlib.AbstractContextManager:
    """Operations in this context that save y, in any shape and order, save nothing: the backward pass calls make(*of),
    which must give y's bits, contiguous as y is.

    Tensors that were changed in place since are an error, as for all that autograd saves: those in `of`, and those that
    operations in this context save (autograd itself looks no more once there are hooks).

    It does nothing where no gradient is recorded, under torch.compile (whose partitioner decides this itself), under
    torch.func (which takes no hooks) and inside other hooks, such as those of gradient checkpointing, which already
    keep y from being saved.
    """
    if not y.numel() or not y.requires_grad or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if transformed() or top_hooks(True) is not None:
        return contextlib.nullcontext()
    address, size = y.data_ptr(), y.numel()
    versions = [(x, x._version) for x in of if x is not None]

    def pack(x: Tensor) -> tuple:
        is_y = x.data_ptr() == address and x.numel() == size
        return (x.size(), x.stride()) if is_y else (x, x._version)

    def unpack(kept: tuple) -> Tensor:
        first, second = kept
        if isinstance(first, Tensor):
            _unchanged(first, second)
            return first
        for each in versions:
            _unchanged(*each)
        with torch.no_grad():
            return make(*of).as_strided(first, second)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _unchanged(x: Tensor, version: int) -> None:
    if x._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(x.shape)} that the backward pass needs has been modified by an inplace "
            f"operation: it is at version {x._version}, expected {version}"
        )
