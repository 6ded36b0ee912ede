"""Features of images: what a trained model's CLS makes of them, beside the class of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from m3ae_fast.data import Sample, Tokenizer
from m3ae_fast.downstream.pack import chunks, pack_for
from m3ae_fast.models import Model


class Features(NamedTuple):
    """Features of N images of one class each, on the CPU."""

    cls: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64, numbers of the classes


def extract(
    model: Model,
    samples: Sequence[Sample],
    tokenizer: Tokenizer | None = None,
    *,
    text: bool = False,
    labeled: bool = True,
    cropped: bool = False,
    batch_size: int = 64,
) -> Features:
    """Features of samples, images cropped to the middle (of a run of --max-patches: whole), nothing masked.

    Args:
        model: it is left in the mode it was in.
        samples: of one label each, read a batch at a time.
        tokenizer: of the model; needed with `text`.
        text: encode each image beside its first caption (a model with a `joint_encoder`); False: images alone, whatever
            captions there are.
        labeled: False: samples may have any labels, and the features get -1.
        cropped: images of a run of --max-patches are, too.
        batch_size: samples of a pass; it changes no feature beyond rounding.
    Raises:
        ValueError: a sample without an image, with no label or several, or (with `text`) without a caption, naming it;
            no sample at all; `text` of a model that cannot read images beside words. BadSample: it cannot be read.
    """
    if text and model.joint_encoder() is None:
        raise ValueError(f"text must be False: {type(model).__name__} encodes no image beside its words, got True")
    if not len(samples):
        raise ValueError("samples must hold at least one, got none")
    device, cls, labels = next(model.parameters()).device, [], []
    with evaluating(model), torch.inference_mode():
        for chunk in chunks(samples, batch_size):
            labels += [_label(sample, labeled) for sample in chunk]
            texts = [_caption(sample) for sample in chunk] if text else None
            batch = pack_for(model, [sample.image for sample in chunk], texts, tokenizer, cropped=cropped)
            cls.append(model.encode_cls(batch.to(device)).float().cpu())
    cls = torch.cat(cls).clone()  # outside inference mode: an ordinary tensor
    return Features(cls, torch.tensor(labels, device="cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`with evaluating(model):` in evaluation mode, then in the mode it was in, whatever is raised."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _label(sample: Sample, labeled: bool) -> int:
    if sample.image is None:
        raise ValueError(f"samples must have an image each, got none in {sample.name}")
    if not labeled:
        return -1
    if len(sample.labels) != 1:
        got = "none" if not sample.labels else f"{len(sample.labels)}"
        raise ValueError(f"samples must have one label each, got {got} in {sample.name}")
    return sample.labels[0]


def _caption(sample: Sample) -> str:
    if not sample.captions:
        raise ValueError(f"samples must have a caption each, got none in {sample.name}")
    return sample.captions[0]
