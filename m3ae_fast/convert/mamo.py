"""A MAMO whose encoders are published ones: CLIP's or DeiT's for images, BERT's first and last layers for words.

Source: arXiv:2210.04183, section 4.1; arXiv:2107.07651 (ALBEF), which shares BERT's layers out so.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.convert import encoder_names as names
from m3ae_fast.convert.runs import write_run
from m3ae_fast.convert.torch_files import read_weights
from m3ae_fast.convert.vit import (
    ACTIVATIONS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    depth_of,
    pixels_of,
    ratio_of,
    read_about,
    side_of,
    weights_in,
)
from m3ae_fast.models import MAMO, MAMOConfig
from m3ae_fast.models.mamo import Encoders
from m3ae_fast.nn.positions import resample_positions

if TYPE_CHECKING:
    from m3ae_fast.data import Tokenizer

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_DIM = 64  # of every published one; a state dict does not show it
IDS = "position_ids"  # whole numbers in older files: no weights
# What is MAMO's own, drawn from seed 0: nothing published has it.
OWN = ("image_projection", "text_projection", "image_mask_token", "image_type", "text_type", "fusion.blocks.0.norm1")


def load_mamo(
    image: str | os.PathLike, text: str | os.PathLike, *, text_vocab: str | os.PathLike | None = None, **known: Any
) -> tuple[MAMO, Tokenizer]:
    """A MAMO made from a published image encoder and a BERT, in fp32, on the CPU, and its vocabulary.

    Its image encoder gives the features of the published one, CLS and patches after the last LayerNorm, and its text
    encoder those of BERT's embeddings and first layers on [CLS] and the words, without [SEP]. The fusion encoder is
    BERT's last layers, behind a LayerNorm of its own: what it reads, patches beside words, is MAMO's. The momentum
    network is a copy; projections and heads are drawn from seed 0. BERT's pooler and word head are left out.

    Args:
        image: a folder of Transformers (CLIP, ViT, or DeiT that is not distilled), or a file, .safetensors or of
            PyTorch, with its, timm's or open_clip's names.
        text: the folder of a BERT of Transformers, or a file with its names.
        text_vocab: as of `Tokenizer.from_vocab`; None: the one in the folder `text`.
        known: fields of `MAMOConfig` that the files do not show, or other ones: text_depth and fusion_depth, each half
            of BERT's layers by default; image_size, to which positions are resampled; of image_form those that differ,
            for CLIP's files without a config.json say nothing of the activation.

    Raises:
        FileNotFoundError. ValueError, naming the file: it is damaged, or of a model that would compute something else
        here; the two are of different widths; the vocabulary is not BERT's.
    """
    from m3ae_fast.data import Tokenizer  # the train extra

    image, text = Path(image), Path(text)
    images, found = _checked(image, _read_image)
    texts, of_text = _checked(text, _read_text)
    if text_vocab is None and not text.is_dir():
        raise ValueError(f"text_vocab must be given beside a file, {text}, got none")
    tokenizer = Tokenizer.from_vocab(text if text_vocab is None else text_vocab)
    special = [tokenizer.id_of("[CLS]"), tokenizer.id_of("[MASK]")]
    if tokenizer.vocab_size != of_text["vocab_size"] or None in special:
        wanted = f"{of_text['vocab_size']} entries with [CLS] and [MASK]"
        raise ValueError(f"text_vocab must be BERT's, {wanted}, got {tokenizer.vocab_size}")
    for name in ("width", "heads", "mlp_ratio"):
        if found[name] != of_text[name] and (name != "heads" or None not in (found[name], of_text[name])):
            raise ValueError(f"{image} and {text} must be of one {name}, got {found[name]} and {of_text[name]}")
    layers, form = of_text.pop("layers"), found["image_form"] | known.pop("image_form", {})
    if "activation" not in form:
        raise ValueError(
            f"image_form must say the activation, which {image} does not, got none: --set "
            """'image_form={"activation": "quick_gelu"}' of OpenAI's weights, "gelu" of most others"""
        )
    depths = {"text_depth": layers // 2, "fusion_depth": layers - layers // 2}
    heads = found["heads"] or of_text["heads"]
    config = MAMOConfig.from_dict(found | of_text | depths | {"heads": heads} | known | {"image_form": form})
    if config.text_depth + config.fusion_depth > layers:
        raise ValueError(f"text_depth + fusion_depth must be at most {layers}, as {text} has, got {config}")
    state = {f"image.{name}": tensor for name, tensor in images.items()}
    state["image.position"] = _resampled(state["image.position"], config)
    first = names.text_encoder(texts, config.text_depth, config.max_text_length, *special)
    state |= {f"text.{name}": tensor for name, tensor in first.items()}
    state |= names.stack(texts, range(layers - config.fusion_depth, layers), "fusion")
    _check(state, config, f"{image} and {text}")
    torch.manual_seed(0)
    model = MAMO(config)
    model.online.load_state_dict(state, strict=False)
    model.target.load_state_dict(model.online.state_dict())
    return model.eval(), tokenizer


def convert_mamo(
    image: str | os.PathLike,
    text: str | os.PathLike,
    target: str | os.PathLike,
    *,
    text_vocab: str | os.PathLike | None = None,
    **known: Any,
) -> MAMOConfig:
    """Write what `load_mamo` makes as the folder of a run of step 0, which `load_run` and `RunConfig(init=...)` take.

    Args:
        image, text, text_vocab, known: as `load_mamo`'s. target: the folder, made if need be.

    Raises:
        ValueError: as `load_mamo`'s. FileExistsError: `target` holds a run. OSError: it cannot be written.
    """
    model, tokenizer = load_mamo(image, text, text_vocab=text_vocab, **known)
    write_run(Path(target), "mamo", model, tokenizer)
    return model.config


def _checked(path: Path, read) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return read(path)
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path} does not fit: {text}") from error


def _read(path: Path, kinds: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, {heads, norm_eps, activation} of a folder's config.json; of a file alone {}).

    Args:
        kinds: defaults of config.json by model_type.
    """
    if not path.is_dir():
        return read_weights(path, without=IDS).state, {}
    about = read_about(path / "config.json")
    if about.get("model_type") == "clip":  # with its text encoder
        about = {"model_type": "clip_vision_model"} | about.get("vision_config", {})
    kind = about.get("model_type")
    if kind not in kinds:
        raise ValueError(f"{path}/config.json must be of model_type {', '.join(kinds)}, got {kind!r}")
    about = {"num_attention_heads": 12, **kinds[kind], **about}
    act = about["hidden_act"]
    if act not in (*ACTIVATIONS, "quick_gelu"):
        raise ValueError(
            f"{path}/config.json must have hidden_act of {', '.join(ACTIVATIONS)}, quick_gelu, got {act!r}"
        )
    for name, wanted in (("position_embedding_type", "absolute"), ("qkv_bias", True), ("num_channels", 3)):
        if about.get(name, wanted) != wanted:
            raise ValueError(f"{path}/config.json must have {name} {wanted}, got {about[name]!r}")
    found = {"heads": about["num_attention_heads"], "norm_eps": about["layer_norm_eps"]}
    return read_weights(weights_in(path), without=IDS).state, found | {"activation": ACTIVATIONS.get(act, act)}


def _read_image(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict of an ImageEncoder, fields of a MAMOConfig)."""
    clip, vit = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}, {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
    kinds = {"clip_vision_model": clip, "vit": vit, "deit": vit}
    state, about = _read(path, kinds)
    library = names.names_of_images(state)
    state = names.image_encoder(names.renamed(state, library))
    of_clip = "norm_tokens.weight" in state
    if not about and (of_clip or library is names.VIT):
        about = {"norm_eps": 1e-5 if of_clip else 1e-12}
    form = {"norm_tokens": of_clip, "activation": about.get("activation")}
    form["norm_eps"] = about.get("norm_eps", 1e-6)
    if not of_clip:
        form["activation"] = form["activation"] or "gelu"
    width, patch = len(state["cls_token"]), round((state["patch_embed.proj.weight"].shape[1] / 3) ** 0.5)
    side = side_of(len(state["position"]))
    if not side:
        raise ValueError(f"the position table must be of a square of patches, got {len(state['position'])}")
    return state, {
        "width": width, "heads": _heads(about, width), **_sizes(state, "transformer", width), "patch_size": patch,
        "image_size": side * patch, "positions": "given", "image_mean": CLIP_MEAN if of_clip else IMAGENET_MEAN,
        "image_std": CLIP_STD if of_clip else IMAGENET_STD,
        "image_form": {name: value for name, value in form.items() if value is not None}, **pixels_of(path),
    }  # fmt: skip


def _read_text(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(BERT's state dict by the names of `encoder_names.renamed`, fields of a MAMOConfig and "layers")."""
    state, about = _read(path, {"bert": {"hidden_act": "gelu", "layer_norm_eps": 1e-12}})
    state = names.renamed(state, names.BERT)
    if "words" not in state or state["words"].dim() != 2:
        raise ValueError("the weights must have embeddings.word_embeddings.weight of two dimensions")
    count, width = state["words"].shape
    sizes = _sizes({f"bert.{name}": tensor for name, tensor in state.items()}, "bert", width)
    form = {"norm_eps": 1e-12, "activation": "gelu"} | about
    heads = form.pop("heads", None) or _heads({}, width)
    return state, {
        "vocab_size": count, "width": width, "heads": heads, "layers": sizes.pop("depth"), **sizes,
        "text_positions": "given", "text_form": form | {"post_norm": True},
    }  # fmt: skip


def _heads(about: Mapping[str, Any], width: int) -> int | None:
    """Of the attention; None: neither config.json nor the published widths say."""
    return about.get("heads") or (None if width % HEAD_DIM else width // HEAD_DIM)


def _sizes(state: Mapping[str, Tensor], part: str, width: int) -> dict[str, Any]:
    hidden = state.get(f"{part}.blocks.0.mlp.fc1.weight")
    if hidden is None:
        raise ValueError(f"the weights must have {part}.blocks.0.mlp.fc1.weight (by our names), got none")
    return {"depth": depth_of(state, part), "mlp_ratio": ratio_of(len(hidden), width)}


def _resampled(table: Tensor, config: MAMOConfig) -> Tensor:
    """Positions of the configuration's grid."""
    side = side_of(len(table))
    if config.grid == (side, side):
        return table
    rows, columns = config.grid
    message = f"positions of {side} x {side} patches are resampled to {rows} x {columns}"
    warnings.warn(message, M3AEFastWarning, stacklevel=3)
    return resample_positions(table, (side, side), config.grid)


def _check(state: Mapping[str, Tensor], config: MAMOConfig, source: str) -> None:
    """ValueError where the weights are not those of the encoders, but for what is MAMO's own."""
    with torch.device("meta"):
        expected = Encoders(config).state_dict()
    for name, tensor in expected.items():
        if name not in state and not name.startswith(OWN):
            raise ValueError(f"{source} must have {name} (as m3ae_fast names it), got none")
        if name in state and state[name].shape != tensor.shape:
            shapes = tuple(tensor.shape), tuple(state[name].shape)
            raise ValueError(f"{source} do not fit: {name} must have shape {shapes[0]}, got {shapes[1]}")
    others = sorted(set(state) - set(expected))
    if others:
        raise ValueError(f"{source} must not have {others[0]} (as m3ae_fast names it)")
