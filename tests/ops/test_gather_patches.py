"""gather_patches: values against patchify of the whole image, layouts, what is never read, edges, errors."""

import itertools

import pytest
import torch

from m3ae_fast import SeqLens, gather_patches, testing
from m3ae_fast.ops.gather_patches import cases

IMPLS = ["reference", *testing.impls("gather_patches")]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def patchify(images, patch):
    """einops 'n c (h p) (w q) -> n (h w) (p q c)'."""
    n, c, h, w = images.shape
    grid = images.reshape(n, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch * patch * c)


def pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def layouts(images):
    """The same pixels, laid out otherwise."""
    n, c, h, w = images.shape
    yield "planes", images.contiguous()
    yield "pixels", images.contiguous(memory_format=torch.channels_last)
    yield "every second image", torch.stack([images, images], 1).flatten(0, 1)[::2]
    yield "a crop", torch.nn.functional.pad(images, (3, 2, 1, 4))[:, :, 1 : 1 + h, 3 : 3 + w]
    yield "transposed", images.transpose(2, 3).contiguous().transpose(2, 3)
    yield "one image for all strides", images[:1].expand(n, c, h, w) if n == 1 else images.flip(0).flip(0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("patch", "channels"), [*itertools.product((1, 2, 3, 7, 8, 14, 16, 17), (3,)), (4, 1), (6, 5)])
def test_values(impl, patch, channels, isa, poison):
    images = pixels(2, channels, 2 * patch, 3 * patch)
    ids = torch.tensor([5, 0, 3, 3, 1])
    seqlens = torch.tensor([0, 3, 5])
    mean, std = torch.linspace(0.2, 0.8, channels).tolist(), torch.linspace(0.1, 0.9, channels).tolist()
    whole = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    want = patchify(whole, patch)[[0, 0, 0, 1, 1], ids]
    for name, laid_out in layouts(images):
        got = gather_patches(laid_out, ids, seqlens, patch_size=patch, mean=mean, std=std, impl=impl)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
        unit = gather_patches(laid_out.float() / 256, ids, seqlens, patch_size=patch, impl=impl)  # exact
        assert torch.equal(unit, patchify(images.float() / 256, patch)[[0, 0, 0, 1, 1], ids]), name


def bit_cases():
    """All mixes of dtypes; where the interpreter runs them, real sizes of bytes alone."""
    for impl in IMPLS[1:]:
        for pixel in (torch.uint8, *testing.dtypes(impl, "gather_patches")):
            real = (
                ("m3ae_small uint8 planes", "mae_base uint8 pixels") if impl != "triton" or not pixel.is_signed else ()
            )
            yield from (
                (impl, case, pixel, out)
                for case in (*cases.SMALL, *real)
                for out in testing.dtypes(impl, "gather_patches")
            )


@pytest.mark.parametrize(("impl", "case", "pixel", "out"), list(bit_cases()))
def test_the_same_bits_as_the_reference(impl, case, pixel, out, isa, poison):
    call = cases.make(case)
    images, options = call.args[0].detach(), call.kwargs | {"dtype": out}
    images = images if images.dtype == pixel else (images * 255).to(pixel) if pixel == torch.uint8 else images.to(pixel)
    ours, reference = (gather_patches(images, *call.args[1:], **options, impl=impl) for impl in (impl, "reference"))
    assert ours.dtype == out
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("impl", IMPLS)
def test_images_may_be_one_and_the_same(impl, isa, poison):
    """As those of mixed sizes are: each is one column of all patches, and names its own."""
    column = pixels(1, 3, 6 * 8, 8).contiguous(memory_format=torch.channels_last)
    ids, seqlens = torch.tensor([0, 2, 3, 3, 5]), SeqLens([2, 0, 3])
    got = gather_patches(column.expand(3, -1, -1, -1), ids, seqlens, patch_size=8, mean=MEAN, std=STD, impl=impl)
    alone = gather_patches(column, ids, SeqLens([5]), patch_size=8, mean=MEAN, std=STD, impl=impl)
    assert torch.equal(got, alone)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropped_patches_are_never_read(impl):
    """A NaN there would show in no output; an unreadable page would crash: here only the NaN."""
    images = torch.full((1, 3, 8, 8), torch.nan)
    images[:, :, 4:, :4] = 1.0
    images.requires_grad_()
    out = gather_patches(
        images, torch.tensor([2]), SeqLens([1]), patch_size=4, mean=[0.0] * 3, std=[2.0] * 3, impl=impl
    )
    assert torch.equal(out, torch.full((1, 48), 0.5))
    (gradient,) = torch.autograd.grad(out.sum(), images)
    assert torch.equal(gradient[:, :, 4:, :4], torch.full((1, 3, 4, 4), 0.5))
    assert int((gradient != 0).sum()) == 48


@pytest.mark.parametrize("impl", IMPLS)
def test_a_patch_named_twice_gets_both_gradients(impl):
    images = torch.zeros(2, 3, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    out = gather_patches(images, torch.tensor([1, 1, 1, 0]), SeqLens([3, 1]), patch_size=4, impl=impl)
    scale = torch.tensor([1.0, 2**-8, 2**-8, 3.0])  # summed in bf16 the small ones would be lost
    (gradient,) = torch.autograd.grad(out, images, scale.bfloat16()[:, None].expand_as(out))
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(gradient[0, :, :, 4:], torch.full((3, 4, 4), 1 + 2**-7, dtype=torch.bfloat16))
    assert torch.equal(gradient[1, :, :, :4], torch.full((3, 4, 4), 3.0, dtype=torch.bfloat16))
    assert not gradient[0, :, :, :4].any() and not gradient[1, :, :, 4:].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("patch", "channels"), [(8, 3), (8, 1), (17, 3), (24, 3), (177, 3), (16, 5), (16, 64)])
def test_gradients_of_every_patch(impl, patch, channels, dtype, poison):
    """Exact, so wherever a pixel lies in its patch: twice the sum of its rows."""
    images = torch.zeros(2, channels, patch, 2 * patch, dtype=dtype, requires_grad=True)
    image, ids = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 0, 1, 0])
    out = gather_patches(images, ids, SeqLens([3, 1]), patch_size=patch, std=[0.5] * channels, impl=impl)
    dout = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    (gradient,) = torch.autograd.grad(out, images, dout)
    want = torch.zeros(2, 2, dout.shape[1]).index_put((image, ids), 2 * dout.float(), accumulate=True)
    assert torch.equal(patchify(gradient.float(), patch), want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [0, 1])
def test_a_patch_that_many_rows_name(impl, offset, poison):
    """More rows than a warp of a GPU looks at together, the last of another image; gradients that are not aligned."""
    rows = torch.tensor([150, 1])
    ids = torch.arange(151) % 3
    images = torch.zeros(2, 3, 8, 24, requires_grad=True)
    out = gather_patches(images, ids, SeqLens(rows.tolist()), patch_size=8, impl=impl)
    dout = torch.randint(-8, 9, (out.numel() + offset,), generator=torch.Generator().manual_seed(0)).float()
    dout = dout[offset:].view(out.shape)
    (gradient,) = torch.autograd.grad(out, images, dout)
    want = torch.zeros(2, 3, 192).index_put((torch.arange(2).repeat_interleave(rows), ids), dout, accumulate=True)
    assert torch.equal(patchify(gradient, 8), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_past_the_end_are_zero(impl, poison):
    images = torch.ones(2, 3, 4, 4, requires_grad=True)
    ids = torch.tensor([0, 0, 10**6, -1], dtype=torch.int64)
    out = gather_patches(images, ids, torch.tensor([0, 1, 2], dtype=torch.int64), patch_size=4, impl=impl)
    assert torch.equal(out, torch.tensor([1.0, 1, 0, 0])[:, None].expand(4, 48))
    (gradient,) = torch.autograd.grad(out, images, torch.tensor([1.0, 2, 9, torch.nan])[:, None].expand(4, 48))
    assert torch.equal(gradient, torch.tensor([1.0, 2])[:, None, None, None].expand(2, 3, 4, 4))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_offsets_past_31_bits(impl, layout):
    """The last patch of 2.4 GiB of pixels, of which the machine gives only the pages that are touched."""
    count = 12_800
    images = torch.empty(count, 256, 256, 3, dtype=torch.uint8)
    images = images.permute(0, 3, 1, 2) if layout == "pixels" else images.view(count, 3, 256, 256)
    images[-1, :, -16:, -16:] = pixels(3, 16, 16)
    lengths = torch.zeros(count + 1, dtype=torch.int32)
    lengths[-1] = 1
    out = gather_patches(images, torch.tensor([255]), lengths, patch_size=16, dtype=torch.bfloat16, impl=impl)
    assert torch.equal(out, (patchify(pixels(3, 16, 16)[None], 16)[0] * torch.tensor(1 / 255)).bfloat16())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dimension", range(4))
def test_offsets_past_31_bits_of_shorter_strides(impl, dimension):
    """As images permuted from [3, N, 256, 256] have them."""
    images, ids, seqlens = pixels(3, 3, 16, 16), torch.arange(4).repeat(3), SeqLens([4, 4, 4])
    near, far = (
        gather_patches(x, ids, seqlens, patch_size=8, impl=impl) for x in (images, testing.far_apart(images, dimension))
    )
    assert torch.equal(far, near)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (2, 3, 0, 0)])
def test_images_without_a_patch(impl, size, poison):
    """The rows belong to no image: zeros, and gradients of nothing."""
    dtype = testing.widest(impl, "gather_patches")
    call = testing.Call(
        (torch.zeros(size, dtype=dtype).requires_grad_(), torch.tensor([0, -1]), SeqLens([0] * size[0]))
    )
    (out,), (gradient,) = call.run(lambda *args, **options: gather_patches(*args, patch_size=2, **options), impl=impl)
    assert torch.equal(out, torch.zeros(2, 12, dtype=dtype)) and gradient.shape == size


def test_half_on_the_cpu_goes_to_the_reference():
    images, seqlens = pixels(1, 3, 4, 4), SeqLens([1])
    half = gather_patches(images, torch.tensor([0]), seqlens, patch_size=4, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half, gather_patches(images, torch.tensor([0]), seqlens, patch_size=4).half())
    with pytest.raises(ValueError, match="impl='cpp' cannot run gather_patches: it takes float32, bfloat16, flo"):
        gather_patches(images, torch.tensor([0]), seqlens, patch_size=4, dtype=torch.float16, impl="cpp")


def test_mean_and_std_as_tensors():
    images, ids, seqlens = pixels(1, 3, 8, 8), torch.tensor([0, 3]), SeqLens([2])
    numbers = gather_patches(images, ids, seqlens, patch_size=4, mean=MEAN, std=list(STD))
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    assert torch.equal(numbers, gather_patches(images, ids, seqlens, patch_size=4, mean=mean, std=std))


@pytest.mark.skipif("cuda" not in IMPLS, reason="CUDA does not run here: set M3AE_FAST_EMULATE=1")
@pytest.mark.parametrize("impl", ["cuda"])
def test_cuda_refuses_many_channels_and_large_patches(impl):
    def run(channels, patch):
        images = torch.zeros(1, channels, patch, patch, dtype=torch.uint8)
        return gather_patches(images, torch.tensor([0]), SeqLens([1]), patch_size=patch, impl=impl)

    with pytest.raises(ValueError, match="images must have 1 to 64 channels for impl='cuda', got 65"):
        run(65, 1)
    assert run(64, 1).shape == (1, 64)
    with pytest.raises(
        ValueError, match=r"patch_size must be less than 81 for impl='cuda' and images of 64 channels, got 81"
    ):
        run(64, 81)


IMAGES, IDS, SEQLENS = torch.zeros(2, 3, 8, 12), torch.tensor([0, 5, 1]), torch.tensor([0, 2, 3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"images": torch.zeros(3, 8, 12)},
            ValueError,
            r"images must have shape \(any, any, any, any\), got \(3, 8, 12",
        ),
        ({"images": IMAGES.int()}, TypeError, "images must be of dtype uint8, float32"),
        ({"images": [1]}, TypeError, "images must be a tensor, got list"),
        ({"patch_size": 5}, ValueError, "images must be multiples of patch_size 5 high and wide, got 8 x 12"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0"),
        ({"patch_size": 4.0}, TypeError, "patch_size must be an integer, got float"),
        ({"ids": IDS.float()}, TypeError, "ids must be of dtype int32, int64, got float32"),
        ({"ids": IDS[None]}, ValueError, r"ids must have shape \(any,\), got \(1, 3\)"),
        ({"seqlens": torch.tensor([0, 3])}, ValueError, "seqlens must have 2 sequences, one an image, got 1"),
        ({"seqlens": SeqLens([1, 1, 1])}, ValueError, "seqlens must have 2 sequences, one an image, got 3"),
        ({"mean": (0.5,)}, ValueError, r"mean must be 3 numbers, one a channel, got \(0.5,\)"),
        ({"std": 0.5}, ValueError, "std must be 3 numbers, one a channel, got 0.5"),
        ({"std": torch.ones(1).expand(2**40)}, ValueError, "std must be 3 numbers, one a channel, got tensor"),
        ({"std": torch.ones(3, device="meta")}, ValueError, "std must be a dense tensor that holds numbers"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, r"std must be positive, got \(1.0, 0.0, 1.0\)"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32, bfloat16, float16 or float64, got torch.int32"),
        # what only the C++ backend looks at
        ({"ids": torch.tensor([0, 6, 1])}, ValueError, r"ids must be in \[0, 6\), .* patches, got 6 at row 1"),
        (
            {"ids": torch.tensor([0, 5, -1])},
            ValueError,
            r"ids must be in \[0, 6\), an image's patches, got -1 at row 2",
        ),
        (
            {"seqlens": torch.tensor([1, 2, 3])},
            ValueError,
            r"seqlens must ascend from 0 to at most 3 rows, got seqlens\[0\] = 1",
        ),
        (
            {"seqlens": torch.tensor([0, 4, 3])},
            ValueError,
            r"seqlens must ascend from 0 to at most 3 rows, got seqlens\[1\] = 4",
        ),
        (
            {"seqlens": torch.tensor([0, 2, 4])},
            ValueError,
            r"seqlens must ascend from 0 to at most 3 rows, got seqlens\[2\] = 4",
        ),
    ],
)
def test_errors(change, error, message):
    arguments = {"images": IMAGES, "ids": IDS, "seqlens": SEQLENS, "patch_size": 4} | change
    with pytest.raises(error, match=message):
        gather_patches(**arguments)


def test_the_reference_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(gather_patches, backend="aot_eager", fullgraph=True, dynamic=True)
    for seed in (0, 1):
        call = cases.make("planes", seed=seed)
        ours, gradient = call.run(gather_patches, impl="reference")
        again, gradient_again = call.run(compiled, impl="reference")
        assert torch.equal(ours[0], again[0]) and torch.equal(gradient[0], gradient_again[0])
