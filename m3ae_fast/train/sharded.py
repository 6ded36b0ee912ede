"""Sharded checkpoints: a folder written by all processes at once (torch.distributed.checkpoint), read by any number.

`.metadata` and a `__<process>_0.distcp` of each process are torch's; `m3ae_fast.json` is ours: the header, and a
SHA-256 of every file, of itself as it is without that. `.metadata` is a pickle, of which nothing is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from m3ae_fast._files import naming, read_json, temporary_name, write_json
from m3ae_fast.train import distributed
from m3ae_fast.train.sharded_metadata import METADATA, is_uncompressed, read_metadata

HEADER = "m3ae_fast.json"
_SHARD = re.compile(r"__\d+_\d+\.distcp")


def save(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    """Write the folder under a temporary name and move it into place once all of it is on the disk; called by all.

    Raises:
        OSError: something cannot be written (a full disk), or the processes do not see the same folder; nothing is left
            of it then.
    """
    import torch.distributed.checkpoint as dcp

    temporary = temporary_name(path)
    distributed.on_first(lambda: shutil.rmtree(temporary) if temporary.exists() else None)  # of a run that was killed
    try:
        with _as(OSError, f"{path} cannot be written"):
            dcp.save(tensors, checkpoint_id=temporary)
        mine = [*temporary.glob(f"__{distributed.rank()}_*")] + [temporary / METADATA] * distributed.is_first()
        every = distributed.gather({file.name: _digest(file) for file in mine})
        digests = {name: digest for each in every for name, digest in each.items()}
        distributed.on_first(lambda: _finish(temporary, path, header | {"sha256": digests}))
    except (OSError, distributed.FailedElsewhere):  # in all processes: none writes there any more
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _finish(temporary: Path, path: Path, header: dict) -> None:
    """Write the header, and give the folder its name."""
    unseen = [name for name in header["sha256"] if not (temporary / name).exists()]
    if unseen:
        raise OSError(
            f"{path} cannot be written: {unseen[0]} of another process is not seen here; all must share the folder"
        )
    with naming(path):
        write_json(temporary / HEADER, header | {"sha256": header["sha256"] | {HEADER: _digest_of(header)}})
        if path.exists():  # of the same step of the same run
            remove(path)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path, model: nn.Module | None = None) -> tuple[dict, dict[str, Tensor]]:
    """(header, tensors).

    Args:
        model: sharded by FSDP2; every process of it calls, checks a part of the files and reads of what belongs to a
            parameter its own share. None: this process reads everything, in full.
    Raises:
        ValueError: the folder is not whole, or was altered.
    """
    import torch.distributed.checkpoint as dcp

    header = read_json(path / HEADER)
    digests = header.get("sha256")
    own = digests.pop(HEADER, None) if isinstance(digests, dict) else None
    if own != _digest_of(header):
        raise ValueError(f"{path} is damaged: {HEADER} was altered")
    files = sorted(header.pop("sha256").items())
    if METADATA not in dict(files) or not all(name == METADATA or _SHARD.fullmatch(name) for name, _ in files):
        raise ValueError(f"{path} is damaged: {HEADER} names other files than a sharded checkpoint has")
    shares = distributed.world_size() if model is not None else 1
    mine = [path / name for name, _ in files[distributed.rank() % shares :: shares]]

    def refuse_unless(good: Callable[[Path], bool], reason: str) -> None:
        bad = [file.name for file in mine if not good(file)]
        if shares > 1:
            bad = [name for each in distributed.gather(bad) for name in each]
        if bad:
            raise ValueError(f"{path} is damaged: {', '.join(bad)} {reason}")

    # a device or a pipe may never end
    refuse_unless(lambda file: file.is_file() and _digest(file) == digests[file.name], "is missing or was altered")
    metadata = read_metadata(path, {name: (path / name).stat().st_size for name, _ in files if name != METADATA})
    refuse_unless(lambda file: file.name == METADATA or is_uncompressed(file, metadata), "was not written by torch")
    parameters = dict(model.named_parameters()) if model is not None else {}
    tensors = {name: _room_for(name, entry, parameters) for name, entry in metadata.state_dict_metadata.items()}
    reader = dcp.FileSystemReader(path)
    reader.read_metadata = lambda *_, **__: metadata  # torch's own runs the pickle
    with _as(ValueError, f"{path} cannot be read"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist asks for it
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return header, tensors


def remove(path: Path) -> None:
    """Delete a checkpoint's folder, under another name first: no half of it is ever there under its own."""
    hidden = temporary_name(path.with_name(f"{path.name}.old"))
    shutil.rmtree(hidden, ignore_errors=True)
    path.replace(hidden)
    shutil.rmtree(hidden)


def _room_for(name: str, entry, parameters: dict[str, Tensor]) -> Tensor:
    """An empty tensor: sharded as the parameter in the middle of its name is, if that is of the same shape."""
    _, _, name = name.partition(".")
    like = parameters.get(name, parameters.get(name.rpartition(".")[0]))
    if isinstance(like, DTensor) and like.shape == entry.size:
        return torch.empty_like(like, dtype=entry.properties.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")


@contextlib.contextmanager
def _as(kind: type[Exception], message: str) -> Iterator[None]:
    """torch.distributed.checkpoint raises a BaseException, in every process, where one of them failed."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reasons = {_reason(each) for each, _ in error.failures.values()}
        raise kind(f"{message}: {'; '.join(sorted(reasons))}") from None


def _reason(error: BaseException) -> str:
    """One line. torch's own of what is no tensor recommends to run it."""
    if isinstance(error, pickle.UnpicklingError):
        return "the bytes of a tensor hold something else"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _digest_of(header: dict) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
