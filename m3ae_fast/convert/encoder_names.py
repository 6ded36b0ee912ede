"""Names and layouts of published image and text encoders: CLIP's, DeiT's and BERT's, into those of MAMO's encoders.

Shapes: D width, P patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from m3ae_fast.convert.vit_names import joined_qkv

PARTS = ("attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")  # of a block, without its first LayerNorm
QKV = ("attn.q", "attn.k", "attn.v")


class Names(NamedTuple):
    """The names of a library, each with timm's; of BERT with names of our own, "norm_out" the LayerNorm that ends a
    layer."""

    outside: Mapping[str, str]  # parameters, and modules of a weight and a bias, outside the blocks
    stack: str  # matches a module in a block: the block's number, then the module's name in it
    block: Mapping[str, str]  # those names
    prefixes: tuple[str, ...] = ()  # of all names; where there is one, names without it are of another part
    left_out: tuple[str, ...] = ()  # how names of heads begin


TIMM = Names(
    {name: name for name in ("cls_token", "pos_embed", "patch_embed.proj", "norm_pre", "norm")},
    r"blocks\.(\d{1,4})\.(.+)",
    {name: name for name in ("norm1", *PARTS)},
    left_out=("head.", "fc_norm."),
)
CLIP = Names(
    {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "pre_layrnorm": "norm_pre",
        "post_layernorm": "norm",
    },
    r"encoder\.layers\.(\d{1,4})\.(.+)",
    {
        "layer_norm1": "norm1",
        "self_attn.q_proj": "attn.q",
        "self_attn.k_proj": "attn.k",
        "self_attn.v_proj": "attn.v",
        "self_attn.out_proj": "attn.proj",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    ("vision_model.",),
    ("text_model.", "visual_projection.", "text_projection.", "logit_scale"),
)
OPEN_CLIP = Names(
    {
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "conv1": "patch_embed.proj",
        "ln_pre": "norm_pre",
        "ln_post": "norm",
    },
    r"transformer\.resblocks\.(\d{1,4})\.(.+)",
    {
        "ln_1": "norm1",
        "attn.in_proj": "attn.qkv",
        "attn.out_proj": "attn.proj",
        "ln_2": "norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
    ("visual.",),
    ("proj",),
)
VIT = Names(
    {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
    },
    r"encoder\.layer\.(\d{1,4})\.(.+)",
    {
        "layernorm_before": "norm1",
        "attention.attention.query": "attn.q",
        "attention.attention.key": "attn.k",
        "attention.attention.value": "attn.v",
        "attention.output.dense": "attn.proj",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    },
    ("vit.", "deit."),
    ("pooler.", "classifier."),
)
BERT = Names(
    {
        "embeddings.word_embeddings.weight": "words",
        "embeddings.position_embeddings.weight": "positions",
        "embeddings.token_type_embeddings.weight": "types",
        "embeddings.LayerNorm": "norm",
    },
    r"encoder\.layer\.(\d{1,4})\.(.+)",
    {
        "attention.self.query": "attn.q",
        "attention.self.key": "attn.k",
        "attention.self.value": "attn.v",
        "attention.output.dense": "attn.proj",
        "attention.output.LayerNorm": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "output.LayerNorm": "norm_out",
    },
    ("bert.",),
    ("pooler.", "cls."),
)


def names_of_images(state: Mapping[str, Tensor]) -> Names:
    """Whose names a state dict of an image encoder has: timm's, where they are of no other library.

    Raises:
        ValueError: it has a token beside the class token.
    """
    for name in state:
        if name.endswith(("dist_token", "distillation_token", "reg_token")):
            raise ValueError(
                f"the weights must have one class token and patches, got {name}, too, which would be left out of what "
                "is computed: take those of a DeiT that is not distilled"
            )
    of = (("embeddings.class_embedding", CLIP), ("class_embedding", OPEN_CLIP), ("embeddings.cls_token", VIT))
    return next((names for end, names in of if any(name.endswith(end) for name in state)), TIMM)


def renamed(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """With timm's names; queries, keys and values in one.

    Raises:
        ValueError: a name that such a model does not have, an empty tensor, or query, key and value that do not belong
        together.
    """
    prefix = next((each for each in names.prefixes if any(name.startswith(each) for name in state)), "")
    found, parts = {}, {}
    for full, tensor in state.items():
        if not full.startswith(prefix):
            continue
        if not tensor.numel():
            raise ValueError(f"{full} must not be empty, got shape {tuple(tensor.shape)}")
        name = full.removeprefix(prefix)
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))  # of BERT's first files
        module, _, leaf = name.replace("in_proj_", "in_proj.").rpartition(".")
        block = re.fullmatch(names.stack, module)
        if name in names.outside:
            found[names.outside[name]] = tensor.float()
        elif module in names.outside and leaf in ("weight", "bias"):
            found[f"{names.outside[module]}.{leaf}"] = tensor.float()
        elif block and block[2] in names.block and leaf in ("weight", "bias"):
            ours = names.block[block[2]]
            if ours in QKV:
                parts.setdefault(f"blocks.{block[1]}.attn.qkv.{leaf}", {})[QKV.index(ours)] = tensor.float()
            else:
                found[f"blocks.{block[1]}.{ours}.{leaf}"] = tensor.float()
        elif not name.startswith(names.left_out):
            raise ValueError(f"the weights must be those of a plain CLIP, Vision Transformer or BERT, got {full!r}")
    return found | {name: joined_qkv(name, three) for name, three in parts.items()}


def image_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict of an image encoder -> that of `ImageEncoder`, with its "position" [P, D].

    Raises:
        ValueError: a tensor that is missing, or of a shape that it cannot have.
    """
    state = dict(state)
    cls, table, weight = (_needed(state, name) for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"))
    cls, table = cls.flatten(), table.flatten(0, -2) if table.dim() > 1 else table
    if table.dim() != 2 or len(table) < 2 or table.shape[1:] != cls.shape:
        shapes = tuple(cls.shape), tuple(table.shape)
        raise ValueError(f"pos_embed must have rows of shape {shapes[0]} for class token and patches, got {shapes[1]}")
    if weight.dim() == 4 and weight.shape[1] != 3:
        raise ValueError(f"the image encoder must read 3 channels, red, green and blue, got {weight.shape[1]}")
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"the patch embedding must have shape (width, 3, patch, patch), got {tuple(weight.shape)}")
    found = {
        "cls_token": cls + table[0], "position": table[1:].contiguous(),
        "patch_embed.proj.weight": weight.permute(0, 2, 3, 1).flatten(1),  # (row, column, channel)
        "patch_embed.proj.bias": state.pop("patch_embed.proj.bias", torch.zeros(len(weight))),
    }  # fmt: skip
    for name, tensor in state.items():
        inside = name.startswith(("blocks.", "norm."))
        found[f"transformer.{name}" if inside else name.replace("norm_pre", "norm_tokens")] = tensor.contiguous()
    return found


def text_encoder(state: Mapping[str, Tensor], depth: int, longest: int, cls: int, mask: int) -> dict[str, Tensor]:
    """BERT's embeddings and first layers -> the state dict of a `TextEncoder` with post_norm.

    Args:
        state: of `renamed`. depth: layers. longest: words, for the position table.
        cls, mask: numbers of the words [CLS] and [MASK].
    Raises:
        ValueError: a tensor that is missing, or too few positions.
    """
    words, positions, types = (_needed(dict(state), name) for name in ("words", "positions", "types"))
    for name, table in (("positions", positions), ("types", types)):
        if table.dim() != 2 or table.shape[1] != words.shape[1]:
            raise ValueError(f"{name} must have shape (rows, {words.shape[1]}), got {tuple(table.shape)}")
    if len(positions) <= longest:
        raise ValueError(f"max_text_length must be less than the {len(positions)} positions, got {longest}")
    return {
        "embedding.weight": torch.cat([words, words[mask : mask + 1]]),
        "position": positions[1 : 1 + longest] + types[0], "cls_token": words[cls] + positions[0] + types[0],
        **stack(state, range(depth), "transformer", first="norm"),
    }  # fmt: skip


def stack(state: Mapping[str, Tensor], layers: range, prefix: str, *, first: str | None = None) -> dict[str, Tensor]:
    """Some of BERT's layers -> a `Transformer` with post_norm: the LayerNorm at a layer's end is the first one of the
    next block, and the last one the Transformer's.

    Args:
        state: of `renamed`. prefix: of the names. first: the LayerNorm before the first layer; None: it is not theirs.
    Raises:
        ValueError: a tensor that is missing.
    """
    state, found = dict(state), {}
    norms = [first, *(f"blocks.{number}.norm_out" for number in layers)]
    for leaf in ("weight", "bias"):
        for place, norm in enumerate(norms):
            ours = f"{prefix}.norm" if place == len(layers) else f"{prefix}.blocks.{place}.norm1"
            if norm is not None:
                found[f"{ours}.{leaf}"] = _needed(state, f"{norm}.{leaf}")
        for place, number in enumerate(layers):
            for part in PARTS:
                found[f"{prefix}.blocks.{place}.{part}.{leaf}"] = _needed(state, f"blocks.{number}.{part}.{leaf}")
    return found


def _needed(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"the weights must have {name} (by timm's names), got none")
    return state.pop(name)
