"""Writing files so that none is ever half there, and so that every failure names its path."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def naming(path: str | Path):
    """A full disk raises an OSError that names no file: give it one."""
    try:
        yield
    except OSError as error:
        hidden = error.filename is not None and Path(error.filename) == temporary_name(Path(path))
        if (error.filename is None or hidden) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def temporary_name(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a temporary path in the same folder; what was written there becomes `path` at the end, or vanishes.

    A reader sees the old file or the new one, also after a power cut; a failure leaves the old one as it was.
    """
    temporary = temporary_name(path)
    try:
        with naming(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name, too, is on the disk before anything older is deleted
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what processes that were killed left half-written: ours, and safetensors' own `.tmpQ4Ge76`."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".tmp*")]:
        if path.is_dir():  # of a sharded checkpoint
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all. OSError, naming it: it cannot be written (a full disk)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file, on the CPU. SafetensorError: it is not one, or is cut short."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict


def stored_as_it_is(archive: BinaryIO, size: int) -> bool:
    """Whether an archive of torch.save is a zip that is not compressed, and unpacks to no more than its size."""
    try:
        members = zipfile.ZipFile(archive).infolist()
    except Exception:  # a forged archive can fail in any way
        return False
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return stored and sum(member.file_size for member in members) <= size


def write_json(path: Path, value: dict) -> None:
    """Indented, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """ValueError, naming the file, where it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
