"""MAMO's networks in plain PyTorch, one sequence at a time: what the packed ones are compared with."""

import torch
import torch.nn.functional as F

from m3ae_fast import ImageTextBatch
from m3ae_fast.models import MAMO, MAMOConfig

SIZES = {
    "image_size": 16, "patch_size": 4, "vocab_size": 53, "max_text_length": 8, "width": 32, "heads": 4,
    "depth": 2, "text_depth": 2, "projection": 12,
}  # fmt: skip
CONFIG = MAMOConfig(**SIZES, fusion_depth=2, image_mask_ratio=0.75, text_mask_ratio=0.4)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = MAMO(MAMOConfig(**(CONFIG.to_dict() | changes)))
    for parameter in model.parameters():  # biases and norms too: a term left out must show
        if parameter.dim():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_batch(lengths=(5, 3, 8, 1), seed=0, ids=None):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(lengths), 3, 16, 16), generator=generator, dtype=torch.uint8)
    text = torch.randint(0, 53, (sum(lengths),), generator=generator, dtype=torch.int32)
    return ImageTextBatch(pixels, text, list(lengths), sample_ids=ids)


def plain_transformer(transformer, x):
    for block in transformer.blocks:
        y = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
        heads = block.attn.heads
        q, k, v = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        y = ((q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + F.linear(y.transpose(0, 1).flatten(1), block.attn.proj.weight, block.attn.proj.bias)
        y = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6)
        y = F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias)
    return F.layer_norm(x, x.shape[-1:], transformer.norm.weight, transformer.norm.bias, 1e-6)


def plain_image(encoder, config, image, kept):
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.image_mean, config.image_std))
    x = ((image / 255 - mean) / std).view(3, 4, 4, 4, 4).permute(1, 3, 2, 4, 0).reshape(16, 48)[kept]
    x = F.linear(x, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias) + encoder.position[kept]
    return plain_transformer(encoder.transformer, torch.cat([encoder.cls_token[None], x]))


def plain_text(encoder, words):
    x = encoder.embedding.weight[words] + encoder.position[: len(words)]
    return plain_transformer(encoder.transformer, torch.cat([encoder.cls_token[None], x]))


def plain_fusion(encoders, image_tokens, kept, text_tokens):
    patches = [encoders.image_mask_token] * 16
    for row, patch in enumerate(kept):
        patches[patch] = image_tokens[1 + row]
    patches = torch.stack(patches) + encoders.image.position + encoders.image_type
    words = text_tokens[1:] + encoders.text.position[: len(text_tokens) - 1] + encoders.text_type
    return plain_transformer(encoders.fusion, torch.cat([text_tokens[:1], patches, words]))


def mlp(layers, x):
    return F.linear(F.gelu(F.linear(x, layers[0].weight, layers[0].bias)), layers[1].weight, layers[1].bias)
