"""Names and layouts of published Vision Transformers, and ours.

Three naming schemes: MAE's (facebookresearch/mae, and timm for an encoder), Transformers' (ViTMAE), and those of our
`M3AE`.
Shapes: D width, P patches.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from m3ae_fast.batch import MAX_CHANNELS

_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")  # MAE's, and ours
_FROM_MAE = {
    "patch_embed.proj": "patch_embed.proj",
    "norm": "encoder.norm",
    "fc_norm": "encoder.norm",
    "decoder_embed": "decoder_embed",
    "decoder_norm": "decoder.norm",
    "decoder_pred": "image_head",
}
_STACKS = {"blocks": "encoder.blocks", "decoder_blocks": "decoder.blocks"}
_TOKENS = {"cls_token": "cls_token", "mask_token": "image_mask_token"}  # [1, 1, D]; ours [D]
_TABLES = {"pos_embed": "image_position", "decoder_pos_embed": "decoder_image_position"}

_HF_STACKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
_HF = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
} | {
    name: f"decoder.{name}"
    for name in ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")
}
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HF_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
_MAE_OF_HF = {theirs: name for name, theirs in _HF.items()}
_MAE_OF_HF_BLOCK = {theirs: name for name, theirs in _HF_BLOCK.items()}


def ours_of_mae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """MAE's state dict -> that of our model, position tables included, [P, D] each.

    Raises:
        ValueError: a name that such a model does not have, or a shape that cannot be it.
    """
    found = {}
    for name, tensor in state.items():
        ours = _our_name(name)
        if ours in found:
            raise ValueError(f"the weights must have one final LayerNorm, got norm and fc_norm ({name!r})")
        found[ours] = _our_layout(name, tensor.float())
    for theirs, ours in _TABLES.items():
        if ours not in found:
            continue
        first, found[ours] = found[ours][0], found[ours][1:].contiguous()  # of the class token, of patches
        if theirs == "decoder_pos_embed":
            if first.any():
                raise ValueError(f"{theirs} must begin with zeros, for the class token, got other numbers")
        elif "cls_token" not in found or found["cls_token"].shape != first.shape:
            raise ValueError(f"the weights must have a cls_token as wide as {theirs}, {len(first)}, got no such one")
        else:
            found["cls_token"] = found["cls_token"] + first
    return found


def _our_name(name: str) -> str:
    known = _TOKENS | _TABLES
    if name in known:
        return known[name]
    module, _, leaf = name.rpartition(".")
    ours = _FROM_MAE.get(module)
    block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d{1,4})\.(.+)", module)
    if block and block[3] in _BLOCK:
        ours = f"{_STACKS[block[1]]}.{block[2]}.{block[3]}"
    if ours is None or leaf not in ("weight", "bias"):
        raise ValueError(f"the weights must be those of a plain Vision Transformer or MAE, got {name!r}")
    return f"{ours}.{leaf}"


def _our_layout(name: str, tensor: Tensor) -> Tensor:
    if not tensor.numel():
        raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    if name in _TOKENS or name in _TABLES:
        if tensor.dim() != 3 or tensor.shape[0] != 1:
            raise ValueError(f"{name} must have shape (1, tokens, width), got {tuple(tensor.shape)}")
        return tensor.flatten() if name in _TOKENS else tensor[0]
    if name == "patch_embed.proj.weight":
        if tensor.dim() != 4 or tensor.shape[1] > MAX_CHANNELS or tensor.shape[2] != tensor.shape[3]:
            raise ValueError(
                f"{name} must have shape (width, channels, patch, patch), at most {MAX_CHANNELS} channels, "
                f"got {tuple(tensor.shape)}"
            )
        return tensor.permute(0, 2, 3, 1).flatten(1)  # (row, column, channel)
    return tensor.contiguous()


def channels_of_mae(state: dict[str, Tensor]) -> int:
    """Of the images that MAE's state dict takes, 3 where it does not show: whatever else is wrong is said elsewhere."""
    weight = state.get("patch_embed.proj.weight")
    return 3 if weight is None or weight.dim() != 4 else weight.shape[1]


def mae_of_ours(
    state: dict[str, Tensor], positions: dict[str, Tensor], *, channels: int = 3, decoder: bool
) -> dict[str, Tensor]:
    """The image half of our model -> MAE's state dict; text parameters are left out.

    Args:
        state: of the model. positions: its tables "image_position" and "decoder_image_position", [P, D] each.
        channels: of its images.
        decoder: False: the encoder alone, as timm names it.
    """
    modules = {ours: theirs for theirs, ours in _FROM_MAE.items() if theirs != "fc_norm"}
    modules |= {ours: theirs for theirs, ours in _STACKS.items()}
    found = {}
    for name, ours in _TOKENS.items():
        found[name] = state[ours][None, None]
    for name, ours in _TABLES.items():
        table = positions[ours]
        kind = state.get(ours.replace("position", "type"))
        table = table if kind is None else table + kind
        found[name] = torch.cat([torch.zeros_like(table[:1]), table])[None]
    for ours, tensor in state.items():
        prefix = next((each for each in modules if ours.startswith(f"{each}.")), None)
        if prefix is not None:
            found[modules[prefix] + ours.removeprefix(prefix)] = tensor
    weight = found["patch_embed.proj.weight"]
    patch = round((weight.shape[1] / channels) ** 0.5)
    found["patch_embed.proj.weight"] = weight.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2)
    return {n: t.contiguous() for n, t in found.items() if decoder or not n.startswith(("decoder_", "mask_token"))}


def mae_of_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' state dict, of a ViTMAEForPreTraining or a ViTMAEModel, -> MAE's.

    Raises:
        ValueError: a name that such a model does not have, or of query, key and value not all three.
    """
    found, parts = {}, {}
    for name, tensor in state.items():
        full = name if name.startswith(("vit.", "decoder.")) else f"vit.{name}"
        full = full.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")  # as Transformers 5 saves it
        module, _, leaf = full.rpartition(".")
        block = re.fullmatch(r"(vit\.encoder\.layer|decoder\.decoder_layers)\.(\d{1,4})\.(.+)", module)
        if full in _MAE_OF_HF:
            found[_MAE_OF_HF[full]] = tensor
        elif module in _MAE_OF_HF:
            found[f"{_MAE_OF_HF[module]}.{leaf}"] = tensor
        elif block and block[3] in (*_MAE_OF_HF_BLOCK, *_HF_QKV):
            stack = next(ours for ours, theirs in _HF_STACKS.items() if theirs == block[1])
            if block[3] in _HF_QKV:
                parts.setdefault(f"{stack}.{block[2]}.attn.qkv.{leaf}", {})[_HF_QKV.index(block[3])] = tensor
            else:
                found[f"{stack}.{block[2]}.{_MAE_OF_HF_BLOCK[block[3]]}.{leaf}"] = tensor
        else:
            raise ValueError(f"the weights must be those of a ViTMAE, got {name!r}")
    return found | {name: joined_qkv(name, three) for name, three in parts.items()}


def joined_qkv(name: str, parts: dict[int, Tensor]) -> Tensor:
    """Query (0), key (1) and value (2) -> the tensor `name`, one below the other.

    Raises:
        ValueError: one of them is missing, or of another shape.
    """
    shapes = [tuple(parts[i].shape) for i in sorted(parts)]
    if len(parts) != 3 or len(set(shapes)) != 1 or not shapes[0]:
        raise ValueError(f"{name} must be made of query, key and value of one shape, got {shapes}")
    return torch.cat([parts[i] for i in range(3)])


def hf_of_mae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """MAE's state dict -> that of a ViTMAEForPreTraining."""
    found = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)", module)
        if name in _HF:
            found[_HF[name]] = tensor
        elif not block:
            found[f"{_HF[module]}.{leaf}"] = tensor
        elif block[3] == "attn.qkv":
            for theirs, part in zip(_HF_QKV, tensor.chunk(3), strict=True):
                found[f"{_HF_STACKS[block[1]]}.{block[2]}.{theirs}.{leaf}"] = part
        else:
            found[f"{_HF_STACKS[block[1]]}.{block[2]}.{_HF_BLOCK[block[3]]}.{leaf}"] = tensor
    return found
