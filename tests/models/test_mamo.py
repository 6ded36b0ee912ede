"""MAMO against plain PyTorch, a sample and a pass at a time, and each of its parts against a formula of its own."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import ImageTextBatch, SeqLens
from m3ae_fast.models import CLIP, MAMO, EncodersConfig, MAMOConfig, Supervised, SupervisedConfig
from m3ae_fast.models.contrastive import ContrastiveLoss, same_pairs
from tests.models.plain_mamo import CONFIG, SIZES, make_batch, make_model, mlp, plain_fusion, plain_image, plain_text


@pytest.fixture
def model():
    return make_model()


def plain_losses(model, batch, image_mask, text_mask, pairs):
    """pairs: (image, text) of ITM, the right ones first."""
    c, online, target = model.config, model.online, model.target
    texts = [words.long() for words in batch.text.split(batch.text_lengths.lengths)]
    every = list(range(16))
    patch_rows, word_rows, patch_targets, word_targets, features, wanted = [], [], [], [], [], []
    whole_images, whole_texts = [], []
    for b, words in enumerate(texts):
        kept = (~image_mask[b]).nonzero()[:, 0].tolist()
        gone, hidden = image_mask[b].nonzero()[:, 0], text_mask[b, : len(words)].nonzero()[:, 0]
        masked_words = words.clone()
        masked_words[hidden] = c.vocab_size
        image, text = plain_image(online.image, c, batch.images[b], every), plain_text(online.text, words)
        masked_image = plain_image(online.image, c, batch.images[b], kept)
        masked_text = plain_text(online.text, masked_words)
        whole_images.append(image)
        whole_texts.append(text)
        if c.masking == "simultaneous":
            first = second = plain_fusion(online, masked_image, kept, masked_text)
        else:
            first = plain_fusion(online, masked_image, kept, text)
            second = plain_fusion(online, image, every, masked_text)
        patch_rows.append(first[1 + gone])
        word_rows.append(second[17 + hidden])
        with torch.no_grad():
            theirs = plain_image(target.image, c, batch.images[b], every)
            fused = plain_fusion(target, theirs, every, plain_text(target.text, words))
        features.append(theirs[1 + gone])
        patch_targets.append(fused[1 + gone])
        word_targets.append(fused[17 + hidden])
        wanted.append(words[hidden])
    patch_rows, word_rows, features, wanted = map(torch.cat, (patch_rows, word_rows, features, wanted))

    def regression(rows, targets):
        targets = F.layer_norm(torch.cat(targets), targets[0].shape[-1:], eps=1e-6)
        return F.mse_loss(mlp(model.predictor, rows), targets)

    images = F.normalize(torch.stack([online.image_projection(x[0]) for x in whole_images]), dim=1)
    others = F.normalize(torch.stack([online.text_projection(x[0]) for x in whole_texts]), dim=1)
    scores = images @ others.T / model.contrast.temperature
    right = torch.arange(len(texts))
    tell = torch.stack([plain_fusion(online, whole_images[i], every, whole_texts[j])[0] for i, j in pairs])
    label = (torch.arange(len(pairs)) < len(texts)).long()
    return {
        "mrm_loss": (regression(patch_rows, patch_targets) + regression(word_rows, word_targets)) / 2,
        "mim_loss": F.l1_loss(mlp(model.regressor, patch_rows), features),
        "mlm_loss": F.cross_entropy(F.linear(word_rows, model.word_head.weight, model.word_head.bias), wanted),
        "itc_loss": (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2,
        "itm_loss": F.cross_entropy(F.linear(tell, model.match_head.weight, model.match_head.bias), label),
    }


@pytest.fixture
def told(monkeypatch):
    """The pairs that ITM read."""
    seen, draw = [], MAMO._pairs_to_tell

    def record(self, *args):
        pairs = draw(self, *args)
        seen[:] = zip(*(x.tolist() for x in pairs), strict=True)
        return pairs

    monkeypatch.setattr(MAMO, "_pairs_to_tell", record)
    return seen


@pytest.mark.parametrize("masking", ["two_pass", "simultaneous"])
def test_a_packed_step_is_the_plain_one(masking, told):
    """Losses and every gradient."""
    model = make_model(masking=masking, mrm_weight=0.7, itc_weight=0.3)
    for parameter in model.target.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch()
    out = model(batch, seed=3, step=5)
    wanted = plain_losses(model, batch, out.image_mask, out.text_mask, told)
    assert len(told) == 12
    for name, loss in wanted.items():
        torch.testing.assert_close(getattr(out, name), loss, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    total = sum(getattr(model.config, name.replace("loss", "weight")) * loss for name, loss in wanted.items())
    torch.testing.assert_close(out.loss, total, rtol=1e-5, atol=0)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(out.loss, list(parameters.values()))
    theirs = torch.autograd.grad(total, list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-6 + 1e-5 * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("only", ["mrm", "mim", "mlm", "itc", "itm"])
@pytest.mark.parametrize("masking", ["two_pass", "simultaneous"])
def test_a_loss_alone_is_the_same_loss(model, masking, only):
    """What has no weight is not computed, and nothing that is changes by it."""
    weights = {f"{name}_weight": float(name == only) for name in ("mrm", "mim", "mlm", "itc", "itm")}
    batch = make_batch()
    whole, alone = make_model(masking=masking), make_model(masking=masking, **weights)
    whole, alone = whole(batch, seed=1), alone(batch, seed=1)
    for name in ("mrm", "mim", "mlm", "itc", "itm"):
        value = getattr(alone, f"{name}_loss")
        torch.testing.assert_close(value, getattr(whole, f"{name}_loss") if name == only else torch.zeros(()))
    torch.testing.assert_close(alone.loss, getattr(whole, f"{only}_loss"))


@pytest.mark.parametrize("mrm", [0.0, 0.5])
@pytest.mark.parametrize("masking", ["two_pass", "simultaneous"])
def test_words_may_be_shown_and_guessed_as_albef_does(masking, mrm):
    """80/10/10, and the momentum network's guesses, of the whole image beside the masked text, among the targets."""
    shares = {"random_words": 0.3, "kept_words": 0.3, "soft_words": 0.4, "soft_targets_steps": 10}
    weights = {"mrm_weight": mrm, "mim_weight": 0, "itc_weight": 0, "itm_weight": 0}
    model, batch, alpha, every = make_model(masking=masking, **shares, **weights), make_batch(), 0.4 * 3 / 10, range(16)
    for parameter in model.target.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plan = model.plan(batch, seed=4, step=2)
    out = model(batch, plan=plan)
    words = torch.where(plan.shown < 0, batch.text[plan.hidden], plan.shown.int())
    text = batch.text.index_copy(0, plan.hidden, words).long().split(batch.text_lengths.lengths)
    assert {*plan.shown.tolist()} >= {-1, CONFIG.vocab_size} and len({*plan.shown.tolist()}) > 2
    losses, hidden = [], out.text_mask
    for b, words in enumerate(text):
        kept = (~out.image_mask[b]).nonzero()[:, 0].tolist() if masking == "simultaneous" else list(every)
        ours, theirs = (
            plain_fusion(net, plain_image(net.image, CONFIG, batch.images[b], seen), seen, plain_text(net.text, words))
            for net, seen in ((model.online, kept), (model.target, list(every)))
        )
        at = hidden[b, : len(words)].nonzero()[:, 0]
        log_p, guess = (model.word_head(x[17 + at]).log_softmax(1) for x in (ours, theirs))
        wanted = F.one_hot(batch.text.split(batch.text_lengths.lengths)[b][at].long(), CONFIG.vocab_size)
        losses.append(-((alpha * guess.exp().detach() + (1 - alpha) * wanted) * log_p).sum(1))
    torch.testing.assert_close(out.mlm_loss, torch.cat(losses).mean(), rtol=1e-5, atol=1e-6)
    if mrm:
        hard = make_model(masking=masking, **(shares | {"soft_words": 0.0}), **weights)
        hard.load_state_dict(model.state_dict())
        for name in ("mrm_loss", "target_std", "prediction_std"):
            torch.testing.assert_close(getattr(hard(batch, seed=4, step=2), name), getattr(out, name))
    with pytest.raises(ValueError, match="random_words and kept_words must be at most 1 together"):
        MAMOConfig.tiny(random_words=0.6, kept_words=0.5)


@pytest.mark.parametrize("kind", [MAMO, CLIP])
def test_texts_are_told_apart_from_the_start(kind):
    """By their words: two texts of other words were alike but for a cosine of 0.999, their positions'."""
    torch.manual_seed(0)
    model = kind((MAMOConfig if kind is MAMO else EncodersConfig)(**SIZES))
    tokens = model.encode_texts(torch.arange(16, dtype=torch.int32), SeqLens([8, 8])).tokens
    one, other = tokens.view(2, 9, -1)
    assert F.cosine_similarity(one[1:], other[1:]).mean() < 0.7


# -- the momentum network ---------------------------------------------------------------------------------------------


def test_the_target_follows_slowly(model):
    for parameter in model.target.parameters():
        torch.nn.init.normal_(parameter)
    before = [p.clone() for p in model.target.parameters()]
    model.update_target()
    m = model.config.momentum
    for old, new, online in zip(before, model.target.parameters(), model.online.parameters(), strict=True):
        torch.testing.assert_close(new, m * old + (1 - m) * online)


def test_gradients_never_reach_the_target(model):
    """Not even where it would take them."""
    model.target.requires_grad_(True)
    model(make_batch(), seed=0).loss.backward()
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("target."))


def test_the_target_starts_as_a_copy_and_is_not_trained():
    model = MAMO(CONFIG)
    for a, b in zip(model.online.parameters(), model.target.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b and not b.requires_grad


def test_collapse_shows(model):
    """Targets that are all alike have no spread."""
    batch = make_batch()
    lively = model(batch, seed=0)
    with torch.no_grad():
        model.target.fusion.norm.weight.zero_()
    assert lively.target_std > 0.01 and model(batch, seed=0).target_std < 1e-5


# -- contrast ---------------------------------------------------------------------------------------------------------


def units(rows, width=12, seed=0):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_contrast_is_the_dense_formula():
    loss = ContrastiveLoss(12, temperature=0.2)
    image, text = units(5), units(5, seed=1)
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(5):
            exps = [torch.exp(a[i] @ b[j] / 0.2) for j in range(5)]
            total = total - torch.log(exps[i] / sum(exps)) / 10
    torch.testing.assert_close(loss(image, text), total)


def test_contrast_spreads_its_target_over_duplicates():
    image, text = units(3), units(3, seed=1)
    same = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
    scores = image @ text.T / 0.07
    wanted = same / same.sum(1, keepdim=True)
    dense = (F.cross_entropy(scores, wanted) + F.cross_entropy(scores.T, wanted)) / 2
    torch.testing.assert_close(ContrastiveLoss(12)(image, text, same), dense)


def test_contrast_with_a_queue_and_soft_targets():
    """ALBEF's: online against the momentum network's batch and what waits in the queue, newest over oldest."""
    loss = ContrastiveLoss(12, queue_size=5)
    waiting_images, waiting_texts = [], []
    for step in range(4):
        image, text, image_m, text_m = (units(2, seed=10 * step + i) for i in range(4))
        alpha = 0.1 * step
        total = 0.0
        for asking, teacher, batch, waiting in (
            (image, image_m, text_m, waiting_texts), (text, text_m, image_m, waiting_images),
        ):  # fmt: skip
            answers = torch.cat([batch, *waiting[-5:]])
            soft = (teacher @ answers.T / 0.07).softmax(1)
            hard = torch.eye(2, len(answers))
            log_p = (asking @ answers.T / 0.07).log_softmax(1)
            total = total - ((alpha * soft + (1 - alpha) * hard) * log_p).sum(1).mean() / 2
        torch.testing.assert_close(loss(image, text, momentum=(image_m, text_m), soft=alpha), total)
        waiting_images += image_m.split(1)
        waiting_texts += text_m.split(1)
    loss.eval()
    before = loss.image_queue.clone()
    loss(image, text, momentum=(image_m, text_m))
    assert torch.equal(before, loss.image_queue) and loss.queued == 8


def test_the_temperature_stays_within_its_bounds():
    loss = ContrastiveLoss(12)
    with torch.no_grad():
        loss.temperature.fill_(3.0)
    loss(units(2), units(2, seed=1))
    assert loss.temperature == 0.5
    first, second = (loss(units(2), units(2, seed=s)) for s in (1, 2))
    (first + second).backward()  # two forward passes, one backward


def test_a_queue_in_a_step(model):
    model = make_model(queue_size=16, soft_targets=0.4, soft_targets_steps=10)
    batch = make_batch()
    for step in range(3):
        model.update_target()
        model(batch, seed=0, step=step).loss.backward()
    assert model.contrast.queued == 12
    assert torch.equal(model.contrast.image_queue[12:], torch.zeros(4, 12))
    torch.testing.assert_close(model.contrast.text_queue[:12].norm(dim=1), torch.ones(12))


def test_a_queue_may_start_full_of_random_embeddings():
    """As ALBEF's: they are compared with at once, and leave first."""
    model = MAMO(dataclasses.replace(CONFIG, queue_size=6, queue_start="random"))
    loss, image, text, image_m, text_m = model.contrast, *(units(2, seed=s) for s in range(4))
    queues = loss.image_queue.clone(), loss.text_queue.clone()
    assert not torch.equal(*queues) and all(torch.allclose(queue.norm(dim=1), torch.ones(6)) for queue in queues)
    dense = [F.cross_entropy(a @ torch.cat([b, queue]).T / 0.07, torch.arange(2))
             for a, b, queue in ((image, text_m, queues[1]), (text, image_m, queues[0]))]  # fmt: skip
    torch.testing.assert_close(loss(image, text, momentum=(image_m, text_m)), sum(dense) / 2)
    assert torch.equal(loss.image_queue, torch.cat([image_m, queues[0][2:]]))
    with pytest.raises(ValueError, match="queue_start must be one of"):
        dataclasses.replace(CONFIG, queue_start="full")


# -- negatives --------------------------------------------------------------------------------------------------------


def same(batch, image_ids=None):
    """What one process makes of it, which is the same for its images and for its texts."""
    of_images, of_texts = same_pairs(batch, image_ids)
    assert torch.equal(of_images, of_texts)
    return of_images


def test_negatives_are_never_the_same_image_or_text(told):
    model = make_model()
    batch = make_batch((4, 4, 4, 4, 4))
    batch.images[3] = batch.images[1]
    text = batch.text.view(5, 4)
    text[4] = text[0]
    seen = set()
    for step in range(60):
        model(batch, seed=0, step=step)
        assert told[:5] == [(b, b) for b in range(5)] and len(told) == 15
        seen |= set(told[5:])
    forbidden = {(1, 3), (3, 1), (0, 4), (4, 0)} | {(b, b) for b in range(5)}
    assert not seen & forbidden
    assert len(seen) >= 12  # of the 16 that are left


def test_what_the_data_knows_to_be_right_is_no_negative(told):
    model, batch = make_model(), make_batch((4, 4, 4))
    facts, says = torch.tensor([[5, 7, 8], [7, 0, 0], [9, 7, 0]]), torch.tensor([[5, 8], [7, 0], [9, 9]])
    batch = ImageTextBatch(batch.images, batch.text, [4] * 3, facts=facts, says=says)
    right = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 1]]).bool()
    assert torch.equal(same(batch), right)
    assert torch.equal(same(batch, torch.tensor([7, 9, 7])), right | (torch.eye(3).fliplr() > 0))
    seen = set()
    for step in range(30):
        model(batch, seed=0, step=step)
        seen |= set(told[3:])
    assert seen == {(0, 2), (1, 0), (1, 2), (2, 0)}


def test_hard_negatives_are_likelier(told):
    model = make_model()
    batch = make_batch((4, 4, 4, 4))
    image, text = (
        e.embedding for e in (model.encode_images(batch.images), model.encode_texts(batch.text, batch.text_lengths))
    )
    with torch.no_grad():
        model.contrast.temperature.fill_(0.05)
        chances = (image @ text.T / 0.05).fill_diagonal_(-torch.inf).softmax(1)
    counts = torch.zeros(4, 4)
    for step in range(400):
        model._pairs_to_tell((image, text), torch.eye(4).bool(), 0, step)
        for i, j in told[8:]:
            counts[i, j] += 1
    torch.testing.assert_close(counts / 400, chances.detach(), rtol=0, atol=0.08)


def test_negatives_may_grow_hard(told):
    """At first any is as likely as another."""
    model = make_model(hard_negatives_steps=1000)
    model.contrast.reset_parameters()
    image, text = units(4, seed=1), units(4, seed=2)
    chances = (image @ text.T / 0.07).fill_diagonal_(-torch.inf)
    for step, hardness in ((0, 0.001), (499, 0.5), (999, 1.0), (5000, 1.0)):
        counts = torch.zeros(4, 4)
        for seed in range(400):
            model._pairs_to_tell((image, text), torch.eye(4).bool(), seed, step)
            for i, j in told[8:]:
                counts[i, j] += 1
        torch.testing.assert_close(counts / 400, (hardness * chances).softmax(1), rtol=0, atol=0.08)


def test_all_the_same_leaves_no_negative(told):
    model, batch = make_model(), make_batch((3, 3))
    batch.images[1] = batch.images[0]
    out = model(batch, seed=0)
    assert told == [(0, 0), (1, 1)] and out.loss.isfinite()


def test_negatives_take_any_seed_that_masks_take(told):
    model, batch = make_model(), make_batch((4, 3, 5, 4, 3, 5))
    drawn = set()
    for seed, step in ((0, 7), (1, 7), (2**32, 7), (2**63, 7), (0, 8)):
        model(batch, seed=seed, step=step)
        drawn.add(tuple(told))
    assert len(drawn) == 5  # every bit of a seed counts
    model(batch, seed=2**64 - 1, step=2**32 - 1)
    assert len(told) == 18


def test_what_is_not_a_number_shows_in_the_loss(told):
    model, batch = make_model(), make_batch()
    pixels = batch.images / 255
    pixels[2] = torch.nan
    out = model(ImageTextBatch(pixels, batch.text, batch.text_lengths), seed=0)
    assert out.loss.isnan() and not [i for i, _ in told[4:] if i == 2]


def test_image_ids_say_which_images_are_the_same():
    batch = make_batch((3, 3, 3))
    assert torch.equal(same(batch), torch.eye(3).bool())
    assert same(batch, torch.tensor([7, 9, 7])).tolist() == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]


def test_texts_of_the_same_words_in_another_order_differ():
    text = torch.tensor([1, 2, 2, 1, 1, 2, 0, 1, 2], dtype=torch.int32)
    batch = ImageTextBatch(torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8), text, [2, 2, 3, 2])
    assert same(batch).int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]


# -- masks, bad input, use --------------------------------------------------------------------------------------------


def test_masks_do_not_depend_on_the_batch():
    model = make_model(itc_weight=0, itm_weight=0)
    batch = make_batch(ids=[7, 3, 99, 2**40])
    out = model(batch, seed=5, step=2)
    assert out.text_mask.sum(1).tolist() == [2, 2, 4, 1] and (out.image_mask.sum(1) == 12).all()
    alone = model(ImageTextBatch(batch.images[2:3], batch.text[8:16], [8], sample_ids=[99]), seed=5, step=2)
    assert torch.equal(alone.image_mask[0], out.image_mask[2]) and torch.equal(alone.text_mask[0], out.text_mask[2])


def test_everything_masked_is_defined(model):
    batch = make_batch()
    all_of = {"image_mask": torch.ones(4, 16).bool(), "text_mask": torch.ones(4, 8).bool()}
    none_of = {name: ~mask for name, mask in all_of.items()}
    for masks in (all_of, none_of):
        out = model(batch, seed=0, **masks)
        out.loss.backward()
        assert out.loss.isfinite()
    assert out.mrm_loss == 0 and out.mim_loss == 0 and out.mlm_loss == 0


def test_bad_input(model):
    batch = make_batch()
    with pytest.raises(ValueError, match="at least 2 pairs, since ITC and ITM compare them, got 1"):
        model(make_batch((3,)), seed=0)
    with pytest.raises(ValueError, match="an empty text in sample 1"):
        model(ImageTextBatch(batch.images[:2], batch.text[:5], [5, 0]), seed=0)
    with pytest.raises(ValueError, match="no image in sample 0"):
        model(ImageTextBatch(None, batch.text[:8], [5, 3]), seed=0)
    with pytest.raises(ValueError, match="seed must be given to draw masks"):
        model(batch)
    masks = {"image_mask": torch.zeros(4, 16).bool(), "text_mask": torch.zeros(4, 8).bool()}
    with pytest.raises(ValueError, match="seed must be given to draw ITM's negatives"):
        model(batch, **masks)
    with pytest.raises(ValueError, match="16 x 16 pixels"):
        model(ImageTextBatch(torch.zeros(2, 3, 20, 20), batch.text[:2], [1, 1]), seed=0)
    with pytest.raises(ValueError, match="at most max_text_length 8, got 9"):
        model(ImageTextBatch(batch.images[:2], batch.text[:10], [9, 1]), seed=0)
    with pytest.raises(ValueError, match="itm_weight must be positive, got 0 for all"):
        MAMOConfig.tiny(mrm_weight=0, mim_weight=0, mlm_weight=0, itc_weight=0, itm_weight=0)
    with pytest.raises(ValueError, match="fusion_depth must be at least 1, got 0"):
        MAMOConfig.tiny(fusion_depth=0)
    for name in ("mim_weight", "momentum", "image_mask_ratio", "temperature", "mlp_ratio"):
        with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
            MAMOConfig.tiny(**{name: "much"})
    with pytest.raises(ValueError, match=r"image_ids must have shape \(4,\), got \(1,\)"):
        model(batch, seed=0, image_ids=torch.tensor([7]))
    with pytest.raises(TypeError, match="image_ids must be of dtype int32, int64, got float32"):
        model(batch, seed=0, image_ids=torch.zeros(4))
    with pytest.raises(ValueError, match="momentum must be in"):
        MAMOConfig.tiny(momentum=1.5)


def test_match_and_fill_words_are_the_heads_on_plain_fusion(model):
    batch = make_batch()
    images, texts = model.encode_images(batch.images), model.encode_texts(batch.text, batch.text_lengths)
    of_image, of_text = torch.tensor([0, 2, 0, 3]), torch.tensor([1, 2, 0, 0])
    scores = model.match(images, texts, of_image, of_text)
    logits, mask = model.fill_words(batch, seed=1)
    assert logits.shape == (17, 53) and mask.any(1).all()
    words, every = [x.long() for x in batch.text.split(batch.text_lengths.lengths)], list(range(16))
    for score, i, j in zip(scores, of_image, of_text, strict=True):
        image, text = (
            plain_image(model.online.image, CONFIG, batch.images[i], every),
            plain_text(model.online.text, words[j]),
        )
        tell = model.match_head(plain_fusion(model.online, image, every, text)[0])
        torch.testing.assert_close(score, tell[1] - tell[0], rtol=1e-4, atol=1e-5)
    masked = torch.where(mask[2], 53, words[2])
    fused = plain_fusion(
        model.online,
        plain_image(model.online.image, CONFIG, batch.images[2], every),
        every,
        plain_text(model.online.text, masked),
    )
    torch.testing.assert_close(logits[8:16], model.word_head(fused[17:]), rtol=1e-4, atol=1e-4)


def test_a_state_dict_holds_target_and_queue(model):
    ours = make_model(queue_size=4)
    ours(make_batch(), seed=0)
    other = make_model(seed=1, queue_size=4)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    for a, b in zip(ours.target.parameters(), other.target.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.contrast.queued == 4 and torch.equal(other.contrast.text_queue, ours.contrast.text_queue)


# -- baselines --------------------------------------------------------------------------------------------------------


def test_clip_is_contrast_of_two_encoders():
    torch.manual_seed(0)
    model, batch = CLIP(EncodersConfig(**SIZES)), make_batch()
    out = model(batch)
    words = [x.long() for x in batch.text.split(batch.text_lengths.lengths)]
    encoders, every = model.encoders, list(range(16))
    image = [encoders.image_projection(plain_image(encoders.image, model.config, x, every)[0]) for x in batch.images]
    text = [encoders.text_projection(plain_text(encoders.text, x)[0]) for x in words]
    scores = F.normalize(torch.stack(image), dim=1) @ F.normalize(torch.stack(text), dim=1).T / 0.07
    right = torch.arange(4)
    torch.testing.assert_close(out.loss, (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2)
    assert out.text_accuracy == (scores.argmax(1) == right).float().mean()
    assert out.image_accuracy == (scores.argmax(0) == right).float().mean()
    out.loss.backward()
    with pytest.raises(ValueError, match="at least 2 pairs"):
        model(make_batch((3,)))


def test_supervised_names_what_an_image_shows():
    torch.manual_seed(0)
    model = Supervised(SupervisedConfig(image_size=16, patch_size=4, width=32, heads=4, depth=2, classes=5))
    batch = make_batch()
    labels = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]]).bool()
    batch.labels = labels
    out = model(batch)
    logits = torch.stack(
        [model.head(plain_image(model.encoder, model.config, x, list(range(16)))[0]) for x in batch.images]
    )
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(logits, labels.float()))
    found = sum(labels[b, logits[b].topk(int(labels[b].sum())).indices].sum().item() for b in range(4))
    torch.testing.assert_close(out.accuracy.item(), found / 6)
    with pytest.raises(ValueError, match="must have images and labels"):
        model(make_batch())
    batch.labels = labels[:, :4]
    with pytest.raises(ValueError, match=r"batch.labels must have shape \(any, 5\)"):
        model(batch)
