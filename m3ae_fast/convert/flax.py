"""The parameter tree of the M3AE authors' public JAX code -> our state dict."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3ae_fast._pickle_data import Made
from m3ae_fast.convert.pickled_arrays import attributes, load_content, resolve
from m3ae_fast.convert.runs import write_run
from m3ae_fast.convert.torch_files import check_regular, is_torch
from m3ae_fast.convert.vit import HEADS, depth_of
from m3ae_fast.models import M3AE, M3AEConfig

# Their module -> ours. A Dense kernel is [in, out]; torch's weight is its transpose.
_BLOCK = {
    "LayerNorm_0": "norm1",
    "Attention_0/Dense_0": "attn.qkv",
    "Attention_0/Dense_1": "attn.proj",
    "LayerNorm_1": "norm2",
    "TransformerMLP_0/fc1": "mlp.fc1",
    "TransformerMLP_0/fc2": "mlp.fc2",
}
_MODULES = {
    "image_embedding": "patch_embed.proj",
    "text_embedding": "text_embedding",
    "decoder_input_projection": "decoder_embed",
    "decoder_image_output/Dense_0": "image_head",
    "decoder_text_output/Dense_0": "text_head",
    "encoder/LayerNorm_0": "encoder.norm",
    "decoder/LayerNorm_0": "decoder.norm",
}
_TOKENS = {
    "cls_token": "cls_token",
    "encoder_image_type_embedding": "image_type",
    "encoder_text_type_embedding": "text_type",
    "image_mask_embedding": "image_mask_token",
    "text_mask_embedding": "text_mask_token",
    "decoder_image_type_embedding": "decoder_image_type",
    "decoder_text_type_embedding": "decoder_text_type",
}
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def _our_name(path: str) -> str:
    if path in _TOKENS:
        return _TOKENS[path]
    module, _, leaf = path.rpartition("/")
    block = re.fullmatch(r"(encoder|decoder)/Block_(\d+)/(.+)", module)
    ours = _MODULES.get(module)
    if block and block[3] in _BLOCK:
        ours = f"{block[1]}.blocks.{block[2]}.{_BLOCK[block[3]]}"
    if ours is None or leaf not in _LEAVES:
        raise ValueError(f"tree must hold parameters of the public M3AE code only, got {path!r}")
    return f"{ours}.{_LEAVES[leaf]}"


def _flatten(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    seen, branches = 0, [("", iter(tree.items()))]
    while branches:
        prefix, items = branches[-1]
        for key, value in items:
            if not isinstance(key, str | int):
                raise TypeError(f"tree must have names that are text, got {type(key).__name__}")
            path, value, seen = f"{prefix}{key}", resolve(value), seen + 1
            if seen > 100_000 or len(branches) > 32 or len(path) > 1000:  # branches of a pickle can hold themselves
                raise ValueError("tree must hold at most 100,000 names of 1,000 letters, nested at most 32 deep")
            if isinstance(value, Mapping):
                branches.append((f"{path}/", iter(value.items())))
                break
            if not hasattr(value, "__array__"):
                raise TypeError(f"tree must hold arrays, got {type(value).__name__} at {path!r}")
            flat[path] = np.asarray(value)
        else:
            branches.pop()
    return flat


def flax_to_torch(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert parameters of the public code to the state dict of our `M3AE`.

    Args:
        tree: {path: array}, paths joined by "/" as in `encoder/Block_0/Attention_0/Dense_0/kernel`, or the nested
            dictionary itself; a leading "params" is accepted.

    Returns:
        {name: float32 tensor} for `M3AE.load_state_dict`.

    Raises:
        ValueError: a path that the public code does not have. TypeError: something that is no array.
    """
    flat = {path.removeprefix("params/"): array for path, array in _flatten(tree).items()}
    state = {}
    for path, array in flat.items():
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        if path.endswith("/kernel"):
            tensor = tensor.T.contiguous()
        elif path in _TOKENS:
            tensor = tensor.flatten()  # [1, 1, D]
        state[_our_name(path)] = tensor
    return state


def config_from_flax(tree: Mapping[str, Any], **known: Any) -> dict[str, Any]:
    """The `M3AEConfig` fields that a parameter tree shows: widths, depths, vocabulary, patch size.

    Args:
        tree: as `flax_to_torch` takes it. known: fields the tree does not show (heads, image_size) or that override.
    """
    state = flax_to_torch(tree)
    for path in ("image_embedding/kernel", "decoder_input_projection/kernel"):
        ours = state.get(_our_name(path))
        if ours is None or ours.dim() != 2:
            got = "none" if ours is None else f"shape {tuple(ours.shape)}"
            raise ValueError(f"tree must hold a two-dimensional {path!r}, got {got}")

    width, patch_dim = state["patch_embed.proj.weight"].shape
    words = state.get("text_embedding.weight")
    return {
        "patch_size": round((patch_dim / 3) ** 0.5),
        "vocab_size": 0 if words is None else words.shape[0],
        "width": width,
        "depth": depth_of(state, "encoder"),
        "decoder_width": state["decoder_embed.weight"].shape[0],
        "decoder_depth": depth_of(state, "decoder"),
    } | known


def load_flax_checkpoint(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The parameter tree {path: array} of a checkpoint of the public code (`model.pkl`), without running any of it.

    The file is a pickle, which is read as data: arrays are built from its bytes, everything else is only remembered.

    Raises:
        FileNotFoundError. ValueError: the file is cut short, is no pickle, names anything else than arrays and inert
        containers (the message says what), or holds no parameters.
    """
    path = Path(path)
    check_regular(path, "a pickle of the public JAX code")
    if is_torch(path):
        raise ValueError(
            f"{path} must be a pickle of the public JAX code, got a checkpoint of PyTorch or another archive: "
            "m3ae_fast.convert.convert_vit takes those of MAE, ViTMAE and timm"
        )
    content = load_content(path)
    try:
        tree = _flatten(_parameters(content))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} must hold a checkpoint of the public M3AE code: {error}") from error
    if sum(array.nbytes for array in tree.values()) > path.stat().st_size:
        raise ValueError(f"{path} must hold a checkpoint of the public M3AE code, got the same array under many names")
    return tree


def _parameters(content: Any) -> Mapping[str, Any]:
    """The tree inside a checkpoint: a dictionary's "state" or the whole, of that the "params", once or twice."""
    content = resolve(content)
    state = resolve(content.get("state", content)) if isinstance(content, Mapping) else content
    if isinstance(state, Made):
        state = attributes(state)
    for key in ("params", "params"):  # TrainState.params["params"]
        if isinstance(state, Mapping) and key in state:
            state = resolve(state[key])
    if not isinstance(state, Mapping) or not state:
        raise TypeError("it has no parameter tree")
    return state


def convert_flax_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    text_vocab: str | os.PathLike = "bert-base-uncased",
    **known: Any,
) -> M3AEConfig:
    """Write a public checkpoint as the folder of a run of step 0, which `load_run` and `RunConfig(init=...)` take.

    Args:
        source: the checkpoint, a pickle of which nothing is run. target: the folder, made if need be.
        text_vocab: as of `Tokenizer.from_vocab`; of a model that reads words. The public code's is the default.
        known: fields of `M3AEConfig` that the file does not show (heads of an unusual width, an image_size other than
            256, max_text_length), or other ones.

    Raises:
        ValueError: `source`, which it names, is not a checkpoint of the public code, or the vocabulary has another
            number of entries. FileExistsError: `target` holds a run. OSError: it cannot be written.
    """
    from m3ae_fast.data import Tokenizer  # the train extra

    tree = load_flax_checkpoint(source)
    try:
        state, fields = flax_to_torch(tree), config_from_flax(tree)
        heads = {"heads": HEADS.get(fields["width"]), "decoder_heads": HEADS.get(fields["decoder_width"])}
        fields = fields | heads | known
        for name in heads:
            if fields[name] is None:
                raise ValueError(f"{name} must be given (--set {name}=N), got none")
        config = M3AEConfig.from_dict(fields)
        with torch.device("meta"):
            M3AE(config).load_state_dict(state, assign=True)  # no model is made before all sizes fit
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n\t")[2] if isinstance(error, RuntimeError) else str(error)
        reason = reason.partition("\n")[0]
        raise ValueError(f"{os.fspath(source)} does not fit: {reason}") from error
    tokenizer = None
    if config.vocab_size:
        tokenizer = Tokenizer.from_vocab(text_vocab)
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"text_vocab must have the {config.vocab_size} entries of {os.fspath(source)}, got "
                f"{tokenizer.vocab_size} in {os.fspath(text_vocab)}"
            )
    model = M3AE(config)
    model.load_state_dict(state)
    write_run(Path(target), "m3ae", model, tokenizer)
    return config
