"""The model: mixed batches, one packed pass, masks that do not depend on batching, every argument's error."""

import dataclasses

import pytest
import torch

from m3ae_fast import ImageTextBatch, _backends
from m3ae_fast.models import M3AE, MAE, M3AEConfig

CONFIG = M3AEConfig(
    image_size=16, patch_size=4, vocab_size=53, max_text_length=8, width=32, depth=2, heads=4,
    decoder_width=24, decoder_depth=2, decoder_heads=3,
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = M3AE(CONFIG)
    for parameter in model.parameters():  # biases and norms too: a term left out must show
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_batch(images=True, lengths=(5, 3, 8), has_image=None, seed=0, ids=None):
    generator = torch.Generator().manual_seed(seed)
    lengths = list(lengths)
    count = 0 if not images else len(lengths) if has_image is None else sum(has_image)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8) if images else None
    text = torch.randint(0, 53, (sum(lengths),), generator=generator, dtype=torch.int32)
    return ImageTextBatch(pixels, text, lengths, has_image=has_image, sample_ids=ids)


def one(batch, b):
    """Sample b of a batch, alone."""
    start, end = batch.text_lengths.cu[b : b + 2].tolist()
    image = sum(batch.has_image[:b])
    pixels = batch.images[image : image + 1] if batch.has_image[b] else None
    text = batch.text[start:end] if end > start else None
    lengths = [end - start] if end > start else None
    return ImageTextBatch(pixels, text, lengths, sample_ids=batch.sample_ids[b : b + 1])


MIXED = {"lengths": (5, 0, 8, 2, 1), "has_image": (True, True, False, True, False), "ids": [7, 3, 99, 2**40, 0]}


def test_a_mixed_batch_is_the_mean_of_its_samples(model):
    """Pairs, an image alone and texts alone in one packed pass: losses and gradients of each sample on its own."""
    batch = make_batch(**MIXED)
    whole = model(batch, seed=5, step=11)
    alone = [model(one(batch, b), seed=5, step=11) for b in range(len(batch))]
    for name in ("loss", "image_loss", "text_loss", "text_accuracy"):
        mean = torch.stack([getattr(out, name) for out in alone]).mean()
        torch.testing.assert_close(getattr(whole, name), mean, rtol=1e-5, atol=1e-6)
    for b, out in enumerate(alone):
        assert torch.equal(whole.image_mask[b], out.image_mask[0])
        assert torch.equal(whole.text_mask[b, : out.text_mask.shape[1]], out.text_mask[0])
    parameters = list(model.parameters())
    ours = torch.autograd.grad(whole.loss, parameters)
    theirs = torch.autograd.grad(sum(out.loss for out in alone) / len(alone), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 + 1e-5 * b.abs().max().item())


def test_a_plan_made_ahead_gives_the_same_bits(model):
    batch = make_batch(**MIXED)
    drawn, planned = model(batch, seed=5, step=11), model(batch, plan=model.plan(batch, seed=5, step=11))
    for name in ("loss", "image_loss", "text_loss", "image_mask", "text_mask"):
        assert torch.equal(getattr(drawn, name), getattr(planned, name))


def test_a_plan_takes_over_the_masks_of_another(model):
    batch = make_batch(**MIXED)
    plan, other = (model.plan(batch, seed=5, step=step) for step in (0, 1))
    before = plan.layout.rows.data_ptr()
    plan.copy_(other)
    assert plan.layout.rows.data_ptr() == before
    out, wanted = model(batch, plan=plan), model(batch, seed=5, step=1)
    assert torch.equal(out.loss, wanted.loss) and torch.equal(out.text_mask, wanted.text_mask)
    with pytest.raises(ValueError, match="same numbers of kept and masked tokens"):
        plan.copy_(model.plan(make_batch(), seed=5))


def assert_same_pass(model, batch, plan, other_batch, other_plan, bitwise=True, share=1e-6):
    """Losses and gradients of two passes, which may be off by a share of the largest."""
    outputs, gradients = [], []
    for out in (model(batch, plan=plan), model(other_batch, plan=other_plan)):
        outputs.append([getattr(out, name) for name in ("loss", "image_loss", "text_loss", "text_accuracy")])
        gradients.append(torch.autograd.grad(out.loss, list(model.parameters())))
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs) or not bitwise
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs) or not bitwise
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=share * theirs.abs().max().item())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("lengths", [(5, 3, 8, 2), (0, 0, 1, 0), (8,) * 60])
@pytest.mark.usefixtures("own_products")
def test_a_plan_of_a_bucket_gives_the_same_bits(model, monkeypatch, threads, lengths, impl, precision):
    """Where sums over rows are of our kernels on the CPU; elsewhere how they are split follows the number of rows, and
    PyTorch's products on AVX2 do, too."""
    if any(impl not in ("reference", *backends.modules) for backends in _backends.LOADED.values()):
        pytest.skip(f"not all ops have {impl} here")
    if impl == "triton":
        lengths = lengths[:4]  # the interpreter takes its time
    monkeypatch.setattr(_backends, "_FORCED", impl)
    threads(1)
    batch = make_batch(lengths=lengths)
    exact, roomy = (model.plan(batch, seed=5, bucket=bucket) for bucket in (False, True))
    assert roomy.bucket != exact.bucket
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        padded = batch.with_room(roomy.images, roomy.words)
        share = torch.finfo(torch.bfloat16).eps if precision == "bf16" else 1e-6  # PyTorch rounds its products to bf16
        assert_same_pass(model, padded, roomy, batch, exact, bitwise=impl == "cpp", share=share)


def test_a_plan_of_a_bucket_with_room_for_images(model):
    """The mean over the images is another fraction, so losses are the same but for rounding."""
    batch = make_batch(**MIXED)
    exact, roomy = (model.plan(batch, seed=5, bucket=bucket) for bucket in (False, True))
    assert roomy.images == 5 > exact.images == 3
    ours, theirs = model(batch.with_room(roomy.images, roomy.words), plan=roomy), model(batch, plan=exact)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    for a, b in zip(*(torch.autograd.grad(x.loss, list(model.parameters())) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item())


def test_a_plan_of_a_bucket_takes_over_any_other(model):
    """Other lengths, other masks: what is captured with a plan and a batch fits them all."""
    batches = [make_batch(lengths=x, seed=seed) for seed, x in enumerate([(8, 8, 1), (5, 5, 8), (6, 8, 3)])]
    plans = [model.plan(batch, seed=5, step=step, bucket=True) for step, batch in enumerate(batches)]
    assert len({plan.bucket for plan in plans}) == 1
    static = batches[0].with_room(plans[0].images, plans[0].words), model.plan(batches[0], seed=5, bucket=True)
    memory = static[0].text.data_ptr(), static[1].layout.rows.data_ptr(), static[1].layout.kept.cu.data_ptr()
    for step, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
        for ours, theirs in zip(static, (batch, plan), strict=True):
            ours.copy_(theirs)
        out, wanted = model(static[0], plan=static[1]), model(batch, seed=5, step=step)
        assert torch.equal(out.loss, wanted.loss) and torch.equal(out.text_mask, wanted.text_mask)
    assert memory == (static[0].text.data_ptr(), static[1].layout.rows.data_ptr(), static[1].layout.kept.cu.data_ptr())
    with pytest.raises(ValueError, match="other must be a plan of the same bucket"):
        static[1].copy_(model.plan(batches[0], seed=5))


def test_a_plan_is_of_its_batch_and_stands_alone(model):
    batch = make_batch()
    plan = model.plan(batch, seed=0)
    with pytest.raises(ValueError, match="plan must be given instead of seed"):
        model(batch, seed=0, plan=plan)
    with pytest.raises(ValueError, match="plan must be of this batch"):
        model(make_batch(lengths=(5, 3, 7)), plan=plan)


def test_reconstruct_predicts_every_token_and_agrees_with_the_losses(model):
    batch = make_batch(**MIXED)
    out, whole = model.reconstruct(batch, seed=1), model(batch, seed=1)
    assert out.image.shape == (5, 16, 48) and out.text_logits.shape == (16, 53)
    assert out.image[2].isnan().all() and out.image[4].isnan().all() and out.image[0].isfinite().all()
    assert torch.equal(out.image_mask, whole.image_mask) and torch.equal(out.text_mask, whole.text_mask)
    logp = out.text_logits.log_softmax(1)
    losses = []
    for b, (start, end) in enumerate(zip(batch.text_lengths.cu[:-1], batch.text_lengths.cu[1:], strict=True)):
        own = -logp[start:end].gather(1, batch.text[start:end, None].long())[:, 0][out.text_mask[b, : end - start]]
        losses.append(own.mean() if len(own) else torch.zeros(()))
    torch.testing.assert_close(torch.stack(losses).mean(), whole.text_loss)


def test_encode_sees_everything(model):
    batch = make_batch(**MIXED)
    encoded = model.encode(batch)
    assert encoded.cls.shape == (5, 32) and encoded.seqlens.lengths == (22, 17, 9, 19, 2)
    assert encoded.tokens.shape == (69, 32)
    for b in range(5):
        torch.testing.assert_close(encoded.cls[b], model.encode(one(batch, b)).cls[0], rtol=1e-4, atol=1e-5)


def test_masks_are_of_the_sample_not_of_the_batch(model):
    batch = make_batch(ids=[4, 5, 6])
    masks = model(batch, seed=1, step=2)
    again = model(make_batch(ids=[4, 5, 6]), seed=1, step=2)
    assert torch.equal(masks.image_mask, again.image_mask)
    assert not torch.equal(masks.image_mask, model(batch, seed=1, step=3).image_mask)
    assert not torch.equal(masks.image_mask, model(batch, seed=2, step=2).image_mask)
    assert masks.image_mask.sum(1).tolist() == [12, 12, 12]
    assert not torch.equal(masks.image_mask[0], masks.image_mask[1])


def test_shared_masking_is_one_mask_a_batch():
    config = M3AEConfig.from_dict({**CONFIG.to_dict(), "masking": "shared"})
    out = M3AE(config)(make_batch(lengths=(8, 8, 4)), seed=0)
    assert torch.equal(out.image_mask[0], out.image_mask[2]) and torch.equal(out.text_mask[0], out.text_mask[1])
    assert torch.equal(out.text_mask[0, :4], out.text_mask[2, :4])


def test_float_images_are_taken_as_normalized(model):
    batch = make_batch()
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (CONFIG.image_mean, CONFIG.image_std))
    images = (batch.images / 255 - mean) / std
    normalized = ImageTextBatch(images, batch.text, batch.text_lengths)
    torch.testing.assert_close(model(normalized, seed=0).loss, model(batch, seed=0).loss)


@pytest.mark.parametrize("channels", [1, 9, 16])
def test_images_may_have_any_channels(channels):
    """uint8 images are normalized channel by channel, by 0.5 and 0.25 where nothing else is said."""
    config = dataclasses.replace(CONFIG, channels=channels, image_mean=None, image_std=None, image_size=(16, 24))
    assert config.image_mean == (0.5,) * channels and config.image_std == (0.25,) * channels
    config.image_mean = tuple(0.1 + 0.05 * c for c in range(channels))
    model, images = M3AE(config), torch.randint(0, 256, (2, channels, 16, 24), dtype=torch.uint8)
    normalized = (images / 255 - torch.tensor(config.image_mean).view(1, -1, 1, 1)) / 0.25
    out, expected = model(ImageTextBatch(images), seed=0), model(ImageTextBatch(normalized), seed=0)
    torch.testing.assert_close(out.loss, expected.loss)
    assert model.reconstruct(ImageTextBatch(images), seed=0).image.shape == (2, 24, 16 * channels)
    texts = ImageTextBatch(None, torch.arange(5), [2, 3])
    model(texts, seed=0).loss.backward()
    assert not model.patch_embed.proj.weight.grad.any()


def test_nothing_masked_gives_zero_losses_with_zero_gradients(model):
    none = {"image_mask": torch.zeros(3, 16, dtype=torch.bool), "text_mask": torch.zeros(3, 8, dtype=torch.bool)}
    out = model(make_batch(), **none)
    out.loss.backward()
    assert out.loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("bucket", [False, True])
def test_given_masks_may_have_any_counts(model, bucket):
    """Nothing, all and anything between, in one batch: the mean of its samples."""
    batch = make_batch(lengths=(5, 3, 8, 2, 0))
    counts = torch.tensor([[0, 3], [16, 0], [1, 8], [7, 1], [15, 0]])
    image, text = (torch.arange(n).flip(0) < count[:, None] for n, count in zip((16, 8), counts.T, strict=True))
    text = text.flip(1)  # the last patches and the first words
    plan = model.plan(batch, image_mask=image, text_mask=text, bucket=bucket)
    whole = model(batch.with_room(plan.images, plan.words) if bucket else batch, plan=plan)
    assert torch.equal(whole.image_mask, image)
    alone = [model(one(batch, b), image_mask=image[b : b + 1], text_mask=text[b : b + 1]) for b in range(5)]
    for name in ("loss", "image_loss", "text_loss"):
        mean = torch.stack([getattr(out, name) for out in alone]).mean()
        torch.testing.assert_close(getattr(whole, name), mean, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(whole.loss, parameters)
    theirs = torch.autograd.grad(sum(out.loss for out in alone) / 5, parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 + 1e-5 * b.abs().max().item())


def test_everything_masked(model):
    every = {"image_mask": torch.ones(3, 16, dtype=torch.bool), "text_mask": torch.ones(3, 8, dtype=torch.bool)}
    out = model(make_batch(), **every)
    out.loss.backward()
    assert out.loss.isfinite()


def test_images_alone_and_texts_alone(model):
    texts = model(make_batch(images=False), seed=0)
    assert texts.image_loss.item() == 0 and texts.text_loss > 0
    pixels = make_batch().images
    images = model(ImageTextBatch(pixels), seed=0)
    assert images.text_loss.item() == 0 and images.image_loss > 0


def test_an_empty_batch(model):
    empty = ImageTextBatch(torch.zeros(0, 3, 16, 16, dtype=torch.uint8))
    assert model(empty, seed=0).loss.item() == 0
    assert model.reconstruct(empty, seed=0).image.shape == (0, 16, 48) and model.encode(empty).cls.shape == (0, 32)


def test_mae_is_m3ae_without_texts(model):
    mae = MAE(CONFIG)
    assert not [name for name in mae.state_dict() if "text" in name]
    mae.load_state_dict({k: v for k, v in model.state_dict().items() if "text" not in k})
    batch = make_batch()
    alone = ImageTextBatch(batch.images)
    torch.testing.assert_close(mae(batch.images, seed=0).loss, model(alone, seed=0).loss)
    assert torch.equal(mae(batch, seed=0).loss, mae(batch.images, seed=0).loss)
    torch.testing.assert_close(mae.encode(batch).cls, model.encode(alone).cls)
    assert mae.reconstruct(batch, seed=0).text_logits.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_stays_close(model, dtype):
    batch = make_batch()
    exact = model(batch, seed=0)
    with torch.autocast("cpu", dtype):
        out = model(batch, seed=0)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact.loss, rtol=2e-2, atol=0)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_sizes_of_the_paper():
    def millions(config):
        with torch.device("meta"):
            return sum(p.numel() for p in M3AE(config).encoder.parameters()) / 1e6

    assert [round(millions(c)) for c in (M3AEConfig.small(), M3AEConfig.base(), M3AEConfig.large())] == [21, 85, 302]
    assert M3AEConfig.huge().width // M3AEConfig.huge().heads == 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 15}, "image_size must be a multiple of patch_size 4, got 15"),
        ({"width": 30}, "width must be a multiple of 4"),
        ({"heads": 5}, "width must be a multiple of heads, got 32 and 5"),
        ({"image_mask_ratio": 1.0}, r"image_mask_ratio must be in \[0, 1\), got 1.0"),
        ({"masking": "none"}, "masking must be one of"),
        ({"color": 1}, "got color"),
        ({"image_std": (0, 1, 1)}, "image_std must be positive"),
        ({"image_mean": (1, 2)}, "image_mean must have 3 values"),
        ({"image_size": (16,)}, r"image_size must be pixels a side or \(height, width\), got \(16,\)"),
        ({"mlp_ratio": -1}, "mlp_ratio must be positive"),
        ({"activation": "relu"}, "activation must be one of"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        M3AEConfig.from_dict({**CONFIG.to_dict(), **changes})


def test_bad_calls(model):
    with pytest.raises(ValueError, match="seed must be given to draw masks"):
        model(make_batch())
    with pytest.raises(ValueError, match=r"batch.text_lengths must be at most max_text_length 8, got 9"):
        model(make_batch(lengths=(9,)), seed=0)
    with pytest.raises(ValueError, match=r"batch\.images must be of 16 x 16 pixels"):
        model(ImageTextBatch(torch.zeros(1, 3, 20, 16)), seed=0)
    with pytest.raises(ValueError, match=r"batch\.images must have 3 channels, as the configuration says, got 4"):
        model(ImageTextBatch(torch.zeros(1, 4, 16, 16)), seed=0)
    with pytest.raises(TypeError, match="batch must be an ImageTextBatch, got Tensor"):
        model(torch.zeros(1, 3, 16, 16), seed=0)
    with pytest.raises(ValueError, match="this model is of images alone"):
        M3AE(M3AEConfig.from_dict({**CONFIG.to_dict(), "vocab_size": 0}))(make_batch(), seed=0)
    with pytest.raises(ValueError, match="MAE is a model of images"):
        MAE(CONFIG)(make_batch(images=False), seed=0)
    with pytest.raises(ValueError, match="text_tokens"):  # a word outside the vocabulary
        model(ImageTextBatch(None, torch.tensor([53]), [1]), text_mask=torch.zeros(1, 1, dtype=torch.bool))


def test_without_type_vectors_there_are_none():
    """As if they were zero, in the encoder and in the decoder, and nothing of them to train."""
    torch.manual_seed(0)
    without, zero = M3AE(dataclasses.replace(CONFIG, type_vectors=False)), M3AE(CONFIG)
    types = [name for name, _ in zero.named_parameters() if "type" in name]
    assert len(types) == 4 and not [name for name, _ in without.named_parameters() if "type" in name]
    zero.load_state_dict(without.state_dict() | {name: torch.zeros_like(zero.get_parameter(name)) for name in types})
    batch = make_batch(**MIXED)
    assert torch.equal(without(batch, seed=1).loss, zero(batch, seed=1).loss)
    tokens, _ = without.image_encoder()
    assert len(tokens) == 3 and len(zero.image_encoder()[0]) == 4


def test_given_positions_are_weights_that_are_not_trained():
    torch.manual_seed(0)
    model = MAE(dataclasses.replace(CONFIG, positions="given"))
    same = MAE(CONFIG)
    tables = {"image_position", "decoder_image_position"}
    assert set(model.state_dict()) - set(same.state_dict()) == tables
    same.load_state_dict({name: value for name, value in model.state_dict().items() if name not in tables})
    images = make_batch().images
    assert torch.equal(model(images, seed=1).loss, same(images, seed=1).loss)  # sine and cosine, until others are given
    given = model.state_dict() | {name: torch.randn_like(getattr(model, name)) for name in tables}
    model.load_state_dict(given)
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    assert not tables & {name for name, _ in model.named_parameters()}
    assert not torch.equal(model(images, seed=1).loss, same(images, seed=1).loss)
    with torch.device("meta"):
        emptied = MAE(model.config)
    emptied.to_empty(device="cpu").load_state_dict(given)
    assert torch.equal(emptied(images, seed=1).loss, model(images, seed=1).loss)
    emptied.reset_parameters()
    assert torch.equal(emptied.image_position, same.image_position)


def test_the_norms_have_the_eps_of_the_configuration():
    model = MAE(dataclasses.replace(CONFIG, norm_eps=1e-3))
    norms = [module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 10 and set(norms) == {1e-3}


@pytest.mark.parametrize(("field", "value"), [("positions", "learned"), ("norm_eps", 0), ("norm_eps", "small")])
def test_settings_of_published_weights_are_checked(field, value):
    with pytest.raises((ValueError, TypeError), match=field):
        dataclasses.replace(CONFIG, **{field: value})
