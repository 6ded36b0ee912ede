"""MixedDataset in a Loader: shares, epochs of its own for each data set, the same for any workers, ranks and resume."""

from collections import Counter

import numpy as np
import pytest
import torch

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import BadSample, Loader, MixedDataset, Sample, ShapesDataset, Tokenizer, shuffle
from m3ae_fast.data.seeds import MIX, generator

WORDS = [f"{w}{v}" for w in "bcdfghklmnprst" for v in "aeiou"]
TOKENIZER = Tokenizer.train(WORDS, 300)


class Images:
    """Image i is filled with i."""

    flip_safe = True

    def __init__(self, size, bad=(), classes=()):
        self.size, self.bad, self.classes = size, bad, classes

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample(f"{index}.jpg", "it is damaged", "image")
        labels = (index % len(self.classes),) if self.classes else ()
        return Sample(np.full((8, 8, 3), index, np.uint8), (), f"{index}.jpg", labels)

    def captions(self):
        yield from ("image caption",)


class Texts:
    """Text i is word i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Sample(None, (WORDS[index],), f"{index}.txt")

    def captions(self):
        yield from WORDS[: self.size]


def loader(dataset, **options):
    return Loader(dataset, TOKENIZER, **({"image_size": 8, "batch_size": 6, "seed": 3} | options))


def contents(stream: Loader, count: int) -> list[tuple]:
    """(sample id, image number or word) of each sample of `count` batches, and how each was augmented."""
    found = []
    for _ in range(count):
        _, batch = next(stream)
        images, texts = iter(batch.images if batch.images is not None else ()), iter(batch.text.tolist())
        for key, has_image, length in zip(
            batch.sample_ids.tolist(), batch.has_image, batch.text_lengths.lengths, strict=True
        ):
            words = tuple(next(texts) for _ in range(length))
            found.append((key, next(images).numpy().tobytes() if has_image else None, words))
    stream.close()
    return found


MIXED = MixedDataset([Images(10), Texts(7)], [3, 1])


@pytest.mark.parametrize(
    "weights, shares",
    [
        ((3, 1), (750, 250)),
        ((1, 1, 1), (334, 333, 333)),
        ((0.2, 0.05), (800, 200)),
        ((999, 1), (999, 1)),
        ((1e6, 3e6, 2e6), (167, 500, 333)),
    ],
)
def test_every_thousand_has_its_shares(weights, shares):
    mixed = MixedDataset([Texts(5)] * len(weights), weights)
    assert tuple(mixed.shares) == shares
    for block in (0, 1, 10**9):
        drawn = [mixed.at(1000 * block + i, seed=1) for i in range(1000)]
        assert tuple(Counter(source for source, _ in drawn)[i] for i in range(len(weights))) == shares
        for source, share in enumerate(shares):
            assert [turn for s, turn in drawn if s == source] == [share * block + i for i in range(share)]
    starts = {tuple(mixed.at(1000 * block + i, 1)[0] for i in range(50)) for block in range(4)}
    assert len(starts) == 4 or shares == (999, 1), "each block in an order of its own"


def test_counts_are_of_what_comes_before():
    mixed = MixedDataset([Texts(5)] * 3, [5, 3, 2])
    drawn = [mixed.at(i, 7)[0] for i in range(2500)]
    for end in (0, 1, 999, 1000, 1001, 2500):
        assert [mixed.count(source, end, 7) for source in range(3)] == [drawn[:end].count(s) for s in range(3)]


def test_each_data_set_has_epochs_of_its_own():
    """None of its samples is lost or comes twice within one of them."""
    found = contents(loader(MIXED, augment=False), 500)
    images = [np.frombuffer(image, np.uint8)[0] for _, image, _ in found if image is not None]
    texts = [words for _, image, words in found if image is None]
    assert len(images) == 2250 == 3 * len(texts)
    epochs = [sorted(images[i : i + 10]) for i in range(0, 2250, 10)]
    assert all(epoch == list(range(10)) for epoch in epochs)
    assert all(len(set(texts[i : i + 7])) == 7 for i in range(0, 749, 7))
    assert len({tuple(images[i : i + 10]) for i in range(0, 2250, 10)}) > 200, "in an order of its own"


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_and_ranks_change_nothing(workers, world):
    whole = contents(loader(MIXED), 36)
    ranks = [
        contents(loader(MIXED, batch_size=6 // world, workers=workers, rank=rank, world_size=world), 36)
        for rank in range(world)
    ]
    assert sorted(sample for rank in ranks for sample in rank) == sorted(whole)
    per_rank = 6 // world
    assert [ranks[i // per_rank % world][i // 6 * per_rank + i % per_rank] for i in range(216)] == whole


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("table", [True, False])
def test_two_ranks_see_an_epoch_once(monkeypatch, single, table):
    """What one rank sees in an epoch, two see, too, each sample once."""
    monkeypatch.setattr(shuffle, "SMALL", 1 << 16 if table else 0)
    dataset = Images(120) if single else MixedDataset([Images(120)], [2])
    ranks = [contents(loader(dataset, rank=rank, world_size=2, augment=False), 10) for rank in range(2)]
    seen = [np.frombuffer(image, np.uint8)[0] for rank in ranks for _, image, _ in rank]
    assert sorted(seen) == list(range(120))
    one = [np.frombuffer(image, np.uint8)[0] for _, image, _ in contents(loader(dataset, augment=False), 20)]
    assert sorted(one) == sorted(seen)


@pytest.mark.parametrize("workers", [0, 3])
def test_resume_at_any_step(workers):
    whole = contents(loader(MIXED), 40)
    for start in range(0, 40, 1 if workers == 0 else 13):
        assert contents(loader(MIXED, start_step=start, workers=workers), 40 - start) == whole[6 * start :]


def test_data_sets_of_one_size_are_drawn_independently():
    mixed = MixedDataset([Texts(40), Texts(40)], [1, 1])
    drawn = [[], []]
    for key, _, words in contents(loader(mixed), 14):
        drawn[mixed.at(key, 3)[0]].append(words)
    length = min(map(len, drawn))
    assert length > 30 and drawn[0][:length] != drawn[1][:length]
    crops = [generator(0, MIX, 0, 0, source).random() for source in range(2)]
    assert crops[0] != crops[1]


def test_a_bad_sample_is_replaced_within_its_data_set():
    mixed = MixedDataset([Images(10, bad=(2, 5)), Texts(7)], [3, 1])
    stream = loader(mixed, augment=False)
    good = [np.frombuffer(i, np.uint8)[0] for _, i, _ in contents(loader(MIXED, augment=False), 40) if i is not None]
    with pytest.warns(M3AEFastWarning, match=r"\.jpg: it is damaged; skipped"):
        found = [np.frombuffer(i, np.uint8)[0] for _, i, _ in contents(stream, 40) if i is not None]
    assert all(a == b for a, b in zip(good, found, strict=True) if a not in (2, 5)) and not {2, 5} & set(found)
    assert stream.skipped == {"image": stream.counters["images_skipped"]} and set(stream.bad) == {"2.jpg", "5.jpg"}


def test_classes_are_counted_together():
    mixed = MixedDataset([Images(4, classes=("cat", "dog")), Texts(3), Images(4, classes=("owl", "cat"))], [1, 1, 1])
    assert mixed.classes == ("cat", "dog", "owl")
    _, batch = next(loader(mixed, batch_size=300, augment=False))
    images = iter(batch.images[:, 0, 0, 0].tolist())
    for key, row, has_image in zip(batch.sample_ids.tolist(), batch.labels, batch.has_image, strict=True):
        source = mixed.at(key, 3)[0]
        assert has_image == (source != 1)
        expected = {0: (0, 1), 1: (None,), 2: (2, 0)}[source]
        number = expected[next(images) % 2] if has_image else None
        assert row.nonzero().flatten().tolist() == ([] if number is None else [number])


def test_endless_scenes_mix_in_their_own_order():
    mixed = MixedDataset([ShapesDataset(32), Texts(7)], [1, 1])
    shapes = ShapesDataset(32)
    stream = Loader(mixed, TOKENIZER, image_size=32, batch_size=8, seed=3)
    images = torch.cat([next(stream)[1].images for _ in range(3)])
    for i, image in enumerate(images):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), shapes[i].image)


def test_captions_come_in_turns():
    assert list(MixedDataset([Texts(3), Images(2)], [1, 1]).captions()) == [WORDS[0], "image caption", *WORDS[1:3]]


@pytest.mark.parametrize(
    "sources, weights, message",
    [
        ([], [], "weights must be one for each source, got 0 for 0 sources"),
        ([Texts(1)], [1, 2], "weights must be one for each source, got 2 for 1 sources"),
        ([Texts(1)], [0], r"weights must be finite and positive, got \(0,\)"),
        ([Texts(1)] * 2, [1, float("nan")], "weights must be finite and positive"),
        ([Texts(1)] * 2, [1, 1e4], "weights must each be at least a thousandth of all"),
        ([Texts(1), Texts(0)], [1, 1], "sources must each hold at least one sample, got an empty one"),
    ],
)
def test_wrong_mixtures(sources, weights, message):
    with pytest.raises(ValueError, match=message):
        MixedDataset(sources, weights)


def test_a_mixture_of_mixtures_is_refused():
    with pytest.raises(ValueError, match="sources must not be mixtures themselves"):
        MixedDataset([MixedDataset([[1]], [1]), [2]], [1, 1])
