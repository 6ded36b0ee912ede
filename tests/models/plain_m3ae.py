"""M3AE in plain PyTorch, one sample at a time: what both decoders are compared with."""

import torch
import torch.nn.functional as F


def norm(layer, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def attention(q, k, v, heads):
    q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in (q, k, v))
    return ((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)


def through(transformer, x, context=None):
    """[T, D] -> [T, D]; with a context rows attend to that instead of to one another."""
    for block in transformer.blocks:
        y = norm(block.norm1, x)
        if context is None:
            q, k, v = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, 1)
        else:
            q = F.linear(y, block.attn.q.weight, block.attn.q.bias)
            k, v = F.linear(context, block.attn.kv.weight, block.attn.kv.bias).chunk(2, 1)
        x = x + F.linear(attention(q, k, v, block.attn.heads), block.attn.proj.weight, block.attn.proj.bias)
        y = F.linear(norm(block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias)
        x = x + F.linear(F.gelu(y, approximate="tanh"), block.mlp.fc2.weight, block.mlp.fc2.bias)
    return norm(transformer.norm, x)


def in_patches(image, size):
    """[3, H, W] -> [P, size * size * 3], (row, column, channel)."""
    rows, columns = (side // size for side in image.shape[1:])
    return image.view(3, rows, size, columns, size).permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def each(masked):
    """(kept, predicted) numbers of every sample."""
    kept, predicted = masked.ids_keep.split(masked.keep.lengths), masked.ids_mask.split(masked.mask.lengths)
    return list(zip(kept, predicted, strict=True))


def plain_predictions(model, patches, words, image, text, every=False):
    """(of patches, of words): what the heads make of one sample's tokens that are predicted, or of every one.

    patches: [P, patch_dim] pixels, or none. words: [L] ids. image, text: (kept, predicted) numbers of each.
    """
    c, (keep_i, mask_i), (keep_t, mask_t) = model.config, image, text
    embedded = F.linear(patches[keep_i], model.patch_embed.proj.weight, model.patch_embed.proj.bias)
    x = torch.cat([
        model.cls_token[None],
        embedded + model.image_position[keep_i] + model.image_type,
        model.text_embedding.weight[words[keep_t]] + model.text_position[keep_t] + model.text_type,
    ])  # fmt: skip
    x = through(model.encoder, x)
    wanted = (torch.arange(len(patches)), torch.arange(len(words))) if every else (mask_i, mask_t)
    masked = [
        model.image_mask_token + model.decoder_image_position + model.decoder_image_type,
        model.text_mask_token + model.decoder_text_position + model.decoder_text_type,
    ]
    if c.decoder == "cross":
        rows = through(model.decoder, torch.cat([masked[0][wanted[0]], masked[1][wanted[1]]]), x)
        of_image, of_text = rows.split([len(wanted[0]), len(wanted[1])])
    else:
        cls, from_image, from_text = model.decoder_embed(x).split([1, len(keep_i), len(keep_t)])
        masked[0] = masked[0].index_put(
            (keep_i,), from_image + model.decoder_image_position[keep_i] + model.decoder_image_type
        )
        masked[1] = masked[1].index_put(
            (keep_t,), from_text + model.decoder_text_position[keep_t] + model.decoder_text_type
        )
        there = [torch.cat([kept, gone]).sort()[0] for kept, gone in (image, text)]  # no other token is seen
        rows = through(model.decoder, torch.cat([cls, masked[0][there[0]], masked[1][there[1]]]))[1:]
        of_image, of_text = rows.split([len(there[0]), len(there[1])])
        of_image = of_image[torch.isin(there[0], wanted[0])]
        of_text = of_text[torch.isin(there[1], wanted[1])]
    head_i, head_t = model.image_head, model.text_head
    return F.linear(of_image, head_i.weight, head_i.bias), F.linear(of_text, head_t.weight, head_t.bias)


def plain_losses(model, batch, plan):
    """(loss, image loss, text loss) of a batch whose images are normalized."""
    size, images, words = model.config.patch_size, iter(batch.images), batch.text.split(batch.text_lengths.lengths)
    image_loss = text_loss = 0.0
    for has, own, image, text in zip(batch.has_image, words, each(plan.image), each(plan.text), strict=True):
        patches = in_patches(next(images), size) if has else batch.images.new_empty(0, model.config.patch_dim)
        of_image, of_text = plain_predictions(model, patches, own.long(), image, text)
        if len(of_image):
            image_loss = image_loss + (of_image - patches[image[1]]).square().mean() / len(batch)
        if len(of_text):
            text_loss = text_loss + F.cross_entropy(of_text, own.long()[text[1]]) / len(batch)
    c = model.config
    return c.image_loss_weight * image_loss + c.text_loss_weight * text_loss, image_loss, text_loss
