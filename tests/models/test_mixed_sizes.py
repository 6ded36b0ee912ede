"""Images of mixed sizes in one packed batch: the numbers of models of one size, whatever the batch."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from m3ae_fast import ImageTextBatch, _backends
from m3ae_fast.models import CLIP, M3AE, MAE, MAMO, EncodersConfig, M3AEConfig, MAMOConfig, masks
from m3ae_fast.nn.positions import resample_positions

CONFIG = M3AEConfig(
    image_size=(16, 24), patch_size=4, vocab_size=53, max_text_length=8, width=32, depth=2, heads=4,
    decoder_width=24, decoder_depth=2, decoder_heads=3,
)  # fmt: skip
SIZES = [(4, 40), (16, 24), (32, 8), (12, 16)]  # pixels
LENGTHS, HAS_IMAGE = [5, 0, 8, 2, 1], [True, True, False, True, True]


def make_model(**changes):
    torch.manual_seed(0)
    model = M3AE(dataclasses.replace(CONFIG, **changes))
    for name, value in model.state_dict(keep_vars=True).items():
        torch.nn.init.normal_(value, std=0.3 if value.requires_grad else 1.0)  # given positions, too, are any
        assert value.requires_grad or "image_position" in name
    return model


def make_images(sizes=SIZES, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    return images if dtype == torch.uint8 else [(image.to(dtype) - 128) / 60 for image in images]


def make_batch(images=None):
    text = torch.randint(0, 53, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    options = {"has_image": HAS_IMAGE, "sample_ids": [7, 3, 99, 2**40, 0]}
    return ImageTextBatch.from_images(images or make_images(), text, LENGTHS, patch_size=4, **options)


def one(batch, b):
    """Sample b alone, its image whole."""
    image = [batch.whole_images()[sum(batch.has_image[:b])][None]] if batch.has_image[b] else [None]
    start, end = batch.text_lengths.cu[b : b + 2].tolist()
    text = [batch.text[start:end], [end - start]] if end > start else []
    return ImageTextBatch(*image, *text, sample_ids=batch.sample_ids[b : b + 1])


def of_one_size(model, size):
    """A model of images of this size with the same weights."""
    height, width = size
    other = M3AE(dataclasses.replace(model.config, image_size=size))
    state = model.state_dict()
    if model.config.positions == "given":
        for name in ("image_position", "decoder_image_position"):
            state[name] = resample_positions(state[name], model.config.grid, (height // 4, width // 4))
    other.load_state_dict(state)
    return other


def gradients(out, model):
    return torch.autograd.grad(out.loss, list(model.parameters()))


@pytest.mark.parametrize(
    ("impl", "precision", "positions", "masking"),
    [
        ("reference", "fp32", "sincos", "sample"),
        ("triton", "fp32", "sincos", "sample"),
        ("cpp", "bf16", "sincos", "sample"),
        ("cpp", "fp32", "sincos", "sample"),
        ("cpp", "fp32", "sincos", "block"),
        ("cpp", "fp32", "sincos", "multi_block"),
        ("cpp", "fp32", "given", "ratio_range"),
        ("cpp", "fp32", "given", "dirichlet"),
    ],
)
def test_images_of_the_configured_size_give_the_same_bits(monkeypatch, impl, precision, positions, masking):
    """Gradients, too, where sums over rows are of our kernels on the CPU; elsewhere how they are split may follow the
    number of positions."""
    if any(impl not in ("reference", *backends.modules) for backends in _backends.LOADED.values()):
        pytest.skip(f"not all ops have {impl} here")
    monkeypatch.setattr(_backends, "_FORCED", impl)
    model = make_model(positions=positions, masking=masking, norm_pix=masking == "block")
    cut = make_batch(make_images([CONFIG.image_shape] * 4))
    options = {"has_image": HAS_IMAGE, "sample_ids": cut.sample_ids}
    whole = ImageTextBatch(torch.stack(cut.whole_images()), cut.text, cut.text_lengths, **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        ours, theirs = (model(batch, seed=5, step=3) for batch in (cut, whole))
        for name in ("loss", "image_loss", "text_loss", "text_accuracy", "image_mask", "text_mask"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for a, b in zip(gradients(ours, model), gradients(theirs, model), strict=True):
            assert torch.equal(a, b) or impl != "cpp"
            torch.testing.assert_close(a, b)
        assert torch.equal(model.encode(cut).tokens, model.encode(whole).tokens)
        ours, theirs = (model.reconstruct(batch, seed=5).image for batch in (cut, whole))
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("masking", ["sample", "block"])
@pytest.mark.parametrize("positions", ["sincos", "given"])
def test_a_batch_is_the_mean_of_its_samples_on_models_of_their_sizes(positions, masking, dtype):
    """Losses, gradients and masks; encodings and reconstructions are the samples' own."""
    model, batch = make_model(positions=positions, masking=masking), make_batch(make_images(dtype=dtype))
    whole, encoded, rebuilt = model(batch, seed=5, step=11), model.encode(batch), model.reconstruct(batch, seed=5)
    total, patches, sizes = 0, batch.patch_counts(CONFIG.grid), iter(SIZES)
    starts = encoded.seqlens.cu.tolist()
    for b, count in enumerate(patches):
        other = of_one_size(model, next(sizes) if count else CONFIG.image_shape)
        out = other(one(batch, b), seed=5, step=11)
        assert (
            torch.equal(whole.image_mask[b, :count], out.image_mask[0, :count])
            and not whole.image_mask[b, count:].any()
        )
        total = total + torch.stack([out.loss, out.image_loss, out.text_loss]).detach() / len(batch)
        for theirs, ours in zip(other.parameters(), model.parameters(), strict=True):
            (gradient,) = torch.autograd.grad(out.loss / len(batch), theirs, retain_graph=True)
            ours.grad = gradient if ours.grad is None else ours.grad + gradient
        theirs = other.encode(one(batch, b)).tokens
        torch.testing.assert_close(encoded.tokens[starts[b] : starts[b + 1]], theirs, rtol=1e-4, atol=1e-5)
        theirs = other.reconstruct(one(batch, b), seed=5).image[0, :count]
        torch.testing.assert_close(rebuilt.image[b, :count], theirs, rtol=1e-4, atol=1e-4)
        assert rebuilt.image[b, count:].isnan().all()
    torch.testing.assert_close(
        torch.stack([whole.loss, whole.image_loss, whole.text_loss]), total, rtol=1e-5, atol=1e-6
    )
    for ours, parameter in zip(gradients(whole, model), model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6 + 1e-5 * ours.abs().max().item())


@pytest.mark.parametrize("masking", ["sample", "block", "multi_block", "ratio_range", "dirichlet"])
def test_a_batch_split_differently_has_the_same_masks_and_losses(masking):
    model, images = MAE(dataclasses.replace(CONFIG, masking=masking)), make_images(SIZES * 2)
    ids = torch.arange(8) * 5 + 1

    def passes(chosen):
        batch = ImageTextBatch.from_images([images[i] for i in chosen], patch_size=4, sample_ids=ids[chosen])
        return model(batch, seed=1, step=2)

    whole, halves = passes(list(range(8))), [passes([6, 0, 3]), passes([1, 2, 4, 5, 7])]
    for part, chosen in zip(halves, ([6, 0, 3], [1, 2, 4, 5, 7]), strict=True):
        for row, i in zip(part.image_mask, chosen, strict=True):
            assert torch.equal(row.nonzero(), whole.image_mask[i].nonzero())
    torch.testing.assert_close(whole.loss, (3 * halves[0].loss + 5 * halves[1].loss) / 8)


def test_a_plan_made_ahead_gives_the_same_bits_and_is_of_its_batch():
    model, batch = make_model(), make_batch()
    drawn, planned = model(batch, seed=5, step=1), model(batch, plan=model.plan(batch, seed=5, step=1).to("cpu"))
    assert torch.equal(drawn.loss, planned.loss) and torch.equal(drawn.image_mask, planned.image_mask)
    same = ImageTextBatch(torch.stack(make_images([CONFIG.image_shape] * 2)))
    cut = ImageTextBatch.from_images(list(same.images), patch_size=4)
    for ours, theirs in ((same, cut), (cut, same), (batch, cut)):
        with pytest.raises(ValueError, match="plan must be of this batch"):
            model(ours, plan=model.plan(theirs, seed=0))


def test_masks_may_be_given():
    model, batch = make_model(), make_batch()
    columns = max(batch.patch_counts(CONFIG.grid))
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    real = torch.arange(columns) < torch.tensor(batch.patch_counts(CONFIG.grid))[:, None]
    assert torch.equal(model(batch, seed=0, image_mask=mask).image_mask, mask & real)
    with pytest.raises(ValueError, match=r"image_mask must have shape \(5, 24\), got \(5, 23\)"):
        model(batch, seed=0, image_mask=mask[:, 1:])


def test_blocks_are_those_of_each_grid():
    batch = make_batch()
    keys = {"seed": 3, "step": 4}
    found = make_model(masking="block")(batch, **keys).image_mask
    for b, (grid, sample) in enumerate(zip(batch.sample_grids(CONFIG.grid), batch.sample_ids.tolist(), strict=True)):
        if batch.has_image[b]:
            alone = masks.block_mask(grid, CONFIG.image_mask_ratio, sample_ids=[sample], **keys)
            assert torch.equal(found[b, : alone.shape[1]], alone[0])


def test_what_does_not_go():
    model, batch = make_model(), make_batch()
    with pytest.raises(ValueError, match=r"batch\.images must be patches of 4 pixels a side, as configured, got 2"):
        model(ImageTextBatch.from_images(make_images(), patch_size=2), seed=0)
    strip = torch.zeros(3, 4, 100, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at most 24 patches a side, got 25"):
        model(ImageTextBatch.from_images([strip], patch_size=4), seed=0)
    assert make_model(max_patches=25)(ImageTextBatch.from_images([strip], patch_size=4), seed=0).loss.isfinite()
    with pytest.raises(ValueError, match="bucket must be False for images of mixed sizes"):
        model.plan(batch, seed=0, bucket=True)
    with pytest.raises(ValueError, match="masking must not be 'shared', one mask for all, for images of mixed sizes"):
        make_model(masking="shared")(batch, seed=0)
    text = torch.zeros(1, dtype=torch.int64)
    pair = ImageTextBatch.from_images([torch.zeros(3, 64, 64, dtype=torch.uint8)], text, [1], patch_size=8)
    for other in (CLIP(EncodersConfig.tiny(vocab_size=9)), MAMO(MAMOConfig.tiny(vocab_size=9))):
        with pytest.raises(ValueError, match=r"batch\.images must be of one size for this model, got images of mixed"):
            other(pair, seed=0, step=0)


def test_one_program_serves_batches_of_any_sizes():
    """torch.compile, where the plan is given: no grid is built in."""
    model, programs = make_model(), CompileCounter()
    compiled = torch.compile(lambda batch, plan: model(batch, plan=plan).loss, dynamic=True, backend=programs)
    for sizes in (SIZES, [(8, 12), (24, 4), (4, 4), (20, 20)], SIZES[::-1]):
        batch = make_batch(make_images(sizes))
        plan = model.plan(batch, seed=0)
        assert torch.equal(compiled(batch, plan), model(batch, plan=plan).loss)
    assert programs.frame_count == 1
