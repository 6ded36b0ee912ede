"""linear_cross_entropy with class weights, z-loss, lse and leading dimensions, each against its formula in PyTorch."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import SeqLens, linear_cross_entropy, testing

IMPLS = ["reference", *testing.impls("linear_cross_entropy")]
SCALE = 0.25
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def tensors(rows=9, width=7, vocab=13, dtype=torch.float32):
    """x, weight, bias, target, class_weight; rows 0, 3, 6, ... are ignored, some classes weigh nothing."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((rows, width), (vocab, width), (vocab,))
    leaves = (torch.randn(*size, generator=generator).to(dtype).requires_grad_() for size in sizes)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[::3] = -100
    class_weight = torch.rand(vocab, generator=generator)
    class_weight[target[1:2]] = class_weight[-1] = 0
    return *leaves, target, class_weight


def z_losses(logits, target, scale=SCALE):
    """Of each row, 0 of an ignored one."""
    return torch.where(target != -100, scale * logits.logsumexp(-1).square(), 0)


def reduced(values, target, reduction):
    count = (target != -100).sum()
    return {"mean": values.sum() / count, "sum": values.sum(), "none": values}[reduction]


def assert_close(ours, theirs, leaves):
    """Values, and the gradients of a random functional of them."""
    pairs = list(zip(ours, theirs, strict=True))
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    cotangents = [torch.randn(one.shape) for one, other in pairs if other.requires_grad]
    gradients = (
        torch.autograd.grad([x for x in each if x.requires_grad], leaves, cotangents) for each in (ours, theirs)
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@every_impl
@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_class_weights_are_those_of_cross_entropy(impl, reduction, smoothing):
    *leaves, target, class_weight = tensors()
    x, weight, bias = leaves
    options = dict(reduction=reduction, label_smoothing=smoothing)
    ours = linear_cross_entropy(x, weight, target, bias, class_weight=class_weight, impl=impl, **options)
    theirs = F.cross_entropy(F.linear(x, weight, bias), target, class_weight, **options)
    assert_close([ours], [theirs], leaves)


@every_impl
@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_z_loss_is_the_square_of_lse(impl, reduction, smoothing, weighted):
    """It is part of the loss, and class weights leave it alone, as Liger has it."""
    *leaves, target, class_weight = tensors()
    x, weight, bias = leaves
    options = dict(reduction=reduction, label_smoothing=smoothing)
    ours, z_loss = linear_cross_entropy(
        x, weight, target, bias, class_weight=class_weight if weighted else None, lse_square_scale=SCALE,
        return_z_loss=True, impl=impl, **options,
    )  # fmt: skip
    logits = F.linear(x, weight, bias)
    extra = reduced(z_losses(logits, target), target, reduction)
    theirs = F.cross_entropy(logits, target, class_weight if weighted else None, **options) + extra
    assert not z_loss.requires_grad
    assert_close([ours, z_loss], [theirs, extra.detach()], leaves)


@every_impl
@every_reduction
@pytest.mark.parametrize("used", [(1, 0), (0, 1), (1, 1)], ids=["loss", "lse", "both"])
def test_lse_is_differentiable(impl, reduction, used):
    *leaves, target, class_weight = tensors()
    x, weight, bias = leaves
    options = dict(class_weight=class_weight, reduction=reduction, label_smoothing=0.1, lse_square_scale=SCALE)
    ours = linear_cross_entropy(x, weight, target, bias, return_lse=True, impl=impl, **options)
    logits = F.linear(x, weight, bias)
    loss = F.cross_entropy(logits, target, class_weight, reduction=reduction, label_smoothing=0.1)
    theirs = loss + reduced(z_losses(logits, target), target, reduction), logits.logsumexp(1) * (target != -100)
    assert_close(*([x for x, use in zip(each, used, strict=True) if use] for each in (ours, theirs)), leaves)


@every_impl
def test_a_z_loss_made_of_lse_is_the_one_made_in_the_kernel(impl):
    """As ml-cross-entropy's users make it."""
    *leaves, target, _ = tensors()
    x, weight, bias = leaves
    loss, lse = linear_cross_entropy(x, weight, target, bias, return_lse=True, impl=impl)
    inside = linear_cross_entropy(x, weight, target, bias, lse_square_scale=SCALE, impl=impl)
    assert_close([loss + SCALE * lse[target != -100].square().mean()], [inside], leaves)


@every_impl
def test_sample_mean_is_a_mean_of_weighted_means(impl):
    *leaves, target, class_weight = tensors(rows=12)
    x, weight, bias = leaves
    target[6] = target[1]  # the last sequence has one row that counts, of a class that weighs nothing
    target[7:10] = -100
    lengths = SeqLens([4, 0, 2, 4])  # the second has no rows; two rows lie past them
    ours, z_loss = linear_cross_entropy(
        x, weight, target, bias, reduction="sample_mean", cu_seqlens=lengths, class_weight=class_weight,
        lse_square_scale=SCALE, return_z_loss=True, impl=impl,
    )  # fmt: skip
    loss, extra, logits = 0, 0, F.linear(x, weight, bias)
    for begin, end in ((0, 4), (4, 6), (6, 10)):
        some = logits[begin:end], target[begin:end]
        extra = extra + reduced(z_losses(*some), some[1], "mean") / 4
        if begin < 6:
            loss = loss + F.cross_entropy(*some, class_weight) / 4
    assert_close([ours, z_loss], [loss + extra, extra.detach()], leaves)


@every_impl
@pytest.mark.parametrize("reduction", ["mean", "none", "sample_mean"])
@pytest.mark.parametrize("leading", [(3, 4), (2, 1, 6), (0, 5), (12,)])
def test_leading_dimensions(impl, reduction, leading):
    rows = torch.Size(leading).numel()
    *leaves, target, class_weight = tensors(rows=rows)
    x, weight, bias = leaves
    options = dict(
        reduction=reduction, cu_seqlens=SeqLens([rows]), class_weight=class_weight, lse_square_scale=SCALE,
        return_accuracy=True, return_lse=True, return_z_loss=True, impl=impl,
    )  # fmt: skip
    flat = linear_cross_entropy(x, weight, target, bias, **options)
    ours = linear_cross_entropy(x.view(*leading, 7), weight, target.view(leading), bias, **options)
    of_rows = torch.Size(leading)
    assert [each.shape for each in ours] == [of_rows if each is flat[2] or each.dim() else () for each in flat]
    flat_gradients, gradients = (torch.autograd.grad(each[0].sum() + each[2].sum(), leaves) for each in (flat, ours))
    for one, other in itertools.chain(zip(ours, flat, strict=True), zip(gradients, flat_gradients, strict=True)):
        assert torch.equal(one.reshape(other.shape), other)


@every_impl
@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_that_are_all_zero(impl, reduction, smoothing):
    """PyTorch divides 0 by 0."""
    *leaves, target, class_weight = tensors()
    x, weight, bias = leaves
    options = dict(reduction=reduction, label_smoothing=smoothing, class_weight=torch.zeros_like(class_weight))
    loss = linear_cross_entropy(x, weight, target, bias, impl=impl, **options)
    assert not loss.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss.sum(), leaves))


@every_impl
def test_class_weights_keep_their_precision(impl):
    """bfloat16 rows leave a float32 class_weight alone; so does autocast."""
    *leaves, target, class_weight = tensors()
    target[target >= 0] = torch.arange(6)
    class_weight = 1 + torch.arange(13) * 2.0**-12  # in bfloat16 all are 1

    def sums(x, weight, bias):
        options = dict(class_weight=class_weight, reduction="none", impl=impl)
        loss = linear_cross_entropy(x, weight, target, bias, **options)
        plain = linear_cross_entropy(x, weight, target, bias, **(options | {"class_weight": None}))
        return loss, plain * class_weight[target.clamp(min=0)]

    with torch.autocast("cpu", torch.bfloat16):
        results = [sums(*leaves)]
    results.append(sums(*(each.bfloat16() for each in leaves)))
    for weighted, plain in results:
        assert weighted.dtype == torch.float32
        torch.testing.assert_close(weighted, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", testing.impls("linear_cross_entropy"))
@pytest.mark.parametrize("return_lse", [False, True])
def test_all_options_compile_whole(impl, return_lse):
    *leaves, target, class_weight = tensors()
    x, weight, bias = leaves
    options = dict(
        class_weight=class_weight, label_smoothing=0.1, lse_square_scale=SCALE, return_z_loss=True, impl=impl
    )
    call = testing.Call((x.detach()[None].requires_grad_(), weight, target[None], bias), options)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True, dynamic=True)
    eager, found = (call.run(each, return_lse=return_lse) for each in (linear_cross_entropy, compiled))
    for one, other in zip(itertools.chain(*eager), itertools.chain(*found), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("impl", testing.impls("linear_cross_entropy"))
def test_vmap_over_class_weights_is_a_loop(impl):
    x, weight, bias, target, class_weight = tensors()

    def loss(x, class_weight):
        options = dict(class_weight=class_weight, label_smoothing=0.1, return_lse=True, impl=impl)
        loss, lse = linear_cross_entropy(x, weight.detach(), target, bias.detach(), **options)
        return loss + lse.square().mean()

    many = torch.stack([class_weight, class_weight + 1])
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(x.detach(), many)
    for each, ours in zip(many, found, strict=True):
        assert torch.equal(ours, torch.autograd.grad(loss(x, each), x)[0])


def test_errors():
    x, weight, _, target, class_weight = tensors()
    with pytest.raises(ValueError, match=r"class_weight must have shape \(13,\), got \(12,\)"):
        linear_cross_entropy(x, weight, target, class_weight=class_weight[1:])
    with pytest.raises(TypeError, match="class_weight must be of dtype float32, bfloat16, float16, float64, got int64"):
        linear_cross_entropy(x, weight, target, class_weight=class_weight.long())
    with pytest.raises(ValueError, match="class_weight must be on cpu, as x is, got meta"):
        linear_cross_entropy(x, weight, target, class_weight=class_weight.to("meta"))
    with pytest.raises(ValueError, match="class_weight must not require a gradient, got one that does"):
        linear_cross_entropy(x, weight, target, class_weight=class_weight.requires_grad_())
    with pytest.raises(ValueError, match="lse_square_scale must be finite and not negative, got -1"):
        linear_cross_entropy(x, weight, target, lse_square_scale=-1)
    with pytest.raises(TypeError, match="lse_square_scale must be a number, got NoneType"):
        linear_cross_entropy(x, weight, target, lse_square_scale=None)
    with pytest.raises(ValueError, match=r"target must have shape \(3, 3\), got \(9,\)"):
        linear_cross_entropy(x.view(3, 3, 7), weight, target)
