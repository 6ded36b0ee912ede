"""MAMO as PyTorch users write it: padded batches, a pass at a time, SDPA with a mask, every token of the last block.

Passes follow ALBEF's public code: each encoder and each fusion is a call of its own, ITM's negatives one more. The
parameters are ours by name and shape, so that one state dict serves both and the losses must agree.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.padded_m3ae import Transformer, gather
from m3ae_fast import ImageTextBatch
from m3ae_fast.models import MAMO, MAMOConfig


class ImageEncoder(nn.Module):
    def __init__(self, c: MAMOConfig, position: Tensor):
        super().__init__()
        self.config = c
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(c.patch_dim, c.width)})
        self.cls_token = nn.Parameter(torch.zeros(c.width))
        self.transformer = Transformer(c.width, c.depth, c.heads, c.mlp_ratio, approximate="none")
        self.register_buffer("position", position, persistent=False)

    def forward(self, images: Tensor, order: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W] uint8; order [B, K]: the patches that are kept -> [B, 1 + K, D]."""
        c = self.config
        mean, std = (images.new_tensor(x, dtype=torch.float32).view(1, 3, 1, 1) for x in (c.image_mean, c.image_std))
        p, (h, w) = c.patch_size, c.grid
        x = ((images.float() / 255 - mean) / std).view(-1, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1)
        x = self.patch_embed["proj"](x.reshape(-1, h * w, c.patch_dim)) + self.position
        if order is not None:
            x = gather(x, order)
        return self.transformer(torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1), None)


class TextEncoder(nn.Module):
    def __init__(self, c: MAMOConfig, position: Tensor):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size + 1, c.width)
        self.cls_token = nn.Parameter(torch.zeros(c.width))
        self.transformer = Transformer(c.width, c.text_depth, c.heads, c.mlp_ratio, approximate="none")
        self.register_buffer("position", position, persistent=False)

    def forward(self, text: Tensor, real: Tensor) -> Tensor:
        """text [B, L], real [B, L] -> [B, 1 + L, D]."""
        x = self.embedding(text) + self.position[: text.shape[1]]
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1)
        return self.transformer(x, F.pad(real, (1, 0), value=True)[:, None, None])


class Encoders(nn.Module):
    def __init__(self, c: MAMOConfig, ours: nn.Module):
        super().__init__()
        self.image, self.text = ImageEncoder(c, ours.image.position), TextEncoder(c, ours.text.position)
        self.fusion = Transformer(c.width, c.fusion_depth, c.heads, c.mlp_ratio, approximate="none")
        self.image_projection, self.text_projection = (nn.Linear(c.width, c.projection) for _ in range(2))
        for name in ("image_mask_token", "image_type", "text_type"):
            self.register_parameter(name, nn.Parameter(torch.zeros(c.width)))

    def fuse(self, image: Tensor, text: Tensor, real: Tensor) -> Tensor:
        """image [B, P, D], text [B, 1 + L, D], real [B, L] -> [B, 1 + P + L, D], [CLS; patches; words]."""
        image = image + self.image.position + self.image_type
        words = text[:, 1:] + self.text.position[: text.shape[1] - 1] + self.text_type
        keys = F.pad(real, (1 + image.shape[1], 0), value=True)
        return self.fusion(torch.cat([text[:, :1], image, words], dim=1), keys[:, None, None])


class PaddedMAMO(nn.Module):
    def __init__(self, ours: MAMO):
        super().__init__()
        self.config = c = ours.config
        self.online = Encoders(c, ours.online)
        self.predictor, self.regressor = (
            nn.ModuleList([nn.Linear(c.width, c.width), nn.Linear(c.width, c.width)]) for _ in range(2)
        )
        self.word_head, self.match_head = nn.Linear(c.width, c.vocab_size), nn.Linear(c.width, 2)
        self.contrast = nn.Module()
        self.contrast.temperature = nn.Parameter(torch.tensor(c.temperature))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.load_state_dict(ours.state_dict())

    @torch.no_grad()
    def update_target(self) -> None:
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 1 - self.config.momentum)

    def mlp(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        return layers[1](F.gelu(layers[0](x)))

    def forward(
        self, images: Tensor, text: Tensor, real: Tensor, image_mask: Tensor, text_mask: Tensor, pairs: Tensor
    ) -> Tensor:
        """images uint8, text [B, L] padded, real [B, L] True = a word, masks True = masked, pairs [2, n]: ITM's."""
        c, online, target, B = self.config, self.online, self.target, len(images)
        order = image_mask.to(torch.uint8).argsort(dim=1, stable=True)
        keep = int((~image_mask[0]).sum())
        whole, masked_image = online.image(images), online.image(images, order[:, :keep])
        holes = online.image_mask_token.to(whole.dtype).expand(B, image_mask.shape[1] - keep, -1)
        masked_image = gather(torch.cat([masked_image[:, 1:], holes], dim=1), order.argsort(dim=1))
        words = online.text(text, real)
        masked_words = online.text(torch.where(text_mask, c.vocab_size, text), real)
        with torch.no_grad():
            target_image = target.image(images)[:, 1:]
            target_fused = target.fuse(target_image, target.text(text, real), real)

        P = image_mask.shape[1]
        patches = online.fuse(masked_image, words, real)[:, 1 : 1 + P][image_mask]
        read = online.fuse(whole[:, 1:], masked_words, real)[:, 1 + P :]

        def regression(rows: Tensor, theirs: Tensor) -> Tensor:
            return F.mse_loss(
                self.mlp(self.predictor, rows).float(), F.layer_norm(theirs.float(), (c.width,), eps=1e-6)
            )

        mrm = regression(patches, target_fused[:, 1 : 1 + P][image_mask])
        mrm = (mrm + regression(read[text_mask], target_fused[:, 1 + P :][text_mask])) / 2
        mim = F.l1_loss(self.mlp(self.regressor, patches).float(), target_image[image_mask].float())
        logits = self.word_head(read).float()  # of every word, as BERT's head does
        mlm = F.cross_entropy(logits.flatten(0, 1), torch.where(text_mask, text, -100).flatten())
        embeddings = online.image_projection(whole[:, 0]).float(), online.text_projection(words[:, 0]).float()
        a, b = (F.normalize(x, dim=1) for x in embeddings)
        scores = a @ b.T / self.contrast.temperature
        right = torch.arange(B, device=scores.device)
        itc = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
        positive = online.fuse(whole[:, 1:], words, real)[:, 0]
        i, j = pairs[:, B:]
        negative = online.fuse(whole[i, 1:], words[j], real[j])[:, 0]
        tell = self.match_head(torch.cat([positive, negative])).float()
        label = (torch.arange(len(tell), device=tell.device) < B).long()
        return mrm + mim + mlm + itc + F.cross_entropy(tell, label)


def padded_inputs(ours: MAMO, batch: ImageTextBatch, seed: int, step: int) -> tuple[Tensor, ...]:
    """What PaddedMAMO takes: the batch padded, with the masks and ITM's pairs that our model draws for it."""
    drawn = []
    draw = MAMO._pairs_to_tell
    try:
        MAMO._pairs_to_tell = lambda self, *args: drawn.append(draw(self, *args)) or drawn[0]
        with torch.no_grad():
            out = ours(batch, seed=seed, step=step)
    finally:
        MAMO._pairs_to_tell = draw
    longest, device = batch.text_lengths.max, batch.device
    real = torch.arange(longest) < torch.tensor(batch.text_lengths.lengths)[:, None]
    text = torch.zeros(len(batch), longest, dtype=torch.int64)
    text[real] = batch.text.long().cpu()
    pairs = torch.stack(drawn[0])
    return batch.images, *(x.to(device) for x in (text, real, out.image_mask, out.text_mask, pairs))
