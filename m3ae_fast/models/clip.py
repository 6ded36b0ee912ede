"""A CLIP-style model: two encoders and contrast alone, on our packed encoders. A baseline of the papers' tables."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.config import EncodersConfig
from m3ae_fast.models.contrastive import ContrastiveLoss, meet, same_pairs
from m3ae_fast.models.encoders import DualEncoder, EncodedView, check_batch, reset_parameters
from m3ae_fast.models.model import Metric, Model
from m3ae_fast.nn import Transformer
from m3ae_fast.seqlens import SeqLens


@dataclasses.dataclass
class CLIPOutput:
    """fp32 scalars."""

    loss: Tensor  # mean of both directions' cross-entropies
    image_accuracy: Tensor  # share of texts whose image is found among all that are compared; no gradient
    text_accuracy: Tensor  # share of images whose text is


class CLIP(Model):
    """Args: config: see `EncodersConfig`. Source: arXiv:2103.00020, with the temperature bounded as ALBEF's."""

    METRICS: ClassVar = {
        "loss": Metric("loss"),
        "image_accuracy": Metric("image accuracy", "texts whose image is found in the batch", "share"),
        "text_accuracy": Metric("text accuracy", "images whose text is found in the batch", "share"),
    }
    CAPTIONS = "required"

    def __init__(self, config: EncodersConfig):
        super().__init__(config)
        self.encoders = DualEncoder(config)
        self.contrast = ContrastiveLoss(config.projection, temperature=config.temperature)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform kernels, zero biases, N(0, 1) words, N(0, .02) tokens, the configuration's temperature."""
        reset_parameters(self.encoders)
        self.contrast.reset_parameters()

    def update_target(self) -> None:
        """As `Model.update_target`: the temperature stays within its bounds."""
        self.contrast.bound_temperature()

    def forward(
        self,
        batch: ImageTextBatch,
        *,
        seed: int | None = None,
        step: int = 0,
        image_ids: Tensor | None = None,
    ) -> CLIPOutput:
        """The loss of a batch of at least two pairs; with joined processes, each has a part of it, at least one pair.

        Args:
            seed, step: not used, since nothing is random; trainers pass them.
            image_ids: [B] integers, equal where two samples of any process show the same image; None: its bytes decide.

        Raises:
            ValueError: a sample without an image or a word, fewer than two, sizes other than the configuration's.
        """
        check_batch(batch, self.config)
        if len(batch) < 2 and not self.joined:
            raise ValueError(f"batch must hold at least 2 pairs, since they are compared, got {len(batch)}")
        image, text = self.encode_images(batch.images).embedding, self.encode_texts(batch.text, batch.text_lengths)
        text = text.embedding
        peers = meet(self.joined, batch)
        share, same = peers.share("pairs"), same_pairs(batch, image_ids, peers)
        images, texts = peers.gather("pairs", image, text)
        loss = self.contrast(image, text, *same, answers=(images, texts)) * share
        with torch.no_grad():
            best = image @ texts.T
            best_text, best_image = best.argmax(1), (best if peers.alone else images @ text.T).argmax(0)
            right = same[0].gather(1, best_text[:, None]), same[1].gather(0, best_image[None])
            text_accuracy, image_accuracy = (x.float().mean() * share for x in right)
        return CLIPOutput(loss, image_accuracy, text_accuracy)

    def encode_images(self, images: Tensor) -> EncodedView:
        """Whole images [N, C, H, W] -> their tokens and embeddings."""
        return self.encoders.encode_images(images)

    def encode_texts(self, text: Tensor, text_lengths: SeqLens) -> EncodedView:
        """Packed words [sum of text_lengths] -> their tokens and embeddings."""
        return self.encoders.encode_texts(text, text_lengths)

    def encode_cls(self, batch: ImageTextBatch) -> Tensor:
        """[B, D]: the class token of images; texts are left aside."""
        return self.encode_images(batch.images).cls

    def image_encoder(self) -> tuple[list[nn.Parameter], Transformer]:
        """As `Model.image_encoder`."""
        return self.encoders.image.parts()
