"""The precision that torch's settings ask of products of fp32 tensors, on the CPU."""

import pytest
import torch

from m3ae_fast import explain, linear, linear_cross_entropy, testing
from m3ae_fast.ops.linear import cases as linear_cases
from m3ae_fast.ops.linear_cross_entropy import cases as cross_entropy_cases

PAIRS, TILES = ("avx512_bf16", "amx", "amx_emulated"), ("amx", "amx_emulated")  # sets with instructions for bf16
# Rows, width and outer size: several blocks of each, none of them full.
SIZES = {linear: ((13, 1030, 1090), (601, 33, 70)), linear_cross_entropy: ((70, 530, 1100), (530, 33, 70))}
SMALL = [(linear, case) for case in linear_cases.SMALL]
SMALL += [(linear_cross_entropy, case) for case in cross_entropy_cases.SMALL]
CASES = [(function, size) for function, sizes in SIZES.items() for size in sizes] + SMALL

pytestmark = [
    pytest.mark.skipif("cpp" not in testing.impls("linear"), reason="the compiled module is missing"),
    pytest.mark.usefixtures("poison", "own_products"),
]


SEEDS = 3  # an error of one number may be small by chance: the largest of several is not


def make(function, case, seed=0):
    cases = linear_cases if function is linear else cross_entropy_cases
    if isinstance(case, str):
        return cases.make(case, seed=seed)
    rows, width, outer = case
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, width), (outer, width), (outer,))
    x, weight, bias = (torch.randn(*size, generator=generator).requires_grad_() for size in sizes)
    weight.detach().mul_(width**-0.5)
    if function is linear:
        return testing.Call((x, weight, bias), {"activation": "gelu", "input_activation": "gelu_tanh"})
    return testing.Call((x, weight, torch.randint(outer, (rows,), generator=generator), bias))


@pytest.fixture
def ask():
    """torch.set_float32_matmul_precision, put back afterwards."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


def together(*runs):
    """Each tensor that the runs return, with its counterparts."""
    return [each for results in zip(*runs, strict=True) for each in zip(*results, strict=True) if each[0].numel()]


def errors(function, case, precision, seeds, ask):
    """Of every tensor that comes out, forward and backward: the largest errors in `precision`, in "highest" and of
    eager PyTorch with bf16 tensors. And whether `precision` changed anything."""
    largest, changed = {}, False
    for seed in range(seeds):
        call = make(function, case, seed)
        exact = call.run(function, impl="cpp")
        bf16, truth = (call.to(dtype).run(function, impl="reference") for dtype in (torch.bfloat16, torch.float64))
        ask(precision)
        ours = call.run(function, impl="cpp")
        ask("highest")
        for i, (*results, true) in enumerate(together(ours, exact, bf16, truth)):
            assert results[0].dtype == torch.float32
            of_each = torch.stack([(x.double() - true).detach().abs().max() for x in results])
            largest[i] = torch.maximum(largest.get(i, of_each), of_each)
            changed = changed or not torch.equal(*results[:2])
    return [tuple(map(float, each)) for each in largest.values()], changed


@pytest.mark.parametrize(("function", "case"), CASES)
def test_medium_is_as_exact_as_bf16(function, case, isa, ask):
    """By the error rule, against eager PyTorch with bf16 tensors. Where a set cannot do it faster it is "highest"."""
    of_each, changed = errors(function, case, "medium", SEEDS if isa in PAIRS else 1, ask)
    for ours, fp32, bf16 in of_each:
        assert ours <= 2 * bf16 + fp32
    assert changed == (isa in PAIRS and case not in ("empty", "all_ignored"))


@pytest.mark.parametrize(("function", "case"), CASES)
def test_high_is_nearly_as_exact_as_fp32(function, case, isa, ask):
    """Rounding to bf16 leaves up to 2^-9 of a number, and 2^-18 the second time. A product of two such sums is within
    3 * 2^-18 of itself (the last roundings, and the product of the rests, which is left out), one of bf16 within
    2 * 2^-9. So the error is at most fp32's and 1/128 of bf16's. Where a set cannot do it faster it is "highest"."""
    of_each, changed = errors(function, case, "high", SEEDS if isa in TILES else 1, ask)
    for ours, fp32, bf16 in of_each:
        assert ours <= 2 * fp32 + bf16 / 128
    assert changed == (isa in TILES and case not in ("empty", "all_ignored"))


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize(("function", "case"), [each for each in CASES if not isinstance(each[1], str)])
def test_thread_counts_give_the_same_bits(function, case, precision, isa, threads, ask):
    ask(precision)
    call, results = make(function, case), []
    for count in (1, 2, 3):
        threads(count)
        results.append(call.run(function, impl="cpp"))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in together(*results))


@pytest.mark.filterwarnings("error")
def test_each_setting_of_torch_is_read():
    """Without a warning, whichever of torch's settings was used."""
    from m3ae_fast import _cpp

    matmul = torch.backends.mkldnn.matmul
    try:
        matmul.fp32_precision = "none"  # or the wider settings would not count
        for module in (torch.backends, torch.backends.mkldnn, matmul):
            for value in ("bf16", "tf32", "ieee"):
                module.fp32_precision = value
                assert _cpp.precision() == value
            module.fp32_precision = "none"
        for value, expected in (("medium", "bf16"), ("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(value)
            assert _cpp.precision() == expected
        torch.backends.cuda.matmul.allow_tf32 = True  # a GPU's
        assert _cpp.precision() == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_other_dtypes_are_as_they_were(isa, ask):
    for dtype in (torch.bfloat16, torch.float64):
        call = linear_cases.make("small", dtype)
        before = call.run(linear, impl="cpp")
        ask("medium")
        assert all(torch.equal(a, b) for a, b in together(call.run(linear, impl="cpp"), before))
        ask("highest")


def test_a_compiled_call_obeys_at_run_time(ask):
    call = linear_cases.make("gelu")
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for precision in ("highest", "medium", "highest"):
        ask(precision)
        ours, eager = call.run(compiled, impl="cpp"), call.run(linear, impl="cpp")
        assert all(torch.equal(a, b) for a, b in together(ours, eager))


def test_explain_says_what_runs(isa, ask):
    def line():
        return next(line for line in explain().splitlines() if line.startswith("products"))

    before = line()
    assert "rounded" not in before and "sums of two" not in before
    ask("medium")
    assert ("rounded to bf16" in line()) == (isa in PAIRS)
    ask("high")
    assert ("sums of two bf16" in line()) == (isa in TILES)
    ask("highest")
    assert line() == before
