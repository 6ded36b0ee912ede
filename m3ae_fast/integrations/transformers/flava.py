"""FLAVA (arXiv:2112.04482): the logits of masked patches and words are not stored, layers keep a part of what
Transformers' keep, attention is that of packed rows.

The classes have the names of those they stand in for: Transformers knows layers and architectures by name. Shapes: B
samples, N tokens, D width, M masked positions, V the size of a vocabulary.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.flava import modeling_flava as stock

from m3ae_fast.integrations._layers import DROPOUT, drops, layer_norm, offsets, project
from m3ae_fast.integrations._swap import bare, tell, unhooked
from m3ae_fast.integrations.transformers.activations import activation
from m3ae_fast.nn import take_rows
from m3ae_fast.ops import linear, linear_cross_entropy, varlen_attention


def _padding(attention_mask: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """attention_mask [B, N], not 0 where a token is no padding -> [B, 1, 1, N], what Transformers adds to scores.

    For FlavaSelfAttention it says in `packed_keys` how to leave the padding out: the order [B * N] that brings every
    sample's keys together, and their offsets [B + 1]. Queries stay where they are, so nothing need be known on the
    host. Transformers itself would make [B, 1, N, N], which does not show that all queries read the same keys.
    """
    if attention_mask is None or attention_mask.dim() != 2 or torch.compiler.is_compiling():
        return attention_mask
    valid = attention_mask.to(device, torch.bool)
    if device.type == "cpu" and valid.all():  # on a GPU it would be a sync
        return None
    mask = torch.zeros_like(valid, dtype=dtype).masked_fill_(~valid, torch.finfo(dtype).min)[:, None, None]
    order = valid.flatten().logical_not().argsort(stable=True)
    mask.packed_keys = order, F.pad(valid.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
    return mask


class FlavaTextModel(stock.FlavaTextModel):
    """Hands its layers the padding, not a mask of N x N scores."""

    @functools.wraps(stock.FlavaTextModel.forward)
    def forward(self, input_ids=None, attention_mask=None, *args, **kwargs):
        if input_ids is not None:
            attention_mask = _padding(attention_mask, input_ids.device, self.dtype)
        return super().forward(input_ids, attention_mask, *args, **kwargs)


class FlavaMultimodalModel(stock.FlavaMultimodalModel):
    """Hands its layers the padding, not a mask of N x N scores."""

    @functools.wraps(stock.FlavaMultimodalModel.forward)
    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        attention_mask = _padding(attention_mask, hidden_states.device, hidden_states.dtype)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


class FlavaSelfAttention(stock.FlavaSelfAttention):
    """Attention without a tensor of scores; keys that are padding are left out."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        """hidden_states [B, N, D] -> ([B, N, D],); attention_mask: None or `_padding`'s, else as Transformers'."""
        batch, tokens, _ = hidden_states.shape
        order, cu_keys = getattr(attention_mask, "packed_keys", (None, None))
        why = None
        if output_attentions:
            why = "attention weights were asked for"
        elif attention_mask is not None and (order is None or attention_mask.shape[-1] != tokens):
            why = "there is a mask other than one of padding"
        elif not bare(DROPOUT, self.dropout):
            why = "the Dropout is not torch's own, or is hooked"
        elif drops(self.dropout):
            why = "there is dropout of attention weights"
        if why:
            tell(self, why)
            return super().forward(hidden_states, attention_mask, output_attentions)
        q, k, v = (project(part, hidden_states).flatten(0, 1) for part in (self.query, self.key, self.value))
        if order is not None:
            k, v = take_rows(k, order), take_rows(v, order)
        q, k, v = (x.unflatten(1, (-1, self.attention_head_size)) for x in (q, k, v))
        cu = offsets(batch, tokens, q.device)
        rows = varlen_attention(q, k, v, cu, cu_keys, tokens, tokens)
        return (rows.reshape(batch, tokens, self.all_head_size),)


class FlavaSelfOutput(stock.FlavaSelfOutput):
    """The projection, by `linear`."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """hidden_states [B, N, D] -> [B, N, D]; the residual is FlavaLayer's."""
        return self.dropout(project(self.dense, hidden_states))


class FlavaLayer(stock.FlavaLayer):
    """A residual is added inside the LayerNorm after it; what LayerNorms and GELU put out is not stored."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        """[B, N, D] -> ([B, N, D],), with output_attentions ([B, N, D], [B, H, N, N])."""
        if not bare(nn.LayerNorm, self.layernorm_before, self.layernorm_after):
            tell(self, "a LayerNorm is not torch's own, or is hooked")
            return super().forward(hidden_states, attention_mask, output_attentions)
        y, unsaved = layer_norm(self.layernorm_before, hidden_states)
        with unsaved:
            update, *weights = self.attention(y, attention_mask=attention_mask, output_attentions=output_attentions)
        y, x, unsaved = layer_norm(self.layernorm_after, update, hidden_states)
        with unsaved:
            return self._mlp(y, x), *weights

    def _mlp(self, y: Tensor, x: Tensor) -> Tensor:
        """x + mlp(y). The intermediate and the output layer are one here: between them, only the rows before GELU."""
        first, last = self.intermediate, self.output
        name = activation(first.intermediate_act_fn)
        plain = type(first) is stock.FlavaIntermediate and type(last) is stock.FlavaOutput
        plain = plain and bare(nn.Linear, last.dense) and unhooked(first, first.intermediate_act_fn, last)
        if name is None or not plain:
            tell(self, "its MLP is not of plain Linear layers and GELU, or is hooked")
            return last(first(y), x)
        rows = linear(project(first.dense, y), last.dense.weight, last.dense.bias, input_activation=name)
        return x + last.dropout(rows)


class FlavaPredictionHeadTransform(stock.FlavaPredictionHeadTransform):
    """GELU inside the product, and LayerNorm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        name = activation(self.transform_act_fn)
        plain = bare(nn.Linear, self.dense) and bare(nn.LayerNorm, self.LayerNorm)
        if name is None or not (plain and unhooked(self.transform_act_fn)):
            tell(self, "it is not a plain Linear, GELU and LayerNorm, or is hooked")
            return super().forward(hidden_states)
        rows = linear(hidden_states, self.dense.weight, self.dense.bias, activation=name)
        return layer_norm(self.LayerNorm, rows)[0]


class _Logits:
    """Stands for decoder(rows) in FlavaForPreTraining.forward, which only ever asks for the cross-entropy of logits.

    It does not leave that call, and is no tensor that would be made when somebody reads it: by then an optimizer may
    have changed the weights, or FSDP freed them.
    """

    def __init__(self, rows: Tensor, decoder: nn.Linear):
        self.rows, self.decoder, self.reduced = rows, decoder, False

    def view(self, *shape: int) -> _Logits:
        return self  # [M, V] as [-1, V]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not F.cross_entropy:
            return NotImplemented
        logits, target = args
        logits.reduced = True
        options = {name: value for name, value in kwargs.items() if value is not None}
        return linear_cross_entropy(logits.rows, logits.decoder.weight, target, logits.decoder.bias, **options)

    def made(self) -> Tensor | None:
        """The logits; None where their cross-entropy was all that was wanted."""
        return None if self.reduced else project(self.decoder, self.rows)


class FlavaMaskedPredictionHead(stock.FlavaMaskedPredictionHead):
    """Logits, or within FlavaForPreTraining what stands for them."""

    deferred = False

    def forward(self, x: Tensor) -> Tensor | _Logits:
        """[..., D] -> [..., V]."""
        x = self.transform(x)
        # The mean of no rows is NaN in Transformers' loss, and 0 in linear_cross_entropy's.
        if self.deferred and x.dim() == 2 and len(x) and not torch.compiler.is_compiling():
            if bare(nn.Linear, self.decoder) and unhooked(self):
                return _Logits(x, self.decoder)
            tell(self, "its decoder is not a plain Linear, or one of them is hooked")
        return project(self.decoder, x)


class FlavaForPreTraining(stock.FlavaForPreTraining):
    """In training, the losses of masked patches and words without their logits.

    Attributes:
        masked_logits: False (the class's, until the model has its own): a training step with labels and return_loss
            leaves mim_logits, mlm_logits, mmm_image_logits and mmm_text_logits out (None; not in the tuple). True: all
            are there, as in Transformers.
    """

    masked_logits = False

    @functools.wraps(stock.FlavaForPreTraining.forward)
    def forward(self, *args, **kwargs):
        if not self.training or self.masked_logits or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        heads = (self.mim_head, self.mlm_head, self.mmm_image_head, self.mmm_text_head)
        # Exactly these: what wraps a head, as FSDP does, may take its weights away when the call is over.
        heads = [head for head in heads if type(head) is FlavaMaskedPredictionHead]
        for head in heads:
            head.deferred = True
        try:
            output = super().forward(*args, **kwargs)
        finally:
            for head in heads:
                head.deferred = False
        if isinstance(output, tuple):
            output = (value.made() if isinstance(value, _Logits) else value for value in output)
            return tuple(value for value in output if value is not None)
        made = {name: value.made() for name, value in output.items() if isinstance(value, _Logits)}
        return type(output)(**(dict(output) | made))


FAST: dict[type[nn.Module], type[nn.Module]] = {
    getattr(stock, fast.__name__): fast
    for fast in (
        FlavaTextModel,
        FlavaMultimodalModel,
        FlavaSelfAttention,
        FlavaSelfOutput,
        FlavaLayer,
        FlavaPredictionHeadTransform,
        FlavaMaskedPredictionHead,
        FlavaForPreTraining,
    )
}
