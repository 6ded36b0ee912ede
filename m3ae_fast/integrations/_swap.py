"""Modules made faster where they stand: their class is exchanged. Parameters, buffers, hooks and names stay, so that
state dicts, optimizers and checkpoints never notice."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

import torch
from torch import nn

from m3ae_fast import M3AEFastWarning

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TOLD: set[tuple[str, str]] = set()


def accelerate(model: nn.Module, fast: Mapping[type, type]) -> None:
    """Give every module of `model` whose class is a key of `fast` (exactly: not a subclass) the class it maps to.

    Raises:
        TypeError: `model` has no such module.
    """
    modules = list(model.modules())
    if not any(type(module) in fast or type(module) in fast.values() for module in modules):
        names = ", ".join(cls.__name__ for cls in fast)
        raise TypeError(f"model must have modules of the classes {names}, got {type(model).__name__} without any")
    for module in modules:
        module.__class__ = fast.get(type(module), type(module))


def restore(model: nn.Module, fast: Mapping[type, type]) -> None:
    """Undo `accelerate`."""
    stock = {new: old for old, new in fast.items()}
    for module in model.modules():
        module.__class__ = stock.get(type(module), type(module))


def bare(*modules: nn.Module, also: Collection[type] = ()) -> bool:
    """Whether each is a layer of torch.nn itself, or of a class in `also` that does the same, not a subclass (LoRA,
    quantised, parametrised), none of its parameters wraps other tensors (quantised or sharded ones do) and nothing
    hooks into its call: then its parameters say all that it does, and it need not be called."""
    return unhooked(*modules) and all(
        (type(module).__module__.startswith("torch.nn.modules.") or type(module) in also)
        and not any(hasattr(parameter, "__tensor_flatten__") for parameter in module._parameters.values())
        for module in modules
    )


def unhooked(*modules: nn.Module) -> bool:
    """Whether nothing hooks into the call of any of them."""
    return not any(
        "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS) for module in modules
    )


def tell(module: nn.Module, why: str) -> None:
    """Say, once for a class of modules and a reason, that a module runs as it was before `accelerate`."""
    _tell(type(module).__name__, why)


@torch.compiler.assume_constant_result  # a graph holds no warnings: under torch.compile it is said while one is made
def _tell(name: str, why: str) -> None:
    if (name, why) not in _TOLD:
        _TOLD.add((name, why))
        warnings.warn(f"{name} runs unaccelerated: {why}", M3AEFastWarning, stacklevel=4)
