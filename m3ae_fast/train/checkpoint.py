"""Checkpoints: one safetensors file each, written atomically, verified in full when read. A sharded model's are folders
(`m3ae_fast.train.sharded`), which hold the same; either is read into either.

Tensors are named `model.<parameter>`, `optimizer.<parameter>.<moment>` and `ema.<parameter>`. The file's metadata holds
one entry, `m3ae_fast`: JSON with the step, the configuration, the counts of bad steps, in fp16 the loss scale, and a
SHA-256 over all of it, tensors included.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from m3ae_fast._files import read_tensors, remove_unfinished, write_tensors
from m3ae_fast.train import distributed, sharded
from m3ae_fast.train.average import Average

FORMAT = 1


class Checkpoint(NamedTuple):
    """step: steps taken. config: the run's configuration (RunConfig.to_dict). model: its state dict.
    optimizer: {parameter name: {moment name: tensor}}. bad_steps: those skipped, in all and just before this one.
    average: {parameter name: averaged}, empty where the run keeps none.
    loss_scale: the state of the loss scaler, empty but in fp16."""

    step: int
    config: dict
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    bad_steps: tuple[int, int] = (0, 0)
    average: dict[str, Tensor] = {}  # noqa: RUF012  never changed
    loss_scale: dict = {}  # noqa: RUF012  never changed


def save(
    path: Path,
    step: int,
    config: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    bad_steps: tuple[int, int] = (0, 0),
    average: Average | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write the checkpoint under a temporary name and move it into place once it is on the disk.

    Args:
        path: NAME.safetensors, which the first process writes; or a folder, which all of a sharded model write.
    Raises:
        OSError: it cannot be written (a full disk); it names the path and leaves nothing behind.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{moment}"] = value
    if average is not None:
        tensors |= {f"ema.{name}": value for name, value in average.weights.items()}
    header = {"format": FORMAT, "step": step, "config": config, "bad_steps": list(bad_steps)}
    if scaler is not None and scaler.is_enabled():
        header["loss_scale"] = scaler.state_dict()
    if path.suffix:
        distributed.on_first(lambda: _save_file(path, header, tensors))
    else:
        sharded.save(path, header, tensors)


def _save_file(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header["sha256"] = _digest(header, tensors)
    write_tensors(path, tensors, {"m3ae_fast": json.dumps(header)})


def load(path: Path, model: nn.Module | None = None) -> Checkpoint:
    """Read a checkpoint back, on the CPU.

    Args:
        model: see `sharded.load`: a sharded model reads of a folder its own shares.
    Raises:
        FileNotFoundError: no such file. ValueError: it is cut short, altered, or not a checkpoint of m3ae_fast.
    """
    if is_folder(path):
        header, tensors = sharded.load(path, model)
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} is not a checkpoint of m3ae_fast (format {FORMAT})")
    else:
        header, tensors = _load_file(path)
    for name, kind in (("step", int), ("config", dict)):
        if not isinstance(header.get(name), kind):
            raise ValueError(f"{path} is not a whole checkpoint: its {name} must be {kind.__name__}")
    model, moments, average = {}, {}, {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            model[rest] = value
        elif kind == "ema":
            average[rest] = value
        else:
            parameter, _, moment = rest.rpartition(".")
            moments.setdefault(parameter, {})[moment] = value
    counts, loss_scale = tuple(header.get("bad_steps", (0, 0))), header.get("loss_scale", {})
    return Checkpoint(header["step"], header["config"], model, moments, counts, average, loss_scale)


def _load_file(path: Path) -> tuple[dict, dict[str, Tensor]]:
    from safetensors import SafetensorError

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: no such file")
    try:
        metadata, tensors = read_tensors(path)
        header = json.loads(metadata.get("m3ae_fast", "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint, it is cut short or altered: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not a checkpoint of m3ae_fast (format {FORMAT})")
    if header.pop("sha256", None) != _digest(header, tensors):
        raise ValueError(f"{path} is damaged: its contents do not match its checksum")
    return header, tensors


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    average: Average | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Put a checkpoint's weights, moments, average and loss scale into what was built from the same configuration,
    sharded or not: copies of them, for one tensor that is kept would keep all of the file in memory."""
    into = model.state_dict()
    placed = distributed.placed_like
    model.load_state_dict({n: placed(value, into[n]) if n in into else value for n, value in checkpoint.model.items()})
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            if name in checkpoint.optimizer:
                # AdamW keeps `step` on the CPU, or fused where the parameter is, but whole; moments are placed as it is
                device = parameter.device if optimizer.defaults.get("fused") else "cpu"
                optimizer.state[parameter] = {
                    moment: value.to(device, copy=True) if moment == "step" else placed(value, parameter)
                    for moment, value in checkpoint.optimizer[name].items()
                }
    if average is not None:
        average.weights = {name: placed(checkpoint.average[name], value) for name, value in average.weights.items()}
    if scaler is not None:
        scaler.load_state_dict(checkpoint.loss_scale)


def step_path(folder: Path, step: int, *, shards: bool = False) -> Path:
    """Where the checkpoint of a step is kept: a file, or a folder of shards."""
    return folder / (f"step-{step:08d}" if shards else f"step-{step:08d}.safetensors")


def is_folder(path: Path) -> bool:
    """Whether it is a sharded checkpoint, which a run's folder is not."""
    return (path / sharded.HEADER).is_file()


def all_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == ".safetensors" or is_folder(path))


def latest(folder: Path) -> Path:
    """The newest checkpoint of a folder; FileNotFoundError where there is none."""
    found = all_in(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no checkpoint (step-*.safetensors)")
    return found[-1]


def keep_last(folder: Path, count: int = 2) -> None:
    """Delete all but the newest checkpoints, and what a killed process left half-written."""
    remove_unfinished(folder)
    for path in all_in(folder)[: -count or None]:
        delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint, of either kind; nothing where there is none."""
    if path.is_dir():
        sharded.remove(path)
    else:
        path.unlink(missing_ok=True)


def differences(saved: dict, wanted: dict, prefix: str = "") -> list[str]:
    """The fields in which two configurations differ: 'batch_size: 32 in the checkpoint, 64 asked for'."""
    found = []
    for key in [*saved, *(k for k in wanted if k not in saved)]:
        old, new = saved.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} there, {new!r} asked for")
    return found


def _digest(header: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the header and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a memory-mapped tensor is read-only, and is only read here
                digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
