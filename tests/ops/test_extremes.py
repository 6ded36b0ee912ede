"""Finite arguments of any size: a result within the error rule, or inf or NaN where eager PyTorch has it. Never a
number that looks like a result and is none."""

import math

import pytest
import torch
from torch.utils import _pytree as pytree

import m3ae_fast
from m3ae_fast import SeqLens, _backends, testing

pytestmark = pytest.mark.exhaustive

# What differs between the arithmetic of an op's cases; the rest of SMALL is about sizes and layouts.
CASES = {
    "assemble_tokens": ("small",),
    "feature_regression": ("l2 sample_mean", "l1", "cosine", "cosine plain sum", "l2 plain"),
    "gather_patches": ("planes",),
    "layer_norm": ("small", "residual", "300 columns"),
    "linear": ("small", "gelu", "gelu_tanh", "gelu_input"),
    "linear_cross_entropy": ("small", "sum", "none", "weighted", "batch"),
    "masked_mse": ("mean norm_pix", "past the end", "float norm_pix"),
    "restore_tokens": ("small",),
    "varlen_attention": ("small", "ties"),
}
if _backends.TESTED:  # in bfloat16, delta is made of an out that was rounded: at 1e5, which CPUs see, that is too much
    CASES["varlen_attention"] += ("streamed",)
# 1e37: sums of a few dozen still fit. What only adds, and the backends that run in an interpreter, see fewer.
MAGNITUDES = (1e-38, 1e-30, 1e-20, 1e-10, 1e-5, 1e3, 1e5, 1e7, 1e10, 1e15, 1e20, 1e30, 1e37)
FEW = (1e7, 1e30) if _backends.TESTED else (1e-30, 1e7, 1e20, 1e37)
MIXED = (1e5, 1e20, 1e37)
# The backward pass knows the output as it was rounded, and what it subtracts from the gradients of weights comes of it.
# Where one weight is nearly 1, or large keys tie, gradients of q and k in bfloat16 are differences no larger than that.
OF_ROUNDED_OUTPUT = {("varlen_attention", "cpp", torch.bfloat16): ("gradient 0", "gradient 1")}
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
    if (op, case) == ("varlen_attention", "streamed"):  # more keys than one block of Triton's holds, wider heads
        return testing.Call(
            (*attention_tensors(64, 2, dtype), SeqLens(QUERIES), SeqLens(STREAMED)), {"softmax_scale": 0.125}
        )
    return testing.cases(op).make(case, dtype)


QUERIES, STREAMED, SHORT = [40, 3], [150, 7], [20, 7]


def attention_tensors(width, key_heads, dtype, keys=STREAMED):
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(QUERIES), 2), (sum(keys), key_heads), (sum(keys), key_heads))
    drawn = (torch.randn(*shape, width, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(dtype).requires_grad_() for x in drawn)


def of_size(x, magnitude):
    most = x.detach().abs().max().double()
    return x if most == 0 else (x.double() / most * magnitude).to(x.dtype)


def one_changed(call, i, change):
    number = iter(range(i + 1))
    return call.map(lambda x: change(x) if next(number, None) == i else x)


def variants(call, magnitude, op, case):
    """(what was scaled, the call, what is done to the gradient that comes in)"""
    count = 0 if op in ADDING else sum(x.is_floating_point() for x in call.tensors())
    for i in range(count):
        yield f"argument {i}", one_changed(call, i, lambda x: of_size(x, magnitude)), unchanged
    if case != "ties":  # whose gradients would be what equal terms, rounded, differ by
        yield "all arguments", call.map(lambda x: of_size(x, magnitude)), unchanged
    if call.leaves():
        yield "gradient", call, lambda gradient: gradient * power_of_two(magnitude)


def unchanged(gradient):
    return gradient


def power_of_two(magnitude):
    return 2.0 ** round(math.log2(magnitude))  # sums of such gradients are exact


def mixed(x, magnitude):
    """One value in 40, but at least one, becomes so large, and as many so small, where they lie the same every time."""
    values, most = x.detach().flatten().clone(), power_of_two(magnitude)
    few = -(-x.numel() // 40)
    at = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(x.numel()))[: 2 * few]
    values[at] = values[at].sign() * torch.tensor([most, 1 / most], dtype=x.dtype).repeat_interleave(few)[: len(at)]
    return values.view(x.shape)


def mixed_variants(call, magnitude, case):
    """As variants has them."""
    count = sum(x.is_floating_point() for x in call.tensors())
    for i in range(count):
        yield f"argument {i}", one_changed(call, i, lambda x: mixed(x, magnitude)), unchanged
    if count > 1 and case != "l1":  # whose gradient is the sign of differences that rounding decides
        yield "all arguments", call.map(lambda x: mixed(x, magnitude)), unchanged
    if call.leaves():
        yield "gradient", call, lambda gradient: mixed(gradient, magnitude)


def run(call, op, impl, change):
    outputs = pytree.tree_leaves(getattr(m3ae_fast, op)(*call.args, **call.kwargs, impl=impl))
    attached = [x for x in outputs if x.requires_grad]
    if not attached:
        return outputs, []
    cotangents = [change(testing.cotangent(x)) for x in attached]
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


def whole(*tensors):
    yield tensors


def by_size(ours, eager, truth):
    """All, and rows whose largest values are of like size: errors of large rows say nothing about small ones."""
    yield ours, eager, truth
    ours, eager, truth = (x.reshape(-1, x.shape[-1] if x.dim() else 1) for x in (ours, eager, truth))
    size = truth.abs().amax(1).clamp(min=1e-300).log10().div(4).round()
    for each in size[size.isfinite() & eager.isfinite().all(1)].unique():
        yield tuple(x[size == each] for x in (ours, eager, truth))


def faults(op, impl, dtype, tried, parts):
    """What is wrong with the results of some calls, each compared in parts."""
    for what, call, change in tried:
        runs = [run(*each, change) for each in ((call, op, impl), (call, op, "reference"))]
        runs.append(run(call.to(torch.float64), op, "reference", change))
        results = [
            (f"{kind} {i}", Results(factor, op, dtype, *part))
            for kind, factor, *triple in zip(("output", "gradient"), FACTORS, *runs, strict=True)
            for i, each in enumerate(zip(*triple, strict=True))
            for part in parts(*each)
        ]
        sound = all(each.sound for _, each in results)
        yield from (f"{what}: {name}: {each.fault(sound)}" for name, each in results if each.fault(sound))


@pytest.mark.parametrize(
    ("op", "impl", "case", "dtype", "magnitude"), SWEEP, ids=lambda x: str(x).removeprefix("torch.")
)
def test_extremes(op, impl, case, dtype, magnitude, isa):
    left_out = OF_ROUNDED_OUTPUT.get((op, impl, dtype), ()) if case == "streamed" else ()
    found = faults(op, impl, dtype, variants(make(op, case, dtype), magnitude, op, case), whole)
    found = [each for each in found if each.split(": ")[1] not in left_out]
    assert not found, "\n".join(found)


@pytest.mark.skipif(_backends.TESTED is not None, reason="what runs in an interpreter sees whole tensors alone")
@pytest.mark.parametrize(
    ("op", "impl", "case", "dtype", "magnitude"),
    [(*each, magnitude) for *each, of_all in SWEEP if of_all == FEW[0] for magnitude in MIXED],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_mixed_extremes(op, impl, case, dtype, magnitude, isa, request):
    """A few large and small values among ordinary ones."""
    if (op, impl, dtype, isa) == ("varlen_attention", "cpp", torch.float32, "avx2"):
        reason = "on a Zen 3 dk is off by 3.3 to 3.7 times what PyTorch's is off by there, where 3 times is allowed"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))
    left_out = OF_ROUNDED_OUTPUT.get((op, impl, dtype), ())
    tried = mixed_variants(make(op, case, dtype), magnitude, case)
    found = [each for each in faults(op, impl, dtype, tried, by_size) if each.split(": ")[1] not in left_out]
    assert not found, "\n".join(found)


ATTENTION = [
    (impl, dtype, keys)
    for impl in testing.impls("varlen_attention")
    for dtype in DTYPES
    if dtype in testing.dtypes(impl, "varlen_attention")
    for keys in (SHORT, STREAMED)
]
of_attention = pytest.mark.parametrize(
    ("impl", "dtype", "keys"), ATTENTION, ids=lambda x: str(x).removeprefix("torch.").replace(" ", "")
)


@of_attention
@pytest.mark.parametrize(("width", "key_heads"), [(64, 2), (80, 1)])
def test_a_key_with_all_the_weight_has_all_the_gradient(impl, dtype, keys, width, key_heads):
    """Exactly: the scores of the backward pass are those of the forward pass, and delta is what dweights are there."""
    for size in (1e7, 1e20):
        q, k, v = attention_tensors(width, key_heads, dtype, keys)
        q = (q.detach().double() * size).to(dtype).requires_grad_()
        lengths = SeqLens(QUERIES), SeqLens(keys)
        out = m3ae_fast.varlen_attention(q, k, v, *lengths, softmax_scale=1.0, impl=impl)
        dout = testing.cotangent(out)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
        truth = m3ae_fast.varlen_attention(q, k, v, *lengths, softmax_scale=1.0, impl="reference")
        assert torch.equal(out.double(), truth)
        assert not dq.any() and not dk.any()
        assert torch.equal(dv, torch.autograd.grad(truth, v, dout.double())[0].to(dtype))


@of_attention
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_scores_that_are_all_infinitely_low_make_no_number(impl, dtype, keys, scale):
    """In their rows alone: others, and queries without keys, are as ever."""
    q, k, v = attention_tensors(64, 2, dtype, keys)
    lengths = SeqLens([*QUERIES, 5]), SeqLens([*keys, 0])
    alone = m3ae_fast.varlen_attention(q, k, v, SeqLens(QUERIES), SeqLens(keys), softmax_scale=scale, impl=impl)
    q = torch.cat([q, q[:5]]).detach().requires_grad_()
    with torch.no_grad():
        q[0], k[: keys[0]] = -scale * 1e20, 1e20
        q[1 : QUERIES[0]] = 0
    out, lse = m3ae_fast.varlen_attention(q, k, v, *lengths, softmax_scale=scale, return_lse=True, impl=impl)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert out[0].isnan().all() and dq[0].isnan().all()
    assert out[1:].isfinite().all() and dq[1:].isfinite().all()
    for gradient in (dk, dv):
        assert gradient[: keys[0]].isnan().all() and gradient[keys[0] :].isfinite().all()
    assert torch.equal(out[QUERIES[0] : -5], alone[QUERIES[0] :])
    assert not out[-5:].any() and not dq[-5:].any() and (lse[:, -5:] == -torch.inf).all()


@of_attention
@pytest.mark.parametrize("scale", [1e-46, -1e-46])
def test_a_scale_that_is_0_in_fp32_weighs_all_keys_alike(impl, dtype, keys, scale):
    results = []
    for softmax_scale in (scale, 0.0):
        q, k, v = attention_tensors(64, 2, dtype, keys)
        call = testing.Call((q, k, v, SeqLens(QUERIES), SeqLens(keys)), {"softmax_scale": softmax_scale})
        results.append(call.run(m3ae_fast.varlen_attention, impl=impl))
    for ours, plain in zip(*(pytree.tree_leaves(each) for each in results), strict=True):
        assert torch.equal(ours, plain) and ours.isfinite().all()


@pytest.mark.parametrize("impl", testing.impls("feature_regression"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
def test_the_cosine_of_rows_whose_norm_is_past_the_largest_number(impl, dtype):
    pred, target = (torch.randn(2, 4, 64, dtype=torch.float64).sign() * 2e38).to(dtype)
    target[1] = pred[1]
    losses = [
        m3ae_fast.feature_regression(
            x.requires_grad_(), y, distance="cosine", normalize=False, reduction="none", impl=each
        )
        for each, x, y in ((impl, pred, target), ("reference", pred.detach().double(), target.double()))
    ]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=0, atol=1e-5)
    assert torch.autograd.grad(losses[0].sum(), pred)[0].isfinite().all()
