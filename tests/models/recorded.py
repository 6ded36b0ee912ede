"""CUDA graphs without a GPU: every operation of a pass is recorded with its tensors, and replayed in the same memory.

As in a graph, what the host reads or decides (lengths, sizes, branches) stays what it was in the capture.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")  # for the device: refused in a capture


class Record(TorchDispatchMode):
    """`calls`: (operator, arguments, keywords, result) of all that runs inside; `before`: what it wrote over."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.setdefault(id(value), (value, value.clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class RecordedGraphs:
    """In the place of `m3ae_fast.models.graphs.CudaGraphs`."""

    def __init__(self, device):
        self.warmed_up, self.captured, self.replayed = 0, 0, 0

    def warm_up(self, function):
        self.warmed_up += 1
        return function()

    def capture(self, function):
        """A capture runs nothing: what it has written over is put back."""
        self.captured += 1
        with Record() as record:
            outputs = function()
        with torch.no_grad():
            for value, before in record.before.values():
                value.copy_(before)

        @torch.no_grad()
        def replay():
            self.replayed += 1
            for func, args, kwargs, out in record.calls:
                for ours, new in zip(*map(pytree.tree_leaves, (out, func(*args, **kwargs))), strict=True):
                    if isinstance(ours, torch.Tensor):
                        ours.copy_(new)

        return replay, outputs
