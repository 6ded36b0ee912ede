"""VQA: questions about images, answered from a list, by a decoder on MAMO's fusion encoder.

Source: arXiv:2107.07651, section 4 (ALBEF: answers are generated, and ranked by their likelihood).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast import nn as fast
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.encoders import reset_parameters
from m3ae_fast.models.mamo import MAMO
from m3ae_fast.ops import linear_cross_entropy
from m3ae_fast.seqlens import SeqLens

IGNORED = -100


class DecoderBlock(nn.Module):
    """Causal self-attention over an answer's words, cross-attention to a question and its image, an MLP."""

    def __init__(self, width: int, heads: int, *, mlp_ratio: float, activation: str):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (fast.LayerNorm(width) for _ in range(3))
        self.qkv, self.proj = fast.Linear(width, 3 * width), fast.Linear(width, width)
        self.cross = fast.CrossAttention(width, heads)
        self.mlp = fast.Mlp(width, int(width * mlp_ratio), activation=activation)

    def forward(self, x: Tensor, context: Tensor, context_seqlens: SeqLens) -> Tensor:
        """x [Q, A, N, D], context [T, D] packed, a sequence for each of the Q questions -> [Q, A, N, D]."""
        Q, A, N, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(Q * A, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # few words: padding at the end costs little
        x = x + self.proj(y.transpose(1, 2).reshape(Q, A, N, D))
        rows = SeqLens([A * N] * Q, x.device)  # all answers to a question read the same context
        x = x + self.cross(self.norm2(x).flatten(0, 2), context, rows, context_seqlens).view(x.shape)
        return x + self.mlp(self.norm3(x))


class VQA(nn.Module):
    """A MAMO with an answer decoder.

    Args:
        mamo: is trained along. depth: blocks of the decoder.
    """

    def __init__(self, mamo: MAMO, *, depth: int = 2):
        super().__init__()
        self.mamo = mamo
        self.config = c = mamo.config
        options = {"mlp_ratio": c.mlp_ratio, "activation": c.activation}
        self.blocks = nn.ModuleList(DecoderBlock(c.width, c.heads, **options) for _ in range(depth))
        self.norm = fast.LayerNorm(c.width)
        self.head = fast.Linear(c.width, c.vocab_size + 1)  # the last is the end of the answer
        self._reset_decoder()

    def reset_parameters(self) -> None:
        """New weights, the MAMO's too."""
        self.mamo.reset_parameters()
        self._reset_decoder()

    def _reset_decoder(self) -> None:
        for module in (self.blocks, self.norm, self.head):
            reset_parameters(module)

    def forward(self, batch: ImageTextBatch, answers: Sequence[Sequence[int]]) -> Tensor:
        """The loss of answering: -log-likelihood of each sample's answer, mean over the samples; fp32.

        Args:
            batch: images and questions. answers: B lists of vocabulary ids, of at least one word.
        """
        if len(answers) != len(batch):
            raise ValueError(f"answers must be {len(batch)}, one a question, got {len(answers)}")
        ids = self._padded(answers, batch.device)[:, None]
        return -self._likelihood(batch, ids).mean()

    def rank(self, batch: ImageTextBatch, answers: Sequence[Sequence[int]]) -> Tensor:
        """[B, len(answers)] fp32: the log-likelihood of each answer of a list to each question.

        Args:
            batch: images and questions. answers: the list, of vocabulary ids, at least one word each.
        """
        ids = self._padded(answers, batch.device)
        return self._likelihood(batch, ids.expand(len(batch), -1, -1))

    def _padded(self, answers: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """[A, N] ids, each answer with its end, -100 past it."""
        end = self.mamo.config.vocab_size
        for number, answer in enumerate(answers):
            if not len(answer):
                raise ValueError(f"answers must have at least one word each, got none in answer {number}")
            if len(answer) >= self.mamo.config.max_text_length:
                raise ValueError(
                    f"answers must have less than max_text_length {self.mamo.config.max_text_length} words, "
                    f"got {len(answer)} in answer {number}"
                )
        rows = [torch.tensor([*answer, end], device="cpu") for answer in answers]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(device)

    def _likelihood(self, batch: ImageTextBatch, ids: Tensor) -> Tensor:
        """ids [B, A, N] -> [B, A]."""
        mamo = self.mamo
        images, texts = mamo.encode_images(batch.images), mamo.encode_texts(batch.text, batch.text_lengths)
        every = torch.arange(len(batch), device="cpu")
        rows, layout = mamo.pair(images, texts, every, every, every=True)
        context = mamo.online.fuse(rows, layout)
        start = torch.full_like(ids[..., :1], mamo.online.text.mask_id)  # [MASK]: what comes here?
        seen = torch.cat([start, ids[..., :-1].clamp(min=0)], dim=-1)
        x = mamo.online.text.embedding(seen) + mamo.online.text.position[: ids.shape[2]]
        for block in self.blocks:
            x = block(x, context, layout.seqlens)
        x = self.norm(x).flatten(0, 2)
        target = ids.flatten()
        losses = linear_cross_entropy(
            x, self.head.weight, target, self.head.bias, ignore_index=IGNORED, reduction="none"
        )
        return -losses.view(ids.shape).sum(-1)
