"""Out-of-distribution detection: scores that are high for images like those of the training data, and their AUROC."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from m3ae_fast import _checks
from m3ae_fast._settings import path
from m3ae_fast.data.samples import open_some
from m3ae_fast.downstream.commands.arguments import add_classes
from m3ae_fast.downstream.commands.session import few, finish, open_run, pair_of_classes
from m3ae_fast.downstream.features import Features, extract
from m3ae_fast.downstream.scoring.accuracy import score_logits
from m3ae_fast.downstream.scoring.auroc import score_ood
from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.downstream.tasks import probe
from m3ae_fast.downstream.tasks.finetune import Classifier, load_classifier


@torch.no_grad()
def ood(train: Features, known: Features, unknown: Features, classify: Callable[[Tensor], Tensor]) -> list[Result]:
    """Accuracy on known classes, then how well `max_softmax` and `Mahalanobis` detect images of unknown kinds.

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
        level = covariance.diagonal().mean() * torch.eye(len(covariance), dtype=x.dtype, device=x.device)
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


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast ood` takes."""
    add_classes(command)
    command.add_argument(
        "--out-data", required=True, metavar="shapes|DIR", help="images of unknown kinds; their labels are not read"
    )
    probe.add_fitting(command)
    command.add_argument(
        "--classifier", type=path, metavar="FILE", help="what finetune --save wrote, instead of a probe"
    )


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast ood`; returns the exit status."""
    if args.classifier and args.text:
        raise ValueError("--text must not be given with --classifier, which reads images alone")
    run, scored, trained = open_run(args)
    samples, training = pair_of_classes(scored, trained, count=args.train_samples, drawn=probe.PROBED)
    strange = scored(open_some, args.out_data)
    model = _classifier(args.classifier, run.model, samples.classes) if args.classifier else None
    reading = {"tokenizer": run.tokenizer, "text": args.text}
    known, unknown = extract(run.model, samples, **reading), extract(run.model, strange, **reading, labeled=False)
    train, settings = probe.to_fit(args, training, run)
    if model:
        results = ood(train, known, unknown, lambda cls: model.classify(cls.to(args.device)).cpu())
    else:
        results = ood(train, known, unknown, probe.fit_probe(train, **settings))
    return finish(args, run, results, train_samples=len(training))


def _classifier(path: Path, model: nn.Module, classes: tuple[str, ...]) -> Classifier:
    classifier, theirs = load_classifier(path, model)
    if tuple(theirs) != classes:
        raise ValueError(f"{path} must be of the classes of --data, {few(classes)}, got {few(theirs)}")
    return classifier
