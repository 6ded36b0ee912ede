"""recomputed: what autograd would keep for the backward pass, made again there instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from m3ae_fast._autograd import transformed

# Private to torch, so it may be missing: then nothing is taken to be nested in hooks of the user's.
top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)


def recomputed(y: Tensor, make: Callable[..., Tensor], *sources: Tensor | None) -> contextlib.AbstractContextManager:
    """Operations in this context that save y, in any shape and order, save nothing: the backward pass calls
    make(*sources), which must give y's bits, contiguous as y is.

    What is changed in place before then is an error, as it is without this context: torch itself does not look where
    there are hooks. Sources are the tensors of the forward pass: a module may hold others by then (functional_call).

    It does nothing where no gradient is recorded, under torch.compile (whose partitioner decides this itself), under
    torch.func (which takes no hooks) and inside other hooks, such as those of gradient checkpointing, which already
    keep y from being saved.

    Raises:
        RuntimeError: in the backward pass, where a source or anything saved was changed in place.
    """
    if not y.numel() or not y.requires_grad or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if transformed() or top_hooks(True) is not None:
        return contextlib.nullcontext()
    address, size, version = y.data_ptr(), y.numel(), y._version
    sources = [None if x is None else (x.detach(), x._version) for x in sources]

    def pack(x: Tensor) -> tuple[Tensor, int] | tuple[torch.Size, tuple[int, ...]]:
        is_y = x.data_ptr() == address and x.numel() == size and x._version == version
        return (x.size(), x.stride()) if is_y else (x, x._version)

    def unpack(kept: tuple[Tensor, int] | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(kept[0], Tensor):
            return _unchanged(*kept)
        with torch.no_grad():
            return make(*(None if source is None else _unchanged(*source) for source in sources)).as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _unchanged(x: Tensor, version: int) -> Tensor:
    if x._version != version:
        raise RuntimeError(
            "a tensor needed for gradient computation has been modified by an inplace operation: "
            f"{x.dtype} {list(x.shape)} is at version {x._version}, expected {version}"
        )
    return x
