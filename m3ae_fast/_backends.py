"""Which implementation runs an op: loading, registration with torch.library, choice, explanation."""

from __future__ import annotations

import functools
import importlib
import os
import typing
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

Impl = typing.Literal["reference", "cpp", "triton", "cuda"]
IMPLS = typing.get_args(Impl)
# Best first; the reference closes every list. "cuda" is in none: no measurement has shown it faster than "triton" yet.
PREFERENCE = {"cpu": ("cpp",), "cuda": ("triton",)}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs on CPU tensors, slowly, to be tested
EMULATED = os.environ.get("M3AE_FAST_EMULATE") == "1"  # so do then the CUDA kernels: csrc/cuda/emulator.h
TESTED = "triton" if INTERPRETED else "cuda" if EMULATED else None  # the one backend that such a run is for
# Ops at which PyTorch beats our scalar loops, which is all that arm64 has for now: docs/cpu_scalar.md.
SLOW_WITHOUT_VECTORS = frozenset({"linear", "linear_cross_entropy"})
RUNS_ON = {  # devices, floating dtypes
    "cpp": (("cpu",), (torch.float32, torch.bfloat16, torch.float64)),
    "triton": (("cpu", "cuda") if INTERPRETED else ("cuda",), (torch.float32, torch.bfloat16, torch.float16)),
    "cuda": (("cpu", "cuda") if EMULATED else ("cuda",), (torch.float32, torch.bfloat16, torch.float16)),
}
_FORCED = os.environ.get("M3AE_FAST_IMPL") or None
if _FORCED is not None and _FORCED not in IMPLS:
    raise ValueError(f"M3AE_FAST_IMPL must be one of {', '.join(IMPLS)}, got {_FORCED!r}")

# Private to torch, so they may be missing: then every call is taken to need torch's dispatcher, slower and not wrong.
try:
    dispatch_modes, function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
    transforms, tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
    profiling, has_storage = torch._C._autograd._profiler_enabled, torch._C._has_storage
except AttributeError:
    dispatch_modes, has_storage = (lambda: 1), (lambda x: True)

LIBRARY = torch.library.Library("m3ae_fast", "DEF")
LOADED: dict[str, Backends] = {}  # op name -> its backends, for explain() and the contract tests


class Backends:
    """The implementations of one op: `modules` that loaded, `reasons` for those that did not; whether "cpp" is `slow`:
    then PyTorch is preferred to it."""

    def __init__(self, op: str, modules: dict[str, ModuleType], reasons: dict[str, str]):
        self.op, self.modules, self.reasons = op, modules, reasons
        self.slow = op in SLOW_WITHOUT_VECTORS and "cpp" in modules and modules["cpp"]._C.active_isa() == "scalar"
        self.remarks: list[str] = []  # for explain()
        self.picked: dict[tuple, str] = {}  # what `pick` found for an impl, a device and dtypes
        # How many channels rows (of a head, in attention) may have, where a backend has a limit: its module's WIDEST.
        self.widest = {impl: module.WIDEST for impl, module in modules.items() if hasattr(module, "WIDEST")}

    def __getitem__(self, impl: str) -> ModuleType:
        return self.modules[impl]

    def preferred(self, device: str) -> tuple[str, ...]:
        """Best first; the reference closes the list."""
        return tuple(name for name in PREFERENCE.get(device, ()) if not (self.slow and name == "cpp"))

    def floats(self, impl: str) -> tuple[torch.dtype, ...]:
        """The floating dtypes that `impl` takes: RUNS_ON's, or fewer where its module says so (FLOATS)."""
        return getattr(self.modules[impl], "FLOATS", RUNS_ON[impl][1])

    def refusal(self, impl: str, device: str, *dtypes: torch.dtype) -> str | None:
        """Why `impl` cannot run this op on tensors of these dtypes; None where it can. Integers: the op checks them."""
        if impl not in self.modules:
            return self.reasons.get(impl, "this op has no such backend")
        runs_on, floats = RUNS_ON[impl][0], self.floats(impl)
        if device not in runs_on:
            return f"it runs on {' and '.join(runs_on)} tensors, got {device}"
        for dtype in dtypes:
            if dtype.is_floating_point and dtype not in floats:
                return f"it takes {', '.join(str(d).removeprefix('torch.') for d in floats)}, got {dtype}"
        return None

    def cannot_run(self, impl: str, tensor: Tensor, *others: torch.dtype) -> str | None:
        """Why `impl` cannot run a call with this tensor; None where it can."""
        reason = self.refusal(impl, tensor.device.type, tensor.dtype, *others)
        if reason is None and self.too_wide(impl, tensor.shape):
            reason = f"it takes at most {self.widest[impl]} channels a head, got {tensor.shape[-1]}"
        return reason

    def too_wide(self, impl: str, shape: tuple[int, ...]) -> bool:
        """Whether rows have more channels than `impl` takes."""
        return impl in self.widest and shape[-1] > self.widest[impl]


def load(package: str, *impls: str) -> Backends:
    """Import `<package>.<impl>_backend` for each name; one that cannot be imported here is kept with its reason."""
    op = package.rpartition(".")[2]
    modules, reasons = {}, {}
    for impl in impls:
        if impl == "triton" and torch.version.cuda is None and not INTERPRETED:
            reasons[impl] = "this torch is built without CUDA"  # and importing Triton takes its time
            continue
        try:
            modules[impl] = importlib.import_module(f"{package}.{impl}_backend")
        except ImportError as error:
            reasons[impl] = str(error)
    LOADED[op] = Backends(op, modules, reasons)
    return LOADED[op]


def pick(backends: Backends, impl: str | None, tensor: Tensor, *others: torch.dtype) -> str:
    """The implementation that runs: an explicit one is obeyed or refused, None selects the preferred one.

    others: the dtypes that its kernels meet besides the tensor's.
    """
    impl = impl or _FORCED
    if torch.compiler.is_compiling():
        return _pick(backends, impl, tensor, *others)
    key = (impl, tensor.device.type, tensor.dtype, *others)
    picked = backends.picked.get(key)
    if picked is None or (picked in backends.widest and backends.too_wide(picked, tensor.shape)):
        picked = _pick(backends, impl, tensor, *others)
        if picked != "reference" or not backends.widest:  # else the reference perhaps runs wide rows alone
            backends.picked[key] = picked
    return picked


def _pick(backends: Backends, impl: str | None, tensor: Tensor, *others: torch.dtype) -> str:
    if impl is None:
        for name in backends.preferred(tensor.device.type):
            if backends.cannot_run(name, tensor, *others) is None:
                return name
        return "reference"
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl != "reference":
        reason = backends.cannot_run(impl, tensor, *others)
        if reason is not None:
            raise ValueError(f"impl={impl!r} cannot run {backends.op}: {reason}")
    return impl


def has_kernels(
    backends: Backends, impl: str | None, device: str, shape: tuple[int, ...], *dtypes: torch.dtype
) -> bool:
    """Whether calls with such tensors are run by kernels; impl None: by those of the fastest backend for the device."""
    names = backends.preferred(device) if impl is None else (impl,)
    return any(backends.refusal(name, device, *dtypes) is None and not backends.too_wide(name, shape) for name in names)


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a matrix product: the widest of its arguments', under autocast the autocast dtype, as PyTorch's."""
    dtype = tensors[0].dtype
    for each in tensors[1:]:
        if each.dtype != dtype:
            dtype = torch.promote_types(dtype, each.dtype)
    device = tensors[0].device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def for_product(
    backends: Backends, impl: str | None, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[str, Tensor, Tensor, Tensor | None]:
    """What runs x W^T + b, and its arguments in the dtypes that it takes.

    Beside rows of some dtypes, its module's FP32_PARAMETERS, a backend takes fp32 parameters, as autocast has them: it
    rounds them on their way into the product and leaves their gradients in fp32, so these are cast nowhere.
    """
    dtype = product_dtype(x, weight) if bias is None else product_dtype(x, weight, bias)
    if x.dtype != dtype:
        x = x.to(dtype)
    impl = pick(backends, impl, x)
    if weight.dtype != dtype:
        taken = getattr(backends.modules.get(impl), "FP32_PARAMETERS", ())
        if weight.dtype != torch.float32 or dtype not in taken:
            weight = weight.to(dtype)
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    return impl, x, weight, bias


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums and losses are computed in: fp32, fp64 where the tensors are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for an output of x's shape, contiguous. (Sizes that are passed as a torch.Size cost twice as much.)"""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def operator(backends: Backends, part: str | Callable) -> Callable[[Callable], Operator]:
    """Decorates the function that allocates an operator's outputs, the one place where its signature is written.

    The annotated parameters are the torch operator's; the result is a tensor, or a tuple of tensors and Nones (for
    outputs that these arguments do not ask for). The function is the operator's fake, and a backend's function `part`
    is given the same arguments, then the outputs, which it fills. `part` may also be a function that is given the
    backend before these.
    """
    return lambda allocate: Operator(backends, part, allocate)


class Operator:
    """A torch operator `m3ae_fast::<name>(str impl, ...)`. Called in eager mode, it does without torch's dispatcher.

    Whoever calls it, autograd's threads among them, its kernels run on the device of its first argument, a tensor.
    """

    def __init__(self, backends: Backends, part: str | Callable, allocate: Callable):
        self.backends, self.part, self.allocate = backends, part, allocate
        self.name = name = allocate.__name__.lstrip("_")
        LIBRARY.define(name + _schema(allocate), tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, self._implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"m3ae_fast::{name}", self._fake, lib=LIBRARY)
        self.registered = getattr(torch.ops.m3ae_fast, name).default

    def __call__(self, impl: str, *args):
        if type(impl) is not Direct and type(direct(impl, args)) is not Direct:
            if torch.jit.is_tracing():
                raise RuntimeError(
                    f"torch.jit.trace must not meet {self.name}: it would keep the sizes of its example, and no "
                    "gradient in what is saved; use torch.export or torch.compile, or first restore(model) what was "
                    "accelerated"
                )
            return self.registered(impl, *args)
        device = args[0].get_device()  # -1: the CPU
        if device >= 0 and device != torch.cuda.current_device():  # which Triton, and its stream, would be
            with torch.cuda.device(device):
                return self(impl, *args)
        outputs, backend = self.allocate(*args), self.backends.modules[impl]
        fill = getattr(backend, self.part) if type(self.part) is str else functools.partial(self.part, backend)
        if type(outputs) is tuple:
            fill(*args, *outputs)
        else:
            fill(*args, outputs)
        return outputs

    def _implementation(self, impl, *args):
        return _tensors(self(DIRECT[impl], *args), args[0])

    def _fake(self, impl, *args):
        return _tensors(self.allocate(*args), args[0])


def _tensors(outputs, like: Tensor):
    """What torch's operators return are tensors: an empty one for None."""
    if type(outputs) is not tuple:
        return outputs
    return tuple(like.new_empty(0) if x is None else x for x in outputs)


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
    list[int]: "SymInt[]",
    list[float]: "float[]",
    list[bool]: "bool[]",
}


def _schema(allocate: Callable) -> str:
    hints = typing.get_type_hints(allocate)
    returned = len(typing.get_args(hints.pop("return"))) or 1
    arguments = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in hints.items())
    return f"(str impl, {arguments}) -> " + ("Tensor" if returned == 1 else f"({', '.join(['Tensor'] * returned)})")


class Direct(str):
    """A backend's name in a call that was found to do without torch's dispatcher."""


DIRECT = {impl: Direct(impl) for impl in IMPLS}


def direct(impl: str, args: tuple = ()) -> str:
    """impl, as a Direct where a call with these arguments can do without torch's dispatcher."""
    return DIRECT[impl] if not torch.compiler.is_compiling() and eager(args) else str(impl)


def eager(args: tuple) -> bool:
    """Whether a call can do without torch's dispatcher: it is `plain`, and no profiler records it."""
    return plain(args) and not profiling()


# Types of an operator's other arguments. They are looked up here first, because isinstance(x, Tensor) is slower.
NO_TENSORS = frozenset({str, Direct, int, float, bool, type(None), list, tuple, torch.dtype})


def plain(args: tuple) -> bool:
    """Whether nothing traces or transforms a call, and no argument is a wrapper (which has no storage), or a view that
    is yet to be negated."""
    if dispatch_modes() or function_modes() or transforms() or forward_ad._current_level >= 0 or tracing() is not None:
        return False
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if not has_storage(x) or x.is_neg():
                return False
        elif kind not in NO_TENSORS and isinstance(x, Tensor):
            return False
    return True
