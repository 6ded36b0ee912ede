"""layer_norm: values, messages and edges; what every op owes is in test_contract.py."""

import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import layer_norm, testing
from m3ae_fast.ops.layer_norm import cases

IMPLS = ["reference", *testing.impls("layer_norm")]
pytestmark = [pytest.mark.parametrize("impl", IMPLS), pytest.mark.usefixtures("poison")]

FP32, BF16 = torch.float32, torch.bfloat16


def rows(*size, dtype=FP32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def test_values_and_gradients_by_formula(impl):
    dtype = testing.widest(impl, "layer_norm")
    x, residual = rows(7, 33, dtype=dtype), rows(7, 33, dtype=dtype, seed=1)
    weight, bias = rows(33, dtype=dtype, seed=2), rows(33, dtype=dtype, seed=3)
    leaves = (x, residual, weight, bias)
    y, s = layer_norm(x, weight, bias, residual=residual, eps=1e-3, impl=impl)
    total = x + residual
    centered = total - total.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close((y, s), (expected, total))
    grads = testing.cotangent(y), testing.cotangent(s).flip(0)
    torch.testing.assert_close(
        torch.autograd.grad((y, s), leaves, grads), torch.autograd.grad((expected, total), leaves, grads)
    )


@pytest.mark.parametrize("residual", [None, FP32, BF16], ids=["alone", "residual_fp32", "residual_bf16"])
@pytest.mark.parametrize("x", [FP32, BF16], ids=["x_fp32", "x_bf16"])
@pytest.mark.parametrize("params", [FP32, BF16], ids=["params_fp32", "params_bf16"])
@pytest.mark.parametrize("out", [None, FP32, BF16], ids=["own", "to_fp32", "to_bf16"])
def test_every_mix_of_dtypes(impl, x, residual, params, out):
    options = {} if residual is None else {"residual": rows(9, 70, dtype=residual, seed=1)}
    call = testing.Call(
        (rows(9, 70, dtype=x), rows(70, dtype=params, seed=2), rows(70, dtype=params, seed=3)),
        options | {"dtype": out},
    )
    summed = x if residual is None else torch.promote_types(x, residual)
    outputs, gradients = call.run(layer_norm, impl=impl)
    assert [t.dtype for t in outputs] == [out or summed] + ([] if residual is None else [summed])
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in call.leaves()]
    eager, eager_gradients = call.run(layer_norm, impl="reference")
    exact = call.to(torch.float64)
    if residual is not None:  # the statistics are those of the rounded sum, which fp64 alone would not round
        s = outputs[1].detach()
        assert torch.equal(s, eager[1])
        true_y = F.layer_norm(s.double(), (70,), exact.args[1], exact.args[2], 1e-6)
    else:
        true_y = F.layer_norm(exact.args[0], (70,), exact.args[1], exact.args[2], 1e-6)
    testing.assert_error_rule("y", outputs[0], eager[0], true_y, factor=2)
    exact.kwargs["dtype"] = None
    truth = exact.run(layer_norm, impl="reference")[1]
    for i, results in enumerate(zip(gradients, eager_gradients, truth, strict=True)):
        testing.assert_error_rule(f"gradient {i}", *results, factor=3)


@pytest.mark.parametrize("width", [40, 520])
@pytest.mark.parametrize("unaligned", ["x", "weight", "residual"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_alignments(impl, dtype, unaligned, width):
    """Rows at a multiple of 8 bytes, a parameter at one of 4: what a GPU moves in packs elsewhere."""

    def place(name, dtype, *size):
        x = rows(*size, dtype=dtype, seed=len(name)).detach()
        offset = (1 if name == "weight" else 8 // x.element_size()) if name == unaligned else 0
        return testing.moved(x, offset).requires_grad_()

    x, weight = place("x", dtype, 5, width), place("weight", FP32, width)
    call = testing.Call((x, weight, None), {"residual": place("residual", dtype, 5, width)})
    outputs, gradients = call.run(layer_norm, impl=impl)
    aligned = call.map(lambda x: x.clone())
    expected, expected_gradients = aligned.run(layer_norm, impl=impl)
    torch.testing.assert_close((outputs, gradients), (expected, expected_gradients))


def test_the_sum_is_normalized_as_it_was_rounded(impl):
    """bf16: y equals the norm of the s that is returned, not of a finer sum that nobody sees."""
    x, residual = rows(64, 40, dtype=BF16), rows(64, 40, dtype=BF16, seed=1)
    y, s = layer_norm(x, None, None, residual=residual, dtype=FP32, impl=impl)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, layer_norm(s, None, None, dtype=FP32, impl=impl))


def test_large_means_do_not_spoil_the_variance(impl):
    x = rows(5, 384).detach() + 1000
    testing.assert_error_rule(
        "y",
        layer_norm(x, None, None, impl=impl),
        F.layer_norm(x, (384,), eps=1e-6),
        F.layer_norm(x.double(), (384,), eps=1e-6),
        factor=2,
    )


def test_rows_of_one_and_constant_rows_give_the_bias(impl):
    bias = rows(1)
    x, weight = rows(6, 1), rows(1, seed=4)
    assert torch.equal(layer_norm(x, weight, bias, impl=impl), bias.expand(6, 1))
    flat = torch.full((3, 64), 0.5)
    assert torch.equal(layer_norm(flat, None, None, impl=impl), torch.zeros(3, 64))


def test_any_leading_dimensions(impl):
    x, weight = rows(2, 3, 4, 8), rows(8, seed=1)
    y, s = layer_norm(x, weight, None, residual=x, impl=impl)
    flat = layer_norm(x.view(-1, 8), weight, None, residual=x.view(-1, 8), impl=impl)
    assert torch.equal(y.view(-1, 8), flat[0]) and torch.equal(s.view(-1, 8), flat[1])
    assert layer_norm(x[0, 0, 0], weight, None, impl=impl).shape == (8,)
    assert layer_norm(rows(0, 4, 8), weight, None, impl=impl).shape == (0, 4, 8)


def test_autocast_keeps_fp32(impl):
    x = rows(4, 16)
    expected = layer_norm(x, None, None, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer_norm(x, None, None, impl=impl), expected)
        assert layer_norm(x, None, None, dtype=BF16, impl=impl).dtype == BF16


def test_either_output_alone_gives_its_own_gradient(impl):
    call = cases.make("residual")
    leaves = call.leaves()
    x, *params, residual = leaves
    y, s = layer_norm(*call.args, **call.kwargs, impl=impl)
    gy, gs = testing.cotangent(y), testing.cotangent(s).flip(0)
    both = torch.autograd.grad((y, s), (x, residual), (gy, gs), retain_graph=True)
    from_y = torch.autograd.grad(y, leaves, gy, retain_graph=True)
    from_s = torch.autograd.grad(s, leaves, gs, allow_unused=True)
    assert torch.equal(both[0], both[1])
    torch.testing.assert_close(both[0], from_y[0] + from_s[0])
    assert torch.equal(from_s[0], gs) and torch.equal(from_s[3], gs)
    assert all(g is None for g in from_s[1:3]) and all(g.any() for g in from_y)
    assert len(params) == 2


def test_only_the_gradients_asked_for_are_made(impl):
    call = cases.make("residual")
    together = call.run(layer_norm, impl=impl)[1]
    for i, leaf in enumerate(call.leaves()):
        x, weight, bias, residual = (t if t is leaf else t.detach() for t in call.leaves())
        y, s = layer_norm(x, weight, bias, residual=residual, impl=impl)
        attached = [t for t in (y, s) if t.requires_grad]
        (alone,) = torch.autograd.grad(attached, leaf, [testing.cotangent(t) for t in attached])
        assert torch.equal(alone, together[i])


def test_element_offsets_past_2_to_the_31(impl):
    """Rows that start past 2**31 elements, in the one pass that only reads: the gradients of weight and bias."""
    if impl == "reference":
        pytest.skip("the reference would write copies of 8 GB")
    if impl == "triton":
        pytest.skip("Triton's interpreter would take minutes over 2**18 rows")
    torch.use_deterministic_algorithms(False)  # or torch.empty would fill all of it
    width, count = 8192, 2**18 + 2
    s, dy = (torch.empty(count, width, dtype=BF16) for _ in range(2))  # fresh pages read as zeros and take no memory
    stats = torch.zeros(2, count)
    stats[1, -2:] = 0.5
    s[-2:], dy[-2:] = 6.0, torch.tensor([[1.0], [4.0]])
    _, (dweight, dbias) = torch.ops.m3ae_fast.layer_norm_backward(impl, dy, None, s, None, stats, False, True)
    assert torch.equal(dbias, torch.full((width,), 5.0)) and torch.equal(dweight, torch.full((width,), 15.0))


def test_fp16_runs_where_the_backend_takes_it(impl):
    x = rows(4, 16, dtype=torch.float16)
    if torch.float16 in testing.dtypes(impl, "layer_norm"):
        assert layer_norm(x, None, None, impl=impl).dtype == torch.float16
    else:
        with pytest.raises(ValueError, match=f"impl='{impl}' cannot run layer_norm: it takes"):
            layer_norm(x, None, None, impl=impl)
        assert layer_norm(rows(4, 16), None, None, dtype=torch.float16, impl=impl).dtype == torch.float16


REFUSED = {
    "width": (dict(weight=torch.ones(9)), ValueError, r"weight must have shape \(8,\), got \(9,\)"),
    "bias": (dict(bias=torch.ones(1, 8)), ValueError, r"bias must have shape \(8,\), got \(1, 8\)"),
    "residual": (dict(residual=torch.ones(3, 8)), ValueError, r"residual must have shape \(4, 8\), got \(3, 8\)"),
    "no tensor": (dict(x=3.0), TypeError, "x must be a tensor, got float"),
    "integers": (dict(x=torch.ones(4, 8).int()), TypeError, "x must be of dtype float32.* got int32"),
    "integer weight": (dict(weight=torch.ones(8).int()), TypeError, "weight must be of dtype .* got int32"),
    "scalar": (dict(x=torch.ones(())), ValueError, r"x must have a last dimension of at least 1, got shape \(\)"),
    "no width": (dict(x=torch.ones(4, 0)), ValueError, r"at least 1, got shape \(4, 0\)"),
    "device": (dict(bias=torch.ones(8, device="meta")), ValueError, "bias must be on cpu, as x is, got meta"),
    "dtype": (dict(dtype=torch.int32), ValueError, "dtype must be one of torch.float32.*, got torch.int32"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_at_the_door(impl, what):
    changes, error, message = REFUSED[what]
    arguments = {"x": torch.ones(4, 8), "weight": None, "bias": None} | changes
    with pytest.raises(error, match=message):
        layer_norm(**arguments, impl=impl)


def test_fp64_rows_of_any_size(impl, isa):
    """Squares of 2^900 are infinite; a power of two changes no digit of what is right."""
    if impl != "cpp":
        pytest.skip("PyTorch's own sums overflow, and other backends take no fp64")
    weight = rows(40, dtype=torch.float64)
    results = []
    for exponent in (400, 900, 1018):
        x = (rows(7, 40, dtype=torch.float64, seed=1).detach().abs() * 2.0**exponent).requires_grad_()
        y = layer_norm(x, weight, None, impl=impl)
        dx, dweight = torch.autograd.grad(y, (x, weight), testing.cotangent(y))
        results.append((y, dx * 2.0**exponent, dweight))
    for each in results[1:]:
        torch.testing.assert_close(each, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "most"), [(FP32, 3e38), (BF16, 3e38), (torch.float64, 1.5e308)])
def test_a_row_wider_than_all_numbers_is_no_row_of_zeros(impl, dtype, most, isa):
    if impl != "cpp":
        pytest.skip("not looked after there")
    x = torch.tensor([[most, -most, -most, 1.0], [1.0, 2.0, 3.0, 4.0]], dtype=dtype).requires_grad_()
    y = layer_norm(x, None, None, impl=impl)
    dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    assert y[0].isnan().all() and dx[0].isnan().all()
    assert y[1].isfinite().all() and dx[1].isfinite().all()
