"""Validation: the losses of a run on samples that it does not train on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.data import Loader, MixedDataset, Sample, Tokenizer, open_dataset
from m3ae_fast.models import Model
from m3ae_fast.train import distributed, run
from m3ae_fast.train.average import Average
from m3ae_fast.train.config import RunConfig
from m3ae_fast.train.precision import autocast

SAMPLES = 1000  # at most
SEED = 2**31  # of scenes, order and masks: the same in every run, and no run's own


def open_held_out(
    config: RunConfig, dataset: Sequence[Sample] | MixedDataset, images: dict[str, Any]
) -> Sequence[Sample] | MixedDataset | None:
    """What a run does not train on; None where it holds nothing out.

    Args:
        config: its val_share or val_data. dataset: which it trains on. images: `ModelConfig.images` of its model.
    Raises:
        FileNotFoundError, ValueError: no such data, or for a model of classes, or a k-NN probe, none or other ones.
    """
    classes = tuple(getattr(dataset, "classes", ()))
    if config.knn_every and not classes:
        raise ValueError(f"knn_every must be 0 for data without classes, got {config.knn_every} for {config.data}")
    if config.val_data is None:
        return dataset.held_out if config.val_share else None
    held_out = open_dataset(config.val_data, seed=SEED, strict=config.strict, **images)
    if (config.model_class.LABELS or config.knn_every) and tuple(held_out.classes) != classes:
        raise ValueError(f"val_data must have the classes of data, {classes}, got {held_out.classes}")
    return held_out


def first_batches(loader: Callable[..., Loader], count: int, config: RunConfig) -> list[ImageTextBatch]:
    """The first samples of a loader, in batches, shared by all processes: this one's, as they are read.

    Args:
        loader: makes one of `batch_size` samples a batch. count: of samples, at most.
    """
    processes = distributed.world_size()
    each = max(min(config.batch_size, count) // processes, 1)
    batches = itertools.islice(loader(batch_size=each), max(count // (each * processes), 1))
    return [batch for _, batch in batches]


@contextlib.contextmanager
def evaluating(model: nn.Module, average: Average | None) -> Iterator[Model]:
    """The model in evaluation mode, without gradients; afterwards it is bitwise as it was.

    Args:
        model: as it is called in training. average: whose weights are taken instead, if there is one.
    """
    own = distributed.bare(model)
    training = own.training
    own.eval()  # in training, a pass may fill a queue
    if average is not None:
        average.swap(own)
    try:
        with torch.no_grad():
            yield own
    finally:
        distributed.end_of_passes(model)
        if average is not None:
            average.swap(own)
        own.train(training)


class Validation:
    """Samples held out, in batches, and the model's losses on them.

    They are read once, and kept as they are read, up to a thousand of them shared by all processes: the same in every
    run on the same data, uncropped, with the same masks each time.

    Args:
        held_out: of `open_held_out`. tokenizer, model, config: the run's.
        device: where the losses are computed.
    Raises:
        ValueError: not one sample that can be read and is of the kind that the model trains on.
    """

    def __init__(
        self,
        held_out: Sequence[Sample] | MixedDataset,
        tokenizer: Tokenizer | None,
        model: Model,
        config: RunConfig,
        device: torch.device,
    ):
        self._config, self._device = config, device
        make = functools.partial(run.make_loader, held_out, tokenizer, model, config, seed=SEED, augment=False)
        self._batches = first_batches(make, min(len(held_out), SAMPLES), config)

    def losses(self, model: nn.Module, average: Average | None) -> dict[str, float | None]:
        """Means of the model's METRICS over the samples, each called val_...; None for one that is not finite.

        Afterwards the model is bitwise as it was. All processes call it.

        Args:
            model: as it is called in training. average: whose weights are taken instead, if there is one.
        """
        with evaluating(model, average) as own:
            torch.manual_seed(SEED)
            totals = torch.zeros(len(own.METRICS), device=self._device)
            for batch in self._batches:
                with autocast(self._config.precision, self._device):
                    output = model(batch.to(self._device), seed=SEED, step=0)
                totals += torch.stack([getattr(output, name).float() for name in own.METRICS])
            means = distributed.mean(totals / len(self._batches)).tolist()
        named = zip(own.METRICS, means, strict=True)
        return {f"val_{name}": value if math.isfinite(value) else None for name, value in named}
