"""linear_cross_entropy: what the contract tests do not cover."""

import math
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import SeqLens, linear_cross_entropy, testing

IMPLS = ["reference", *testing.impls("linear_cross_entropy")]


def tensors(rows=9, width=7, vocab=13, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((rows, width), (vocab, width), (vocab,))
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype).requires_grad_() for size in sizes)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[::3] = -100
    return x, weight, bias, target


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_is_cross_entropy_of_linear(impl, reduction, smoothing, kind):
    x, weight, bias, target = tensors()
    loss = linear_cross_entropy(
        x, weight, target.to(kind), bias, reduction=reduction, label_smoothing=smoothing, impl=impl
    )
    want = F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    scale = torch.randn_like(loss)  # not 1: the gradients made in the forward pass are scaled
    for ours, theirs in zip(
        gradients((loss * scale).sum(), x, weight, bias), gradients((want * scale).sum(), x, weight, bias), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_sample_mean_is_a_mean_of_means(impl):
    x, weight, bias, target = tensors(rows=12)
    target[4:6] = -100  # the third sequence has rows, but none that counts; the second has no rows
    lengths = SeqLens([4, 0, 2, 5])  # the last row lies past them
    loss, accuracy = linear_cross_entropy(
        x, weight, target, bias, reduction="sample_mean", cu_seqlens=lengths, return_accuracy=True, impl=impl
    )
    want, hits, logits = 0, 0, F.linear(x, weight, bias)
    for begin, end in ((0, 4), (6, 11)):
        want = want + F.cross_entropy(logits[begin:end], target[begin:end]) / 4
        counts = target[begin:end] != -100
        hits += (logits[begin:end].argmax(1) == target[begin:end])[counts].double().mean() / 4
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(accuracy, hits.float())
    assert not accuracy.requires_grad
    for ours, theirs in zip(gradients(loss, x, weight, bias), gradients(want, x, weight, bias), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    bare = linear_cross_entropy(
        x, weight, target, bias, reduction="sample_mean", cu_seqlens=lengths.cu.long(), impl=impl
    )
    assert torch.equal(bare, loss)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sample_mean"])
def test_rows_past_the_last_sequence_are_ignored(impl, reduction):
    x, weight, bias, target = tensors()
    lengths = torch.tensor([0, 4, 6])
    with torch.no_grad():
        x[6:] = torch.nan
    loss = linear_cross_entropy(x, weight, target, bias, reduction=reduction, cu_seqlens=lengths, impl=impl)
    if reduction == "none":
        assert torch.equal(loss[6:], torch.zeros(3))
        loss = loss[:6].sum()
    assert loss.isfinite()
    if impl == "reference":
        return  # PyTorch multiplies 0 by NaN
    dx, dweight, dbias = gradients(loss, x, weight, bias)
    assert torch.equal(dx[6:], torch.zeros(3, 7))
    assert dx.isfinite().all() and dweight.isfinite().all() and dbias.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sample_mean"])
@pytest.mark.parametrize("rows", [0, 5])
def test_all_ignored_is_zero_and_attached(impl, reduction, rows):
    x, weight, bias, _ = tensors(rows)
    target = torch.full((rows,), -100)
    loss, accuracy = linear_cross_entropy(
        x,
        weight,
        target,
        bias,
        reduction=reduction,
        cu_seqlens=torch.tensor([0, rows]),
        return_accuracy=True,
        impl=impl,
    )
    assert loss.requires_grad and torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(accuracy, torch.zeros_like(loss))
    for gradient in gradients(loss.sum(), x, weight, bias):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_sequences_at_all(impl):
    x, weight, bias, target = tensors(0)
    loss = linear_cross_entropy(x, weight, target, bias, reduction="sample_mean", cu_seqlens=SeqLens([]), impl=impl)
    assert loss.item() == 0 and loss.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_accuracy(impl, reduction):
    """The target's logit is made the largest in chosen rows; of equal logits the first counts."""
    x, weight, target = torch.zeros(6, 5), torch.eye(5), torch.tensor([0, 1, 2, 7, 4, 1])
    x[0, 0] = x[1, 1] = x[2, 3] = x[4, 4] = x[4, 3] = 1  # hit, hit, miss, ignored, miss (a tie), miss (all equal)
    _, accuracy = linear_cross_entropy(
        x, weight, target, ignore_index=7, reduction=reduction, return_accuracy=True, impl=impl
    )
    want = torch.tensor([1.0, 1, 0, 0, 0, 0])
    torch.testing.assert_close(accuracy, {"none": want, "sum": want.sum(), "mean": want.sum() / 5}[reduction])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", range(8))
def test_only_the_gradients_asked_for(impl, reduction, wanted):
    *leaves, target = tensors()
    for i, each in enumerate(leaves):
        each.requires_grad_(bool(wanted >> i & 1))
    x, weight, bias = leaves
    loss = linear_cross_entropy(x, weight, target, bias, reduction=reduction, impl=impl).sum()
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.backward()
    for each in leaves:
        assert (each.grad is not None) == each.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice(impl):
    x, weight, bias, target = tensors()
    loss = linear_cross_entropy(x, weight, target, bias, impl=impl)
    once = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    twice = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    scaled = torch.autograd.grad(3 * loss, (x, weight, bias), retain_graph=True)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(3 * a, b)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 2 * once[1])


@pytest.mark.parametrize("impl", testing.impls("linear_cross_entropy"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_blocks_of_rows(impl, dtype, monkeypatch):
    """A vocabulary so large that the rows run in several blocks agrees with eager PyTorch in fp64."""
    size = (700, 24, 20011)
    if impl == "triton":
        if dtype not in testing.dtypes(impl, "linear_cross_entropy"):
            pytest.skip("Triton has no fp64")
        from m3ae_fast.ops.linear_cross_entropy import triton_backend

        monkeypatch.setattr(triton_backend, "LOGITS_BYTES", 1 << 18)
        size = (70, 24, 5011)  # the interpreter is slow
    x, weight, bias, target = tensors(*size, dtype)
    truth = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = F.cross_entropy(F.linear(*truth), target)
    eager = F.cross_entropy(F.linear(x, weight, bias).to(torch.promote_types(dtype, torch.float32)), target)
    loss = linear_cross_entropy(x, weight, target, bias, impl=impl)
    testing.assert_error_rule("loss", loss, eager, want, 2)
    results = (gradients(a, *b) for a, b in ((loss, (x, weight, bias)), (eager, (x, weight, bias)), (want, truth)))
    for name, ours, theirs, true in zip(("dx", "dweight", "dbias"), *results, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-15)
        else:
            testing.assert_error_rule(name, ours, theirs, true, 3)


@pytest.mark.parametrize("impl", [i for i in testing.impls("linear_cross_entropy") if i == "triton"])
def test_float16_meets_its_loss_scale_before_it_is_rounded(impl):
    """1 / 2048 of a nearly uniform softmax over 30,522 classes is below the least float16: it is not 0 once scaled."""
    x, weight, bias, target = tensors(4, 16, 30522, torch.float16)
    lengths = SeqLens([1] * 4 + [0] * 2044)  # each row weighs as one of 2048 does
    options = dict(reduction="sample_mean", cu_seqlens=lengths)

    def run(impl, dtype):
        leaves = [(each.detach() * 0.01).to(dtype).requires_grad_() for each in (x, weight, bias)]
        loss = linear_cross_entropy(*leaves[:2], target, leaves[2], impl=impl, **options)
        return gradients(loss * 2.0**16, *leaves)

    results = run(impl, x.dtype), run("reference", x.dtype), run("reference", torch.float64)
    for name, *each in zip(("dx", "dweight", "dbias"), *results, strict=True):
        testing.assert_error_rule(name, *each, 3)
    never = torch.ones(30522, dtype=torch.bool).index_fill_(0, target[target != -100], False)
    testing.assert_error_rule("dbias of other classes", *(dbias[never] for *_, dbias in results), 3)


@pytest.mark.parametrize("impl", [i for i in testing.impls("linear_cross_entropy") if i == "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [384, 512])
def test_thread_counts_give_the_same_bits_at_real_sizes(impl, dtype, width, threads):
    x, weight, bias, target = tensors(170, width, 30522, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        loss = linear_cross_entropy(x, weight, target, bias, impl=impl)
        results.append([loss, *gradients(loss, x, weight, bias)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


MEMORY = """
import resource, torch
from m3ae_fast import linear_cross_entropy
x = torch.randn(1024, 512).to(torch.{dtype}).requires_grad_()
weight = torch.randn(30522, 512).to(torch.{dtype}).requires_grad_()
target = torch.arange(1024)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
linear_cross_entropy(x[:2], weight[:64], target[:2]).backward()  # libraries warm, .grad allocated
x.grad.fill_(0), weight.grad.fill_(0)
before = peak()
gradients = torch.autograd.grad(linear_cross_entropy(x, weight, target, impl="cpp"), (x, weight))
print(peak() - before - sum(g.nbytes for g in gradients) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.skipif(not testing.impls("linear_cross_entropy"), reason="the compiled module is missing")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_beyond_the_gradients(dtype, python):
    """MiB at the peak, in a process of its own; the logits alone are 119 in fp32 and eager PyTorch takes three such."""
    run = python(MEMORY.format(dtype=dtype))
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 64


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits(impl):
    x, weight, bias, target = tensors()
    loss = linear_cross_entropy(x * 1e4, weight, target, bias, impl=impl)
    want = F.cross_entropy(F.linear(x.double() * 1e4, weight.double(), bias.double()), target)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert all(g.isfinite().all() for g in gradients(loss, x, weight, bias))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_class_that_the_bias_rules_out(impl):
    """A bias of -inf, and rows that do not count: no 0 * inf in any gradient."""
    x, weight, bias, target = tensors()
    target[target == 5] = 4
    with torch.no_grad():
        bias[5] = -torch.inf
    loss = linear_cross_entropy(x, weight, target, bias, impl=impl)
    want = F.cross_entropy(F.linear(x, weight, bias), target)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(loss, x, weight, bias), gradients(want, x, weight, bias), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    x, weight, bias, target = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target, bias, impl=impl)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, linear_cross_entropy(x, weight, target, bias), rtol=0.02, atol=0.02)
    assert all(g.dtype == torch.float32 for g in gradients(loss, x, weight, bias))


@pytest.mark.parametrize("impl", testing.impls("linear_cross_entropy"))
def test_autocast_does_not_round_the_gradients_of_fp32_parameters(impl):
    x, weight, bias, target = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target, bias, impl=impl)
    for gradient in gradients(loss, weight, bias):
        assert gradient.dtype == torch.float32 and not torch.equal(gradient, gradient.bfloat16().float())


def test_float16_goes_to_the_reference_on_cpu():
    x, weight, bias, target = tensors(dtype=torch.float16)
    assert linear_cross_entropy(x, weight, target, bias).dtype == torch.float32
    with pytest.raises(ValueError, match="impl='cpp' cannot run linear_cross_entropy: it takes float32"):
        linear_cross_entropy(x, weight, target, bias, impl="cpp")


@pytest.mark.parametrize("bad", [-1, 13, -101, 2**31 - 1])
def test_a_target_that_names_no_class(bad):
    x, weight, bias, target = tensors()
    target[4] = bad
    with pytest.raises(ValueError, match=rf"target must be in \[0, 13\) or ignore_index \(-100\), got {bad}"):
        linear_cross_entropy(x, weight, target, bias, impl="cpp")


def test_errors():
    x, weight, _, target = tensors()
    with pytest.raises(ValueError, match=r"x must have shape \(any, any\), got \(7,\)"):
        linear_cross_entropy(x[0], weight, target)
    with pytest.raises(ValueError, match=r"weight must have shape \(any, 7\), got \(7, 13\)"):
        linear_cross_entropy(x, weight.t(), target)
    with pytest.raises(ValueError, match=r"bias must have shape \(13,\), got \(7,\)"):
        linear_cross_entropy(x, weight, target, x[0])
    with pytest.raises(ValueError, match=r"target must have shape \(9,\), got \(8,\)"):
        linear_cross_entropy(x, weight, target[1:])
    with pytest.raises(TypeError, match="target must be of dtype int32, int64, got float32"):
        linear_cross_entropy(x, weight, target.float())
    with pytest.raises(TypeError, match="x must be of dtype float32, bfloat16, float16, float64, got int64"):
        linear_cross_entropy(x.long(), weight, target)
    with pytest.raises(ValueError, match="weight must be on cpu, as x is, got meta"):
        linear_cross_entropy(x, weight.to("meta"), target)
    with pytest.raises(ValueError, match="target must be on cpu, as x is, got meta"):
        linear_cross_entropy(x, weight, target.to("meta"))
    with pytest.raises(ValueError, match="cu_seqlens must be on cpu, as x is, got meta"):
        linear_cross_entropy(x, weight, target, cu_seqlens=torch.tensor([0, 9], device="meta"))
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', 'sample_mean', got 'max'"):
        linear_cross_entropy(x, weight, target, reduction="max")
    with pytest.raises(ValueError, match=r'cu_seqlens must be given for reduction="sample_mean", got None'):
        linear_cross_entropy(x, weight, target, reduction="sample_mean")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        linear_cross_entropy(x, weight, target, label_smoothing=1.5)
    with pytest.raises(TypeError, match="ignore_index must be an integer, got float"):
        linear_cross_entropy(x, weight, target, ignore_index=1.0)


@pytest.mark.skipif("cpp" not in testing.impls("linear_cross_entropy"), reason="the compiled module is missing")
def test_autocast_leaves_the_gradient_of_an_fp32_weight_in_fp32(isa):
    x = torch.randn(40, 70, requires_grad=True)
    weight, bias = torch.randn(133, 70).mul_(0.1).requires_grad_(), torch.randn(133, requires_grad=True)
    target = torch.randint(0, 133, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target, bias, reduction="sum", impl="cpp")
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (x, weight)]
    rounded.append(bias.detach().double().requires_grad_())
    truth = linear_cross_entropy(*rounded[:2], target, rounded[2], reduction="sum", impl="reference")
    ours, true = torch.autograd.grad(2 * loss, (x, weight, bias)), torch.autograd.grad(2 * truth, rounded)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)
    for mine, exact in zip(ours, true, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=4 * eps, atol=4 * eps * float(exact.abs().max()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("nan", [(), (3,), (3, 5)])
def test_accuracy_of_nan_is_argmax(impl, nan, isa):
    x, weight, bias, _ = (t.detach() for t in tensors(vocab=37))
    rows, classes = len(x), len(weight)
    bias[list(nan)] = torch.nan
    best = torch.nn.functional.linear(x, weight, bias).argmax(1)
    for target in range(classes):
        options = {"reduction": "none", "return_accuracy": True, "impl": impl}
        _, hit = linear_cross_entropy(x, weight, torch.full((rows,), target), bias, **options)
        assert torch.equal(hit, (best == target).float())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab", [13, 64])
def test_accuracy_of_an_infinite_row_is_argmax(impl, vocab):
    """Whatever classes a backend adds to its own use: there its logit is NaN, infinity times a weight of 0."""
    x, weight, _, _ = tensors(rows=vocab, vocab=vocab)
    x, weight = x.detach().clone(), weight.detach().clone()
    x[:, 0], weight[:, 0] = math.inf, -1
    weight[5, 0] = 1
    options = {"reduction": "none", "return_accuracy": True, "impl": impl}
    loss, hit = linear_cross_entropy(x, weight, torch.arange(vocab), **options)
    assert loss.isnan().all() and hit.nonzero().tolist() == [[5]]


@pytest.mark.skipif("cpp" not in testing.impls("linear_cross_entropy"), reason="other backends' products are torch's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("target", [0, 1])
def test_a_logit_that_is_lost_on_its_way_is_no_probability_of_zero(dtype, target, isa):
    """-2 most + 2 most + 1 is the largest logit, and minus infinity on its way, unless tiles add up even and odd places
    apart: the loss is right or NaN."""
    most = 0.9 * torch.finfo(dtype).max
    weight = torch.zeros(21, 5, dtype=dtype)
    weight[0] = torch.tensor([-most, -most, most, most, 1])
    weight.requires_grad_()
    loss = linear_cross_entropy(torch.ones(1, 5, dtype=dtype), weight, torch.tensor([target]), impl="cpp")
    lost, truth = loss.isnan().item(), math.log(20 + math.e) - (target == 0)
    assert lost or abs(loss.item() - truth) < 1e-2
    assert torch.autograd.grad(loss, weight)[0].isnan().any() == lost


@pytest.mark.skipif("cpp" not in testing.impls("linear_cross_entropy"), reason="other backends' products are torch's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_logits_take_no_longer(dtype):
    """Classes that a bias of minus infinity takes out; and a run that has diverged."""
    x, weight = torch.randn(64, 512).to(dtype), torch.randn(1024, 512).to(dtype)
    bias, target = torch.zeros(1024, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    without = bias.clone()
    without[100:] = -torch.inf

    def seconds(*arguments):
        times = []
        for _ in range(3):
            start = time.process_time()
            loss = linear_cross_entropy(*arguments, impl="cpp")
            times.append(time.process_time() - start)
        return min(times), loss

    plain, _ = seconds(x, weight, target, bias)
    masked, loss = seconds(x, weight, target, without)
    diverged, lost = seconds(x * 1e20, weight * 1e20, target, bias)
    assert loss.isfinite() and lost.isnan() and max(masked, diverged) < 20 * plain + 0.05


@pytest.mark.skipif("cpp" not in testing.impls("linear_cross_entropy"), reason="other backends' products are torch's")
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e20), (torch.bfloat16, 1e20), (torch.float64, 1e200)])
def test_a_logit_below_all_numbers_has_no_probability(dtype, size, isa):
    x = torch.tensor([[size, size]], dtype=dtype).requires_grad_()
    weight = torch.tensor([[-size, -2 * size], *[[1 / size, 0.0]] * 20], dtype=dtype).requires_grad_()
    loss = linear_cross_entropy(x, weight, torch.tensor([1]), impl="cpp")
    torch.testing.assert_close(loss.item(), math.log(20), rtol=1e-2, atol=0)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert dx.isfinite().all() and not dweight[0].any() and dweight[1:, 0].all()
