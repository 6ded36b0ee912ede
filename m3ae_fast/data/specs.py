"""open_dataset: the data that a command line names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.cluttered import ClutteredShapes
from m3ae_fast.data.folder import FolderDataset
from m3ae_fast.data.hdf5 import HDF5Dataset
from m3ae_fast.data.hf import HFDataset
from m3ae_fast.data.mixture import MixedDataset
from m3ae_fast.data.paired import PairedShare
from m3ae_fast.data.rows import JSONLinesDataset
from m3ae_fast.data.sample import EncodedDataset
from m3ae_fast.data.shapes import ShapesDataset, check_drawn
from m3ae_fast.data.shards import TarDataset
from m3ae_fast.data.split import Split
from m3ae_fast.data.streamed import StreamedDataset

DRAWN = {"shapes": ShapesDataset, "cluttered": ClutteredShapes}
HDF5, JSON_LINES, SAVED = (".h5", ".hdf5"), (".jsonl", ".ndjson"), "hf:"
SPLITS = ("train", "val")


def open_dataset(
    data: str | Sequence[str],
    *,
    image_size: int | tuple[int, int],
    seed: int,
    channels: int = 3,
    strict: bool = False,
    paired_share: float = 1.0,
    val_share: float = 0.0,
):
    """The data set that a specification names, or the MixedDataset of several.

        shapes                  synthetic scenes, built in ("./shapes" is a folder of that name)
        cluttered               synthetic images whose color is their label, built in
        DIR                     FolderDataset: name.jpg + name.txt, or a subfolder for each class
        FILE.h5, FILE.hdf5      HDF5Dataset; FILE.h5:train and FILE.h5:val of a file of both
        FILE.jsonl, .ndjson     JSONLinesDataset
        hf:DIR                  HFDataset, what datasets' save_to_disk wrote
        a-{00..11}.tar, *.tar   TarDataset
        URL.tar, pipe:COMMAND   StreamedDataset

    Args:
        data: SPEC or SPEC=WEIGHT, or a list of those (weight 1 where none is given). What follows the last "=" is a
            weight if it is a number; a path that ends in such needs a weight of its own, "DIR=3=1". After a command, or
            a URL with a "?", a weight must follow a space: "pipe:aws s3 cp s3://b/a.tar - =3".
        image_size: pixels a side, or (height, width), of synthetic images; images in files keep their sizes.
        seed: of synthetic images.
        channels: of the images, 1 to 16.
        strict: raise BadSample for a damaged shard, instead of a warning.
        paired_share: of the images, which keep their captions: see PairedShare.
        val_share: of the samples, which are not in it but in its `held_out`: see Split.
    Raises:
        FileNotFoundError, ValueError: no such data, or nothing in it; the first image is of other channels; a weight
            that is not positive.
        ModuleNotFoundError: what a format needs is not installed.
    """
    given = listed(data)
    if not given:
        raise ValueError("data must name at least one data set, got none")
    specs, weights = zip(*map(split_weight, given), strict=True)
    sources = [open_source(spec, image_size=image_size, seed=seed, channels=channels, strict=strict) for spec in specs]
    if paired_share != 1:
        sources = [PairedShare(source, paired_share, seed, number) for number, source in enumerate(sources)]
    if val_share:
        sources = [Split(source, val_share) for source in sources]
    return sources[0] if len(sources) == 1 else MixedDataset(sources, weights)


def open_source(spec: str, *, image_size: int | tuple[int, int], seed: int, channels: int = 3, strict: bool = False):
    """The data set of one specification, without a weight; arguments and errors are those of `open_dataset`."""
    if spec in DRAWN:
        check_drawn(spec, channels)
        return DRAWN[spec](image_size, seed)
    if is_streamed(spec):
        return StreamedDataset(spec, channels=channels)
    dataset = _open_files(spec, channels, strict)
    try:
        dataset.read(0)
    except BadSample as bad:  # of other kinds some may be: they are skipped, one after the other
        if bad.kind == "channels":
            wanted = f"data must have images of {channels} channels, as the model takes (pretrain --set channels=N)"
            raise ValueError(f"{wanted}, got {bad}") from None
    return dataset


def _open_files(spec: str, channels: int, strict: bool) -> EncodedDataset:
    if spec.startswith(SAVED):
        return HFDataset(spec.removeprefix(SAVED), channels=channels)
    path, split = split_of(spec)
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path):
        return FolderDataset(path, channels=channels)
    if suffix in HDF5:
        return HDF5Dataset(path, split, channels=channels)
    if suffix in JSON_LINES:
        return JSONLinesDataset(path, channels=channels)
    if suffix == ".tar":
        return TarDataset(path, strict=strict, channels=channels)
    if os.path.exists(path):
        raise ValueError(
            f"data must be shapes, cluttered, a folder, or a file named .h5, .hdf5, .jsonl, .ndjson or .tar, got {spec}"
        )
    raise FileNotFoundError(
        "data must name shapes, cluttered, a folder, an .h5 or .jsonl file or .tar shards that are there, "
        f"there is no {spec}"
    )


def listed(data: str | Sequence[str]) -> list[str]:
    """The specifications, of which `data` is one or several."""
    return [data] if isinstance(data, str) else list(data)


def split_of(spec: str) -> tuple[str, str | None]:
    """ "imagenet.h5:train" -> ("imagenet.h5", "train"); any other -> (itself, None)."""
    path, colon, split = spec.rpartition(":")
    return (path, split) if colon and split in SPLITS and path.lower().endswith(HDF5) else (spec, None)


def split_weight(spec: str) -> tuple[str, float]:
    """ "A.h5=3" -> ("A.h5", 3.0); weight 1 where none is given. ValueError: it is not positive, or there is no name."""
    name, equals, weight = spec.rpartition("=")
    number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", weight)
    if name.startswith("pipe:") or ("://" in name and "?" in name):  # "x=3" may be part of it
        number = number and name.endswith(" ")
        name = name.rstrip()
    if not equals or not number:
        name, weight = spec, "1"
    if not name:
        raise ValueError(f"data must name a data set, got {spec!r}")
    if not 0 < float(weight) < float("inf"):
        raise ValueError(f"data must have a weight that is positive, got {spec}")
    return name, float(weight)


def absolute(spec: str) -> str:
    """The same specification, whatever the current folder."""
    name, _ = split_weight(spec)
    if name in DRAWN or is_streamed(name):
        return spec
    kind = SAVED * name.startswith(SAVED)
    return kind + os.path.abspath(name.removeprefix(kind)) + spec[len(name) :]


def without_place(spec: str) -> str:
    """What an absolute specification says besides where its data are: its last name and its weight, of a URL without
    what is behind the "?", and whether it is streamed. "/data/a.tar=3" -> ".../a.tar=3"."""
    name, _ = split_weight(spec)
    if name in DRAWN:
        return spec
    last = (name if name.startswith("pipe:") else name.partition("?")[0] if "://" in name else name).rpartition("/")[2]
    kind = "stream:" if is_streamed(name) else SAVED * name.startswith(SAVED)
    return f"{kind}.../{last}{spec[len(name) :]}"


def refuse_streamed(data: str | Sequence[str], named_by: str, instead: str) -> None:
    """Refuse data that a file names, where opening them would run a command or ask a server: a person must name those.

    Args:
        data: as of `open_dataset`. named_by: the file. instead: what to do.
    Raises:
        ValueError: one of them is streamed.
    """
    for spec in listed(data):
        if is_streamed(split_weight(spec)[0]):
            raise ValueError(f"{named_by} names data that would run a command or ask a server, {spec}: {instead}")


def is_streamed(spec: str) -> bool:
    """Whether it is a URL or a command's output."""
    return spec.startswith("pipe:") or "://" in spec
