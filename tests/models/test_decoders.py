"""Both decoders, of all or of a part of the masked tokens: against plain PyTorch, sample by sample."""

import dataclasses

import pytest
import torch

from m3ae_fast import ImageTextBatch
from m3ae_fast.models import M3AE, MAE, M3AEConfig, multi_block_mask
from tests.models.plain_m3ae import each, in_patches, plain_losses, plain_predictions

CONFIG = M3AEConfig(
    image_size=16, patch_size=4, vocab_size=53, max_text_length=12, width=32, depth=2, heads=4,
    decoder_width=24, decoder_depth=2, decoder_heads=3,
)  # fmt: skip
LENGTHS, HAS_IMAGE, IDS = (5, 0, 12, 2, 1), (True, True, False, True, False), (7, 3, 99, 2**40, 0)
WAYS = [("joint", 0.4), ("cross", 1.0), ("cross", 0.4), ("cross", (0.4, 1.0))]


def make_model(kind=M3AE, **changes):
    torch.manual_seed(0)
    model = kind(dataclasses.replace(CONFIG, **changes)).double()
    for parameter in model.parameters():  # biases and norms too: a term left out must show
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_batch(samples=range(5)):
    """Images that are normalized already, in fp64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 16, 16, generator=generator, dtype=torch.float64)
    words = torch.randint(0, 53, (5, 12), generator=generator, dtype=torch.int32)
    lengths, has_image = [LENGTHS[i] for i in samples], [HAS_IMAGE[i] for i in samples]
    return ImageTextBatch(
        images[[i for i in samples if HAS_IMAGE[i]]] if any(has_image) else None,
        torch.cat([words[i, : LENGTHS[i]] for i in samples]) if any(lengths) else None,
        lengths if any(lengths) else None,
        has_image=has_image,
        sample_ids=[IDS[i] for i in samples],
    )


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))  # an error where a parameter has none: DDP waits for it


def assert_all_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * max([1.0, *b.abs().flatten().tolist()]))


@pytest.mark.parametrize("masking", ["sample", "shared", "multi_block"])
@pytest.mark.parametrize(("decoder", "ratio"), [("joint", 1.0), *WAYS])
def test_losses_and_gradients_are_those_of_plain_pytorch(decoder, ratio, masking):
    model, batch = make_model(decoder=decoder, predict_ratio=ratio, masking=masking), make_batch()
    plan = model.plan(batch, seed=5, step=7)
    out, wanted = model(batch, plan=plan), plain_losses(model, batch, plan)
    assert_all_close((out.loss, out.image_loss, out.text_loss), wanted)
    assert_all_close(gradients(model, out.loss), gradients(model, wanted[0]))


@pytest.mark.parametrize("decoder", M3AEConfig.DECODERS)
def test_pictures_are_of_every_token_whatever_part_is_predicted(decoder):
    model, batch = make_model(decoder=decoder, predict_ratio=0.3), make_batch()
    found = model.reconstruct(batch, seed=5)
    plan = make_model(decoder=decoder).plan(batch, seed=5)
    words, images = batch.text.long().split(LENGTHS), iter(batch.images)
    logits = found.text_logits.split(LENGTHS)
    for b, (image, text) in enumerate(zip(each(plan.image), each(plan.text), strict=True)):
        patches = in_patches(next(images), 4) if HAS_IMAGE[b] else batch.images.new_empty(0, 48)
        of_image, of_text = plain_predictions(model, patches, words[b], image, text, every=True)
        assert_all_close([found.image[b]] if HAS_IMAGE[b] else [], [of_image] if HAS_IMAGE[b] else [])
        assert_all_close([logits[b]], [of_text])
    assert torch.equal(found.image_mask, model(batch, seed=5).image_mask)


def test_a_cross_decoders_prediction_is_the_same_whatever_else_is_predicted():
    """So the loss of a part is the mean over that part of what reconstruct predicts."""
    model, batch = make_model(MAE, decoder="cross", predict_ratio=0.4), make_batch()
    images = batch.images
    plan, found = model.plan(images, seed=3), model.reconstruct(images, seed=3).image
    errors = [
        (found[b, predicted] - in_patches(images[b], 4)[predicted]).square().mean()
        for b, (_, predicted) in enumerate(each(plan.image))
    ]
    torch.testing.assert_close(model(images, plan=plan).loss, sum(errors) / len(errors))


def drawn(model, batch, **keys):
    """Of each sample, the numbers of the predicted patches and words."""
    plan = model.plan(batch, **keys)
    return [
        (image[1].tolist(), text[1].tolist()) for image, text in zip(each(plan.image), each(plan.text), strict=True)
    ]


@pytest.mark.parametrize("masking", M3AEConfig.MASKINGS)
def test_the_part_is_of_its_sample_and_step_alone(masking):
    model = make_model(masking=masking, predict_ratio=0.3)
    whole = drawn(model, make_batch(), seed=5, step=7)
    for split in ([[0, 1, 2], [3, 4]], [[4, 0], [3], [1, 2]]):
        for part in split:
            assert drawn(model, make_batch(part), seed=5, step=7) == [whole[b] for b in part]
    full = make_model(masking=masking)
    plan, kept = (each_model.plan(make_batch(), seed=5, step=7) for each_model in (model, full))
    for ours, theirs in ((plan.image, kept.image), (plan.text, kept.text)):
        assert torch.equal(ours.ids_keep, theirs.ids_keep) and ours.lengths == theirs.lengths
        assert torch.equal(ours.as_bool(16), theirs.as_bool(16))
        for (_, some), (_, masked) in zip(each(ours), each(theirs), strict=True):
            assert len(some) == max(round(0.3 * len(masked)), min(len(masked), 1))
            assert set(some.tolist()) <= set(masked.tolist()) and some.tolist() == sorted(some.tolist())


def test_patches_and_words_have_shares_of_their_own():
    """A share of 1 draws nothing, so masks alone do, too."""
    patches, words = (
        make_model(predict_ratio=ratio).plan(make_batch(), seed=5) for ratio in ([0.25, 1.0], (1.0, 0.25))
    )
    assert patches.image.mask.lengths == (3, 3, 0, 3, 0) and not patches.text.skipped
    assert words.text.mask.lengths == (1, 0, 2, 1, 1) and not words.image.skipped
    mask = torch.ones(5, 12, dtype=torch.bool)
    assert make_model(predict_ratio=(0.5, 1.0)).plan(make_batch([2]), text_mask=mask[:1]).text.mask.lengths == (12,)


def test_every_masked_token_is_predicted_as_often_as_the_others():
    """Of 12 masked patches 4; over 3,000 samples of one mask."""
    samples = 3000
    model = M3AE(dataclasses.replace(CONFIG, predict_ratio=1 / 3))
    batch = ImageTextBatch(torch.zeros(samples, 3, 16, 16))
    mask = torch.zeros(samples, 16, dtype=torch.bool)
    mask[:, 2:14] = True
    plans = [model.plan(batch, seed=seed, step=step, image_mask=mask) for seed, step in ((0, 0), (0, 1), (1, 0))]
    for plan in plans:
        assert plan.image.mask.lengths == (4,) * samples
        counts = torch.bincount(plan.image.ids_mask, minlength=16)
        assert not counts[[0, 1, 14, 15]].any()
        assert (counts[2:14] - samples / 3).abs().max() < 5 * (samples * 2 / 9) ** 0.5
    assert not torch.equal(plans[0].image.ids_mask, plans[1].image.ids_mask)
    assert not torch.equal(plans[0].image.ids_mask, plans[2].image.ids_mask)


@pytest.mark.parametrize(("decoder", "ratio"), WAYS)
def test_a_mixed_batch_is_the_mean_of_its_samples(decoder, ratio):
    model = make_model(decoder=decoder, predict_ratio=ratio)
    whole = model(make_batch(), seed=5, step=11)
    alone = [model(make_batch([b]), seed=5, step=11) for b in range(5)]
    for name in ("loss", "image_loss", "text_loss", "text_accuracy"):
        torch.testing.assert_close(getattr(whole, name), torch.stack([getattr(out, name) for out in alone]).mean())
    assert_all_close(gradients(model, whole.loss), gradients(model, sum(out.loss for out in alone) / 5))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("decoder", "ratio"), WAYS)
def test_a_plan_of_a_bucket_gives_the_same_bits(decoder, ratio, precision, threads):
    threads(1)
    model = make_model(decoder=decoder, predict_ratio=ratio).float()
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    lengths = [12, 3, 8, 1, 0, 5]
    batch = ImageTextBatch(images, torch.randint(0, 53, (sum(lengths),), generator=generator), lengths)
    exact, roomy = (model.plan(batch, seed=5, bucket=bucket) for bucket in (False, True))
    assert roomy.bucket != exact.bucket and roomy.words > exact.words == sum(lengths)
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for own, plan in ((batch, exact), (batch.with_room(roomy.images, roomy.words), roomy)):
            loss = model(own, plan=plan).loss
            found.append([loss, *gradients(model, loss)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("decoder", M3AEConfig.DECODERS)
def test_nothing_masked_and_everything_masked(decoder):
    model, batch = make_model(decoder=decoder, predict_ratio=0.5), make_batch()
    for removed in (False, True):
        masks = {f"{name}_mask": torch.full((5, n), removed) for name, n in (("image", 16), ("text", 12))}
        out = model(batch, seed=0, **masks)
        assert out.loss.isfinite() and (out.loss > 0) == removed
        assert all(gradient.isfinite().all() for gradient in gradients(model, out.loss))


def test_a_caller_says_what_is_kept_what_is_predicted_and_what_is_neither():
    model, batch = make_model(), make_batch()
    image = torch.randint(0, 3, (5, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    text = torch.tensor([2, 1, 0] * 4, dtype=torch.uint8).expand(5, 12)
    plan = model.plan(batch, image_mask=image, text_mask=text)
    for masked, mask, lengths in ((plan.image, image, (16, 16, 0, 16, 0)), (plan.text, text, LENGTHS)):
        for b, (kept, predicted) in enumerate(each(masked)):
            own = mask[b, : lengths[b]]
            assert kept.tolist() == (own == 0).nonzero()[:, 0].tolist()
            assert predicted.tolist() == (own == 1).nonzero()[:, 0].tolist()
    out, wanted = model(batch, plan=plan), plain_losses(model, batch, plan)
    assert_all_close((out.loss, *gradients(model, out.loss)), (wanted[0], *gradients(model, wanted[0])))
    assert torch.equal(out.image_mask, (image > 0) & torch.tensor(HAS_IMAGE)[:, None])


def test_multi_block_predicts_the_blocks_from_the_square():
    model, images = make_model(MAE, masking="multi_block"), make_batch().images
    mask = multi_block_mask((4, 4), seed=5, step=2, sample_ids=[0, 1, 2])
    drawn, given = model(images, seed=5, step=2), model(images, image_mask=mask)
    assert torch.equal(drawn.loss, given.loss) and torch.equal(drawn.image_mask, mask > 0)
    assert (mask == 2).any() and not torch.equal(drawn.loss, model(images, image_mask=mask == 1).loss)


def test_a_cross_decoder_has_what_it_needs_and_no_more():
    joint, cross = (set(make_model(decoder=name).state_dict()) for name in M3AEConfig.DECODERS)
    assert {name for name in joint - cross if "decoder.blocks" not in name} == {
        "decoder_embed.weight",
        "decoder_embed.bias",
    }
    assert all(".attn." in name for name in cross - joint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "self"}, "decoder must be one of 'joint', 'cross', got 'self'"),
        ({"predict_ratio": 0}, r"predict_ratio must be in \(0, 1\], got 0"),
        ({"predict_ratio": 1.5}, r"predict_ratio must be in \(0, 1\], got 1.5"),
        ({"predict_ratio": [0.5, 0]}, r"predict_ratio must be in \(0, 1\], got 0"),
        ({"predict_ratio": [0.5]}, r"predict_ratio must be a number or \(image, text\), got \(0.5,\)"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_bad_calls():
    masks = {"image_mask": torch.ones(5, 16, dtype=torch.bool), "text_mask": torch.ones(5, 12, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"seed must be given to draw which masked tokens are predicted \(predict_rat"):
        make_model(predict_ratio=0.5)(make_batch(), **masks)
    assert make_model(predict_ratio=0.5).reconstruct(make_batch(), **masks).image_mask.shape == (5, 16)
    wrong = masks | {"image_mask": torch.full((5, 16), 3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"image_mask must be 0 \(kept\), 1 \(predicted\) or 2 \(neither\), got 3"):
        make_model()(make_batch(), **wrong)
    with pytest.raises(TypeError, match=r"image_mask must be of dtype bool \(True = removed\) or uint8"):
        make_model()(make_batch(), **(masks | {"image_mask": torch.zeros(5, 16)}))
