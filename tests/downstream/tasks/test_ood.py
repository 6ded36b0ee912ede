"""Scores of what is like the training data, against brute force."""

import pytest
import torch

from m3ae_fast.downstream.features import Features
from m3ae_fast.downstream.scoring.auroc import auroc
from m3ae_fast.downstream.tasks.ood import Mahalanobis, max_softmax


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_max_softmax():
    logits = normal(7, 4) * 3
    wanted = [max(torch.exp(row) / torch.exp(row).sum()) for row in logits]
    torch.testing.assert_close(max_softmax(logits).sigmoid().float(), torch.stack(wanted))
    assert max_softmax(torch.ones(2, 1)).tolist() == [float("inf")] * 2, "a single class is certain"


def test_max_softmax_has_no_ties_near_one():
    sure = torch.tensor([[40.0, 0.0, 0.0], [0.0, 41.0, 0.0], [2000.0, -1000.0, 1000.0]])
    assert (sure.softmax(1).amax(1) == 1).all()
    scores = max_softmax(sure)
    assert scores.dtype == torch.float64 and scores.tolist() == sorted(set(scores.tolist()))
    assert auroc(scores[2:], scores[:2]) == 1.0


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_mahalanobis(shrinkage):
    x, labels = normal(60, 4) @ normal(4, 4, seed=1), torch.arange(60) % 3 * 2  # class 1 has no sample
    x = x + labels[:, None] * 3
    new = normal(9, 4, seed=2) * 4
    means = {c: x[labels == c].double().mean(0) for c in (0, 2, 4)}
    covariance = torch.zeros(4, 4, dtype=torch.float64)
    for row, c in zip(x.double(), labels.tolist(), strict=True):
        covariance += torch.outer(row - means[c], row - means[c]) / 60
    shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / 4 * torch.eye(4)
    inverse = torch.linalg.inv(shrunk)
    wanted = [-min((row - m) @ inverse @ (row - m) for m in means.values()) for row in new.double()]
    found = Mahalanobis(Features(x, labels), shrinkage=shrinkage)
    torch.testing.assert_close(found.score(new), torch.stack(wanted).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.score(means[2][None].float()), torch.zeros(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count, width", [(200, 3), (20, 30)])
def test_ledoit_wolf(count, width):
    """Their b^2 / d^2, the sum over samples written out."""
    x = normal(count, width) * torch.linspace(0.5, 2, width)
    found = Mahalanobis(Features(x, torch.zeros(count, dtype=torch.int64))).shrinkage
    rest = x.double() - x.double().mean(0)
    covariance = rest.T @ rest / count
    level = covariance.trace() / width * torch.eye(width)
    error = sum((torch.outer(row, row) - covariance).square().sum() for row in rest) / count**2
    assert found == pytest.approx(min(1.0, (error / (covariance - level).square().sum()).item()), rel=1e-9)
    assert 0 < found < 1 and (found > 0.2) == (count < width)


def test_it_tells_far_from_near():
    train = Features(normal(100, 5), torch.arange(100) % 2)
    scorer = Mahalanobis(train)
    near, far = scorer.score(normal(50, 5, seed=3)), scorer.score(normal(50, 5, seed=4) + 6)
    assert auroc(near, far) == 1.0 and auroc(far, near) == 0.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: max_softmax(torch.ones(3)), r"logits must have shape \(any, any\), got \(3,\)"),
        (lambda: scorer(1), "train must hold two features or more, got 1"),
        (lambda: scorer(4, shrinkage=0.0), "train must give a covariance that can be inverted"),
        (lambda: scorer(4, shrinkage=2), r"shrinkage must be in \[0, 1\], got 2"),
        (lambda: scorer(9).score(torch.ones(2, 4)), r"cls must have shape \(any, 6\), got \(2, 4\)"),
    ],
)
def test_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def scorer(count, **options):
    return Mahalanobis(Features(normal(count, 6), torch.zeros(count, dtype=torch.int64)), **options)


def test_features_all_alike():
    with pytest.raises(ValueError, match="train must give a covariance that can be inverted"):
        Mahalanobis(Features(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64)))
