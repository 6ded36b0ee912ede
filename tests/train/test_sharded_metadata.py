"""The metadata of a sharded checkpoint: nothing of it runs, and what does not fit the other files is refused."""

import hashlib
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch.distributed.checkpoint import filesystem, metadata

from m3ae_fast.train import sharded
from m3ae_fast.train.sharded_metadata import METADATA, read_metadata
from tests.altered_pickles import altered, counts_apart

TENSORS = {"model.a": torch.arange(6.0).reshape(2, 3), "model.b": torch.ones(4, dtype=torch.bfloat16)}
TENSORS |= {"optimizer.a.step": torch.tensor(3.0), "model.none": torch.ones(0, 2, dtype=torch.int64)}


@pytest.fixture
def folder(tmp_path):
    """A sharded checkpoint of one process."""
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        sharded.save(tmp_path / "step-00000001", {"step": 1}, TENSORS)
    return tmp_path / "step-00000001"


def sign(folder, change=lambda header: None):
    """Make the header right for files that were altered, as whoever alters them can."""
    header = json.loads((folder / sharded.HEADER).read_text())
    header["sha256"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in sorted(os.listdir(folder))
        if name != sharded.HEADER
    }
    change(header)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    header["sha256"][sharded.HEADER] = digest
    (folder / sharded.HEADER).write_text(json.dumps(header))


def test_it_is_what_torch_wrote(folder):
    with open(folder / METADATA, "rb") as file:
        theirs = pickle.load(file)
    (shard,) = folder.glob("*.distcp")
    ours = read_metadata(folder, {shard.name: shard.stat().st_size})
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data and ours.planner_data == theirs.planner_data
    _, tensors = sharded.load(folder)
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items()) and len(tensors) == len(TENSORS)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def forge(folder, change):
    """Write the metadata again as `change` alters it."""
    with open(folder / METADATA, "rb") as file:
        content = pickle.load(file)
    content = change(content) or content
    (folder / METADATA).write_bytes(pickle.dumps(content))
    sign(folder)


def entry(content, name="model.a"):
    return content.state_dict_metadata[name]


def place(content, name="model.a"):
    (found,) = (info for index, info in content.storage_data.items() if index.fqn == name)
    return found


def without_dtype(content):
    entry(content).properties = metadata.TensorProperties(torch.complex64)


FORGED = {
    "a call": (lambda m: Touch("ran"), "it names pathlib.Path.touch, which is nothing that such a file needs"),
    "a call inside": (lambda m: m.planner_data.update(x=Touch("ran")), "it names pathlib.Path.touch"),
    "another object": (lambda m: [1], "Metadata was expected"),
    "a part": (lambda m: entry(m), "Metadata was expected"),
    "no tensor": (
        lambda m: m.state_dict_metadata.update({"model.a": metadata.BytesStorageMetadata()}),
        "TensorStorageMetadata was expected",
    ),
    "another dtype": (without_dtype, "it names torch.complex64"),
    "a file elsewhere": (lambda m: setattr(place(m), "relative_path", "../secret"), "../secret"),
    "another file": (lambda m: setattr(place(m), "relative_path", METADATA), METADATA),
    "a negative offset": (lambda m: setattr(place(m), "offset", -1), "a part of '__0_0.distcp' is none"),
    "an offset beyond the end": (lambda m: setattr(place(m), "offset", 10**6), "a part of '__0_0.distcp' is none"),
    "a negative length": (lambda m: setattr(place(m), "length", -1), "a part of '__0_0.distcp' is none"),
    "the same bytes": (
        lambda m: [setattr(i, "offset", 0) or setattr(i, "length", 3000) for i in m.storage_data.values()] and None,
        "the same bytes are used twice",
    ),
    "another way to read": (
        lambda m: setattr(place(m), "transform_descriptors", ["zstd"]),
        "a part of '__0_0.distcp' is compressed or encrypted",
    ),
    "a tensor that is too large": (lambda m: setattr(entry(m), "size", torch.Size((2**30, 3))), "is not whole"),
    "a large tensor of a small file": (
        lambda m: (
            setattr(entry(m), "size", torch.Size((2**30, 3)))
            or setattr(entry(m), "chunks", [metadata.ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2**30, 3)))])
        ),
        "the bytes of 'model.a' are too few",
    ),
    "a size that overflows": (lambda m: setattr(entry(m), "size", torch.Size((2**40, 2**40, 0))), "a size must be"),
    "a part that is outside": (
        lambda m: setattr(entry(m).chunks[0], "offsets", torch.Size((1, 0))),
        "a part of 'model.a' is outside of it",
    ),
    "a part of other dimensions": (
        lambda m: setattr(entry(m).chunks[0], "sizes", torch.Size((6,))),
        "is outside of it",
    ),
    "a part that is nowhere": (
        lambda m: [m.storage_data.pop(index) for index in list(m.storage_data) if index.fqn == "model.a"] and None,
        "MetadataIndex(fqn='model.a'",
    ),
    "parts of nothing": (lambda m: entry(m, "model.none").chunks.extend(entry(m, "model.none").chunks), "more parts"),
    "a size of many digits": (lambda m: setattr(place(m), "offset", 10**5000), "a part of '__0_0.distcp' is none"),
    "an unexpected class": (
        lambda m: m.planner_data.update(x=filesystem._StoragePrefix("a")),
        "it names torch.distributed.checkpoint.filesystem._StoragePrefix",
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_is_forged_is_refused(folder, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    change, reason = FORGED[what]
    forge(folder, change)
    with pytest.raises(ValueError, match=r"/\.metadata must be the metadata of a sharded checkpoint") as error:
        sharded.load(folder)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_the_header_names_only_files_of_the_checkpoint(folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    for change in (
        lambda header: header["sha256"].update({"../secret": digest}),
        lambda header: header["sha256"].update({str(tmp_path / "secret"): digest}),
        lambda header: header["sha256"].pop(METADATA),
    ):
        sign(folder, change)
        with pytest.raises(ValueError, match="names other files than a sharded checkpoint has"):
            sharded.load(folder)
    (folder / sharded.HEADER).write_text(json.dumps({"sha256": [1]}))
    with pytest.raises(ValueError, match="was altered"):
        sharded.load(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_is_no_file_of_a_checkpoint(folder):
    (shard,) = folder.glob("*.distcp")
    sign(folder)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is missing or was altered"):
        sharded.load(folder)


def rewrite(folder, change):
    """Write the shard's parts again, each as `change` makes it of its bytes, and the metadata to fit."""
    (shard,) = folder.glob("*.distcp")
    old, new = shard.read_bytes(), []

    def move(content):
        for place in content.storage_data.values():
            new.append(change(old[place.offset : place.offset + place.length]))
            place.offset, place.length = sum(map(len, new[:-1])), len(new[-1])
        shard.write_bytes(b"".join(new))

    forge(folder, move)


def packed(part, compression=zipfile.ZIP_DEFLATED, size=0):
    """An archive of the same members, compressed, its data longer by `size` bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(part)) as source, zipfile.ZipFile(packed, "w", compression) as target:
        for member in source.namelist():
            target.writestr(member, source.read(member) + bytes(size * ("/data/" in member)))
    return packed.getvalue()


def claiming(part):
    """An archive whose directory says of each member that it is a gigabyte."""
    start = part.rindex(b"PK\x05\x06")
    at = part.index(b"PK\x01\x02")
    while at >= 0:
        part = part[: at + 20] + struct.pack("<II", 2**30, 2**30) + part[at + 28 :]
        at = part.find(b"PK\x01\x02", at + 1, start)
    return part


OTHERS = {
    "a compressed archive": lambda part: packed(part, size=50_000_000),
    "an archive that claims more": claiming,
    "a pickle": lambda part: pickle.dumps(Touch("ran"), 2).ljust(len(part)),
    "half an archive": lambda part: part[: len(part) // 2].ljust(len(part)),
    "nothing": lambda part: bytes(len(part)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_parts_that_torch_did_not_write_are_refused(folder, tmp_path, monkeypatch, what):
    """Before torch reads them, which first unpacks what is compressed."""
    monkeypatch.chdir(tmp_path)
    rewrite(folder, OTHERS[what])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch has read them"))
        with pytest.raises(ValueError, match=r"step-00000001 is damaged: __0_0\.distcp was not written by torch"):
            sharded.load(folder)
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_is_not_compressed_is_read(folder):
    rewrite(folder, lambda part: packed(part, zipfile.ZIP_STORED))
    _, tensors = sharded.load(folder)
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())


def test_an_archive_of_something_else_is_told_in_one_line(folder):
    """Not in torch's words, which recommend to run what is there."""

    def other(part):
        replaced = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(part)) as source, zipfile.ZipFile(replaced, "w") as target:
            for member in source.namelist():
                target.writestr(
                    member, pickle.dumps(Touch("ran"), 2) if member.endswith("data.pkl") else source.read(member)
                )
        return replaced.getvalue()

    rewrite(folder, other)
    with pytest.raises(ValueError, match=r"step-00000001 cannot be read: the bytes of a tensor hold something else$"):
        sharded.load(folder)


def fuzz(folder):
    """Read checkpoints of altered metadata, and print how many could be read, and how many were refused."""
    outcomes = {"read": 0, "refused": 0}

    @settings(derandomize=True, database=None, max_examples=500, deadline=None)
    @given(content=altered([(folder / METADATA).read_bytes()]))
    def load(content):
        (folder / METADATA).write_bytes(content)
        sign(folder)
        try:
            _, tensors = sharded.load(folder)
        except ValueError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert sum(tensor.nbytes for tensor in tensors.values()) < 1000
            outcomes["read"] += 1

    load()
    print(outcomes["read"], outcomes["refused"])


def test_altered_metadata_is_read_or_refused(folder):
    read, refused = counts_apart(__file__, folder)
    assert read > 10 and refused > 100


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]))
