"""MAE: the masked autoencoder of images alone (arXiv:2111.06377), on M3AE's encoder and decoder.

The image half of M3AE without any text parameter: what the papers' tables compare M3AE with.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.config import M3AEConfig
from m3ae_fast.models.m3ae import M3AE, Encoded, M3AEOutput, Reconstruction
from m3ae_fast.models.masking import Plan


class MAE(M3AE):
    """M3AE with vocab_size 0. Takes batches of images, or the images themselves, [B, C, H, W].

    Args:
        config: sizes; its text fields are ignored. Set norm_pix=True for the per-patch normalized target that the MAE
            paper found best.
    """

    CAPTIONS = "unused"

    def __init__(self, config: M3AEConfig):
        super().__init__(dataclasses.replace(config, vocab_size=0))

    def forward(
        self,
        batch: ImageTextBatch | Tensor,
        *,
        seed: int | None = None,
        step: int = 0,
        image_mask: Tensor | None = None,
        plan: Plan | None = None,
    ) -> M3AEOutput:
        """As M3AE.forward; text_loss and text_accuracy are 0."""
        return super().forward(_images(batch), seed=seed, step=step, image_mask=image_mask, plan=plan)

    def plan(self, batch: ImageTextBatch | Tensor, **options) -> Plan:
        """As M3AE.plan."""
        return super().plan(_images(batch), **options)

    def reconstruct(
        self,
        batch: ImageTextBatch | Tensor,
        *,
        seed: int | None = None,
        step: int = 0,
        image_mask: Tensor | None = None,
    ) -> Reconstruction:
        """As M3AE.reconstruct; text_logits is empty."""
        return super().reconstruct(_images(batch), seed=seed, step=step, image_mask=image_mask)

    def encode(self, batch: ImageTextBatch | Tensor) -> Encoded:
        """As M3AE.encode."""
        return super().encode(_images(batch))


def _images(batch: ImageTextBatch | Tensor) -> ImageTextBatch:
    """The images of a batch; captions are left aside, so that MAE trains on the data M3AE trains on."""
    if isinstance(batch, Tensor):
        return ImageTextBatch(batch)
    if batch.images is None:
        raise ValueError("batch.images must not be None: MAE is a model of images")
    if all(batch.has_image) and not batch.text_lengths.total:
        return batch
    ids = batch.sample_ids[[i for i, has in enumerate(batch.has_image) if has]]
    return ImageTextBatch(batch.images, grids=batch.grids, sample_ids=ids)
