"""Recall at k against a walk through every order that the scores allow."""

import itertools

import numpy as np
import pytest
import torch

from m3ae_fast.downstream import recalls
from m3ae_fast.downstream.scoring.recall import right_pairs


def first_k_of_every_order(scores, right, k):
    """The share of all orders, of those that sort the scores, in which a right one is among the first k."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return sum(any(right[i] for i in order[:k]) for order in orders) / len(orders)


def brute_force(scores, right, k):
    queries = [
        first_k_of_every_order(row, wanted, k) for row, wanted in zip(scores.tolist(), right.tolist(), strict=True)
    ]
    return sum(queries) / len(queries)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_against_every_order(seed, k):
    """Few levels of scores, so that ties are everywhere; several texts an image."""
    rng = torch.Generator().manual_seed(seed)
    truth = torch.cat([torch.arange(3), torch.randint(3, (3,), generator=rng)])
    scores = torch.randint(3, (3, 6), generator=rng).float()
    right = truth == torch.arange(3)[:, None]
    of_images, of_texts = recalls(scores, truth, ks=[k])
    for result, s, r in ((of_images, scores, right), (of_texts, scores.T, right.T)):
        assert result.value == pytest.approx(brute_force(s, r, k), abs=1e-12)
        assert result.chance == pytest.approx(brute_force(torch.zeros_like(s), r, k), abs=1e-12)
    assert (of_images.name, of_images.count, of_texts.name, of_texts.count) == (f"text R@{k}", 3, f"image R@{k}", 6)


def test_without_ties_it_is_a_count():
    """At the size of a real test set, against numpy's sort."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(100), 5)
    scores = rng.standard_normal((100, 500)) + 2.0 * (truth == np.arange(100)[:, None])
    got = {result.name: result for result in recalls(torch.from_numpy(scores), torch.from_numpy(truth))}
    texts = np.argsort(-scores, 1)
    images = np.argsort(-scores, 0).T
    for k in (1, 5, 10):
        found = [(truth[row[:k]] == i).any() for i, row in enumerate(texts)]
        assert got[f"text R@{k}"].value == pytest.approx(np.mean(found))
        assert got[f"image R@{k}"].value == pytest.approx(
            np.mean([t in row[:k] for t, row in zip(truth, images, strict=True)])
        )
        assert got[f"image R@{k}"].chance == pytest.approx(k / 100)
    missed = np.prod([(495 - i) / (500 - i) for i in range(10)])
    assert got["text R@10"].chance == pytest.approx(1 - missed)
    assert got["text R@1"].chance == pytest.approx(5 / 500)
    p = got["image R@1"].value
    assert got["image R@1"].error == pytest.approx((p * (1 - p) / 499) ** 0.5)


@pytest.mark.parametrize("value", [0.0, -torch.inf, torch.inf, 3.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_scores_reach_chance(value, dtype):
    truth = torch.tensor([0, 1, 2, 3, 4, 4, 1] * 3)
    for result in recalls(torch.full((5, 21), value, dtype=dtype), truth):
        assert result.value == pytest.approx(result.chance, abs=1e-12)
        assert result.value < 1 or "10" in result.name or result.name == "image R@5"


def test_more_places_than_candidates():
    results = {r.name: r for r in recalls(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1]))}
    assert [results[f"text R@{k}"].value for k in (1, 5, 10)] == [0, 1, 1]
    assert [results[f"text R@{k}"].chance for k in (1, 5, 10)] == [0.5, 1, 1]


def test_scores_that_were_not_looked_at():
    """-inf is below every score: only the first image's text was ranked, and wrongly the second's."""
    scores = torch.tensor([[0.3, -torch.inf, -torch.inf], [-torch.inf, -torch.inf, 0.1], [0.0, 0.2, 0.4]])
    results = {r.name: r.value for r in recalls(scores, torch.arange(3), ks=[1, 2])}
    assert results["text R@1"] == pytest.approx(2 / 3)
    assert results["text R@2"] == pytest.approx((1 + 0.5 + 1) / 3), "two are left, one of them is right"


def test_equal_texts_are_right_for_each_of_their_images():
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    strict = recalls(scores, torch.arange(3), ks=[1])
    fair = recalls(scores, torch.arange(3), ks=[1], texts=["a star", "a star", "a ring"])
    assert [r.value for r in strict] == pytest.approx([1 / 3, 1 / 3]) and [r.value for r in fair] == [1, 1]
    assert [r.chance for r in fair] == pytest.approx([(2 + 2 + 1) / 9] * 2)


def test_equal_images_share_their_texts():
    right = right_pairs(torch.tensor([0, 1, 2]), 3, 3, images=[b"x", b"y", b"x"])
    assert right.int().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    both = right_pairs(torch.tensor([0, 1, 2]), 3, 3, images=[b"x", b"y", b"x"], texts=["s", "s", "t"])
    assert both.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]


def test_duplicates_against_a_loop():
    rng = np.random.default_rng(1)
    truth = np.concatenate([np.arange(8), rng.integers(0, 8, 12)])
    texts = [f"text {i}" for i in rng.integers(0, 9, 20)]
    images = [bytes([i]) for i in rng.integers(0, 5, 8)]
    got = right_pairs(torch.from_numpy(truth), 8, 20, texts=texts, images=images)
    for i, j in itertools.product(range(8), range(20)):
        same = any(texts[j] == texts[o] and images[truth[o]] == images[i] for o in range(20))
        assert got[i, j].item() is same


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"scores": torch.zeros(3)}, ValueError, r"scores must have shape \(any, any\), got \(3,\)"),
        ({"scores": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "scores must be of dtype float32, .*got int64"),
        (
            {"scores": torch.tensor([[0, torch.nan, 1], [0, 0, 0]])},
            ValueError,
            "scores must be numbers, got 1 NaN of 6",
        ),
        ({"truth": torch.tensor([0, 1])}, ValueError, r"truth must have shape \(3,\), got \(2,\)"),
        ({"truth": torch.tensor([0.0, 1, 1])}, TypeError, "truth must be of dtype int32, int64, got float32"),
        ({"truth": torch.tensor([0, 1, 2])}, ValueError, r"truth must be in \[0, 2\), got \[2\]"),
        ({"truth": torch.tensor([0, 0, 0])}, ValueError, "truth must name each of 2 images, got no text of image 1"),
        ({"ks": [0]}, ValueError, "ks must be at least 1, got 0"),
        ({"texts": ["a"]}, ValueError, "texts must have 3 entries, as scores has, got 1"),
        ({"images": [b"a"]}, ValueError, "images must have 2 entries, as scores has, got 1"),
        (
            {"scores": torch.zeros(0, 0), "truth": torch.zeros(0).long()},
            ValueError,
            r"scores must be of .*got shape \(0, 0\)",
        ),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        recalls(**({"scores": torch.zeros(2, 3), "truth": torch.tensor([0, 1, 1])} | arguments))
