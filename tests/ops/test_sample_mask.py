"""sample_mask: the generator's published answers, the rule that selects, statistics, grouping, errors."""

import pytest
import torch

from m3ae_fast import SampledMask, SeqLens, sample_mask, testing
from m3ae_fast.ops.sample_mask import reference

IMPLS = ["reference", *testing.impls("sample_mask")]
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # philox4x32-10 in Random123's kat_vectors: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """Python's own big integers: neither backend's arithmetic."""
    x, y, z, w = counter
    k0, k1 = key
    for _ in range(10):
        a, b = x * 0xD2511F53, z * 0xCD9E8D57
        x, y, z, w = b >> 32 ^ y ^ k0, b & ONES, a >> 32 ^ w ^ k1, a & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return x, y, z, w


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, words):
    assert philox(counter, key) == words
    tensors = [torch.tensor([c]) for c in counter]
    assert tuple(int(word) for word in reference.philox4x32(tensors, key)) == words
    if "cpp" in IMPLS:
        from m3ae_fast._cpp import _C

        assert tuple(_C.philox4x32(counter, key)) == words


def expected(lengths, keeps, seed, step, sample_ids, stream):
    """The rule, word by word."""
    kept, masked = [], []
    for length, keep, sample_id in zip(lengths, keeps, sample_ids, strict=True):
        keys = []
        for position in range(length):
            counter = (position >> 2, sample_id & ONES, stream | (sample_id >> 32) << 8, step)
            keys.append((philox(counter, (seed & ONES, seed >> 32))[position & 3], position))
        chosen = {position for _, position in sorted(keys)[:keep]}
        kept += sorted(chosen)
        masked += [position for position in range(length) if position not in chosen]
    return SampledMask(torch.tensor(kept, dtype=torch.int32), torch.tensor(masked, dtype=torch.int32))


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype == torch.int32
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 2**32 - 1])
def test_keeps_the_smallest_words(impl, seed, step, isa):
    lengths, keeps = [0, 1, 3, 4, 63, 64, 65, 200], [0, 1, 1, 0, 20, 64, 1, 150]
    ids = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 2**55 + 2**33, 2**56 - 1]
    got = sample_mask(lengths, keeps, seed=seed, step=step, sample_ids=ids, stream=255, impl=impl)
    assert_equal(got, expected(lengths, keeps, seed, step, ids, 255))


@pytest.mark.parametrize("impl", IMPLS)
def test_shared_is_the_draw_of_sample_zero(impl):
    one = sample_mask([50], 20, seed=3, impl=impl)
    four = sample_mask([50] * 4, 20, seed=3, shared=True, impl=impl)
    assert_equal(four, [x.repeat(4) for x in one])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_batch_a_sample_is_in_does_not_matter(impl):
    lengths, keeps, ids = [9, 70, 31, 200], [4, 69, 3, 50], [11, 2**50, 7, 3]
    whole = sample_mask(lengths, keeps, seed=5, sample_ids=ids, impl=impl)
    parts = [
        sample_mask([n], [k], seed=5, sample_ids=torch.tensor([i]), impl=impl)
        for n, k, i in zip(lengths, keeps, ids, strict=True)
    ]
    assert_equal(whole, [torch.cat(part) for part in zip(*parts, strict=True)])


def test_every_part_of_the_key_matters():
    options = {"seed": 1, "step": 2, "stream": 3, "sample_ids": [4]}
    base = sample_mask([64], 32, **options)
    for change in ({"seed": 1 + 2**32}, {"seed": 2}, {"step": 3}, {"stream": 4}, {"sample_ids": [4 + 2**32]}):
        assert not torch.equal(base.ids_keep, sample_mask([64], 32, **(options | change)).ids_keep)


def test_positions_are_kept_evenly():
    """Chi-square of how often each of 196 positions is kept: 195 degrees of freedom, seed fixed."""
    samples, length, keep = 4000, 196, 49
    kept = sample_mask([length] * samples, keep, seed=2024).ids_keep
    counts = kept.long().bincount(minlength=length).double()
    mean = samples * keep / length
    # a count is binomial, and the 49 of one sample exclude each other: variance mean * (1 - keep / (length - 1)) about
    chi2 = float(((counts - mean) ** 2).sum() / (mean * (1 - keep / length))) * (length - 1) / length
    assert 195 - 4 * (2 * 195) ** 0.5 < chi2 < 195 + 4 * (2 * 195) ** 0.5


def test_pairs_of_positions_are_kept_evenly():
    """Neighbors share a counter: how often two are kept together must be as chance has it, for every distance."""
    samples, length, keep = 4000, 64, 16
    kept = torch.zeros(samples, length)
    kept.scatter_(1, sample_mask([length] * samples, keep, seed=7).ids_keep.view(samples, keep).long(), 1.0)
    together = (kept.T @ kept).double()[~torch.eye(length, dtype=torch.bool)]
    chance = samples * (keep / length) * (keep - 1) / (length - 1)
    assert abs(together.mean() - chance) < 1e-6 * chance
    assert ((together - chance).abs() < 5.5 * chance**0.5).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_words_are_kept_in_order(impl, monkeypatch):
    """200,000 words of 32 bits hold some equal ones: keep just as many that a pair is cut in two."""
    length = 200_000
    position = torch.arange(length)
    zero = torch.zeros_like(position)
    words = torch.stack(reference.philox4x32((position >> 2, zero, zero, zero), (9, 0)))
    words = words.gather(0, (position & 3)[None])[0]
    in_order, order = words.sort(stable=True)
    ties = (in_order[1:] == in_order[:-1]).nonzero()[:, 0]
    assert len(ties) > 0
    for tie in ties[: 1 if impl == "triton" else 3].tolist():
        mask = sample_mask([length], tie + 1, seed=9, impl=impl)
        first, second = order[tie], order[tie + 1]
        assert first < second and first in mask.ids_keep and second in mask.ids_mask


def test_kinds_of_arguments_agree():
    lengths, keeps = [7, 12, 30], [3, 0, 30]
    base = sample_mask(SeqLens(lengths), SeqLens(keeps), seed=1)
    assert_equal(base, sample_mask(lengths, torch.tensor(keeps), seed=1))
    assert_equal(base, sample_mask(torch.tensor(lengths, dtype=torch.int32), iter(keeps), seed=1, device="cpu"))
    assert_equal(base, sample_mask(lengths, keeps, seed=1, sample_ids=torch.tensor([0, 1, 2], dtype=torch.int32)))
    assert_equal(sample_mask(lengths, [5, 5, 5], seed=1), sample_mask(lengths, 5, seed=1))
    assert base.ids_keep.device.type == "cpu"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("lengths", "num_keep", "options", "error", "message"),
    [
        ([4, 4], [1, 5], {}, ValueError, r"num_keep must be in \[0, length\] for every sample, got 5 of 4 .* sample 1"),
        ([4, 2], 3, {}, ValueError, r"num_keep must be in \[0, length\] for every sample, got 3 of 2"),
        ([4], -1, {}, ValueError, r"num_keep must be in \[0, 2147483648\), got -1"),
        ([4], [-1], {}, ValueError, "lengths must be at least 0, got -1"),
        ([4], 1.5, {}, TypeError, "must be integers"),
        ([4, 4], [1], {}, ValueError, "num_keep must have 2 entries, as lengths has, got 1"),
        ([4], 1, {"seed": -1}, ValueError, r"seed must be in \[0, 18446744073709551616\), got -1"),
        ([4], 1, {"seed": 2**64}, ValueError, "seed must be in"),
        ([4], 1, {"seed": 1.0}, TypeError, "seed must be an integer, got float"),
        ([4], 1, {"step": 2**32}, ValueError, r"step must be in \[0, 4294967296\)"),
        ([4], 1, {"stream": 256}, ValueError, r"stream must be in \[0, 256\), got 256"),
        ([4], 1, {"sample_ids": [2**56]}, ValueError, r"sample_ids must be in \[0, 72057594037927936\), got 7205"),
        ([4], 1, {"sample_ids": torch.tensor([-1])}, ValueError, r"sample_ids must be in \[0, \d+\), got -1"),
        ([4], 1, {"sample_ids": torch.tensor([1.0])}, TypeError, "sample_ids must be of dtype int32, int64"),
        ([4], 1, {"sample_ids": [1, 2]}, ValueError, r"sample_ids must have shape \(1,\), got \(2,\)"),
        ([4], 1, {"shared": True, "sample_ids": [1]}, ValueError, "sample_ids must be None with shared=True"),
        ([4, 5], 1, {"shared": True}, ValueError, "lengths and num_keep must be the same for all samples with shared"),
        ([4, 4], [1, 2], {"shared": True}, ValueError, "lengths and num_keep .* same .* got 2 of 4 in sample 1"),
    ],
)  # fmt: skip
def test_errors(impl, lengths, num_keep, options, error, message):
    with pytest.raises(error, match=message):
        sample_mask(lengths, num_keep, **({"seed": 0} | options), impl=impl)


def test_the_reference_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(sample_mask, backend="aot_eager", fullgraph=True, dynamic=True)
    for seed in (5, 6):
        arguments = (SeqLens([9, 20 + seed, 0]), SeqLens([3, seed, 0]))
        got = compiled(*arguments, seed=seed, impl="reference")
        assert_equal(got, sample_mask(*arguments, seed=seed))


@pytest.mark.parametrize(
    ("impl", "device"),
    [(impl, device) for device in testing.devices() for impl in testing.impls("sample_mask", device)],
)
def test_a_million_positions_are_split_as_the_reference_splits_them(impl, device):
    """Captions, images and long sequences, each with its own id and keep ratio."""
    positions = 0
    generator = torch.Generator().manual_seed(11)
    for longest, samples in ((64, 30), (256, 30), (4096, 60), (65_536, 18)):
        lengths = torch.randint(longest // 2, longest + 1, (samples,), generator=generator)
        keeps = (lengths * torch.rand(samples, generator=generator)).long()
        ids = torch.randint(0, 2**56, (samples,), generator=generator)
        options = {"seed": 2**63 + longest, "step": longest, "sample_ids": ids, "stream": samples % 256}
        lengths, keeps = SeqLens(lengths), SeqLens(keeps)
        positions += lengths.total
        got = sample_mask(lengths, keeps, **options, device=device, impl=impl)
        assert_equal([x.cpu() for x in got], sample_mask(lengths, keeps, **options, impl="reference"))
    assert positions >= 1_000_000
