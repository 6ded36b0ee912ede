"""M3AE as PyTorch users write it: padded [B, S, D] batches, every patch embedded, SDPA with a mask, all logits.

Shapes and steps follow the authors' public code and facebookresearch/mae: embed every token, add positions and types,
gather the kept ones, encode, unshuffle with mask tokens, decode, predict every patch and word, mean over the masked.
Captions are padded to the batch's longest (the public code pads to 64: more). The parameters are ours by name and
shape, so that one state dict serves both and the losses must agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast import ImageTextBatch
from m3ae_fast.models import M3AE, M3AEConfig


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        B, S, D = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.proj(x.transpose(1, 2).reshape(B, S, D))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, approximate: str):
        super().__init__()
        self.approximate = approximate
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, approximate: str):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, hidden, approximate)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), keys)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float, approximate: str = "tanh"):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, int(width * mlp_ratio), approximate) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, keys)
        return self.norm(x)


class PaddedM3AE(nn.Module):
    def __init__(self, config: M3AEConfig):
        super().__init__()
        self.config = c = config
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(c.patch_dim, c.width)})
        self.text_embedding = nn.Embedding(c.vocab_size, c.width)
        self.encoder = Transformer(c.width, c.depth, c.heads, c.mlp_ratio)
        self.decoder_embed = nn.Linear(c.width, c.decoder_width)
        self.decoder = Transformer(c.decoder_width, c.decoder_depth, c.decoder_heads, c.mlp_ratio)
        self.image_head = nn.Linear(c.decoder_width, c.patch_dim)
        self.text_head = nn.Linear(c.decoder_width, c.vocab_size)
        for name in ("cls_token", "image_type", "text_type"):
            self.register_parameter(name, nn.Parameter(torch.zeros(c.width)))
        for name in ("image_mask_token", "text_mask_token", "decoder_image_type", "decoder_text_type"):
            self.register_parameter(name, nn.Parameter(torch.zeros(c.decoder_width)))
        ours = M3AE(config)
        self.load_state_dict(ours.state_dict())
        for name, table in ours.named_buffers():
            self.register_buffer(name, table, persistent=False)
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(getattr(c, name)).view(1, 3, 1, 1), persistent=False)

    def patchify(self, images: Tensor) -> Tensor:
        c = self.config
        x = (images.float() / 255 - self.image_mean) / self.image_std
        p, (h, w) = c.patch_size, c.grid
        return x.view(-1, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(-1, h * w, c.patch_dim)

    def forward(
        self, images: Tensor, text: Tensor, text_padding: Tensor, image_mask: Tensor, text_mask: Tensor,
        image_keep: int, text_keep: int,
    ) -> Tensor:  # fmt: skip
        """images [B,3,H,W] uint8, text [B,L] padded, text_padding [B,L] True = padding, masks True = removed; how many
        patches each image keeps, and how many words the text that keeps the most."""
        target = self.patchify(images)
        B, P, L = images.shape[0], target.shape[1], text.shape[1]
        always = torch.ones(B, 1 + P, dtype=torch.bool, device=text.device)
        image = self.patch_embed["proj"](target) + self.image_position + self.image_type
        words = self.text_embedding(text) + self.text_position[:L] + self.text_type

        image_order = image_mask.to(torch.uint8).argsort(dim=1, stable=True)  # kept first
        removed = text_mask | text_padding
        text_order = removed.to(torch.uint8).argsort(dim=1, stable=True)
        image = gather(image, image_order[:, :image_keep])
        words = gather(words, text_order[:, :text_keep])
        words_here = torch.arange(text_keep, device=text.device) < (~removed).sum(1)[:, None]
        valid = torch.cat([always[:, : 1 + image_keep], words_here], dim=1)
        x = torch.cat([self.cls_token.expand(B, 1, -1), image, words], dim=1)
        x = self.decoder_embed(self.encoder(x, valid[:, None, None]))

        cls, image, words = x.split([1, image_keep, text_keep], dim=1)
        image = unshuffle(image, self.image_mask_token, image_order)
        words = unshuffle(words, self.text_mask_token, text_order)
        # a slot whose kept row was padding is a padded or masked slot: masked ones need the mask token
        words = torch.where(removed[..., None], self.text_mask_token.to(words.dtype), words)
        image = image + self.decoder_image_position + self.decoder_image_type
        words = words + self.decoder_text_position[:L] + self.decoder_text_type
        valid = torch.cat([always, ~text_padding], dim=1)
        x = self.decoder(torch.cat([cls, image, words], dim=1), valid[:, None, None])

        pixels = self.image_head(x[:, 1 : 1 + P])
        image_loss = (pixels.float() - target).square().mean(-1)
        image_loss = ((image_loss * image_mask).sum(1) / image_mask.sum(1)).mean()
        logits = self.text_head(x[:, 1 + P :])
        wanted = text_mask & ~text_padding
        text_loss = F.cross_entropy(logits.float().flatten(0, 1), text.flatten(), reduction="none").view(B, L)
        text_loss = ((text_loss * wanted).sum(1) / wanted.sum(1).clamp(min=1)).mean()
        return self.config.image_loss_weight * image_loss + self.config.text_loss_weight * text_loss


def gather(x: Tensor, order: Tensor) -> Tensor:
    return torch.gather(x, 1, order[..., None].expand(-1, -1, x.shape[2]))


def unshuffle(kept: Tensor, mask_token: Tensor, order: Tensor) -> Tensor:
    holes = mask_token.to(kept.dtype).expand(kept.shape[0], order.shape[1] - kept.shape[1], -1)
    return gather(torch.cat([kept, holes], dim=1), order.argsort(dim=1))


def padded_inputs(batch: ImageTextBatch, image_mask: Tensor, text_mask: Tensor) -> tuple[Tensor | int, ...]:
    """What PaddedM3AE takes, from one of our batches with the masks that our model drew for it."""
    longest = batch.text_lengths.max
    real = torch.arange(longest) < torch.tensor(batch.text_lengths.lengths)[:, None]
    text = torch.zeros(len(batch), longest, dtype=torch.int64)
    text[real] = batch.text.long().cpu()
    kept = int((~image_mask[0]).sum()), int((real & ~text_mask).sum(1).max())
    return batch.images, *(x.to(batch.device) for x in (text, ~real, image_mask, text_mask)), *kept
