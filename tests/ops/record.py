"""Record: which torch operators of m3ae_fast are called."""

from torch.utils._python_dispatch import TorchDispatchMode


class Record(TorchDispatchMode):
    """`calls`: every call of an m3ae_fast torch operator, (operator, args, kwargs)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "m3ae_fast":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))
