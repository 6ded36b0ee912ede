"""feature_regression: values against the formulas, reductions, what counts nowhere, precision, errors."""

import math

import pytest
import torch

from m3ae_fast import SeqLens, feature_regression, testing
from m3ae_fast.ops.feature_regression import cases

IMPLS = ["reference", *testing.impls("feature_regression")]
DISTANCES = ["l2", "l1", "cosine"]
REDUCTIONS = ["mean", "sum", "none", "sample_mean"]


def row_loss(pred, target, distance, normalize):
    """[R] of rows that face each other, by the formulas."""
    if normalize:
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    if distance == "cosine":
        lengths = pred.square().sum(1).sqrt() * target.square().sum(1).sqrt()
        return 1 - (pred * target).sum(1) / lengths.clamp(min=1e-12)
    off = pred - target
    return (off.square() if distance == "l2" else off.abs()).mean(1)


def problem(width=75, lengths=(3, 0, 12), seed=0):
    """(pred, target, rows, cu): rows name some of the targets more than once, out of order."""
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(sum(lengths), width, generator=generator)
    target = 3 * torch.randn(11, width, generator=generator) + 1
    rows = torch.randint(0, 11, (sum(lengths),), generator=generator)
    return pred, target, rows, SeqLens(lengths)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("width", [2, 75, 768])
def test_values_and_gradients(impl, normalize, distance, width, isa, poison):
    pred, target, rows, cu = problem(width)
    exact = pred.double().requires_grad_()
    each = row_loss(exact, target.double()[rows], distance, normalize)
    want = {
        "mean": each.mean(),
        "sum": each.sum(),
        "none": each,
        "sample_mean": (each[:3].mean() + 0 + each[3:].mean()) / 3,
    }
    for reduction, loss in want.items():
        pred = pred.detach().requires_grad_()
        options = {"distance": distance, "normalize": normalize, "reduction": reduction, "cu_seqlens": cu}
        got = feature_regression(pred, target, rows, impl=impl, **options)
        assert got.dtype == torch.float32 and got.shape == loss.shape
        torch.testing.assert_close(got.double(), loss, rtol=2e-5, atol=1e-6)
        cotangent = testing.cotangent(loss.detach())
        (gradient,) = torch.autograd.grad(got, pred, cotangent.float())
        (expected,) = torch.autograd.grad(loss, exact, cotangent, retain_graph=True)
        torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("impl", IMPLS)
def test_defaults_are_the_mean_of_squares_row_by_row(impl):
    pred, target, rows, _ = problem()
    facing = target[rows]
    want = row_loss(pred, facing, "l2", True).mean()
    torch.testing.assert_close(feature_regression(pred, facing, impl=impl), want)
    torch.testing.assert_close(feature_regression(pred, target, rows.int(), impl=impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_flat_target_stays_flat(impl, isa):
    """A row of one value is 0 when normalized: rounding must not be blown up by 1 / sqrt(1e-6)."""
    target = torch.arange(0.1, 250, 10)[:, None].expand(25, 768).contiguous()
    loss = feature_regression(torch.zeros(25, 768), target, reduction="none", impl=impl)
    assert float(loss.max()) <= (0.0 if impl != "reference" else 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_targets_far_from_zero_keep_their_precision(impl, isa):
    pred, target, rows, _ = problem(768)
    want = row_loss(pred.double(), (target + 1000).double()[rows], "l2", True).mean()
    torch.testing.assert_close(
        feature_regression(pred, target + 1000, rows, impl=impl).double(), want, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("first", [3, 30, 3000])
def test_a_first_value_far_out_costs_no_precision(impl, first, isa):
    """Sums run over differences from it."""
    pred, target, rows, _ = problem(768)
    target[:, 0] = first
    want = row_loss(pred.double(), target.double()[rows], "l2", True).mean()
    loss = feature_regression(pred, target, rows, impl=impl)
    torch.testing.assert_close(loss.double(), want, rtol=3e-7, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_eps_is_added_to_the_variance(impl):
    pred, target, rows, _ = problem()
    large = feature_regression(pred, target, rows, eps=1e9, impl=impl)
    torch.testing.assert_close(large, pred.square().mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_l1_has_the_gradient_of_pytorch(impl, isa):
    """0 at equality, and at NaN, which shows in the loss."""
    pred = torch.tensor([[1.0, 2.0, 3.0, torch.nan]], requires_grad=True)
    target = torch.tensor([[1.0, 1.0, 4.0, 0.0]])
    loss = feature_regression(pred, target, distance="l1", normalize=False, impl=impl)
    (gradient,) = torch.autograd.grad(loss, pred)
    assert loss.isnan()
    assert gradient.tolist() == [[0, 0.25, -0.25, 0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_zero_vector_has_a_cosine_of_zero(impl, isa):
    pred = torch.zeros(2, 40).requires_grad_()
    target = torch.stack([torch.zeros(40), torch.ones(40)])
    loss = feature_regression(pred, target, distance="cosine", normalize=False, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    assert loss.tolist() == [1, 1]
    assert torch.equal(gradient[0], torch.zeros(40))
    torch.testing.assert_close(gradient[1], torch.full((40,), -1e8 / math.sqrt(40)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_past_the_end_count_nowhere(impl, distance, reduction, poison):
    pred, target, rows, cu = problem()
    more = torch.cat([pred, torch.full((2, 75), torch.nan)]).requires_grad_()
    more_rows = torch.cat([rows, torch.tensor([-5, 10**7])])
    pred.requires_grad_()
    options = {"distance": distance, "reduction": reduction, "cu_seqlens": cu, "impl": impl}
    loss, longer = (
        feature_regression(pred, target, rows, **options),
        feature_regression(more, target, more_rows, **options),
    )
    cotangent = torch.ones_like(longer)
    if reduction == "none":
        cotangent[-2:] = torch.nan
    (want,), (got,) = torch.autograd.grad(loss.sum(), pred), torch.autograd.grad(longer, more, cotangent)
    torch.testing.assert_close(longer[: len(loss)] if reduction == "none" else longer, loss)
    assert reduction != "none" or torch.equal(longer[len(loss) :], torch.zeros(2))
    assert torch.equal(got, torch.cat([want, torch.zeros(2, 75)]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "sample_mean"])
@pytest.mark.parametrize(("samples", "rows", "targets"), [(0, 0, 0), (3, 0, 4), (0, 2, 4), (3, 2, 0)])
def test_without_any_row_the_loss_is_zero_and_attached(impl, distance, reduction, samples, rows, targets):
    pred = torch.randn(rows, 24, requires_grad=True)
    loss = feature_regression(
        pred, torch.randn(targets, 24), torch.zeros(rows, dtype=torch.int32), distance=distance, reduction=reduction,
        cu_seqlens=SeqLens([0] * samples), impl=impl,
    )  # fmt: skip
    assert loss == 0 and loss.requires_grad
    (gradient,) = torch.autograd.grad(loss, pred)
    assert torch.equal(gradient, torch.zeros(rows, 24))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_target_is_a_constant(impl):
    pred, target, rows, _ = problem()
    pred.requires_grad_()
    target.requires_grad_()
    feature_regression(pred, target, rows, impl=impl).backward()
    assert pred.grad is not None and target.grad is None
    assert not feature_regression(pred.detach(), target, rows, impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_a_kept_graph_gives_its_gradient_again(impl):
    pred, target, rows, _ = problem()
    pred.requires_grad_()
    loss = feature_regression(pred, target, rows, impl=impl)
    (once,) = torch.autograd.grad(loss, pred, retain_graph=True)
    once = once.clone()
    (scaled,) = torch.autograd.grad(3 * loss, pred, retain_graph=True)
    (last,) = torch.autograd.grad(3 * loss, pred)
    assert torch.equal(scaled, last)
    torch.testing.assert_close(scaled, 3 * once)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("pred_dtype", "target_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
)
def test_dtypes_may_differ(impl, distance, pred_dtype, target_dtype, isa):
    """Only what comes in is rounded, and the gradient on its way out: under autocast too."""
    pred, target, rows, _ = problem()
    low = pred.to(pred_dtype).requires_grad_()
    target = target.to(target_dtype)
    high = low.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = feature_regression(low, target, rows, distance=distance, impl=impl)
    same = feature_regression(high, target.float(), rows, distance=distance, impl=impl)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, same)
    (gradient,), (exact,) = torch.autograd.grad(3 * loss, low), torch.autograd.grad(3 * same, high)
    assert gradient.dtype == pred_dtype
    eps = torch.finfo(pred_dtype).eps
    torch.testing.assert_close(gradient.float(), exact, rtol=eps, atol=0)  # made and scaled: each rounded to half of it


@pytest.mark.parametrize("impl", testing.impls("feature_regression"))
def test_float64_predictions_are_met_in_float64(impl):
    if torch.float64 not in testing.dtypes(impl, "feature_regression"):
        pytest.skip(f"{impl} takes no float64")
    pred, target, rows, _ = problem()
    loss = feature_regression(pred.double(), target, rows, impl=impl)
    assert loss.dtype == torch.float64
    want = row_loss(pred.double(), target.double()[rows], "l2", True).mean()
    torch.testing.assert_close(loss, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "impl", ["reference", *(i for i in IMPLS if torch.float16 in testing.dtypes(i, "feature_regression"))]
)
def test_small_float16_gradients_wait_for_their_loss_scale(impl):
    """1 / (R D) is 5e-6 here, of which float16 keeps six bits."""
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(256, 768, generator=generator).half().requires_grad_()
    target = torch.randn(256, 768, generator=generator)
    loss = feature_regression(pred, target, impl=impl)
    exact = pred.detach().double().requires_grad_()
    want = row_loss(exact, target.double(), "l2", True).mean()
    (gradient,), (expected,) = torch.autograd.grad(loss * 2**16, pred), torch.autograd.grad(want * 2**16, exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_many_threads_give_the_same_bits(distance, threads):
    """Rows enough for each thread to get some."""
    call = cases.make(f"mamo_small {distance}")
    bits = []
    for count in (1, 2, 3):
        threads(count)
        bits.append(call.run(feature_regression, impl="cpp"))
    for again in bits[1:]:
        assert torch.equal(again[0][0], bits[0][0][0]) and torch.equal(again[1][0], bits[0][1][0])


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_past_31_bits(impl):
    """The last row of 4 GiB of features, of which the machine gives only the pages that are touched."""
    if impl == "reference":
        pytest.skip("the reference copies them all")
    target = torch.empty(2**15 + 1, 2**16, dtype=torch.bfloat16)
    target[-1] = 1
    pred = torch.full((1, 2**16), 3.0, requires_grad=True)
    loss = feature_regression(pred, target, torch.tensor([2**15]), normalize=False, impl=impl)
    assert loss == 4
    (gradient,) = torch.autograd.grad(loss, pred)
    assert torch.equal(gradient, torch.full((1, 2**16), 4 / 2**16))


def test_half_on_the_cpu_goes_to_the_reference():
    pred, target, rows, _ = problem()
    loss = feature_regression(pred.half(), target, rows)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, feature_regression(pred.half().float(), target, rows))
    with pytest.raises(ValueError, match=r"impl='cpp' cannot run feature_regression: it takes .*, got torch\.float16"):
        feature_regression(pred, target.half(), rows, impl="cpp")


PRED, TARGET, ROWS, CU = torch.zeros(3, 8), torch.zeros(4, 8), torch.tensor([0, 3, 3]), torch.tensor([0, 2, 3])


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred": PRED[0]}, ValueError, r"pred must have shape \(any, any\), got \(8,\)"),
        ({"pred": PRED[:, :0], "target": TARGET[:, :0]}, ValueError, "pred must have a last dimension of at least 1"),
        ({"pred": PRED.int()}, TypeError, "pred must be of dtype float32, bfloat16, float16, float64, got int32"),
        ({"target": TARGET[:, 1:]}, ValueError, r"target must have shape \(any, 8\), got \(4, 7\)"),
        ({"target": TARGET.int()}, TypeError, "target must be of dtype"),
        ({"rows": None}, ValueError, r"target must have shape \(3, 8\), got \(4, 8\)"),
        ({"rows": ROWS[:2]}, ValueError, r"rows must have shape \(3,\), got \(2,\)"),
        ({"rows": ROWS.float()}, TypeError, "rows must be of dtype int32, int64"),
        ({"distance": "smooth_l1"}, ValueError, "distance must be one of 'l2', 'l1', 'cosine', got 'smooth_l1'"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', 'sample_mean', got"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"eps": math.nan}, ValueError, "eps must be positive, got nan"),
        ({"cu_seqlens": None}, ValueError, 'cu_seqlens must be given for reduction="sample_mean", got None'),
        ({"cu_seqlens": CU.float()}, TypeError, "cu_seqlens must be of dtype int32, int64"),
        # what a GPU would have to sync for
        ({"rows": torch.tensor([0, 4, 3])}, ValueError, r"rows must be in \[0, 4\)"),
        ({"rows": torch.tensor([0, -1, 3])}, ValueError, r"rows must be in \[0, 4\)"),
        ({"rows": torch.tensor([0, 2**32 + 1, 3])}, ValueError, r"rows must be in \[0, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, ValueError, "cu_seqlens must ascend from 0 to at most 3 rows, got"),
        ({"cu_seqlens": torch.tensor([1, 2, 3])}, ValueError, "cu_seqlens must ascend from 0 to at most 3 rows, got"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, "cu_seqlens must ascend from 0 to at most 3 rows, got"),
    ],
)
def test_errors(impl, change, error, message):
    arguments = {"pred": PRED, "target": TARGET, "rows": ROWS, "cu_seqlens": CU, "reduction": "sample_mean"} | change
    with pytest.raises(error, match=message):
        feature_regression(**arguments, impl=impl)


@pytest.mark.parametrize("case", ["l2 sample_mean", "cosine"])
def test_the_reference_compiles_whole(case):
    torch._dynamo.reset()
    compiled = torch.compile(feature_regression, backend="aot_eager", fullgraph=True, dynamic=True)
    for seed in (0, 1):
        call = cases.make(case, seed=seed)
        ours, gradient = call.run(feature_regression, impl="reference")
        again, gradient_again = call.run(compiled, impl="reference")
        assert torch.equal(ours[0], again[0]) and torch.equal(gradient[0], gradient_again[0])


@pytest.mark.skipif("cpp" not in testing.impls("feature_regression"), reason="other backends take no fp64")
@pytest.mark.parametrize(("distance", "normalize"), [("l2", True), ("l1", True), ("cosine", True), ("cosine", False)])
def test_fp64_features_of_any_size(distance, normalize, isa, poison):
    """Squares of 2^900 are infinite; a power of two changes no digit of what is normalized."""
    pred, target, rows, _ = problem()
    results = []
    for exponent in (400, 900, 1016):
        large = 2.0**exponent
        of_pred = (pred.double() * (large if distance == "cosine" else 1)).requires_grad_()
        options = {"distance": distance, "normalize": normalize, "impl": "cpp"}
        loss = feature_regression(of_pred, target.double() * large, rows, **options)
        dpred = torch.autograd.grad(loss, of_pred)[0]
        results.append((loss, dpred * large if distance == "cosine" else dpred))
    for each in results[1:]:
        torch.testing.assert_close(each, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.skipif("cpp" not in testing.impls("feature_regression"), reason="other backends take no fp64")
@pytest.mark.parametrize("normalize", [True, False])
def test_the_cosine_of_fp64_rows_whose_norm_is_past_the_largest_number(normalize, isa):
    """The norm of 64 values of 2^1022 is 2^1025; the gradient's few digits are those of subnormal numbers."""
    pred, target = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).sign().double()
    results = []
    for large in (1.0, 2.0**1022):
        of_pred = (pred * large).requires_grad_()
        loss = feature_regression(of_pred, target * large, distance="cosine", normalize=normalize, impl="cpp")
        results.append((loss, torch.autograd.grad(loss, of_pred)[0] * large))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.skipif("cpp" not in testing.impls("feature_regression"), reason="not looked after elsewhere")
@pytest.mark.parametrize("distance", DISTANCES)
def test_features_wider_than_all_numbers_are_no_zeros(distance, isa):
    target = torch.full((1, 16), 3e38)
    target[0, :2] = torch.tensor([0, -3e38])
    loss = feature_regression(torch.ones(1, 16), target, distance=distance, impl="cpp")
    assert loss.isnan()
