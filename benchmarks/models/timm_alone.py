"""timm without torchvision: `timm_alone.load()` before the first `import timm`.

timm asks for torchvision when it is imported, for data sets, transforms and a frozen BatchNorm; its Vision Transformers
need none of it. A torchvision goes with one build of torch, and the CPU build that is tested here may have none.
"""

import importlib
import importlib.util
import sys
import types

MODULES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


class Named(type):
    """Classes of any attributes: each is its own name."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class StandIn(types.ModuleType):
    """A module with a class of every name."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (), {})


def load():
    """timm; where torchvision is missing, stand-ins take its place while timm is imported, and no longer.

    Raises:
        ImportError: no timm.
    """
    if "timm" in sys.modules or importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision"):
        return importlib.import_module("timm")
    stand_ins = {f"torchvision{name}": StandIn(f"torchvision{name}") for name in MODULES}
    for name, module in stand_ins.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stand_ins[parent], child, module)
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("timm")
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
