"""Modules made faster where they stand: their class is exchanged. Parameters, buffers, hooks and names stay, so that
state dicts, optimizers and checkpoints never notice."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from m3ae_fast._warning import M3AEFastWarning

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TOLD: set[tuple[str, str]] = set()


def accelerate(model: nn.Module, fast: Mapping[type, type]) -> None:
    """Give every module of `model` whose class is a key of `fast` (exactly: not a subclass) the class it maps to.

    A module whose forward was replaced on the instance, as Accelerate's hooks do, is left as it is, with an
    M3AEFastWarning: the replacement keeps calling the forward that it found.

    Raises:
        TypeError: `model` has no such module.
    """
    if not any(type(module) in fast or type(module) in fast.values() for module in model.modules()):
        names = ", ".join(cls.__name__ for cls in fast)
        raise TypeError(f"model must have modules of the classes {names}, got {type(model).__name__} without any")
    _exchange(model, fast)


def restore(model: nn.Module, fast: Mapping[type, type]) -> None:
    """Undo `accelerate`, except for modules whose forward has been replaced since, with a warning."""
    _exchange(model, {new: old for old, new in fast.items()})


def _exchange(model: nn.Module, classes: Mapping[type, type]) -> None:
    left = set()
    for module in model.modules():
        if type(module) in classes:
            forward = module.__dict__.get("forward")
            if getattr(forward, "__func__", None) is type(module).forward:
                del module.forward  # the class's own: Accelerate leaves it behind when it takes its hooks off
            elif forward is not None:
                left.add(type(module).__name__)
                continue
            module.__class__ = classes[type(module)]
    if left:
        why = "their forward has been replaced, as Accelerate's hooks do: take those off first"
        warnings.warn(f"{', '.join(sorted(left))} stay as they are: {why}", M3AEFastWarning, stacklevel=4)


def bare(kind: type | tuple[type, ...], *modules: nn.Module) -> bool:
    """Whether each is a `kind`, or one of them, not a subclass (LoRA, quantized, parametrised), none of its parameters
    wraps other tensors (quantized or sharded ones do) and nothing hooks into its call: then its parameters say all that
    it does, and it need not be called."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return unhooked(*modules) and all(
        type(module) in kinds
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
