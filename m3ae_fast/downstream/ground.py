"""Where in an image a phrase is: Grad-CAM of ITM's score on an attention map of the fusion encoder, no box ever seen.

Source: arXiv:2107.07651, section 4.4 and appendix (ALBEF takes the third of its six fusion layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.downstream.examples import Phrase, chunks
from m3ae_fast.downstream.report import Result
from m3ae_fast.models import MAMO, ModelConfig
from m3ae_fast.models.fusion import FusionLayout
from m3ae_fast.nn import Block
from m3ae_fast.nn.rows import take_rows
from m3ae_fast.seqlens import SeqLens

if TYPE_CHECKING:
    from m3ae_fast.data import Tokenizer


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
    every = torch.arange(len(batch))
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
    attn, out, weights = block.attn, [], []
    qkv = attn.qkv(y).view(-1, 3, attn.heads, attn.head_dim)
    for part in qkv.split(seqlens.lengths):
        q, k, v = part.permute(1, 2, 0, 3)
        weight = (q @ k.transpose(1, 2) / attn.head_dim**0.5).softmax(-1).detach().requires_grad_()
        weights.append(weight)
        out.append((weight @ v).transpose(0, 1).flatten(1))
    y, x = block.norm2(attn.proj(torch.cat(out)), residual=x)
    return x, block.mlp(y), weights


def to_pixels(maps: Tensor, config: ModelConfig) -> Tensor:
    """[B, P] -> [B, H, W], bilinear."""
    grid = maps.view(-1, 1, *config.grid)
    return torch.nn.functional.interpolate(grid, size=config.image_shape, mode="bilinear")[:, 0]


def points(maps: Tensor, config: ModelConfig) -> Tensor:
    """[B, 2] int64: (x, y) of the highest pixel of each map."""
    pixels = to_pixels(maps, config)
    at = pixels.flatten(1).argmax(1)
    return torch.stack([at % pixels.shape[2], at // pixels.shape[2]], dim=1)


def score_ground(
    model: MAMO, phrases: Sequence[Phrase], tokenizer: Tokenizer, *, batch_size: int = 64, block: int | None = None
) -> list[Result]:
    """Pointing accuracy: how often the highest pixel of the map lies in the phrase's box. Chance: a random pixel.

    Phrases without a box are left out, as are those whose box the square crop in the middle cuts off.

    Raises:
        ValueError: none is left.
    """
    from m3ae_fast.downstream.pack import crop_box, pack_for

    device, (height, width) = next(model.parameters()).device, model.config.image_shape
    hits, shares = [], []
    for chunk in chunks(phrases, batch_size):
        batch = pack_for(model, [p.image for p in chunk], [p.phrase for p in chunk], tokenizer).to(device)
        for phrase, (x, y) in zip(chunk, points(ground(model, batch, block=block), model.config).tolist(), strict=True):
            box = phrase.box and crop_box(phrase.box, *phrase.image.shape[:2], height)
            if box:
                hits.append(box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3])
                shares.append((box[2] - box[0]) * (box[3] - box[1]) / (height * width))
    if not hits:
        raise ValueError(
            f"phrases must have boxes to be scored, none of {len(phrases)} has one within the square in the middle"
        )
    return [Result.of("pointing accuracy", hits, sum(shares) / len(shares))]


def draw_ground(
    model: MAMO, phrases: Sequence[Phrase], tokenizer: Tokenizer, path: Path, *, block: int | None = None
) -> None:
    """Each image, its map, the highest pixel (a cross) and the box, where it is known, with the phrase below."""
    import numpy as np
    from PIL import Image, ImageDraw

    from m3ae_fast.downstream.pack import crop_box, pack_for
    from m3ae_fast.train.pictures import RIGHT, WRONG, Cards, heat

    size = model.config.image_shape[0]
    batch = pack_for(model, [p.image for p in phrases], [p.phrase for p in phrases], tokenizer)
    maps = ground(model, batch.to(next(model.parameters()).device), block=block).cpu()
    cards = []
    for phrase, image, map, (x, y) in zip(
        phrases, batch.images, to_pixels(maps, model.config), points(maps, model.config).tolist(), strict=True
    ):
        pixels = image.permute(1, 2, 0).numpy()
        box = phrase.box and crop_box(phrase.box, *phrase.image.shape[:2], size)
        shown, scale = Image.fromarray(heat(pixels, map)).resize((4 * size, 4 * size)), 4
        pen, inside = ImageDraw.Draw(shown), box and box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]
        color, (cx, cy), arm = RIGHT if inside else WRONG, (scale * (x + 0.5), scale * (y + 0.5)), size // 5
        for line in ((cx - arm, cy, cx + arm, cy), (cx, cy - arm, cx, cy + arm)):
            pen.line(line, fill=color if box else "#1f2430", width=max(size // 32, 2))
        if box:
            pen.rectangle([scale * each for each in box], outline=color, width=max(size // 48, 2))
        words = [(word, "", False) for word in phrase.phrase.split()]
        cards.append(([pixels, np.asarray(shown)], words))
    Cards(cards, ("original", "where it points")).save(path)
