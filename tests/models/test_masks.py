"""Ways to mask: against plain loops, the same for any split of a batch, every argument's error."""

import math

import numpy as np
import pytest
import torch

from m3ae_fast import ImageTextBatch, sample_mask
from m3ae_fast.models import (
    M3AE,
    MAE,
    M3AEConfig,
    block_mask,
    dirichlet_masks,
    multi_block_mask,
    random_mask,
    score_mask,
)
from m3ae_fast.models.masks import stand_ins

KEY = {"seed": 2**63 + 5, "step": 7}
IDS = [3, 0, 2**40 + 1, 8, 9, 10]
LENGTHS = [1, 2, 0, 9, 64, 256]
GRIDS = [(14, 14), (4, 4), (3, 12), (1, 9), (2, 2), (1, 2), (1, 1)]


class Numbers:
    """Uniform numbers of a sample, one after the other, by the key that the docstrings name."""

    def __init__(self, sample, stream=0):
        words = np.random.Philox(key=KEY["seed"] + 2**64 * (sample + 2**56 * stream), counter=KEY["step"] * 2**192)
        self.generator = np.random.Generator(words)  # random(): 53 bits of a word

    def between(self, low, high):
        return low + (high - low) * self.generator.random()

    def below(self, n):
        return int(n * self.generator.random())


def kept_of(length, ratio):
    if length < 2:
        return 0
    return min(max(int(length * (1 - ratio)), 1), length - 1)


def cells(numbers, grid, height, width):
    top = numbers.below(grid[0] - height + 1)
    left = numbers.below(grid[1] - width + 1)
    return {(row, column) for row in range(top, top + height) for column in range(left, left + width)}


def loop_block(sample, grid, ratio, min_patches=16, aspect=(0.3, 1 / 0.3)):
    """BEiT's algorithm 1 on sets of patches."""
    numbers, masked = Numbers(sample), set()
    total = grid[0] * grid[1]
    goal, failures = total - kept_of(total, ratio), 0
    while len(masked) < goal and failures < 10:
        left = goal - len(masked)
        area = numbers.between(min(min_patches, left), left)
        shape = math.exp(numbers.between(math.log(aspect[0]), math.log(aspect[1])))
        height, width = round((area * shape) ** 0.5) or 1, round((area / shape) ** 0.5) or 1
        failures += 1
        if height <= grid[0] and width <= grid[1]:
            block = cells(numbers, grid, height, width) - masked
            if 0 < len(block) <= left:
                masked, failures = masked | block, 0
    free = [divmod(i, grid[1]) for i in range(total) if divmod(i, grid[1]) not in masked]
    while len(masked) < goal:
        masked.add(free.pop(numbers.below(len(free))))
    return masked


def loop_multi_block(sample, grid, blocks=4, scale=(0.15, 0.2), aspect=(0.75, 1.5), context=(0.85, 1)):
    """(to be predicted, kept)."""
    numbers, masked = Numbers(sample), set()
    total = grid[0] * grid[1]
    area = numbers.between(*scale) * total
    shape = numbers.between(*aspect)
    height, width = round((area * shape) ** 0.5) or 1, round((area / shape) ** 0.5) or 1
    height, width = max(min(height, grid[0] - 1), 1), max(min(width, grid[1] - 1), 1)
    for _ in range(blocks):
        union = masked | cells(numbers, grid, height, width)
        if len(union) < total or total == 1:
            masked = union
    side = round((numbers.between(*context) * total) ** 0.5) or 1
    square = cells(numbers, grid, *(max(min(side, most - 1), 1) for most in grid))
    everything = {(row, column) for row in range(grid[0]) for column in range(grid[1])}
    return masked, square - masked or everything - masked


def as_sets(mask, grid):
    return [{divmod(i, grid[1]) for i in row.nonzero()[:, 0].tolist()} for row in mask]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.75, 0.99])
def test_block_mask_against_a_loop(grid, ratio):
    mask = block_mask(grid, ratio, sample_ids=IDS, **KEY)
    assert as_sets(mask, grid) == [loop_block(sample, grid, ratio) for sample in IDS]
    patches = grid[0] * grid[1]
    assert mask.sum(1).tolist() == [patches - kept_of(patches, ratio)] * len(IDS)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 1, "context": (1, 1)},
        {"blocks": 9, "scale": (0.5, 0.99), "aspect": (0.1, 9)},
        {"context": (0.01, 0.2)},
    ],
)
def test_multi_block_mask_against_a_loop(grid, options):
    mask = multi_block_mask(grid, sample_ids=IDS, **options, **KEY)
    predicted, kept = zip(*(loop_multi_block(sample, grid, **options) for sample in IDS), strict=True)
    assert as_sets(mask == 1, grid) == list(predicted) and as_sets(mask == 0, grid) == list(kept)
    assert (mask == 1).any(1).all() and (grid == (1, 1) or (mask == 0).any(1).all()) and mask.max() <= 2


def uniform(lengths, keep, stream=0):
    """sample_mask's own, [B, longest]."""
    out = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for b, (n, k) in enumerate(zip(lengths, keep, strict=True)):
        out[b, sample_mask([n], [k], sample_ids=IDS[b : b + 1], stream=stream, **KEY).ids_mask.long()] = True
    return out


@pytest.mark.parametrize("bounds", [(0.0, 0.0), (0.3, 0.9), (0.75, 0.75), (0.0, 0.99)])
def test_random_mask_against_a_loop(bounds):
    mask = random_mask(LENGTHS, bounds, sample_ids=IDS, stream=1, **KEY)
    ratios = [Numbers(sample, stream=1).between(*bounds) for sample in IDS]
    keep = [kept_of(n, ratio) for n, ratio in zip(LENGTHS, ratios, strict=True)]
    assert torch.equal(mask, uniform(LENGTHS, keep, stream=1))


def test_ratios_are_uniform_within_their_range():
    ids = torch.arange(4000)
    shares = random_mask([200] * 4000, (0.3, 0.9), seed=0, sample_ids=ids).double().mean(1)
    assert 0.3 <= shares.min() < 0.31 and 0.89 < shares.max() <= 0.905  # the kept ones are rounded down
    count, low = torch.histc(shares, 6, 0.3025, 0.9025), 4000 / 6
    assert (count - low).abs().max() < 5 * low**0.5


def gamma(numbers, shape):
    """Marsaglia and Tsang's method; below 1 by a variate of shape + 1."""
    if shape < 1:
        return gamma(numbers, shape + 1) * (1 - numbers.between(0, 1)) ** (1 / shape)
    d = shape - 1 / 3
    while True:
        radius, angle = 1 - numbers.between(0, 1), numbers.between(0, 2 * math.pi)
        x = math.sqrt(-2 * math.log(radius)) * math.cos(angle)
        v = (1 + x / math.sqrt(9 * d)) ** 3
        if v > 0 and math.log(1 - numbers.between(0, 1)) < x**2 / 2 + d - d * v + d * math.log(v):
            return d * v


@pytest.mark.parametrize("alpha", [0.2, 1.0, (10.0, 0.3, 1)])
def test_dirichlet_masks_against_a_loop(alpha):
    lengths = [LENGTHS, [256, 64, 9, 0, 2, 1], [5, 0, 0, 5, 5, 5]]
    budgets = [30, 0, 4, 13, 500, 40]
    masks = dirichlet_masks(lengths, budgets, alpha=alpha, sample_ids=IDS, **KEY)
    kept = [[], [], []]
    for sample, tokens, budget in zip(IDS, zip(*lengths, strict=True), budgets, strict=True):
        numbers, budget = Numbers(sample, stream=3), min(max(budget, 1), sum(tokens) - 1)
        drawn = [gamma(numbers, each) for each in (alpha if isinstance(alpha, tuple) else [alpha] * 3)]
        keep = [min(n, int(budget * g / sum(drawn))) for n, g in zip(tokens, drawn, strict=True)]
        for m in sorted(range(3), key=lambda m: drawn[m], reverse=True):
            while sum(keep) < budget and keep[m] < tokens[m]:
                keep[m] += 1
        assert 1 <= sum(keep) == budget < sum(tokens)
        for each, k in zip(kept, keep, strict=True):
            each.append(k)
    for stream, (mask, own, keep) in enumerate(zip(masks, lengths, kept, strict=True)):
        assert torch.equal(mask, uniform(own, keep, stream))


@pytest.mark.parametrize("alpha", [0.001, 0.3, 1.0, 4.0])
def test_shares_have_the_moments_of_a_dirichlet_distribution(alpha):
    """Of three modalities: mean 1/3, variance (1/3)(2/3) / (3 alpha + 1)."""
    samples, budget = 2000, 1000
    masks = dirichlet_masks(
        [[budget + 1] * samples] * 3, [budget] * samples, alpha=alpha, seed=0, sample_ids=range(samples)
    )
    for mask in masks:
        share = 1 - (mask.sum(1).double() - 1) / budget
        variance = 2 / 9 / (3 * alpha + 1)
        assert abs(share.mean() - 1 / 3) < 5 * (variance / samples) ** 0.5
        assert abs(share.var() / variance - 1) < 0.15


@pytest.mark.parametrize("highest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_score_mask_against_a_loop(highest, dtype):
    scores = torch.randint(-3, 4, (6, 12), generator=torch.Generator().manual_seed(0)).to(dtype)  # many are equal
    if dtype != torch.int64:
        scores[0, 1], scores[1, 2], scores[2, 3] = math.inf, -math.inf, math.nan  # which is past its end
    lengths = [12, 5, 3, 1, 0, 8]
    mask = score_mask(scores, 0.6, highest=highest, lengths=lengths)
    for row, score, n in zip(mask, scores.tolist(), lengths, strict=True):
        order = sorted(range(n), key=lambda i: (-score[i] if highest else score[i], i))
        assert row.nonzero()[:, 0].tolist() == sorted(order[: n - kept_of(n, 0.6)])
    assert score_mask(scores[3:], 0.6).sum(1).tolist() == [8, 8, 8]


GENERATORS = {
    "block": lambda b, **key: [block_mask((14, 14), 0.4, **key)],
    "multi_block": lambda b, **key: [multi_block_mask((14, 14), **key)],
    "random": lambda b, **key: [random_mask([LENGTHS[i] for i in b], (0.3, 0.9), **key)],
    "dirichlet": lambda b, **key: dirichlet_masks(
        [[LENGTHS[i] for i in b], [9] * len(b)], [len(LENGTHS)] * len(b), **key
    ),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_mask_is_of_its_sample_and_step_alone(name):
    make, ids = GENERATORS[name], torch.tensor(IDS)
    every = range(len(IDS))
    whole = make(every, sample_ids=ids, **KEY)
    for split in ([[0, 1, 2], [3, 4, 5]], [[5, 0], [3], [1, 4, 2]], [list(every)[rank::2] for rank in range(2)]):
        for part in split:
            for mask, own in zip(whole, make(part, sample_ids=ids[part], **KEY), strict=True):
                assert torch.equal(mask[part][:, : own.shape[1]], own) and not mask[part][:, own.shape[1] :].any()
    others = {"seed": {**KEY, "seed": 6}, "step": {**KEY, "step": 8}}
    for key in others.values():
        assert not all(map(torch.equal, whole, make(every, sample_ids=ids, **key)))
    assert not all(map(torch.equal, whole, make(every, sample_ids=ids + 1, **KEY)))
    if name != "dirichlet":
        assert not torch.equal(whole[0], make(every, sample_ids=ids, stream=1, **KEY)[0])
    assert all(len(mask) == 0 for mask in make([], sample_ids=[], **KEY))


CONFIG = M3AEConfig(
    image_size=16, patch_size=2, vocab_size=53, max_text_length=8, width=32, depth=1, heads=4,
    decoder_width=24, decoder_depth=1, decoder_heads=3, image_mask_ratio=0.6,
)  # fmt: skip


def make_batch(lengths=(5, 0, 8, 2, 1), has_image=(True, True, False, True, False), ids=(7, 3, 99, 2**40, 0)):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (sum(has_image), 3, 16, 16), generator=generator, dtype=torch.uint8)
    text = torch.randint(0, 53, (sum(lengths),), generator=generator, dtype=torch.int32)
    return ImageTextBatch(pixels, text, list(lengths), has_image=list(has_image), sample_ids=list(ids))


def model_of(masking, kind=M3AE, **changes):
    return kind(M3AEConfig.from_dict({**CONFIG.to_dict(), "masking": masking, **changes}))


@pytest.mark.parametrize("masking", ["block", "multi_block", "ratio_range", "dirichlet"])
def test_masking_of_a_model(masking):
    """What `masking` says in a mixed batch, in a plan made ahead, in a bucket."""
    model, batch = model_of(masking, mask_ratio_range=[0.2, 0.4], dirichlet_alpha=[3, 0.5]), make_batch()
    out = model(batch, seed=5, step=7)
    key = {"seed": 5, "step": 7, "sample_ids": batch.sample_ids}
    images, words = [64, 64, 0, 64, 0], [5, 0, 8, 2, 1]
    text = model_of("sample")(batch, seed=5, step=7).text_mask
    if masking == "block":
        image = block_mask((8, 8), 0.6, **key)
    elif masking == "multi_block":
        image = multi_block_mask((8, 8), **key) > 0
    elif masking == "ratio_range":
        image, text = random_mask(images, (0.2, 0.4), **key), random_mask(words, (0.2, 0.4), stream=1, **key)
    else:
        image, text = dirichlet_masks([images, words], [25 + 1, 25, 2, 25 + 1, 1], alpha=(3, 0.5), **key)
    image = image & torch.tensor(batch.has_image)[:, None]
    assert torch.equal(out.image_mask, image) and torch.equal(out.text_mask, text) and out.loss.isfinite()
    exact, roomy = (model.plan(batch, seed=5, step=7, bucket=bucket) for bucket in (False, True))
    assert torch.equal(model(batch, plan=exact).loss, out.loss)
    padded = model(batch.with_room(roomy.images, roomy.words), plan=roomy)
    torch.testing.assert_close(padded.loss, out.loss, rtol=1e-6, atol=0)
    assert torch.equal(padded.image_mask, out.image_mask)


@pytest.mark.parametrize("masking", ["block", "multi_block", "ratio_range", "dirichlet"])
def test_masking_of_images_alone(masking):
    model, images = model_of(masking, MAE), make_batch().images
    out = model(images, seed=5)
    assert out.image_mask.any(1).all() and not out.image_mask.all(1).any() and out.loss > 0
    if masking == "dirichlet":  # one modality has all of the budget
        assert torch.equal(out.image_mask, model_of("sample", MAE)(images, seed=5).image_mask)


def test_a_callers_mask_goes_before_that_of_the_model():
    model, batch = model_of("ratio_range"), make_batch()
    image = torch.zeros(5, 64, dtype=torch.bool)
    image[0, :7] = image[1, 9] = True
    drawn, mixed = model(batch, seed=5), model(batch, seed=5, image_mask=image)
    assert torch.equal(mixed.image_mask, image) and torch.equal(mixed.text_mask, drawn.text_mask)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: block_mask((4,), 0.5, sample_ids=[0], seed=0), ValueError, "grid must be"),
        (lambda: block_mask((4, 0), 0.5, sample_ids=[0], seed=0), ValueError, "grid must be at least 1, got 0"),
        (lambda: block_mask((4, 4), 1, sample_ids=[0], seed=0), ValueError, r"ratio must be in \[0, 1\), got 1"),
        (lambda: block_mask((4, 4), 0.5, sample_ids=[0], seed=0, min_patches=0), ValueError, "min_patches must"),
        (lambda: block_mask((4, 4), 0.5, sample_ids=[0], seed=0, aspect=(2, 1)), ValueError, r"aspect must be \(low"),
        (lambda: block_mask((4, 4), 0.5, sample_ids=[0], seed=0, aspect=0.3), ValueError, "aspect must be two numbers"),
        (lambda: block_mask((4, 4), 0.5, sample_ids=[0], seed=-1), ValueError, "seed must be in"),
        (lambda: block_mask((4, 4), 0.5, sample_ids=[0], seed=0, step=2**32), ValueError, "step must be in"),
        (lambda: block_mask((4, 4), 0.5, sample_ids=[0], seed=0, stream=256), ValueError, "stream must be in"),
        (lambda: block_mask((4, 4), 0.5, sample_ids=[2**56], seed=0), ValueError, "sample_ids must be in"),
        (lambda: block_mask((4, 4), 0.5, sample_ids=torch.ones(2), seed=0), TypeError, "sample_ids must be an integer"),
        (lambda: multi_block_mask((4, 4), sample_ids=[0], seed=0, blocks=0), ValueError, "blocks must be at least 1"),
        (lambda: multi_block_mask((4, 4), sample_ids=[0], seed=0, scale=(0, 1)), ValueError, "scale must be in"),
        (lambda: multi_block_mask((4, 4), sample_ids=[0], seed=0, aspect=(0, 1)), ValueError, "aspect must be finite"),
        (lambda: multi_block_mask((4, 4), sample_ids=[0], seed=0, context=(0, 1)), ValueError, "context must be in"),
        (lambda: random_mask([4], (0.5, 1), sample_ids=[0], seed=0), ValueError, "ratio_range must be in"),
        (lambda: random_mask([4], (0.5, None), sample_ids=[0], seed=0), TypeError, "ratio_range must be a number"),
        (lambda: random_mask([4, 5], (0.5, 0.6), sample_ids=[0], seed=0), ValueError, "lengths must have 1 entries"),
        (lambda: dirichlet_masks([[4]], [2], sample_ids=[0], seed=0, alpha=0), ValueError, "alpha must be in"),
        (lambda: dirichlet_masks([[4]], [2], sample_ids=[0], seed=0, alpha=[1, 1]), ValueError, "alpha must have 1 "),
        (lambda: dirichlet_masks([[4]], [-2], sample_ids=[0], seed=0), ValueError, "num_keep must be at least 0"),
        (lambda: dirichlet_masks([[4]], [2, 2], sample_ids=[0], seed=0), ValueError, "num_keep must have 1 entries"),
        (lambda: dirichlet_masks([[4], []], [2], sample_ids=[0], seed=0), ValueError, "lengths must have 1 entries"),
        (lambda: score_mask(torch.zeros(4), 0.5), ValueError, r"scores must have shape \(any, any\)"),
        (lambda: score_mask([[0.0]], 0.5), TypeError, "scores must be a tensor"),
        (lambda: score_mask(torch.zeros(1, 2, dtype=torch.complex64), 0.5), TypeError, "scores must be of a real"),
        (lambda: score_mask(torch.full((1, 2), math.nan), 0.5), ValueError, "scores must be numbers, got NaN"),
        (lambda: score_mask(torch.zeros(1, 2), -0.5), ValueError, "ratio must be in"),
        (lambda: score_mask(torch.zeros(1, 2), 0.5, lengths=[3]), ValueError, r"lengths must be in \[0, 3\), got 3"),
        (lambda: score_mask(torch.zeros(1, 2), 0.5, lengths=[2, 2]), ValueError, "lengths must have 1 entr"),
        (lambda: model_of("blocks"), ValueError, "masking must be one of 'sample', 'shared', 'block'"),
        (lambda: model_of("sample", mask_ratio_range=[0.9, 0.5]), ValueError, "mask_ratio_range must be"),
        (lambda: model_of("sample", dirichlet_alpha=0), ValueError, "dirichlet_alpha must be in"),
        (lambda: model_of("sample", dirichlet_alpha=[1]), ValueError, "dirichlet_alpha must be a number or"),
        (lambda: model_of("sample", dirichlet_alpha=[1, -1]), ValueError, "dirichlet_alpha must be in"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_stand_ins():
    """Shares as asked for, any word of the vocabulary, and each sample's the same in whatever batch."""
    keys = {"random": 0.1, "kept": 0.2, "seed": 3}
    shown = stand_ins([50] * 100, 30, sample_ids=range(100), **keys)
    shares = [(shown == -1).float().mean(), (shown == 30).float().mean()]
    assert shares == [pytest.approx(0.2, abs=0.03), pytest.approx(0.7, abs=0.03)]
    assert set(shown.tolist()) == set(range(-1, 31))
    assert torch.equal(stand_ins([3, 50], 30, sample_ids=[7, 9], **keys)[3:], shown[450:500])
    assert not torch.equal(stand_ins([50] * 100, 30, sample_ids=range(100), step=1, **keys), shown)
    assert stand_ins([], 30, sample_ids=[], **keys).tolist() == []
    with pytest.raises(ValueError, match="counts must have 2 entries, as sample_ids has, got 1"):
        stand_ins([1], 30, sample_ids=[0, 1], **keys)
