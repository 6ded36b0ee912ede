"""Fine-tuning for classification: an image encoder, CLS -> LayerNorm -> Linear, all of it trained.

Shapes: B images, C classes.
Source: arXiv:2205.14204 and arXiv:2111.06377, appendix A.1; of their augmentation the random crops and mirroring, mixup
and cutmix, not RandAugment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast import _checks
from m3ae_fast import nn as fast
from m3ae_fast._settings import OPTIONS, documented, given, setting
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.data import Loader, Sample
from m3ae_fast.downstream.commands.arguments import add_classes, add_trained
from m3ae_fast.downstream.commands.session import finish, load_saved, open_run, pair_of_classes, save
from m3ae_fast.downstream.features import extract
from m3ae_fast.downstream.scoring.accuracy import score_logits
from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.downstream.training import Training, descend
from m3ae_fast.models import ModelConfig


@documented
@dataclasses.dataclass(frozen=True)
class FineTuning(Training):
    """How a classifier is fine-tuned: a twentieth of the steps warm up, then a cosine to 0."""

    lr: float = setting(1e-3, "peak learning rate, per 256 samples of a step", OPTIONS, within="(0, inf)")
    batch_size: int = setting(64, "samples per step", OPTIONS, "B", "[1, inf)")
    layer_decay: float = setting(
        0.75, "factor of the learning rate from each layer to the one below", OPTIONS, "D", "(0, 1]"
    )
    weight_decay: float = setting(0.05, "weight decay of weight matrices", within="[0, inf)")
    drop_path: float = setting(
        0.1, "stochastic depth of the last block; earlier blocks have less", OPTIONS, "P", "[0, 1)"
    )
    mixup: float = setting(0.8, "blend images by shares from Beta(A, A); 0: none", OPTIONS, "A", "[0, inf)")
    cutmix: float = setting(1.0, "paste boxes by shares from Beta(A, A); 0: none", OPTIONS, "A", "[0, inf)")
    smoothing: float = setting(
        0.1, "label smoothing: share of a target spread over all classes", OPTIONS, "S", "[0, 1)"
    )
    workers: int = setting(0, "processes that load data", OPTIONS, "N", "[0, inf)")


class Classifier(nn.Module):
    """logits = Linear(LayerNorm(CLS of images alone)); the Linear starts at 0.

    Args:
        model: of which the image encoder is used.
        classes: C.
    """

    def __init__(self, model: nn.Module, classes: int):
        super().__init__()
        self.model, self.config = model, model.config
        device = next(model.parameters()).device
        self.norm = fast.LayerNorm(model.config.width).to(device)
        self.head = fast.Linear(model.config.width, classes).to(device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W], uint8 or normalized floats -> [B, C]."""
        return self.classify(self.model.encode_cls(ImageTextBatch(images)))

    def classify(self, cls: Tensor) -> Tensor:
        """Class tokens of the encoder [B, D] -> [B, C]."""
        return self.head(self.norm(cls))


def layer_decayed(model: Classifier, *, weight_decay: float, layer_decay: float) -> torch.optim.AdamW:
    """AdamW (.9, .999) whose rate falls by a factor with every layer from the head down: its groups have a "scale".

    Of n blocks, block i (from 0) has layer_decay**(n - i), what makes tokens layer_decay**(n + 1), the final LayerNorm
    and the head 1 (arXiv:2106.08254). What images do not go through (decoders, words) is in no group.

    Args:
        weight_decay: of matrices; none of biases, norms and tokens. layer_decay: in (0, 1].
    """
    _checks.real("layer_decay", layer_decay, "(0, 1]")
    tokens, transformer = model.model.image_encoder()
    top = [*transformer.norm.parameters(), *model.norm.parameters(), *model.head.parameters()]
    layers = [tokens, *(list(block.parameters()) for block in transformer.blocks), top]
    groups = []
    for number, layer in enumerate(layers):
        scale = layer_decay ** (len(layers) - 1 - number)
        for decayed in (True, False):
            chosen = [p for p in layer if (p.dim() >= 2) == decayed]
            groups.append({"params": chosen, "scale": scale, "weight_decay": weight_decay if decayed else 0.0})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999))


def finetune(model: Classifier, samples: Sequence[Sample], *, progress: bool = True, **settings) -> list[float]:
    """Fine-tune for classification; returns the losses.

    Args:
        model: whose encoder and head are trained.
        samples: a data set as `Loader` takes it, of one label a sample; cropped and mirrored as it allows.
        progress: show a bar on stderr.
        settings: fields of `FineTuning`.
    Raises:
        ValueError, TypeError: a setting, or a sample with no label or several. FloatingPointError: as `descend`.
    """
    tuning, config, device = FineTuning(**settings), model.config, next(model.parameters()).device
    classes, smoothing, seed = model.head.out_features, tuning.smoothing, tuning.seed
    named = len(getattr(samples, "classes", ()))
    if not 0 < named <= classes:
        raise ValueError(f"samples must have 1 to {classes} classes, as the model has, got {named}")
    optimizer = layer_decayed(model, weight_decay=tuning.weight_decay, layer_decay=tuning.layer_decay)
    loader = Loader(
        samples, None, image_size=config.image_size, batch_size=tuning.batch_size, seed=seed,
        workers=tuning.workers, pin_memory=device.type == "cuda",
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)

    def loss_at(step: int) -> Tensor:
        batch = next(loader)[1]
        if (batch.labels.sum(1) != 1).any():  # on the host: a GPU would be waited for
            raise ValueError(f"samples must have one label each, got none or several in batch {step}")
        batch = batch.to(device)
        target = F.one_hot(batch.labels.int().argmax(1), classes) * (1 - smoothing) + smoothing / classes
        images, target = mix(normalized(batch.images, config), target, rng, mixup=tuning.mixup, cutmix=tuning.cutmix)
        return F.cross_entropy(model(images).float(), target)

    transformer = model.model.image_encoder()[1]
    fast.drop_paths(transformer, tuning.drop_path)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    others = [p for p in model.parameters() if p.requires_grad and p not in trained]
    for parameter in others:  # a vocabulary's gradient, all zeros, would be written in every step
        parameter.requires_grad_(False)
    steps, rate = tuning.steps, tuning.lr * tuning.batch_size / 256
    try:
        return descend(model, optimizer, loss_at, steps=steps, warmup=steps // 20, lr=rate, progress=progress)
    finally:
        loader.close()
        fast.drop_paths(transformer, 0.0)
        for parameter in others:
            parameter.requires_grad_()


def normalized(images: Tensor, config: ModelConfig) -> Tensor:
    """uint8 [B, C, H, W] -> float32, as a model of this configuration takes images that are no pixels any more."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (config.image_mean, config.image_std))
    return (images / 255 - mean) / std


def mix(
    images: Tensor, target: Tensor, rng: np.random.Generator, *, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Every image with some of another one, which its target then names as well: the batch with itself turned round.

    Half of the batches are blended (mixup, arXiv:1710.09412), in the others a box is pasted (cutmix, arXiv:1905.04899);
    how much is drawn from Beta(a, a), once for a batch.

    Args:
        images: [B, C, H, W] floats. target: [B, C] shares. rng: where the randomness comes from.
        mixup, cutmix: a of each; 0: not this one.
    """
    for name, a in (("mixup", mixup), ("cutmix", cutmix)):
        _checks.real(name, a, "[0, inf)")
    pasted = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    a = cutmix if pasted else mixup
    if a == 0:
        return images, target
    other, share = images.flip(0), rng.beta(a, a)  # share: of the image itself
    if pasted:
        (height, width), side = images.shape[2:], math.sqrt(1 - share)
        y0, y1 = _cut(height, side, rng)
        x0, x1 = _cut(width, side, rng)
        images = images.clone()
        images[:, :, y0:y1, x0:x1] = other[:, :, y0:y1, x0:x1]
        share = 1 - (y1 - y0) * (x1 - x0) / (height * width)
    else:
        images = share * images + (1 - share) * other
    return images, share * target + (1 - share) * target.flip(0)


def _cut(length: int, side: float, rng: np.random.Generator) -> tuple[int, int]:
    """A stretch of side * length around any pixel, as much of it as is within [0, length)."""
    middle, reach = int(rng.integers(length)), round(side * length)
    return max(middle - reach // 2, 0), min(middle - reach // 2 + reach, length)


def load_classifier(path: str | os.PathLike, model: nn.Module) -> tuple[Classifier, list[str]]:
    """What `m3ae-fast finetune --save` wrote, in evaluation mode, and the names of its classes.

    Args:
        path: of the file. model: like the one that was fine-tuned; it is given the weights.
    Raises:
        FileNotFoundError: there is none. ValueError: it is no such file, or of another model.
    """
    what = "a classifier fine-tuned from a model like this one"
    return load_saved(path, "classes", lambda classes: Classifier(model, len(classes)), what)


@torch.no_grad()
def score_classifier(model: Classifier, samples: Sequence[Sample], *, batch_size: int = 64) -> Result:
    """Accuracy on samples of one label each, of the middle of each image; chance is their commonest class."""
    features = extract(model.model, samples, cropped=True, batch_size=batch_size)
    logits = model.classify(features.cls.to(model.head.weight.device))
    return score_logits(logits.cpu(), features.labels)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast finetune` takes."""
    add_classes(command)
    add_trained(command, FineTuning)


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast finetune`; returns the exit status."""
    run, scored, trained = open_run(args)
    test, training = pair_of_classes(scored, trained)
    model = Classifier(run.model, len(training.classes))
    finetune(model, training, **given(FineTuning, args))
    save(args, model, classes=json.dumps(training.classes))
    return finish(args, run, [score_classifier(model, test)])
