"""Where in an image a phrase is: Grad-CAM of ITM's score on an attention map of the fusion encoder, no box ever seen.

Source: arXiv:2107.07651, section 4.4 and appendix (ALBEF takes the third of its six fusion layers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.config import ModelConfig
from m3ae_fast.models.fusion import FusionLayout
from m3ae_fast.models.mamo import MAMO
from m3ae_fast.nn import Block
from m3ae_fast.nn.rows import take_rows
from m3ae_fast.seqlens import SeqLens


def ground(model: MAMO, batch: ImageTextBatch, *, block: int | None = None) -> Tensor:
    """[B, P] fp32, not negative: how much each patch, seen from [CLS; words], speaks for the pair belonging together.

    Args:
        batch: pairs.
        block: of the fusion encoder, counted from 0; None: the middle one. In the last one only CLS looks for ITM: what
            its words see is read by nothing.

    Raises:
        ValueError: the fusion encoder has no such block; a sample that is no pair.
    """
    depth, P = len(model.online.fusion.blocks), model.config.patches
    block = (depth - 1) // 2 if block is None else block
    if not 0 <= block < depth:
        raise ValueError(f"block must be in [0, {depth}), a block of the fusion encoder, got {block}")
    every = torch.arange(len(batch), device="cpu")
    with torch.no_grad():
        images, texts = model.encode_images(batch.images), model.encode_texts(batch.text, batch.text_lengths)
        rows, layout = model.pair(images, texts, every, every)
        x = model.online.assemble(rows, layout)
    with torch.enable_grad():
        score, weights = _score(model, x, layout, block)
        gradients = torch.autograd.grad(score.sum(), weights)
    maps = []
    for weight, gradient in zip(weights, gradients, strict=True):  # [H, S, S] of [CLS; patches; words]
        cam = (weight.detach() * gradient).clamp(min=0).mean(0)
        maps.append(torch.cat([cam[:1], cam[1 + P :]])[:, 1 : 1 + P].mean(0))
    return torch.stack(maps).float()


def _score(model: MAMO, x: Tensor, layout: FusionLayout, at: int) -> tuple[Tensor, list[Tensor]]:
    """ITM's log-odds of every pair, as a function of the attention weights of block `at`."""
    fusion, weights, update = model.online.fusion, [], None
    for number, block in enumerate(fusion.blocks):
        if number == at:
            x, update, weights = _step(block, x, update, layout.seqlens)
        else:
            x, update = block(x, layout.seqlens, update, apart=True)
    y = fusion.norm(update, residual=x)[0]
    logits = model.match_head(take_rows(y, layout.wanted)).float()
    return logits[:, 1] - logits[:, 0], weights


def _step(block: Block, x: Tensor, update: Tensor | None, seqlens: SeqLens) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A block in plain PyTorch, a sequence at a time: its attention weights [H, S, S] are leaves of the graph."""
    y, x = (block.norm1(x), x) if update is None else block.norm1(update, residual=x)
    goes_on = y if block.post_norm else x
    attn, out, weights = block.attn, [], []
    qkv = attn.qkv(y).view(-1, 3, attn.heads, attn.head_dim)
    for part in qkv.split(seqlens.lengths):
        q, k, v = part.permute(1, 2, 0, 3)
        weight = (q @ k.transpose(1, 2) / attn.head_dim**0.5).softmax(-1).detach().requires_grad_()
        weights.append(weight)
        out.append((weight @ v).transpose(0, 1).flatten(1))
    y, x = block.norm2(attn.proj(torch.cat(out)), residual=goes_on)
    return y if block.post_norm else x, block.mlp(y), weights


def to_pixels(maps: Tensor, config: ModelConfig) -> Tensor:
    """[B, P] -> [B, H, W], bilinear."""
    grid = maps.view(-1, 1, *config.grid)
    return torch.nn.functional.interpolate(grid, size=config.image_shape, mode="bilinear")[:, 0]


def points(maps: Tensor, config: ModelConfig) -> Tensor:
    """[B, 2] int64: (x, y) of the highest pixel of each map."""
    pixels = to_pixels(maps, config)
    at = pixels.flatten(1).argmax(1)
    return torch.stack([at % pixels.shape[2], at // pixels.shape[2]], dim=1)
