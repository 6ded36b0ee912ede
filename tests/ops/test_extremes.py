"""Finite arguments of any size: a result within the error rule, or inf or NaN where eager PyTorch has it. Never a
number that looks like a result and is none."""

import math

import pytest
import torch
from torch.utils import _pytree as pytree

import m3ae_fast
from m3ae_fast import SeqLens, _backends, testing

# What differs between the arithmetic of an op's cases; the rest of SMALL is about sizes and layouts.
CASES = {
    "assemble_tokens": ("small",),
    "feature_regression": ("l2 sample_mean", "l1", "cosine", "cosine plain sum", "l2 plain"),
    "gather_patches": ("planes",),
    "layer_norm": ("small", "residual", "300 columns"),
    "linear": ("small", "gelu", "gelu_tanh", "gelu_input"),
    "linear_cross_entropy": ("small", "sum", "none"),
    "masked_mse": ("mean norm_pix", "past the end", "float norm_pix"),
    "restore_tokens": ("small",),
    "varlen_attention": ("small", "ties"),
}
# 1e37: sums of a few dozen still fit. What only adds, and the backends that run in an interpreter, see fewer.
MAGNITUDES = (1e-38, 1e-30, 1e-20, 1e-10, 1e-5, 1e3, 1e5, 1e7, 1e10, 1e15, 1e20, 1e30, 1e37)
FEW = (1e7, 1e30) if _backends.TESTED else (1e-30, 1e7, 1e20, 1e37)
ADDING = ("assemble_tokens", "gather_patches", "restore_tokens")
FACTORS = (4, 6)  # twice the contract's: among so many calls eager PyTorch is lucky in some
NORMS = ("feature_regression", "layer_norm", "masked_mse")
DTYPES = (torch.float32, torch.bfloat16)
SWEEP = [
    (op, impl, case, dtype, magnitude)
    for op, cases in CASES.items()
    for impl in testing.impls(op)
    for case in cases
    for dtype in DTYPES
    if dtype in testing.dtypes(impl, op)
    for magnitude in (FEW if op in ADDING or _backends.TESTED else MAGNITUDES)
]


def make(op, case, dtype):
    if (op, case) == ("masked_mse", "float norm_pix"):
        call = testing.cases(op).make("mean norm_pix", dtype)
        pred, images, *rest = call.args
        return testing.Call((pred, images.to(dtype) / 256, *rest), call.kwargs)
    if (op, case) == ("varlen_attention", "ties"):  # keys that differ in a channel that queries lack: half the weight
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(12, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
        q[..., -1], k[1::2, :, :-1] = 0, k[::2, :, :-1]
        return testing.Call((*(x.to(dtype).requires_grad_() for x in (q, k, v)), SeqLens([8, 4])))
    return testing.cases(op).make(case, dtype)


def of_size(x, magnitude):
    most = x.detach().abs().max().double()
    return x if most == 0 else (x.double() / most * magnitude).to(x.dtype)


def variants(call, magnitude, op, case):
    """(what was scaled, the call, the factor of the gradient that comes in)"""
    count = 0 if op in ADDING else sum(x.is_floating_point() for x in call.tensors())
    for i in range(count):
        number = iter(range(count))
        yield f"argument {i}", call.map(lambda x, i=i, n=number: of_size(x, magnitude) if next(n) == i else x), 1.0
    if case != "ties":  # whose gradients would be what equal terms, rounded, differ by
        yield "all arguments", call.map(lambda x: of_size(x, magnitude)), 1.0
    if call.leaves():
        yield "gradient", call, magnitude


def run(call, op, impl, factor):
    outputs = pytree.tree_leaves(getattr(m3ae_fast, op)(*call.args, **call.kwargs, impl=impl))
    attached = [x for x in outputs if x.requires_grad]
    if not attached:
        return outputs, []
    cotangents = [testing.cotangent(x) * 2.0 ** round(math.log2(factor)) for x in attached]  # sums of them are exact
    return [x.detach() for x in outputs], list(torch.autograd.grad(attached, call.leaves(), cotangents))


def rounding(dtype):
    return torch.finfo(dtype).eps


class Results:
    """One output or gradient: ours, eager PyTorch's, and the truth, in fp64."""

    def __init__(self, factor, op, dtype, ours, eager, truth):
        self.finite, kind, most = ours.isfinite(), ours.dtype, torch.finfo(ours.dtype).max
        self.ours, self.eager, self.truth = ours.double(), eager.double(), truth
        self.held = truth.abs() <= most  # by the dtype; false for NaN
        self.beyond = truth.abs() > 1.1 * most
        known = self.held & eager.isfinite()
        self.size = truth[self.held].abs().max().item() if self.held.any() else 0.0
        error = (self.eager - truth)[known].abs().max().item() if known.any() else 0.0
        self.sound = known.all().item() and error <= 0.1 * self.size + rounding(kind) and self.size < most / 64
        if op in NORMS and error > 0.1 * self.size:  # eager PyTorch's own sums overflow, and it says 0: no measure
            error, known = 0.0, torch.zeros_like(known)
        allowed = factor * error + rounding(kind) * self.size + 256 * torch.finfo(torch.float32).tiny  # subnormals
        # Where eager PyTorch has no number, its error is a rounding of the arguments' dtype.
        self.allowed = torch.where(known, allowed, allowed + factor * rounding(dtype) * self.size)

    def fault(self, sound):
        """What is wrong; None where nothing is. sound: eager PyTorch has all numbers of this call."""
        if sound and not self.finite.all():
            return f"{int((~self.finite).sum())} not finite"
        error = (self.ours - self.truth).abs()
        wrong = self.finite & (self.held & ~(error <= self.allowed) | self.beyond)
        if not wrong.any():
            return None
        at = torch.where(wrong, error, -1).argmax()
        values = (x.flatten()[at] for x in (self.ours, self.truth, self.eager, self.allowed))
        return "{:.6e} for {:.6e} (eager {:.6e}), {:.3e} allowed".format(*values)


@pytest.mark.parametrize(
    ("op", "impl", "case", "dtype", "magnitude"), SWEEP, ids=lambda x: str(x).removeprefix("torch.")
)
def test_extremes(op, impl, case, dtype, magnitude, isa):
    faults = []
    for what, call, size in variants(make(op, case, dtype), magnitude, op, case):
        runs = [run(*each, size) for each in ((call, op, impl), (call, op, "reference"))]
        runs.append(run(call.to(torch.float64), op, "reference", size))
        results = {
            f"{kind} {i}": Results(factor, op, dtype, *each)
            for kind, factor, *triple in zip(("output", "gradient"), FACTORS, *runs, strict=True)
            for i, each in enumerate(zip(*triple, strict=True))
        }
        sound = all(each.sound for each in results.values())
        faults += [f"{what}: {name}: {each.fault(sound)}" for name, each in results.items() if each.fault(sound)]
    assert not faults, "\n".join(faults)
