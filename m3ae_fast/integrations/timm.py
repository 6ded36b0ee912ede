"""timm's Vision Transformers on the ops of m3ae_fast: `accelerate(model)`, and `restore(model)` undoes it.

The classes here are timm's under their own names, with another `forward`: same arguments, parameters and results. What
one of them has not got it leaves to timm's, and says so once (M3AEFastWarning). Tested with timm 1.0.31.

Shapes: B samples, N tokens each, T = all tokens of a batch, P prefix tokens (class, registers), D width.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from timm import layers
from timm.models import naflexvit, vision_transformer
from timm.models._manipulate import checkpoint, checkpoint_seq
from torch import Tensor, nn

from m3ae_fast.integrations import _swap
from m3ae_fast.integrations._layers import DROPOUT, drops, embed_patches, layer_norm, offsets, project
from m3ae_fast.nn.rows import take_rows
from m3ae_fast.ops import (
    assemble_tokens,
    linear,
    restore_tokens,
    varlen_attention,
    varlen_attention_qkvpacked,
)
from m3ae_fast.seqlens import SeqLens

__all__ = ["accelerate", "restore"]

M = TypeVar("M", bound=nn.Module)

GELUS = {layers.GELU: "gelu", layers.GELUTanh: "gelu_tanh"}  # and torch.nn.GELU, by its `approximate`
NORMS = (nn.LayerNorm, layers.LayerNorm)
EMBEDDING = (layers.PatchEmbed, layers.PatchDropout, nn.Conv2d, *DROPOUT)


def accelerate(model: M) -> M:
    """Let every VisionTransformer, NaFlexVit, Block, Attention and Mlp of timm's in `model` run on the ops here.

    Their classes are exchanged in place, subclasses of them are left alone: parameters, state dict, hooks, device and
    training mode stay as they are. Calling it twice changes nothing. Call it before fully_shard and torch.compile.

    Args:
        model: one of timm's, or a module that holds some of its modules.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` holds none of these modules.
    """
    _swap.accelerate(model, FAST)
    return model


def restore(model: M) -> M:
    """Undo `accelerate`: every module gets timm's own class back. Returns `model` itself."""
    _swap.restore(model, FAST)
    return model


class Mlp(layers.Mlp):
    """fc2(gelu(fc1(x))) over the last dimension; of the hidden rows only fc1(x) is stored."""

    def forward(self, x: Tensor) -> Tensor:
        act = self.act
        activation = {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate] if type(act) is nn.GELU else None
        activation = activation or GELUS.get(type(act))
        why = None
        if activation is None:
            why = f"its activation is {type(act).__name__}, not a GELU"
        elif type(self.norm) is not nn.Identity or drops(self.drop1):
            why = "there is a norm or a dropout before fc2"
        elif not (
            _swap.bare(nn.Linear, self.fc2) and _swap.bare(DROPOUT, self.drop1) and _swap.unhooked(act, self.norm)
        ):
            why = "fc2 is no plain Linear, or something hooks into it or into the activation"
        if why is not None:
            _swap.tell(self, why)
            return super().forward(x)
        hidden = project(self.fc1, x)
        return self.drop2(linear(hidden, self.fc2.weight, self.fc2.bias, input_activation=activation))


class Attention(layers.Attention):
    """Self-attention by `varlen_attention`. attn_mask may be a SeqLens: x [1, T, D] is packed then."""

    def refusal(self) -> str | None:
        """Why it cannot run on `varlen_attention`; None where it can."""
        if not self.fused_attn:
            return "fused_attn is off: it is to make its weights"
        if self.training and self.attn_drop.p:
            return "it drops attention weights"
        return None

    def forward(self, x: Tensor, attn_mask: Tensor | SeqLens | None = None, is_causal: bool = False) -> Tensor:
        B, N, _ = x.shape
        why = self.refusal()
        if isinstance(attn_mask, SeqLens):
            cu, longest = attn_mask, None
        elif attn_mask is not None or is_causal:
            why = "it was given a mask"
        if why is not None:
            _swap.tell(self, why)
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        if attn_mask is None:
            cu, longest = offsets(B, N, x.device), N
        gate = None if self.gate is None else self.gate(x).sigmoid()
        qkv = project(self.qkv, x).reshape(B * N, 3, self.num_heads, self.head_dim)
        if _swap.bare(nn.Identity, self.q_norm, self.k_norm):
            x = varlen_attention_qkvpacked(qkv, cu, longest)
        else:
            q, k, v = qkv.unbind(1)
            x = varlen_attention(self.q_norm(q), self.k_norm(k), v, cu, None, longest)
        x = self.norm(x.view(B, N, self.attn_dim))
        if gate is not None:
            x = x * gate
        return self.proj_drop(project(self.proj, x))


class Block(vision_transformer.Block):
    """The residual add after attention happens inside norm2; what the norms put out is made again, not kept."""

    def forward(self, x: Tensor, attn_mask: Tensor | SeqLens | None = None, is_causal: bool = False) -> Tensor:
        if not _swap.bare(NORMS, self.norm1, self.norm2):
            _swap.tell(self, "its norms are no plain LayerNorms, or something hooks into them")
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        y, unsaved = layer_norm(self.norm1, x)
        with unsaved:
            y = self.attn(y, attn_mask=attn_mask, is_causal=is_causal)
        y, x, unsaved = layer_norm(self.norm2, self.drop_path1(self.ls1(y)), x)
        with unsaved:
            y = self.mlp(y)
        return x + self.drop_path2(self.ls2(y))


class VisionTransformer(vision_transformer.VisionTransformer):
    """Patch dropout comes first: a patch that is dropped is neither read nor embedded."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not self.training or not getattr(self.patch_drop, "prob", 0):
            return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        why = self.refusal(x)
        if attn_mask is not None or is_causal:
            why = "it was given a mask"
        if why is not None:
            _swap.tell(self, f"{why}; all patches are embedded, then dropped")
            return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        x = self.norm_pre(self.kept(x))
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)

    def refusal(self, images: Tensor) -> str | None:
        """Why the kept patches of [B, C, H, W] cannot be embedded alone; None where they can."""
        embed, conv, pos_drop = self.patch_embed, self.patch_embed.proj, self.pos_drop
        if not _swap.bare(EMBEDDING, embed, conv, embed.norm, pos_drop, self.patch_drop):
            return "patch_embed, pos_drop or patch_drop are not timm's plain ones, or something hooks into them"
        if type(embed.norm) is not nn.Identity or drops(pos_drop):
            return "there is a norm or a dropout before patch_drop"
        size, _ = patch = embed.patch_size
        height, width = images.shape[-2:]
        fits = images.is_floating_point() and height % size == 0 and width % size == 0
        if patch != (size, size) or not fits or (embed.strict_img_size and (height, width) != embed.img_size):
            return "the images are no whole number of square patches"
        if type(conv) is not nn.Conv2d or (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) != (
            patch, patch, (0, 0), (1, 1), 1,
        ):  # fmt: skip
            return "the patches overlap, have gaps, or are not projected whole"
        return None

    def kept(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P + kept patches, D], those that patch_drop draws, in its order."""
        batch, _, height, width = images.shape
        size, prefix = self.patch_embed.patch_size[0], self.num_prefix_tokens
        grid = height // size, width // size
        numbers = torch.arange(-prefix, grid[0] * grid[1], device=images.device).expand(batch, -1)
        ids = self.patch_drop(numbers[..., None])[:, prefix:, 0]  # drawn as for tokens
        count, ids = ids.shape[1], ids.flatten()
        cu = offsets(batch, count, images.device)

        rows = embed_patches(self.patch_embed.proj, images, ids, cu)

        zeros = rows.new_zeros(1, *grid, self.embed_dim)
        table = self._pos_embed(zeros if self.dynamic_img_size else zeros.flatten(1, 2))  # [1, P + patches, D]
        x = assemble_tokens(rows, None, image_ids=ids, cu_image=cu, image_position=table[0, prefix:])
        return torch.cat([table[:, :prefix].expand(batch, -1, -1), x.view(batch, count, -1)], 1)


class NaFlexVit(naflexvit.NaFlexVit):
    """A ragged batch goes through the blocks packed, [1, T, D]; its padding comes back behind them, as zeros."""

    def forward_features(
        self,
        patches: Tensor,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor | None]:
        if patch_coord is None or patch_valid is None:
            return super().forward_features(patches, patch_coord, patch_valid, attn_mask)
        why = "it was given a mask" if attn_mask is not None else self.refusal()
        if why is not None:
            _swap.tell(self, f"{why}; padding goes through the blocks")
            return super().forward_features(patches, patch_coord, patch_valid, attn_mask)
        # A mask that is given is handed on: none of [B, 1, N, N] is made.
        embeds = self._forward_embeds(patches, patch_coord, patch_valid, attn_mask=patch_valid)
        x_BND, patch_valid = embeds["patches"], embeds["patch_valid"]
        real_BN = F.pad(patch_valid.bool(), (self.num_prefix_tokens, 0), value=True)
        seqlens = SeqLens(real_BN.sum(1), x_BND.device)  # on a GPU these two lines are syncs, once a batch
        real = real_BN.flatten()
        places = real.nonzero().flatten()

        x = take_rows(x_BND.flatten(0, 1), places)[None]
        for block in self.blocks:
            x = checkpoint(block, x, attn_mask=seqlens) if self.grad_checkpointing else block(x, attn_mask=seqlens)
        x = self.norm(x)[0]

        rows = torch.where(real, real.cumsum(0) - 1, -1)
        x = restore_tokens(x, rows, torch.full_like(rows, -1)).view(x_BND.shape)
        return {"patches": x, "patch_valid": patch_valid}

    def refusal(self) -> str | None:
        """Why rows of many samples cannot go through the blocks as one; None where they can."""
        if self.rope is not None:
            return "it rotates queries and keys"
        for block in self.blocks:
            if not (isinstance(block, Block) and isinstance(block.attn, Attention) and isinstance(block.mlp, Mlp)):
                return "its blocks are not all timm's Block with Attention and Mlp"
            if not _swap.unhooked(*block.modules()):
                return "something hooks into its blocks, and would find no [B, N, D]"
            if any(path.training and getattr(path, "drop_prob", 0) for path in (block.drop_path1, block.drop_path2)):
                return "it drops paths, by sample"
            if why := block.attn.refusal():
                return f"in its attention, {why}"
        return None


FAST = {
    layers.Mlp: Mlp,
    layers.Attention: Attention,
    vision_transformer.Block: Block,
    vision_transformer.VisionTransformer: VisionTransformer,
    naflexvit.NaFlexVit: NaFlexVit,
}
