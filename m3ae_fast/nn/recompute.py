"""recomputed: what autograd would keep for the backward pass, made again there instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from m3ae_fast._autograd import transformed

# Private to torch, so it may be missing: then nothing is taken to be nested in hooks of the user's.
top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)


def recomputed(y: Tensor, make: Callable[[], Tensor]) -> contextlib.AbstractContextManager:
    """Operations in this context that save y, in any shape and order, save nothing: the backward pass calls make, which
    must give y's bits, contiguous as y is.

    It does nothing where no gradient is recorded, under torch.compile (whose partitioner decides this itself), under
    torch.func (which takes no hooks) and inside other hooks, such as those of gradient checkpointing, which already
    keep y from being saved.
    """
    if not y.numel() or not y.requires_grad or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if transformed() or top_hooks(True) is not None:
        return contextlib.nullcontext()
    address, size = y.data_ptr(), y.numel()

    def pack(x: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        return (x.size(), x.stride()) if x.data_ptr() == address and x.numel() == size else x

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make().as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
