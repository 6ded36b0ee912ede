"""What the autograd of all ops has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from m3ae_fast._backends import DIRECT, direct, eager

# Private to torch, so it may be missing: then every graph is taken to be kept.
keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
# So may these, which say whether torch.func is at work: then it is taken to be, always: slower, not wrong.
try:
    from torch._functorch.utils import unwrap_dead_wrappers

    transformed = torch._C._are_functorch_transforms_active
except (ImportError, AttributeError):
    transformed = lambda: True  # noqa: E731
# Whether a gradient is several at once (is_grads_batched=True), likewise.
many = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda gradient: True)
WHY = (
    "its gradient is made by a kernel, which autograd cannot see into. impl='reference', or M3AE_FAST_IMPL=reference "
    "for the whole process, is plain PyTorch and has all of them."
)


def op_of(part: Callable | type) -> str:
    """The op that a class or a function of its op.py belongs to; elsewhere the module's name says what it is."""
    *_, package, module = part.__module__.split(".")
    return package if module == "op" else module


class Function(torch.autograd.Function):
    """An op whose gradients are made by kernels: `forward` calls them, `setup_context` keeps what `backward`, under
    `@differentiable_once`, needs.

    torch.func.grad takes it as it is, vmap calls the kernels once a sample. What backward needs is an argument, a copy
    of one that may be written to in between, or an output that is not differentiable, for which no gradient is made up
    (`kept`). forward names all its arguments: without gradients torch.compile counts them.
    """

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args):
        try:
            if transformed():
                return super().apply(*args)
            plain, need = eager(args), forward_ad._current_level >= 0  # which autograd has to refuse
            if not plain:
                args = unwrap_dead_wrappers(args)  # left over from a transformation
            if torch.is_grad_enabled():
                for x in args:
                    need = need or (isinstance(x, Tensor) and x.requires_grad)
            if plain:
                args = (DIRECT[args[0]], *args[1:])
            if not need:
                return cls.forward(*args)
            # Function.apply without its look at forward's signature, which costs three times the rest of it.
            return super(torch.autograd.Function, cls).apply(*args)
        except NotImplementedError as error:
            if "jvp" not in str(error):
                raise
            raise NotImplementedError(f"{op_of(cls)} has no forward-mode derivative (jvp): {WHY}") from None


def kept(ctx, *tensors: Tensor | None) -> None:
    """Outputs that are there for the backward pass alone: they have no gradient, and none is filled in with zeros."""
    ctx.mark_non_differentiable(*(x for x in tensors if x is not None))
    ctx.set_materialize_grads(False)


def link(x: Tensor) -> Tensor:
    """For a loss whose backward needs nothing that stands for x: an output to be saved in its place, through which a
    second derivative finds x, to be refused. (The loss itself will not do: its user may scale it in place.)"""
    return x.new_empty(0)


def differentiable_once(backward: Callable) -> Callable:
    """For `backward(ctx, saved, *gradients)`, which is given ctx.saved_tensors: its results cannot be differentiated.
    ctx.impl, where there is one, becomes what operators are to be called with.

    torch's `once_differentiable` lets a second derivative be lost in silence where no gradient that comes in requires
    one; here what was saved counts, too, so something that stands for the op's inputs must be.
    """
    op = op_of(backward)

    @functools.wraps(backward)
    def wrapper(ctx, *gradients):
        if gradients[0] is None and all(x is None for x in gradients):
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # once: gradient checkpointing hands them out one time
        if hasattr(ctx, "impl"):
            ctx.impl = direct(ctx.impl, (*gradients, *saved))
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *gradients)
        with torch.no_grad():
            results = backward(ctx, saved, *gradients)
        if torch.compiler.is_compiling():
            return results
        made = [x for x in results if x is not None]
        refusing = iter(_Refuse.apply(op, len(made), *made, *gradients, *saved) if made else ())
        return tuple(x if x is None else next(refusing) for x in results)

    return wrapper


class _Refuse(torch.autograd.Function):
    """The first `count` tensors as they are, as functions of all of them whose derivative is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, count, *tensors):
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op} has no second derivative: {WHY}")


def scaled(gradient: Tensor, dloss: Tensor) -> Tensor:
    """gradient * dloss, one number; in place on the CPU where the graph goes with this backward pass: it is large."""
    if torch.compiler.is_compiling() or transformed() or many(dloss) or dloss.device.type != "cpu" or keep_graph():
        return gradient * dloss
    return gradient if dloss.item() == 1 else gradient.mul_(dloss)
