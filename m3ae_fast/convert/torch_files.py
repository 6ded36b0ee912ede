"""State dicts in files of PyTorch and of safetensors: what a file may claim is bounded by the bytes it has."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3ae_fast._files import read_tensors, stored_as_it_is

ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch.save begin
SAFETENSORS = ".safetensors"


class Weights(NamedTuple):
    """state: tensors by name. args: the arguments of the training script, where the file has them."""

    state: dict[str, Tensor]
    args: Mapping[str, Any]


def check_regular(path: Path, what: str) -> None:
    """FileNotFoundError: there is none. ValueError: it is a pipe or a device, whose reading may never end."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}, which must be {what}")
    if not path.is_file():
        raise ValueError(f"{path} must be {what}: it is no regular file")


def is_torch(path: Path) -> bool:
    """Whether torch.save wrote the file; not of a pipe or a device, which is not read."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(len(LEGACY))
    return start.startswith(ZIP) or start == LEGACY


def read_weights(path: Path, *, without: str | None = None) -> Weights:
    """The state dict of a file of PyTorch (read by its `weights_only` loader) or of safetensors.

    Of a training checkpoint, the one under "model" or "state_dict".

    Args:
        without: the end of names that are left out, whatever is there.
    Raises:
        FileNotFoundError. ValueError, naming it: it is no regular file, is damaged, asks for more than tensors, or
            holds no state dict.
    """
    check_regular(path, "a file of weights")
    try:
        content = read_tensors(path)[1] if path.suffix == SAFETENSORS else _load(path)
        state, args = _state_of(content, without)
    except OSError:
        raise
    except Exception as error:  # what is hostile or cut short can fail in any way
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ValueError(f"{path} must be a file of weights, a state dict: {reason[:200]}") from error
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > path.stat().st_size:
        raise ValueError(f"{path} must hold its {size:,} bytes of weights, got a file of {path.stat().st_size:,} bytes")
    return Weights(state, args)


def _load(path: Path) -> Any:
    """Tensors that read from the file itself (mmap): nothing is unpacked, no memory is reserved."""
    with open(path, "rb") as file:
        if not stored_as_it_is(file, path.stat().st_size):
            raise ValueError("it is cut short, compressed, or of torch before 1.6 (there: load it, and save it again)")
    with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's checkpoints hold their arguments
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _state_of(content: Any, without: str | None) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    if not isinstance(content, Mapping):
        raise TypeError(f"it holds a {type(content).__name__}")
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    state = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)), content)
    if without is not None:
        state = {name: tensor for name, tensor in state.items() if not str(name).endswith(without)}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"it holds a {type(tensor).__name__} under {str(name)[:80]!r}")
        if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.device.type != "cpu":
            raise TypeError(f"{name!r} is not a dense tensor of floats, but {tensor.dtype} {tensor.layout}")
    if not state:
        raise ValueError("it is empty")
    return dict(state), args
