"""Published MAE, ViTMAE and timm weights into our `MAE`, and our models into files of Transformers and timm.

Sizes are read from the tensors, and no model is made before they all fit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3ae_fast._files import naming, read_json, write_json, write_tensors
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.convert import vit_names
from m3ae_fast.convert.runs import run_fields
from m3ae_fast.convert.torch_files import check_regular, read_weights
from m3ae_fast.models import M3AE, MAE, M3AEConfig
from m3ae_fast.nn.positions import resample_positions, sincos_2d

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADS = {192: 3, 384: 6, 512: 16, 768: 12, 1024: 16, 1280: 16}  # by width; no state dict shows them. 512: MAE's decoder
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # Transformers' names
MAX_JSON = 1 << 20  # bytes
_NEEDED = ("image_position", "patch_embed.proj.weight", "encoder.blocks.0.mlp.fc1.weight")
_NEEDED_DECODER = ("decoder_embed.weight", "decoder_image_position")


def load_vit(source: str | os.PathLike, **known: Any) -> MAE:
    """An MAE made from published weights, in fp32, on the CPU.

    It has no type vectors (`type_vectors=False`), because published MAEs have none. If the file has no decoder, one is
    initialized from seed 0. A position table other than the sine-cosine one is kept as it is (`positions="given"`). An
    M3AEFastWarning says what was resampled, drawn or left out.

    Args:
        source: `mae_pretrain_vit_*.pth` or `mae_finetuned_*.pth` of facebookresearch/mae, or a Vision Transformer of
            timm's, from torch.save (read by its `weights_only` loader) or in safetensors; or the folder of a
            Transformers ViTMAE, config.json and model.safetensors or pytorch_model.bin.
        known: fields of `M3AEConfig` that the file does not say (heads of an unusual width, norm_pix), or other ones:
            with another image_size the position tables are resampled.

    Raises:
        FileNotFoundError. ValueError, naming it: it is no regular file, is damaged, or of another model.
    """
    source = Path(source)
    try:
        state, found = _read_folder(source) if source.is_dir() else _read_file(source)
        channels, state = vit_names.channels_of_mae(state), vit_names.ours_of_mae(state)
        config = _config(state, channels, found | known)
        _fit_positions(state, found, config)
        _check_names(state, config)
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if str(source) in text else f"{source} does not fit: {text}") from error
    torch.manual_seed(0)
    model = MAE(config)
    model.load_state_dict(state, strict=False)
    return model.eval()


def convert_vit(source: str | os.PathLike, target: str | os.PathLike, **known: Any) -> M3AEConfig:
    """Write published weights as a checkpoint of step 0, which `load_run` and `RunConfig(init=...)` take.

    Args:
        source, known: as `load_vit`'s. target: NAME.safetensors.

    Raises:
        ValueError: as `load_vit`'s, or target has another ending. OSError: target cannot be written.
    """
    from m3ae_fast.train import checkpoint  # the train extra

    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"target must name a .safetensors file, got {target}")
    model = load_vit(source, **known)
    checkpoint.save(target, 0, run_fields("mae", model.config), model, None)
    return model.config


def write_vitmae(model: M3AE, folder: str | os.PathLike) -> None:
    """Write the folder of a Transformers ViTMAE: `ViTMAEForPreTraining.from_pretrained(folder)` takes it.

    Token types are added to the position tables; parameters for words are left out.

    Args:
        model: an MAE or an M3AE, with the joint decoder. folder: made if need be.

    Raises:
        ValueError: it has a cross decoder, which no ViTMAE has. OSError: it cannot be written.
    """
    folder, c = Path(folder), model.config
    if c.decoder != "joint":
        raise ValueError(f"the model must have decoder 'joint' to be written as a ViTMAE, got {c.decoder!r}")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state = vit_names.mae_of_ours(model.state_dict(), _positions(model), channels=c.channels, decoder=True)
    write_tensors(folder / "model.safetensors", vit_names.hf_of_mae(state), {"format": "pt"})
    write_json(folder / "config.json", {
        "architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "dtype": "float32",
        "hidden_size": c.width, "num_hidden_layers": c.depth, "num_attention_heads": c.heads,
        "intermediate_size": int(c.width * c.mlp_ratio),
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[c.activation],
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02,
        "layer_norm_eps": c.norm_eps, "image_size": c.image_size, "patch_size": c.patch_size,
        "num_channels": c.channels, "qkv_bias": True,
        "decoder_hidden_size": c.decoder_width, "decoder_num_hidden_layers": c.decoder_depth,
        "decoder_num_attention_heads": c.decoder_heads, "decoder_intermediate_size": int(c.decoder_width * c.mlp_ratio),
        "mask_ratio": c.image_mask_ratio, "norm_pix_loss": c.norm_pix,
    })  # fmt: skip
    height, width = c.image_shape
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "ViTImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255,
        "do_resize": True, "size": {"height": height, "width": width}, "resample": 3,
        "do_normalize": True, "image_mean": c.image_mean, "image_std": c.image_std,
    })  # fmt: skip


def write_timm(model: M3AE, target: str | os.PathLike) -> dict[str, Any]:
    """Write the encoder as safetensors for timm, for images alone; returns the arguments of its VisionTransformer.

    They are JSON in the file's metadata, too, under "config":
    `VisionTransformer(**arguments).load_state_dict(load_file(target))`.

    Args:
        model: an MAE or an M3AE; its token type goes into the position table. target: the file.

    Raises:
        OSError: it cannot be written.
    """
    c = model.config
    sizes = {
        "img_size": c.image_size, "patch_size": c.patch_size, "in_chans": c.channels, "embed_dim": c.width,
        "depth": c.depth, "num_heads": c.heads, "mlp_ratio": c.mlp_ratio, "act_layer": c.activation, "num_classes": 0,
        "global_pool": "token",
    }  # fmt: skip
    state = vit_names.mae_of_ours(model.state_dict(), _positions(model), channels=c.channels, decoder=False)
    about = {"mean": c.image_mean, "std": c.image_std, "norm_eps": c.norm_eps}
    metadata = {"format": "pt", "config": json.dumps(sizes), "about": json.dumps(about)}
    write_tensors(Path(target), state, metadata)
    return sizes


def _positions(model: M3AE) -> dict[str, Tensor]:
    return {name: getattr(model, name) for name in ("image_position", "decoder_image_position")}


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(MAE's state dict, fields of the configuration) of a file of facebookresearch/mae or timm."""
    state, args = read_weights(path)
    left = [name for name in state if name.partition(".")[0] == "head"]
    state = {name: tensor for name, tensor in state.items() if name not in left}
    if left:
        _say(f"{path}: the classifier {left[0].partition('.')[0]} is left out")
    if "fc_norm.weight" in state:
        _say(f"{path} was fine-tuned on the mean of its patches: its fc_norm becomes the LayerNorm of every token")
    norm_pix = args.get("norm_pix_loss")
    if not isinstance(norm_pix, bool):
        norm_pix = "visualize" not in path.name  # MAE's own for pictures are the ones trained on plain pixels
    return state, {"norm_pix": norm_pix}


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of a folder of Transformers."""
    about = read_about(folder / "config.json")
    kind, act = about.get("model_type"), about.get("hidden_act", "gelu")
    if kind != "vit_mae":
        raise ValueError(f"{folder}/config.json must be of model_type 'vit_mae', got {kind!r}")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise ValueError(f"{folder}/config.json must have hidden_act of {', '.join(ACTIVATIONS)}, got {act!r}")
    state = vit_names.mae_of_hf(read_weights(weights_in(folder)).state)
    channels = [vit_names.channels_of_mae(state)]
    for name, allowed in (("num_channels", channels), ("qkv_bias", [True]), ("norm_pix_loss", [False, True])):
        if about.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{folder}/config.json must have {name} {allowed[-1]}, got {about[name]!r}")
    found = {
        "image_size": about.get("image_size", 224), "heads": about.get("num_attention_heads", 12),
        "decoder_heads": about.get("decoder_num_attention_heads", 16), "activation": ACTIVATIONS[act],
        "norm_eps": about.get("layer_norm_eps", 1e-12), "norm_pix": about.get("norm_pix_loss", False),
        "image_mask_ratio": about.get("mask_ratio", 0.75),
    }  # fmt: skip
    return state, found | pixels_of(folder)


def weights_in(folder: Path) -> Path:
    """The file of weights of a folder of Transformers."""
    names = ("model.safetensors", "pytorch_model.bin")
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def pixels_of(folder: Path) -> dict[str, list[float]]:
    """image_mean and image_std, where a folder of Transformers says them."""
    path = folder / "preprocessor_config.json"
    images = read_about(path) if path.exists() else {}
    return {name: [float(value) for value in images[name]] for name in ("image_mean", "image_std") if name in images}


def read_about(path: Path) -> dict[str, Any]:
    """A JSON file of a folder of Transformers. FileNotFoundError. ValueError, naming it."""
    check_regular(path, "of the folder of a ViTMAE or another model of Transformers")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} must be a configuration of at most {MAX_JSON:,} bytes, got {path.stat().st_size:,}")
    return read_json(path)


def _config(state: Mapping[str, Tensor], channels: int, known: Mapping[str, Any]) -> M3AEConfig:
    """The configuration that tensors show, and what else is known of it."""
    decoder = "decoder_embed.weight" in state
    for name in (*_NEEDED, *(_NEEDED_DECODER if decoder else ())):
        if name not in state:
            raise ValueError(f"the weights must have {name} (as m3ae_fast names it), got none")
    width, patch_dim = len(state["cls_token"]), state["patch_embed.proj.weight"].shape[1]
    patch = round((patch_dim / channels) ** 0.5)
    patches = len(state["image_position"])
    fields = {
        "vocab_size": 0, "patch_size": patch, "channels": channels, "image_size": side_of(patches) * patch or None,
        "activation": "gelu",
        "image_mean": IMAGENET_MEAN if channels == 3 else None, "image_std": IMAGENET_STD if channels == 3 else None,
        "type_vectors": False, "width": width,
        "depth": depth_of(state, "encoder"), "heads": HEADS.get(width),
        "mlp_ratio": ratio_of(len(state["encoder.blocks.0.mlp.fc1.weight"]), width),
    }  # fmt: skip
    tables = {"image_position": (patches, width)}
    if decoder:
        wide = len(state["decoder_embed.weight"])
        fields |= {"decoder_width": wide, "decoder_depth": depth_of(state, "decoder"), "decoder_heads": HEADS.get(wide)}
        tables["decoder_image_position"] = (patches, wide)
    else:
        _say("there is no decoder in the weights: a new one is drawn from seed 0")
    for name, shape in tables.items():
        if state[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(state[name].shape)}")
    fields |= known
    if fields["image_size"] is None:
        raise ValueError(f"image_size must be given for {patches} patches (--set image_size=[H,W]), got none")
    for name in ("heads", "decoder_heads"):
        if fields.get(name, 1) is None:
            of = fields["width" if name == "heads" else "decoder_width"]
            raise ValueError(f"{name} must be given for width {of} (--set {name}=N), got none")
    return M3AEConfig.from_dict(fields)


def side_of(patches: int) -> int:
    """Of a square of patches; 0: they are none."""
    side = round(patches**0.5)
    return side if side * side == patches else 0


def ratio_of(hidden: int, width: int) -> float:
    """The mlp_ratio whose product with the width, cut to a whole number, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def depth_of(state: Mapping[str, Tensor], part: str) -> int:
    """The number of blocks of a part of our model. ValueError: one is missing."""
    numbers = {int(match[1]) for name in state if (match := re.match(rf"{part}\.blocks\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"the {part} must have blocks 0 to {len(numbers) - 1}, got {max(numbers)}")
    return len(numbers)


def _fit_positions(state: dict[str, Tensor], found: Mapping[str, Any], config: M3AEConfig) -> None:
    """Leave tables out that are ours anyway; resample those of another grid, and say so. Sets config.positions."""
    patches, grid = len(state["image_position"]), config.grid
    if "image_size" in found:
        grid = dataclasses.replace(config, image_size=found["image_size"]).grid
    elif side := side_of(patches):
        grid = side, side
    if grid[0] * grid[1] != patches:
        raise ValueError(f"the position table must have {grid[0]} x {grid[1]} rows, got {patches}")
    tables = [name for name in ("image_position", "decoder_image_position") if name in state]
    if grid == config.grid and all(torch.equal(state[name], sincos_2d(*grid, state[name].shape[1])) for name in tables):
        for name in tables:
            del state[name]
        return
    config.positions = "given"
    if grid != config.grid:
        _say(f"positions of {grid[0]} x {grid[1]} patches are resampled to {config.grid[0]} x {config.grid[1]}")
        for name in tables:
            state[name] = resample_positions(state[name], grid, config.grid)


def _check_names(state: Mapping[str, Tensor], config: M3AEConfig) -> None:
    """ValueError where the weights are not those of an MAE, but for a decoder that is missing as a whole."""
    with torch.device("meta"):
        expected = MAE(config).state_dict()
    partly = "decoder_embed.weight" in state
    if partly and config.decoder != "joint":
        raise ValueError(f"decoder must be 'joint', as that in the weights is, got {config.decoder!r}")
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            shapes = tuple(tensor.shape), tuple(state[name].shape)
            raise ValueError(f"{name} must have shape {shapes[0]}, got {shapes[1]}")
        decoding = name.startswith(("decoder", "image_head", "image_mask_token"))
        if name not in state and (partly or not decoding):
            raise ValueError(f"the weights must have {name} (as m3ae_fast names it), got none")
    others = sorted(set(state) - set(expected))
    if others:
        raise ValueError(f"the weights must not have {others[0]} (as m3ae_fast names it)")


def _say(text: str) -> None:
    warnings.warn(text, M3AEFastWarning, stacklevel=3)
