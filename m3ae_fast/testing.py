"""What tests and benchmarks share: real-model sizes, recorded calls, and the error rule. Not needed to train."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from m3ae_fast import _backends, _checks


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of one training step: every op's cases are drawn from these, so that all speak of the same models."""

    batch: int
    image_size: int
    patch_size: int
    width: int
    heads: int
    decoder_width: int
    decoder_heads: int
    vocab_size: int
    text_lengths: tuple[int, int]  # shortest and longest caption, both inclusive
    max_text_length: int = 64
    image_mask_ratio: float = 0.75
    text_mask_ratio: float = 0.75

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def kept_patches(self) -> int:
        return int(self.patches * (1 - self.image_mask_ratio))

    def captions(self, seed: int = 0) -> list[int]:
        """Caption lengths of one batch."""
        low, high = self.text_lengths
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(low, high + 1, (self.batch,), generator=generator, device="cpu").tolist()

    def kept_words(self, seed: int = 0) -> list[int]:
        """Kept words of each caption: at least one kept and one masked."""
        return [min(max(int(n * (1 - self.text_mask_ratio)), 1), n - 1) for n in self.captions(seed)]


SHAPES = {
    # for tests: odd sizes, so that every tail of every vector loop runs
    "small": ModelShape(3, 24, 4, 40, 5, 24, 3, 101, (2, 9), max_text_length=9),
    # real models: sizes of arXiv:2205.14204 (S, H) and arXiv:2111.06377 (MAE-B, 224 px, images alone: see the cases)
    "m3ae_small": ModelShape(8, 256, 16, 384, 6, 512, 16, 30522, (10, 32)),
    "m3ae_huge": ModelShape(8, 256, 16, 1280, 16, 512, 16, 30522, (10, 32)),
    "mae_base": ModelShape(8, 224, 16, 768, 12, 512, 16, 30522, (2, 2)),
}


@dataclasses.dataclass
class Call:
    """One call of an op: positional and keyword arguments of its public function."""

    args: tuple
    kwargs: dict = dataclasses.field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [x for x in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def leaves(self) -> list[Tensor]:
        """The tensors that require a gradient, in order."""
        return [x for x in self.tensors() if x.requires_grad]

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every floating tensor replaced; leaves stay leaves."""

        def each(x):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return function(x.detach()).requires_grad_(x.requires_grad)

        args, kwargs = pytree.tree_map(each, (self.args, self.kwargs))
        return Call(args, kwargs)

    def to(self, dtype: torch.dtype) -> Call:
        return self.map(lambda x: x.to(dtype))

    def on(self, device: torch.device | str) -> Call:
        """A copy of the same call on a device: its tensors and the offsets of its SeqLens; leaves stay leaves."""

        def each(x):
            if not isinstance(x, Tensor):
                return x
            return x.detach().to(device, copy=True).requires_grad_(x.requires_grad)

        args, kwargs = pytree.tree_map(each, (self.args, self.kwargs))
        return Call(args, kwargs)

    def run(self, function: Callable, **options) -> tuple[list[Tensor], list[Tensor]]:
        """(outputs, gradients): gradients of a fixed random functional of all floating outputs, for every leaf."""
        outputs = [
            x for x in pytree.tree_leaves(function(*self.args, **self.kwargs, **options)) if isinstance(x, Tensor)
        ]
        leaves = self.leaves()
        if not leaves:
            return outputs, []
        attached = [x for x in outputs if x.requires_grad]
        gradients = torch.autograd.grad(attached, leaves, [cotangent(x) for x in attached])
        return outputs, list(gradients)


def moved(x: Tensor, elements: int) -> Tensor:
    """The same values, so many elements past where an allocation begins."""
    return torch.cat([x.new_zeros(elements), x.flatten()])[elements:].view(x.shape)


def far_apart(x: Tensor, dimension: int) -> Tensor:
    """The same values, the last along a dimension 2^31 elements from the first, though each step is shorter than that.

    The memory between them is never touched, so the machine never gives it.
    """
    strides = list(x.contiguous().stride())
    strides[dimension] = -(-(2**31) // (x.shape[dimension] - 1))
    ends = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) + 1
    return x.new_empty(ends).as_strided(x.shape, strides).copy_(x)


def widened(x: Tensor, width: int) -> Tensor:
    """The last dimension repeated, or cut, to `width`."""
    return x.repeat(*[1] * (x.dim() - 1), -(-width // x.shape[-1]))[..., :width]


def cotangent(x: Tensor) -> Tensor:
    """A fixed pseudo-random gradient for x, exactly representable in bfloat16."""
    generator = torch.Generator().manual_seed(x.numel())
    return (torch.randint(-64, 65, x.shape, generator=generator, device="cpu") / 64).to(x.device, x.dtype)


def cases(op: str):
    """The op's cases module: `SMALL` and `REAL` (names), `make(name, dtype, seed) -> Call`, in a loss `LOSS = True`."""
    return importlib.import_module(f"m3ae_fast.ops.{op}.cases")


def devices() -> list[str]:
    """Where every backend is tested: the CPU and, where torch sees one, a GPU. Triton's interpreter and the CUDA
    emulator run on the CPU."""
    return ["cpu", "cuda"] if torch.cuda.is_available() and _backends.TESTED is None else ["cpu"]


def impls(op: str, device: str = "cpu") -> list[str]:
    """The backends of an op that can run here on a device, the reference left out.

    Under TRITON_INTERPRET=1 the Triton backend alone, under M3AE_FAST_EMULATE=1 the CUDA kernels: another run tests the
    others, at their speed.
    """
    backends = _backends.LOADED[op]
    names = [name for name in backends.modules if _backends.TESTED in (None, name)]
    return [name for name in names if backends.refusal(name, device, dtypes(name, op)[0]) is None]


def dtypes(impl: str, op: str) -> tuple[torch.dtype, ...]:
    """The floating dtypes that a backend of an op takes."""
    return _backends.LOADED[op].floats(impl) if impl != "reference" else _checks.FLOATS


def widest(impl: str, op: str) -> torch.dtype:
    """float64 where the backend takes it, else the first dtype that it takes."""
    floats = dtypes(impl, op)
    return torch.float64 if torch.float64 in floats else floats[0]


def isas() -> list[str]:
    """Instruction sets of this build that this machine runs; [] without the compiled module, or where it is not tested
    (TRITON_INTERPRET=1, M3AE_FAST_EMULATE=1)."""
    if _backends.TESTED is not None:
        return []
    try:
        from m3ae_fast._cpp import _C
    except ImportError:
        return []
    return _C.available_isas()


def assert_error_rule(name: str, ours: Tensor, eager: Tensor, truth: Tensor, factor: float) -> None:
    """|ours - truth| <= factor * |eager - truth| + one rounding, in the maximum norm; truth in fp64.

    Where ours is fp64 too, eager may come in fp32: its error is scaled by the ratio of the two roundings. The truth is
    fp64 then, too, and off by as much as eager in fp64 would be: factor + 1, and two roundings.
    """
    scale = roundings = 1.0
    if ours.dtype == torch.float64 and eager.dtype == torch.float32:
        scale, eager = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps, eager.double()
        factor, roundings = factor + 1, 2
    if not ours.is_floating_point():
        assert torch.equal(ours, eager), f"{name}: differs from the reference"
        return
    assert ours.dtype == eager.dtype and ours.shape == eager.shape, (
        f"{name}: {ours.dtype} {tuple(ours.shape)} against the reference's {eager.dtype} {tuple(eager.shape)}"
    )
    finite = truth.isfinite()
    assert torch.equal(ours.double()[~finite].nan_to_num(7.0), truth[~finite].nan_to_num(7.0)), (
        f"{name}: infinities differ"
    )
    assert ours[finite].isfinite().all(), f"{name}: not finite where the truth is"
    if not finite.any():
        return
    rounding = roundings * torch.finfo(ours.dtype).eps * truth[finite].abs().max()
    error = (ours.double() - truth)[finite].abs().max()
    eager_error = scale * (eager.double() - truth)[finite].abs().max()
    assert error <= factor * eager_error + rounding, f"{name}: error {error:.3e}, eager PyTorch has {eager_error:.3e}"


def assert_error_rules(ours: tuple, eager: tuple, truth: tuple) -> None:
    """The error rule for all that three runs (`Call.run`) return: factor 2 for outputs, 3 for gradients."""
    for kind, factor, *results in zip(("output", "gradient"), (2, 3), ours, eager, truth, strict=True):
        for i, each in enumerate(zip(*results, strict=True)):
            assert_error_rule(f"{kind} {i}", *each, factor)
