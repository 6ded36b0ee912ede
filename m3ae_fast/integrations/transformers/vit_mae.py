"""ViTMAE (arXiv:2111.06377): kept patches alone are embedded, blocks and decoder run on packed rows, the loss reads
pixels.

The classes have the names of those they stand in for: Transformers knows layers and architectures by name. Shapes: B
images, P patches of which K are kept, N tokens, D width. (Annotations are evaluated: Transformers reads them to learn
what a model takes.)
"""

import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.vit_mae import modeling_vit_mae as stock
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from m3ae_fast.integrations._layers import DROPOUT, drops, embed_patches, layer_norm, offsets, project
from m3ae_fast.integrations._swap import bare, tell, unhooked
from m3ae_fast.integrations.transformers.activations import activation
from m3ae_fast.nn import take_rows
from m3ae_fast.ops import assemble_tokens, linear, masked_mse, restore_tokens, varlen_attention


class ViTMAEEmbeddings(stock.ViTMAEEmbeddings):
    """Kept patches alone are embedded, drawn as Transformers draws them."""

    def forward(
        self, pixel_values: Tensor, noise: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """pixel_values [B, C, H, W], noise [B, P] -> tokens [B, 1 + K, D], mask [B, P] (1: removed), ids_restore."""
        embeddings, projection = self.patch_embeddings, self.patch_embeddings.projection
        height, width = embeddings.patch_size
        if not pixel_values.is_floating_point():  # gather_patches would take bytes and divide them by 255
            return super().forward(pixel_values, noise, interpolate_pos_encoding)
        if tuple(pixel_values.shape[1:]) != (embeddings.num_channels, *embeddings.image_size):
            if interpolate_pos_encoding:
                tell(self, "images of another size than the configuration's")
            return super().forward(pixel_values, noise, interpolate_pos_encoding)
        if height != width or any(side % height for side in embeddings.image_size):
            tell(self, "patches must be square and divide the image")
            return super().forward(pixel_values, noise, interpolate_pos_encoding)
        if not (bare(nn.Conv2d, projection) and bare(stock.ViTMAEPatchEmbeddings, embeddings)):
            tell(self, "the patch projection is not a plain Conv2d, or is hooked")
            return super().forward(pixel_values, noise, interpolate_pos_encoding)

        batch, patches = len(pixel_values), embeddings.num_patches
        keep = operator.index(int(patches * (1 - self.config.mask_ratio)))  # index: a number to torch.compile as well
        if noise is None:
            noise = torch.rand(batch, patches, device=pixel_values.device)
        ids_shuffle = noise.argsort(dim=1).to(pixel_values.device)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= keep).to(torch.get_default_dtype())

        ids, cu = ids_shuffle[:, :keep].flatten(), offsets(batch, keep, pixel_values.device)
        position = self.position_embeddings[0]
        tokens = assemble_tokens(
            embed_patches(projection, pixel_values, ids, cu), None, image_ids=ids, cu_image=cu,
            cls_token=self.cls_token[0, 0] + position[0], image_position=position[1:],
        )  # fmt: skip
        return tokens.unflatten(0, (batch, 1 + keep)), mask, ids_restore


class ViTMAEAttention(stock.ViTMAEAttention):
    """Attention over packed rows, without weights or masks."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
        """hidden_states [B, N, D] -> [B, N, D] and no weights: they are never made."""
        why = None
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            why = "attention weights were asked for"
        elif attention_mask is not None:
            why = "there is an attention_mask"
        elif self.training and self.attention_dropout:
            why = "there is dropout of attention weights"
        elif not getattr(self._interface(), "__module__", "").startswith("transformers."):
            why = "its attention function is not one of Transformers'"
        if why:
            tell(self, why)
            return super().forward(hidden_states, attention_mask, **kwargs)
        batch, tokens, _ = hidden_states.shape
        q, k, v = (
            project(projection, hidden_states).view(batch * tokens, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cu = offsets(batch, tokens, hidden_states.device)
        rows = varlen_attention(q, k, v, cu, None, tokens, softmax_scale=self.scaling)
        return project(self.o_proj, rows.reshape(batch, tokens, -1)), None

    def _interface(self) -> Callable:
        """What Transformers' own would call: somebody may have registered another."""
        return stock.ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, stock.eager_attention_forward)


class ViTMAEMLP(stock.ViTMAEMLP):
    """GELU on the way into fc2."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]; of the hidden rows only fc1's are stored."""
        name = activation(self.activation_fn)
        if name is None or not (bare(nn.Linear, self.fc2) and unhooked(self.activation_fn)):
            tell(self, "fc2 is not a plain Linear, its activation is not GELU, or one of them is hooked")
            return super().forward(hidden_states)
        return linear(project(self.fc1, hidden_states), self.fc2.weight, self.fc2.bias, input_activation=name)


class ViTMAELayer(stock.ViTMAELayer):
    """A block whose residual adds happen inside the LayerNorms."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """[B, N, D] -> [B, N, D]; the backward pass normalizes again what the LayerNorms put out."""
        why = None
        if drops(self.dropout):
            why = "there is dropout"
        elif not (bare(nn.LayerNorm, self.layernorm_before, self.layernorm_after) and bare(DROPOUT, self.dropout)):
            why = "a LayerNorm or Dropout is not torch's own, or is hooked"
        if why:
            tell(self, why)
            return super().forward(hidden_states, attention_mask, **kwargs)
        y, unsaved = layer_norm(self.layernorm_before, hidden_states)
        with unsaved:
            update, _ = self.attention(y, attention_mask, **kwargs)
        y, x, unsaved = layer_norm(self.layernorm_after, update, hidden_states)
        with unsaved:
            return x + self.mlp(y)


class ViTMAEDecoder(stock.ViTMAEDecoder):
    """The decoder on tokens restored in one write."""

    def forward(
        self, hidden_states: Tensor, ids_restore: Tensor, interpolate_pos_encoding: bool = False
    ) -> stock.ViTMAEDecoderOutput:
        """hidden_states [B, 1 + K, D], ids_restore [B, P] -> logits [B, P, patch_dim]; restored in one write."""
        if interpolate_pos_encoding:
            tell(self, "interpolate_pos_encoding was asked for")
            return super().forward(hidden_states, ids_restore, interpolate_pos_encoding)
        batch, kept, _ = hidden_states.shape
        ids_restore = ids_restore.to(hidden_states.device)
        cls = torch.arange(0, batch * kept, kept, device=ids_restore.device)[:, None]  # its row in each sample
        rows = torch.cat([cls, torch.where(ids_restore < kept - 1, cls + 1 + ids_restore, -1)], dim=1)
        slots = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        x = restore_tokens(
            project(self.decoder_embed, hidden_states).flatten(0, 1), rows.flatten(), slots.flatten(),
            image_mask_token=self.mask_token[0, 0], image_position=self.decoder_pos_embed[0],
        ).unflatten(0, rows.shape)  # fmt: skip
        for layer in self.decoder_layers:
            x = layer(x)
        return stock.ViTMAEDecoderOutput(logits=project(self.decoder_pred, self.decoder_norm(x)[:, 1:]))


class ViTMAEForPreTraining(stock.ViTMAEForPreTraining):
    """The whole model, its loss of the masked patches alone."""

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> stock.ViTMAEForPreTrainingOutput:
        """As Transformers'. The loss reads the masked patches' pixels from the images: no target is made."""
        if interpolate_pos_encoding or (pixel_values is not None and pixel_values.requires_grad):
            return super().forward(
                pixel_values, noise, interpolate_pos_encoding, attention_mask, return_dict=True, **kwargs
            )
        options = {"noise": noise, "attention_mask": attention_mask}
        outputs = self.vit(pixel_values, **options, **kwargs)
        logits = self.decoder(outputs.last_hidden_state, outputs.ids_restore).logits
        batch, patches, _ = logits.shape
        kept = outputs.last_hidden_state.shape[1] - 1
        ids = outputs.ids_restore.argsort(dim=1)[:, kept:]
        rows = ids + torch.arange(0, batch * patches, patches, device=ids.device)[:, None]
        loss = masked_mse(
            take_rows(logits.flatten(0, 1), rows.flatten()), pixel_values, ids.flatten(),
            offsets(batch, patches - kept, ids.device),
            patch_size=self.config.patch_size, norm_pix=self.config.norm_pix_loss, reduction="mean",
        )  # fmt: skip
        return stock.ViTMAEForPreTrainingOutput(
            loss=loss, logits=logits, mask=outputs.mask, ids_restore=outputs.ids_restore,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        )  # fmt: skip


FAST: dict[type[nn.Module], type[nn.Module]] = {
    getattr(stock, fast.__name__): fast
    for fast in (ViTMAEEmbeddings, ViTMAEAttention, ViTMAEMLP, ViTMAELayer, ViTMAEDecoder, ViTMAEForPreTraining)
}
