"""masked_mse: values against MAE's own loss, reductions, what counts nowhere, precision, errors."""

import pytest
import torch

from m3ae_fast import SeqLens, masked_mse, testing
from m3ae_fast.ops.masked_mse import cases

IMPLS = ["reference", *testing.impls("masked_mse")]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def mae_loss(images, pred, mask, patch, norm_pix, dtype=torch.float64):
    """forward_loss of MAE's public code: [N, P, p*p*3] predictions, mask 1 = removed. Row losses [N, P]."""
    n, c, h, w = images.shape
    x = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
    x = (x - torch.tensor(MEAN, dtype=dtype)[:, None, None]) / torch.tensor(STD, dtype=dtype)[:, None, None]
    x = x.reshape(n, c, h // patch, patch, w // patch, patch)
    target = torch.einsum("nchpwq->nhwpqc", x).reshape(n, -1, patch**2 * c)
    if norm_pix:
        mean = target.mean(dim=-1, keepdim=True)
        var = target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
    return ((pred.to(dtype) - target) ** 2).mean(dim=-1) * mask


def problem(patch=4, seed=0, counts=(3, 0, 12)):
    """(padded predictions, images, mask [N, P], packed rows of them: pred, ids, cu)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(counts), 3, 3 * patch, 4 * patch), generator=generator, dtype=torch.uint8)
    images[:, :, :patch] //= 90
    images[-1, :, -patch:, -patch:] = 77  # a patch of one color
    padded = torch.randn(len(counts), 12, 3 * patch * patch, generator=generator)
    ids = [torch.randperm(12, generator=generator)[:count].sort()[0] for count in counts]
    mask = torch.zeros(len(counts), 12, dtype=torch.float64)
    for n, chosen in enumerate(ids):
        mask[n, chosen] = 1
    return padded, images, mask, padded[mask > 0], torch.cat(ids), SeqLens(counts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("patch", [1, 4, 7, 16, 20])
def test_values_and_gradients(impl, norm_pix, patch, isa, poison):
    padded, images, mask, pred, ids, cu = problem(patch)
    options = {"patch_size": patch, "norm_pix": norm_pix, "mean": MEAN, "std": STD, "impl": impl}
    padded = padded.double().requires_grad_()
    rows = mae_loss(images, padded, mask, patch, norm_pix)
    want = {
        "mean": rows.sum() / mask.sum(),  # MAE's
        "sample_mean": (rows.sum(1) / mask.sum(1).clamp(min=1)).mean(),
        "sum": rows.sum(),
        "none": rows[mask > 0],
    }
    for reduction, loss in want.items():
        pred = pred.detach().requires_grad_()
        got = masked_mse(pred, images, ids, cu, reduction=reduction, **options)
        assert got.dtype == torch.float32 and got.shape == loss.shape
        torch.testing.assert_close(got.double(), loss, rtol=2e-5, atol=1e-6)
        cotangent = testing.cotangent(loss.detach())
        (gradient,) = torch.autograd.grad(got, pred, cotangent.float())
        (expected,) = torch.autograd.grad(loss, padded, cotangent, retain_graph=True)
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradient.double(), expected[mask > 0], rtol=2e-5, atol=2e-5 * scale)


@pytest.mark.parametrize("impl", IMPLS)
def test_images_may_be_one_and_the_same(impl, isa, poison):
    """As those of mixed sizes are: each is one column of all patches, and names its own."""
    generator = torch.Generator().manual_seed(0)
    column = torch.randint(0, 256, (1, 6 * 8, 8, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    shared, ids, seqlens = column.expand(3, -1, -1, -1), torch.tensor([0, 2, 3, 3, 5]), SeqLens([2, 0, 3])
    found = []
    for images in (shared, shared.contiguous(memory_format=torch.channels_last)):
        pred = torch.randn(5, 192, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = masked_mse(pred, images, ids, seqlens, patch_size=8, norm_pix=True, impl=impl)
        found.append((loss, *torch.autograd.grad(loss, pred)))
    assert all(map(torch.equal, *found)) and found[0][0] > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flat_patches_stay_flat(impl, layout, isa):
    """In a patch of one color the normalized target is 0 exactly: rounding must not be blown up by 1 / sqrt(1e-6)."""
    images = torch.arange(0, 250, 10, dtype=torch.uint8)[:, None, None, None].expand(25, 3, 16, 16)
    images = images.contiguous(memory_format=layout)
    options = {"patch_size": 16, "norm_pix": True, "reduction": "none", "impl": impl}
    gray = masked_mse(torch.zeros(25, 768), images, torch.zeros(25, dtype=torch.int32), SeqLens([1] * 25), **options)
    assert float(gray.max()) <= (0.0 if impl != "reference" else 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sample_mean", "mean", "sum", "none"])
def test_rows_past_the_end_count_nowhere(impl, reduction, poison):
    _, images, _, pred, ids, cu = problem()
    more = torch.cat([pred, torch.full((2, 48), torch.nan)]).requires_grad_()
    more_ids = torch.cat([ids, torch.tensor([-5, 10**7])])
    pred.requires_grad_()
    options = {"patch_size": 4, "reduction": reduction, "impl": impl}
    loss, longer = masked_mse(pred, images, ids, cu, **options), masked_mse(more, images, more_ids, cu, **options)
    (want,), (got,) = torch.autograd.grad(loss.sum(), pred), torch.autograd.grad(longer.sum(), more)
    torch.testing.assert_close(longer[: len(loss)] if reduction == "none" else longer, loss)
    assert reduction != "none" or torch.equal(longer[len(loss) :], torch.zeros(2))
    assert torch.equal(got, torch.cat([want, torch.zeros(2, 48)]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sample_mean", "mean", "sum"])
@pytest.mark.parametrize(("images", "rows"), [(0, 0), (3, 0), (0, 2), (3, 2)])
def test_without_any_row_the_loss_is_zero_and_attached(impl, reduction, images, rows):
    pred = torch.randn(rows, 48, requires_grad=True)
    ids, cu = torch.zeros(rows, dtype=torch.int32), SeqLens([0] * images)
    loss = masked_mse(
        pred, torch.zeros(images, 3, 8, 8), ids, cu, patch_size=4, norm_pix=True, reduction=reduction, impl=impl
    )
    assert loss == 0 and loss.requires_grad
    (gradient,) = torch.autograd.grad(loss, pred)
    assert torch.equal(gradient, torch.zeros(rows, 48))


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_predictions_give_a_float32_loss(impl):
    """Under autocast the decoder's output is bfloat16: only it is rounded, not the loss."""
    _, images, _, pred, ids, cu = problem()
    low = pred.bfloat16().requires_grad_()
    high = low.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_mse(low, images, ids, cu, patch_size=4, norm_pix=True, impl=impl)
    same = masked_mse(high, images, ids, cu, patch_size=4, norm_pix=True, impl=impl)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, same)
    (gradient,), (exact,) = torch.autograd.grad(loss, low), torch.autograd.grad(same, high)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), exact, rtol=2 * 2**-8, atol=0)  # the error and the product rounded


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("patch", [7, 8])
@pytest.mark.parametrize("layout", ["planes", "pixels", "crop", "flipped"])
def test_layouts_agree(impl, layout, patch, isa):
    _, images, _, pred, ids, cu = problem(patch)
    laid_out = {
        "planes": images.contiguous(),
        "pixels": images.contiguous(memory_format=torch.channels_last),
        "crop": torch.nn.functional.pad(images, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
        "flipped": images.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    options = {"patch_size": patch, "norm_pix": True, "mean": MEAN, "std": STD, "impl": impl}
    assert torch.equal(masked_mse(pred, images, ids, cu, **options), masked_mse(pred, laid_out, ids, cu, **options))


def test_an_image_in_float_is_taken_as_it_is():
    _, images, _, pred, ids, cu = problem()
    pixels = masked_mse(pred, images, ids, cu, patch_size=4, mean=MEAN, std=STD)
    ready = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    for same in (ready, ready.double()):
        torch.testing.assert_close(masked_mse(pred, same, ids, cu, patch_size=4), pixels, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_past_31_bits(impl):
    """The last patch of 2.4 GiB of pixels, of which the machine gives only the pages that are touched."""
    images = torch.empty(12_800, 3, 256, 256, dtype=torch.uint8)
    images[-1, :, -16:, -16:] = 255
    lengths = torch.zeros(12_801, dtype=torch.int64)
    lengths[-1] = 1
    pred = torch.full((1, 768), 3.0, requires_grad=True)
    loss = masked_mse(pred, images, torch.tensor([255]), lengths, patch_size=16, reduction="sum", impl=impl)
    assert loss == 4
    (gradient,) = torch.autograd.grad(loss, pred)
    assert torch.equal(gradient, torch.full((1, 768), 4 / 768))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dimension", range(4))
def test_offsets_past_31_bits_of_shorter_strides(impl, dimension):
    """As images permuted from [3, N, 256, 256] have them."""
    _, images, _, pred, ids, cu = problem()
    far = testing.far_apart(images, dimension)
    near, far = (masked_mse(pred, x, ids, cu, patch_size=4, reduction="none", impl=impl) for x in (images, far))
    assert torch.equal(far, near)


def test_half_on_the_cpu_goes_to_the_reference():
    _, images, _, pred, ids, cu = problem()
    loss = masked_mse(pred.half(), images, ids, cu, patch_size=4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, masked_mse(pred.half().float(), images, ids, cu, patch_size=4))
    with pytest.raises(ValueError, match=r"impl='cpp' cannot run masked_mse: it takes .*, got torch\.float16"):
        masked_mse(pred, images.half(), ids, cu, patch_size=4, impl="cpp")


def test_a_second_derivative_is_refused():
    """There is none here: an error, not a silent zero."""
    _, images, _, pred, ids, cu = problem()
    pred.requires_grad_()
    loss = masked_mse(pred, images, ids, cu, patch_size=4, impl="cpp")
    (gradient,) = torch.autograd.grad(loss, pred, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), pred)


PRED, IMAGES, IDS, CU = torch.zeros(3, 48), torch.zeros(2, 3, 8, 12), torch.tensor([0, 5, 1]), torch.tensor([0, 2, 3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred": PRED[:, 1:]}, ValueError, r"pred must have shape \(any, 48\), got \(3, 47\)"),
        ({"pred": PRED.int()}, TypeError, "pred must be of dtype float32, bfloat16, float16, float64, got int32"),
        ({"images": IMAGES[0]}, ValueError, "images must have shape"),
        ({"images": IMAGES.clone().requires_grad_()}, ValueError, "images must not require a gradient"),
        ({"patch_size": 5}, ValueError, "images must be multiples of patch_size 5 high and wide, got 8 x 12"),
        ({"ids_mask": IDS[:2]}, ValueError, r"ids_mask must have shape \(3,\), got \(2,\)"),
        ({"ids_mask": IDS.float()}, TypeError, "ids_mask must be of dtype int32, int64"),
        ({"cu_mask": torch.tensor([0, 3])}, ValueError, "cu_mask must have 2 sequences, one an image, got 1"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of 'sample_mean', 'mean', 'sum', 'none', got"),
        ({"mean": (1.0, 2.0)}, ValueError, "mean must be 3 numbers"),
        ({"std": (1.0, 2.0, -1.0)}, ValueError, "std must be positive"),
        (
            {"pred": PRED[:, :1], "images": IMAGES[:, :1], "patch_size": 1, "norm_pix": True},
            ValueError,
            "norm_pix must be False for patches of one value",
        ),
        # what only the C++ backend looks at
        (
            {"ids_mask": torch.tensor([0, 6, 1])},
            ValueError,
            r"ids_mask must be in \[0, 6\), .* patches, got 6 at row 1",
        ),
        (
            {"cu_mask": torch.tensor([0, 3, 2])},
            ValueError,
            r"cu_mask must ascend from 0 to at most 3 rows, got cu_mask\[2\] = 2 after 3",
        ),
        (
            {"cu_mask": torch.tensor([0, 2, 4])},
            ValueError,
            r"cu_mask must ascend from 0 to at most 3 rows, got cu_mask\[2\] = 4",
        ),
    ],
)
def test_errors(change, error, message):
    arguments = {"pred": PRED, "images": IMAGES, "ids_mask": IDS, "cu_mask": CU, "patch_size": 4} | change
    with pytest.raises(error, match=message):
        masked_mse(**arguments)


def test_the_reference_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(masked_mse, backend="aot_eager", fullgraph=True, dynamic=True)
    for seed in (0, 1):
        call = cases.make("mean norm_pix", seed=seed)
        ours, gradient = call.run(masked_mse, impl="reference")
        again, gradient_again = call.run(compiled, impl="reference")
        assert torch.equal(ours[0], again[0]) and torch.equal(gradient[0], gradient_again[0])


@pytest.mark.skipif("cuda" not in IMPLS, reason="CUDA does not run here: set M3AE_FAST_EMULATE=1")
@pytest.mark.parametrize("impl", ["cuda"])
def test_cuda_refuses_many_channels_and_large_patches(impl):
    def run(channels, patch):
        images = torch.zeros(1, channels, patch, patch)
        pred = torch.ones(1, channels * patch * patch)
        return masked_mse(pred, images, torch.tensor([0]), SeqLens([1]), patch_size=patch, impl=impl)

    with pytest.raises(ValueError, match="images must have 1 to 64 channels for impl='cuda', got 65"):
        run(65, 2)
    with pytest.raises(
        ValueError, match=r"patch_size must leave at most 9216 values in a patch for impl='cuda', got 56, .* 9408"
    ):
        run(3, 56)
    assert run(1, 96) == 1


@pytest.mark.skipif("cpp" not in testing.impls("masked_mse"), reason="other backends take no fp64")
def test_fp64_patches_of_any_size(isa):
    """Squares of 2^900 are infinite; a power of two changes no digit of a normalized patch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    pred = torch.randn(3, 48, generator=generator, dtype=torch.float64, requires_grad=True)
    results = []
    for exponent in (400, 900, 1023):
        loss = masked_mse(
            pred,
            images * 2.0**exponent,
            torch.tensor([0, 3, 1]),
            SeqLens([2, 1]),
            patch_size=4,
            norm_pix=True,
            impl="cpp",
        )
        results.append((loss, *torch.autograd.grad(loss, pred)))
    for each in results[1:]:
        torch.testing.assert_close(each, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.skipif("cpp" not in testing.impls("masked_mse"), reason="not looked after elsewhere")
def test_a_patch_wider_than_all_numbers_is_no_patch_of_zeros(isa):
    images = torch.full((1, 1, 4, 4), 3e38)
    images[0, 0, 0, :2] = torch.tensor([0, -3e38])
    pred = torch.zeros(1, 16, requires_grad=True)
    loss = masked_mse(pred, images, torch.tensor([0]), SeqLens([1]), patch_size=4, norm_pix=True, impl="cpp")
    assert loss.isnan() and torch.autograd.grad(loss, pred)[0].isnan().all()
