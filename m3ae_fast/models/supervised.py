"""A supervised ViT on our packed encoder. A baseline of the papers' tables."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast import _checks
from m3ae_fast import nn as fast
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.config import SupervisedConfig
from m3ae_fast.models.encoders import ImageEncoder, check_sizes, reset_parameters, whole
from m3ae_fast.models.model import Metric, Model
from m3ae_fast.nn.rows import take_rows


@dataclasses.dataclass
class SupervisedOutput:
    """fp32 scalars."""

    loss: Tensor  # binary cross-entropy of every class
    accuracy: Tensor  # share of an image's shown classes among its highest logits, as many as it shows; no gradient


class Supervised(Model):
    """A ViT that names the classes an image shows, one or several. Args: config: see `SupervisedConfig`."""

    METRICS: ClassVar = {
        "loss": Metric("loss"),
        "accuracy": Metric("accuracy", "share of shown classes named", "share"),
    }
    LABELS = True

    def __init__(self, config: SupervisedConfig):
        super().__init__(config)
        self.encoder = ImageEncoder(config, config.depth)
        self.head = fast.Linear(config.width, config.classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform kernels, zero biases, N(0, .02) class token."""
        reset_parameters(self)

    def forward(self, batch: ImageTextBatch, *, seed: int | None = None, step: int = 0) -> SupervisedOutput:
        """Binary cross-entropy of every class, mean over images and classes; texts are left aside.

        Args:
            batch: images, with `labels`. seed, step: not used; trainers pass them.

        Raises:
            ValueError: no labels or of another number of classes; images of another size than the configuration's.
        """
        check_sizes(batch, self.config)
        if batch.labels is None or batch.images is None:
            raise ValueError("batch must have images and labels, got none")
        _checks.shape("batch.labels", batch.labels, (None, self.config.classes))
        labels = batch.labels
        if not all(batch.has_image):
            labels = labels[[b for b, has in enumerate(batch.has_image) if has]]
        wanted = labels.float()
        logits = self.head(self.encode_images(batch.images)).float()
        with torch.no_grad():
            rank = logits.argsort(dim=1, descending=True).argsort(dim=1)
            shown = wanted.sum(1, keepdim=True)
            accuracy = ((rank < shown) * wanted).sum() / shown.sum().clamp(min=1)
        return SupervisedOutput(F.binary_cross_entropy_with_logits(logits, wanted), accuracy)

    def encode_images(self, images: Tensor) -> Tensor:
        """Whole images [N, C, H, W] -> CLS features [N, D]."""
        views = whole([self.config.patches] * len(images), images.device)
        return take_rows(self.encoder(images, views), views.cls_rows(0).to(images.device))

    def encode_cls(self, batch: ImageTextBatch) -> Tensor:
        """[B, D]: the class token of images; texts are left aside."""
        return self.encode_images(batch.images)

    def image_encoder(self) -> tuple[list[nn.Parameter], fast.Transformer]:
        """As `Model.image_encoder`."""
        return self.encoder.parts()
