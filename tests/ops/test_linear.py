"""linear: what the contract tests do not cover."""

import re

import pytest
import torch
import torch.nn.functional as F

import m3ae_fast
from m3ae_fast import linear, testing
from m3ae_fast.ops.linear import cases
from m3ae_fast.ops.linear import op as linear_op

IMPLS = ["reference", *testing.impls("linear")]


def tensors(rows=5, inner=7, outer=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=generator).to(dtype) for size in ((rows, inner), (outer, inner), (outer,))]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_values(impl, activation):
    x, weight, bias = tensors()
    z = (x.double()[:, None, :] * weight.double()).sum(2) + bias.double()
    y = {
        None: z,
        "gelu": z * 0.5 * torch.special.erfc(-z / 2**0.5),
        "gelu_tanh": z * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    }[activation]
    torch.testing.assert_close(linear(x, weight, bias, activation=activation, impl=impl).double(), y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3), (0, 3), (3, 0)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_any_rank_and_empty_sizes(impl, leading, activation):
    for inner, outer in ((7, 11), (0, 11), (7, 0)):
        x = torch.randn(*leading, inner, requires_grad=True)
        weight, bias = (torch.randn(outer, inner, requires_grad=True), torch.randn(outer, requires_grad=True))
        y = linear(x, weight, bias, activation=activation, impl=impl)
        assert y.shape == (*leading, outer)
        want = F.linear(x, weight, bias)
        want = F.gelu(want) if activation else want
        torch.testing.assert_close(y, want)
        cotangent = torch.randn_like(y)
        for ours, theirs in zip(
            torch.autograd.grad(y, (x, weight, bias), cotangent),
            torch.autograd.grad(want, (x, weight, bias), cotangent),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_transposed_weight(impl):
    x, weight, bias = tensors()
    held = weight.t().contiguous().t()
    torch.testing.assert_close(linear(x, held, bias, impl=impl), linear(x, weight, bias, impl=impl), rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", range(8))
def test_only_the_gradients_asked_for(impl, wanted):
    values = tensors()
    for i, each in enumerate(values):
        each.requires_grad_(bool(wanted >> i & 1))
    y = linear(*values, activation="gelu", impl=impl)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.square().sum().backward()
    for each in values:
        assert (each.grad is not None) == each.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("impl", [i for i in testing.impls("linear") if i == "cpp"])
def test_thread_counts_give_the_same_bits_at_real_sizes(impl, case, dtype, threads):
    """Where the products are ours. Torch's own may differ from one thread count to another: there ours are torch's."""
    call, results = cases.make(case, dtype), []
    for count in (1, 2, 3):
        threads(count)
        outputs, gradients = call.run(linear, impl=impl)
        results.append(outputs + gradients)
        have, expected = results[-1], results[0]
        if not linear_op.BACKENDS[impl].products(dtype):
            outputs, gradients = call.run(linear, impl="reference")
            expected = outputs + gradients
            if call.kwargs.get("activation"):  # our own derivative of GELU, where the gradients begin, rounds elsewhere
                have, expected = have[: len(outputs)], outputs
        assert all(torch.equal(a, b) for a, b in zip(have, expected, strict=True)), f"{count} threads"


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes_take_the_widest(impl):
    x, weight, bias = tensors()
    x = x.bfloat16().requires_grad_()
    y = linear(x, weight.requires_grad_(), bias, impl=impl)
    assert y.dtype == torch.float32
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.dtype == torch.bfloat16 and dweight.dtype == torch.float32


def test_float16_goes_to_the_reference_on_cpu():
    x, weight, bias = tensors(dtype=torch.float16)
    assert torch.equal(linear(x, weight, bias), linear(x, weight, bias, impl="reference"))
    with pytest.raises(ValueError, match="impl='cpp' cannot run linear: it takes float32, bfloat16, float64, got"):
        linear(x, weight, bias, impl="cpp")


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    x, weight, bias = (t.requires_grad_() for t in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias, activation="gelu", impl=impl)
        if torch.float64 in testing.dtypes(impl, "linear"):
            assert linear(x.double(), weight, bias, impl=impl).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), linear(x, weight, bias, activation="gelu"), rtol=0.03, atol=0.03)
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("activations", [(None, None), ("gelu", None), (None, "gelu_tanh")])
def test_autocast_rounds_the_weight_on_its_way_and_its_gradient_not_at_all(isa, by_torch, activations, monkeypatch):
    """Where the products are ours; where torch multiplies, the same numbers, rounded."""
    backend = linear_op.BACKENDS["cpp"]
    if by_torch:
        monkeypatch.setattr(backend, "products", lambda dtype: 0)
    activation, input_activation = activations
    options = {"activation": activation, "input_activation": input_activation}
    values = [t.requires_grad_() for t in tensors(rows=50, inner=70, outer=67)]
    dy = torch.randn(50, 67, generator=torch.Generator().manual_seed(1))

    def run(impl, values, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = linear(*values, **options, impl=impl)
        return [y, *torch.autograd.grad(y, values, dy.to(y.dtype))]

    ours, eager = run("cpp", values, True), run("reference", values, True)
    truth = run("reference", [t.detach().double().requires_grad_() for t in values], False)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for name, factor, *results in zip(("y", "dx", "dweight", "dbias"), (2, 3, 3, 3), ours, eager, truth, strict=True):
        testing.assert_error_rule(name, *results, factor)
    if activations == (None, None) and backend.products(torch.bfloat16):
        x, dz = values[0].detach().bfloat16().double(), dy.bfloat16().double()
        torch.testing.assert_close(ours[2].double(), dz.t() @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", testing.impls("linear"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(40_000, 300, 70), (50, 70, 1300), (7, 1300, 1100)])
def test_products_of_several_column_groups(impl, dtype, sizes):
    """A long contraction and a wide result are computed some columns at a time."""
    if impl == "triton":
        pytest.skip("its products are torch's")
    call = testing.Call(tuple(t.requires_grad_() for t in tensors(*sizes, dtype)))
    references = (each.run(linear, impl="reference") for each in (call, call.to(torch.float64)))
    testing.assert_error_rules(call.run(linear, impl=impl), *references)


@pytest.mark.skipif("cpp" not in testing.impls("linear"), reason="the compiled module is missing")
def test_fp32_products_are_torchs_on_intel(isa, monkeypatch):
    """Where torch's settings ask for no bf16 that this set has; explain() says so, and the results are F.linear's."""
    backend, torchs, ours = linear_op.BACKENDS["cpp"], 0, 1
    like = {dtype: torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)}

    def of(dtype, precision, intel):
        return backend._C.products_of(like[dtype], precision, intel)

    for precision in ("none", "ieee", "tf32", "bf16"):
        elsewhere = of(torch.float32, precision, False)
        assert of(torch.float32, precision, True) == (torchs if elsewhere == ours else elsewhere)
        for dtype in (torch.bfloat16, torch.float64):
            assert of(dtype, precision, True) == of(dtype, precision, False)
    assert of(torch.float32, "ieee", False) == (torchs if isa == "scalar" else ours)

    monkeypatch.setattr(backend, "products", lambda dtype: of(dtype, "ieee", True))
    line = next(line for line in m3ae_fast.explain().splitlines() if line.startswith("products"))
    assert re.search(r"fp32[^;]* by torch's F\.linear", line)
    x, weight, bias = tensors(rows=50, inner=70, outer=67)
    assert torch.equal(linear(x, weight, bias, impl="cpp"), F.linear(x, weight, bias))


def test_errors():
    x, weight, _ = tensors()
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        linear([1.0], weight)
    with pytest.raises(ValueError, match="x must have at least one dimension, got a scalar"):
        linear(x[0, 0], weight)
    with pytest.raises(TypeError, match="x must be of dtype float32, bfloat16, float16, float64, got int64"):
        linear(x.long(), weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(any, 7\), got \(7, 11\)"):
        linear(x, weight.t())
    with pytest.raises(ValueError, match=r"bias must have shape \(11,\), got \(7,\)"):
        linear(x, weight, x[0])
    with pytest.raises(TypeError, match="weight must be of dtype float32, bfloat16, float16, float64, got int32"):
        linear(x, weight.int())
    with pytest.raises(ValueError, match="activation must be one of None, 'gelu', 'gelu_tanh', got 'relu'"):
        linear(x, weight, activation="relu")
    with pytest.raises(ValueError, match="weight must be on cpu, as x is, got meta"):
        linear(x, weight.to("meta"))
