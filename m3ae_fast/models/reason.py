"""Reason: whether a sentence is true of two images (NLVR2's task), on MAMO's fusion encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3ae_fast import nn as fast
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.encoders import reset_parameters
from m3ae_fast.models.mamo import MAMO


class Reason(nn.Module):
    """A MAMO that reads the sentence beside each image; an MLP tells from both class tokens.

    Args:
        mamo: is trained along.
    """

    def __init__(self, mamo: MAMO):
        super().__init__()
        self.mamo = mamo
        self.config = c = mamo.config
        self.head = nn.Sequential(
            fast.Linear(2 * c.width, c.width), fast.Linear(c.width, 1, input_activation=c.activation)
        )
        reset_parameters(self.head)

    def reset_parameters(self) -> None:
        """New weights, the MAMO's too."""
        self.mamo.reset_parameters()
        reset_parameters(self.head)

    def forward(self, left: Tensor, batch: ImageTextBatch) -> Tensor:
        """[B] fp32 log-odds that the sentence is true.

        Args:
            left: [B, C, H, W], the left images. batch: the right images, with the sentences.
        """
        mamo, B = self.mamo, len(batch)
        if left.shape != batch.images.shape:
            raise ValueError(
                f"left must have the shape of the right images, {tuple(batch.images.shape)}, got {tuple(left.shape)}"
            )
        images = mamo.encode_images(torch.cat([left, batch.images]))
        texts = mamo.encode_texts(batch.text, batch.text_lengths)
        every = torch.arange(2 * B, device="cpu")
        rows, layout = mamo.pair(images, texts, every, every % B)
        first, second = mamo.online.fuse(rows, layout).chunk(2)
        return self.head(torch.cat([first, second], dim=1)).float()[:, 0]
