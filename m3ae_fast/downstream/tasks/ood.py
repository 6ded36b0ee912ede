"""Out-of-distribution detection: scores that are high for images like those of the training data, and their AUROC."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast.downstream.features import Features
from m3ae_fast.downstream.scoring.accuracy import score_logits
from m3ae_fast.downstream.scoring.auroc import score_ood
from m3ae_fast.downstream.scoring.report import Result


@torch.no_grad()
def ood(train: Features, known: Features, unknown: Features, classify: Callable[[Tensor], Tensor]) -> list[Result]:
    """How well `max_softmax` and `Mahalanobis` tell images of unknown kinds, after the accuracy on known ones.

    Args:
        train: features that Mahalanobis is fitted to.
        known: features of images of the classes of `train`. unknown: of other kinds; their labels are not read.
        classify: features [N, D] -> logits [N, C].
    Raises:
        ValueError: as `Mahalanobis`.
    """
    logits, others = classify(known.cls), classify(unknown.cls)
    mahalanobis = Mahalanobis(train)
    return [
        score_logits(logits, known.labels),
        score_ood("AUROC, max softmax", max_softmax(logits), max_softmax(others)),
        score_ood("AUROC, Mahalanobis", mahalanobis.score(known.cls), mahalanobis.score(unknown.cls)),
    ]


def max_softmax(logits: Tensor) -> Tensor:
    """Logits [N, C] -> [N] float64: log(p / (1 - p)) of the probability p of the likeliest class, whose order it has
    without the ties where p is 1 to rounding; of a single class infinity. Source: arXiv:1610.02136."""
    _checks.shape("logits", logits, (None, None))
    best, rest = logits.double().sort(1, descending=True).values.tensor_split([1], dim=1)
    return best[:, 0] - rest.logsumexp(1)


class Mahalanobis:
    """Distance to the nearest class mean, in the metric of one covariance S that all classes share.

        score(x) = -min over classes of (x - mean)' S^-1 (x - mean)

    Args:
        train: features of two images or more, not all alike.
        shrinkage: a in S = (1 - a) * covariance + a * (its mean variance) * I, in [0, 1]; None: Ledoit and Wolf's, the
            one expected to be nearest to the true covariance.
    Raises:
        ValueError: fewer than two features, or a covariance that has no inverse.

    Source: arXiv:1807.03888, section 2.1; the shrinkage J. Multivariate Analysis 88 (2004) 365-411.
    """

    def __init__(self, train: Features, *, shrinkage: float | None = None):
        _checks.shape("train.cls", train.cls, (None, None))
        _checks.shape("train.labels", train.labels, (len(train.cls),))
        if len(train.cls) < 2:
            raise ValueError(f"train must hold two features or more, got {len(train.cls)}")
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage}")
        x = train.cls.double()
        classes = [x[train.labels == label] for label in train.labels.unique()]
        self._means = torch.stack([part.mean(0) for part in classes])
        rest = torch.cat([part - part.mean(0) for part in classes])
        covariance = rest.T @ rest / len(rest)
        level = covariance.diagonal().mean() * torch.eye(len(covariance), dtype=x.dtype)
        self.shrinkage = _ledoit_wolf(rest, covariance, level) if shrinkage is None else float(shrinkage)
        shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * level
        self._root, failed = torch.linalg.cholesky_ex(shrunk)
        if failed or not self._root.isfinite().all():
            raise ValueError(
                "train must give a covariance that can be inverted: features alike within their classes, or a "
                f"shrinkage too small for {len(x)} features of width {x.shape[1]}, got shrinkage {self.shrinkage:.3g}"
            )
        self._means = self._whiten(self._means)

    def score(self, cls: Tensor) -> Tensor:
        """Features [N, D] -> [N] float32, 0 at a class mean, below it elsewhere."""
        _checks.shape("cls", cls, (None, len(self._root)))
        distance = torch.cdist(self._whiten(cls.double()), self._means, compute_mode="donot_use_mm_for_euclid_dist")
        return -distance.square().amin(1).float()

    def _whiten(self, rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._root, rows.T, upper=False).T


def _ledoit_wolf(rest: Tensor, covariance: Tensor, level: Tensor) -> float:
    """The expected squared error of the covariance over its squared distance from `level`, at most 1."""
    count = len(rest)
    error = (rest.square().sum(1).square().sum() / count - covariance.square().sum()) / count
    distance = (covariance - level).square().sum()
    return min(1.0, (error / distance).item()) if distance > 0 else 1.0
