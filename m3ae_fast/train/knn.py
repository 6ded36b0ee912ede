"""A k-NN probe of a run: do images of one class lie side by side in the features?"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.data import Loader, MixedDataset, Sample
from m3ae_fast.models import ModelConfig
from m3ae_fast.train import distributed
from m3ae_fast.train.average import Average
from m3ae_fast.train.config import RunConfig
from m3ae_fast.train.precision import autocast
from m3ae_fast.train.validation import SEED, evaluating, first_batches

NEIGHBORS, TEMPERATURE = 20, 0.07  # DINO's


def knn_classify(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int,
    *,
    neighbors: int = NEIGHBORS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The class that wins the vote of the nearest neighbors: each votes with exp(cosine / temperature).

    Args:
        train: [N, D] float32, features. labels: [N] int64, their classes.
        test: [M, D] float32, features to classify. classes: how many there are.
        neighbors: that vote, at most N.

    Returns:
        [M] int64.

    Source: arXiv:2104.14294 (DINO), eval_knn.py of its public code; arXiv:1805.01978.
    """
    cosines = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    best, places = cosines.topk(min(neighbors, len(train)), 1)
    votes = cosines.new_zeros(len(test), classes).scatter_add_(1, labels[places], (best / temperature).exp())
    return votes.argmax(1)


class KNNProbe:
    """Samples trained on and samples held out, images of one class each, and how well the former classify the latter.

    They are read once, and kept as they are read, shared by all processes: uncropped, without captions.

    Args:
        dataset: trained on. held_out: of `open_held_out`. config: the run's.
        model_config: the model's, for its image_size and max_patches.
        device: where features are computed.
    Raises:
        ValueError: an image of several classes, or not one sample that can be read and has a class.
    """

    def __init__(
        self,
        dataset: Sequence[Sample] | MixedDataset,
        held_out: Sequence[Sample] | MixedDataset,
        config: RunConfig,
        model_config: ModelConfig,
        device: torch.device,
    ):
        self._config, self._device = config, device
        self._train, self._test = (self._read(each, model_config) for each in (dataset, held_out))

    def _read(self, dataset: Sequence[Sample] | MixedDataset, model_config: ModelConfig) -> list[ImageTextBatch]:
        make = functools.partial(
            Loader, dataset, None, image_size=model_config.image_size, max_patches=model_config.max_patches,
            patch_size=model_config.patch_size, seed=SEED, augment=False, labeled_only=True,
            rank=distributed.rank(), world_size=distributed.world_size(), strict=self._config.strict,
        )  # fmt: skip
        batches = first_batches(make, min(len(dataset), self._config.knn_samples), self._config)
        most = max(int(batch.labels.sum(1).max()) for batch in batches)
        if most > 1:
            raise ValueError(f"knn_every must be 0 for images of several classes, for a vote names one, got {most}")
        return batches

    def scores(self, model: nn.Module, average: Average | None) -> dict[str, float | None]:
        """knn_accuracy, None where a feature is not finite, and knn_chance, the share of the commonest class among what
        is classified.

        Afterwards the model is bitwise as it was. All processes call it, and have the same scores.

        Args:
            model: as it is called in training. average: whose weights are taken instead, if there is one.
        """
        with evaluating(model, average) as own:
            (train, labels), (test, truths) = (self._features(own, each) for each in (self._train, self._test))
        classes = self._train[0].labels.shape[1]
        accuracy = None
        if train.isfinite().all() and test.isfinite().all():
            accuracy = (knn_classify(train, labels, test, classes) == truths).double().mean().item()
        return {"knn_accuracy": accuracy, "knn_chance": truths.bincount().max().item() / len(truths)}

    def _features(self, model: nn.Module, batches: list[ImageTextBatch]) -> tuple[Tensor, Tensor]:
        """([N, D] float32, [N] int64) of all processes, on the CPU."""
        cls, labels = [], []
        for batch in batches:
            with autocast(self._config.precision, self._device):
                cls.append(model.encode_cls(batch.to(self._device)).float().cpu())
            labels.append(batch.labels.int().argmax(1))
        every = distributed.gather((torch.cat(cls), torch.cat(labels)))
        return tuple(torch.cat(parts) for parts in zip(*every, strict=True))
