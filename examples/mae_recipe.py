"""models_mae.py of facebookresearch/mae on m3ae_fast: the same state dict, random masks, losses and gradients.

    class MAE(Packed, models_mae.MaskedAutoencoderViT): ...

Kept patches alone are read and embedded, and the loss reads its target from the images. N images of L patches, K kept.
"""

import torch

from m3ae_fast import SeqLens, assemble_tokens, gather_patches, linear, masked_mse, restore_tokens
from m3ae_fast.nn import Block


def packed(blocks):
    """timm's blocks as m3ae_fast has them: the same parameters under the same names."""
    new = torch.nn.ModuleList()
    for block in blocks:
        hidden, width = block.mlp.fc1.weight.shape
        new.append(Block(width, block.attn.num_heads, mlp_ratio=hidden / width, activation="gelu", eps=block.norm1.eps))
    new.load_state_dict(blocks.state_dict())
    return new


class Packed:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.blocks, self.decoder_blocks = packed(self.blocks), packed(self.decoder_blocks)

    def forward_encoder(self, imgs, mask_ratio):  # -> [N, 1 + K, D], mask [N, L], ids_restore [N, L]
        conv = self.patch_embed.proj
        assert imgs.shape[2:] == self.patch_embed.img_size, f"{imgs.shape[2:]} is not {self.patch_embed.img_size}"
        numbers = torch.arange(self.patch_embed.num_patches, device=imgs.device).expand(len(imgs), -1)
        kept, mask, ids_restore = self.random_masking(numbers[..., None], mask_ratio)  # its draw, of patches' numbers
        ids, seqlens = kept.flatten(), SeqLens([kept.shape[1]] * len(imgs), imgs.device)
        x = gather_patches(imgs, ids, seqlens, patch_size=conv.kernel_size[0])
        x = linear(x, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)
        cls_token, position = (self.cls_token + self.pos_embed[:, :1]).flatten(), self.pos_embed[0, 1:]
        x = assemble_tokens(x, None, image_ids=ids, cu_image=seqlens, cls_token=cls_token, image_position=position)
        seqlens = SeqLens([1 + kept.shape[1]] * len(imgs), imgs.device)
        for block in self.blocks:
            x = block(x, seqlens)
        return self.norm(x).unflatten(0, (len(imgs), -1)), mask, ids_restore

    def forward_decoder(self, x, ids_restore):  # [N, 1 + K, D] -> [N, L, patch * patch * 3]
        first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]  # where each image's class token stands
        rows = torch.cat([first, torch.where(ids_restore + 1 < x.shape[1], first + 1 + ids_restore, -1)], 1)
        slots = torch.arange(rows.shape[1], device=x.device).repeat(len(rows))
        params = {"image_mask_token": self.mask_token.flatten(), "image_position": self.decoder_pos_embed[0]}
        x = restore_tokens(self.decoder_embed(x).flatten(0, 1), rows.flatten(), slots, **params)
        seqlens = SeqLens([rows.shape[1]] * len(rows), x.device)
        for block in self.decoder_blocks:
            x = block(x, seqlens)
        return self.decoder_pred(self.decoder_norm(x).unflatten(0, rows.shape)[:, 1:])

    def forward_loss(self, imgs, pred, mask):
        patch, ids = self.patch_embed.proj.kernel_size[0], torch.arange(mask.shape[1], device=imgs.device)
        options = {"patch_size": patch, "norm_pix": self.norm_pix_loss, "reduction": "none"}
        every = SeqLens([len(ids)] * len(imgs), imgs.device)
        loss = masked_mse(pred.flatten(0, 1), imgs, ids.repeat(len(imgs)), every, **options)
        return (loss * mask.flatten()).sum() / mask.sum()
