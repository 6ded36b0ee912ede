"""What torch.distributed.checkpoint writes to `.metadata`: which tensors a checkpoint has, and where their bytes are.

torch reads this pickle by running it. Here it is read as data, and torch's objects are made from what was checked:
sizes, dtypes out of a list, and parts of files that are in the folder and as long as they must be.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from m3ae_fast._files import stored_as_it_is
from m3ae_fast._pickle_data import Made, Name, read_pickle

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

METADATA = ".metadata"
_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),  # Python 3.13
}  # fmt: skip
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def read_metadata(folder: Path, files: Mapping[str, int]) -> Metadata:
    """The metadata of the checkpoint in a folder.

    Args:
        files: the sizes in bytes of the files that may hold tensors, by name.
    Raises:
        ValueError: the file has anything that such metadata does not need, or that does not fit the other files.
    """
    path = folder / METADATA
    content = read_pickle(path, _known, "the metadata of a sharded checkpoint and nothing else")
    try:
        return _metadata(content, files)
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of another form than torch writes
        raise ValueError(f"{path} must be the metadata of a sharded checkpoint: {str(error)[:200]}") from error


def is_uncompressed(path: Path, metadata: Metadata) -> bool:
    """Whether the parts of a file are archives of tensors that become no larger when torch reads them."""
    places = [place for place in metadata.storage_data.values() if place.relative_path == path.name]
    with open(path, "rb") as file:
        for place in places:
            file.seek(place.offset)
            if not stored_as_it_is(io.BytesIO(file.read(place.length)), place.length):
                return False
    return True


def _known(name: Name) -> bool:
    if name.module == "torch":
        return name.name == "Size" or name.name in _DTYPES
    return name.name in _NAMES.get(name.module, ())


def _metadata(content: Any, files: Mapping[str, int]) -> Metadata:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    state = _state("Metadata", content)
    places, used = {}, 0
    for index, info in state["storage_data"].items():
        index, info = _state("MetadataIndex", index), _state("_StorageInfo", info)
        file, offset, length = _text(info["relative_path"]), info["offset"], info["length"]
        if not _is_size((offset,)) or not _is_size((length,)) or offset + length > files[file]:
            raise ValueError(f"a part of {file!r} is none")
        if info.get("transform_descriptors"):
            raise ValueError(f"a part of {file!r} is compressed or encrypted")
        used += length
        places[MetadataIndex(_text(index["fqn"]), _size(index["offset"]))] = _StorageInfo(file, offset, length)
    if used > sum(files.values()):
        raise ValueError("the same bytes are used twice")
    entries, parts = {}, 0
    for name, entry in state["state_dict_metadata"].items():
        entries[name] = entry = _entry(_text(name), entry)
        parts += len(entry.chunks)
        if parts > len(places):
            raise ValueError("it has more parts of tensors than places for them")
        for chunk in entry.chunks:
            length = places[MetadataIndex(name, chunk.offsets)].length
            if math.prod(chunk.sizes) * entry.properties.dtype.itemsize > length:
                raise ValueError(f"the bytes of {name!r} are too few")
    return Metadata(entries, planner_data={name: (name,) for name in entries}, storage_data=places)


def _entry(name: str, made: Any) -> TensorStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

    state = _state("TensorStorageMetadata", made)
    dtype = _state("TensorProperties", state["properties"], tuple)[0]
    if not isinstance(dtype, Name) or dtype.name not in _DTYPES:
        raise ValueError(f"{name!r} must have a dtype")
    size, chunks = _size(state["size"]), []
    for chunk in state["chunks"]:
        chunk = _state("ChunkStorageMetadata", chunk)
        offsets, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
        fits = (offset + part <= whole for offset, part, whole in zip(offsets, sizes, size, strict=False))
        if not len(offsets) == len(sizes) == len(size) or not all(fits):
            raise ValueError(f"a part of {name!r} is outside of it")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError(f"{name!r} is not whole")
    return TensorStorageMetadata(TensorProperties(getattr(torch, dtype.name)), size, chunks)


def _state(name: str, made: Any, kind: type = dict) -> Any:
    """The attributes of what was an object of torch's class `name`."""
    if not isinstance(made, Made) or not isinstance(made.function, Name) or made.function.name != name:
        raise ValueError(f"{name} was expected")
    if not isinstance(made.state, kind):
        raise ValueError(f"{name} is empty")
    return made.state


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"a name must be text, got {type(value).__name__}")
    return value


def _size(made: Any) -> torch.Size:
    sizes = made.args[0] if isinstance(made, Made) and made.function == ("torch", "Size") and made.args else None
    if not _is_size(sizes):
        raise ValueError("a size must be of integers that are not negative")
    return torch.Size(sizes)


def _is_size(numbers: Any) -> bool:
    if type(numbers) is not tuple or len(numbers) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        return False
    return math.prod(max(number, 1) for number in numbers) < 2**62
