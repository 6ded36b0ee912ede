"""open_dataset: what each specification opens, and what is said of one that opens nothing."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from m3ae_fast import data
from m3ae_fast.cli import _name_of
from m3ae_fast.data import open_dataset
from m3ae_fast.data.specs import absolute, split_weight, without_place
from m3ae_fast.train import RunConfig

PHOTOS, SAVED = (Path(__file__).parent.parent / "data" / name for name in ("photos", "hf_pairs"))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """One of each format, in the current folder."""
    monkeypatch.chdir(tmp_path)
    with h5py.File("pairs.h5", "w") as file:
        file["text"] = ["one", "two"]
    with h5py.File("imagenet.hdf5", "w") as file:
        for split in ("train", "val"):
            file.create_dataset(f"{split}_jpg", (2,), h5py.vlen_dtype(np.uint8))
            file[f"{split}_labels"] = [0, 1]
    Path("rows.jsonl").write_text(json.dumps({"text": "one"}))
    for i in range(2):
        with tarfile.open(f"x-{i}.tar", "w") as shard:
            member = tarfile.TarInfo("a.txt")
            member.size = 3
            shard.addfile(member, io.BytesIO(b"one"))
    shutil.copytree(SAVED, "saved=2")
    Path("dir=3").mkdir()
    Path("dir=3/a.txt").write_text("one")
    Path("file.csv").write_text("one")


@pytest.mark.parametrize(
    "spec, kind, size",
    [
        ("shapes", "ShapesDataset", 2**31 - 1),
        (str(PHOTOS), "FolderDataset", 3),
        ("dir=3=1", "FolderDataset", 1),
        ("hf:saved=2=1", "HFDataset", 3),
        ("pairs.h5", "HDF5Dataset", 2),
        ("imagenet.hdf5:val", "HDF5Dataset", 2),
        ("rows.jsonl", "JSONLinesDataset", 1),
        ("x-0.tar", "TarDataset", 1),
        ("x-{0..1}.tar=0.5", "TarDataset", 2),
        ("x-*.tar", "TarDataset", 2),
        ("pipe:cat x-{0..1}.tar =2", "StreamedDataset", 2**31 - 1),
        (["pairs.h5=3", "rows.jsonl"], "MixedDataset", 3),
        (["pairs.h5=3"], "HDF5Dataset", 2),
    ],
)
def test_specifications(files, spec, kind, size):
    dataset = open_dataset(spec, image_size=32, seed=0)
    assert type(dataset) is getattr(data, kind) and len(dataset) == size
    if kind == "MixedDataset":
        assert tuple(dataset.shares) == (750, 250)


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("nowhere", FileNotFoundError, "data must name shapes, cluttered, a folder, .* there is no nowhere"),
        ("none.h5", FileNotFoundError, "path must name an HDF5 file, there is no none.h5"),
        ("file.csv", ValueError, "data must be shapes, cluttered, a folder, or a file named .h5, .* got file.csv"),
        ("imagenet.hdf5", ValueError, "its split, train or val, must be named"),
        ("pairs.h5:train", ValueError, "path must hold train_jpg/train_labels, got text in"),
        ("pairs.h5=0", ValueError, "data must have a weight that is positive, got pairs.h5=0"),
        ("pairs.h5=-1", ValueError, "data must have a weight that is positive"),
        ([], ValueError, "data must name at least one data set, got none"),
        ("", ValueError, "data must name a data set, got ''"),
        (["shapes", "=3"], ValueError, "data must name a data set, got '=3'"),
        ("pipe:cat x-0.tar.gz", ValueError, r"pattern must name \.tar files that are not compressed, got pipe:cat x-0"),
        ("https://h/x.tgz?key=a", ValueError, r"pattern must name \.tar files that are not compressed"),
        (["pairs.h5=1", "rows.jsonl=5000"], ValueError, "weights must each be at least a thousandth"),
    ],
)
def test_wrong_specifications(files, spec, error, message):
    with pytest.raises(error, match=message):
        open_dataset(spec, image_size=32, seed=0)


def test_data_of_other_channels_are_refused_in_one_line():
    with pytest.raises(ValueError, match="data must have 9 channels, as the model takes, got 3 in cluttered"):
        open_dataset("cluttered", image_size=32, seed=0, channels=9)
    with pytest.raises(
        ValueError, match=r"images of 9 channels, .* got astronaut\.jpg: it has 3 channels, 9 are wanted"
    ):
        open_dataset(str(PHOTOS), image_size=32, seed=0, channels=9)
    assert open_dataset(str(PHOTOS), image_size=32, seed=0, channels=1)[0].image.shape[2] == 1


def test_a_stream_has_no_numbered_samples():
    with pytest.raises(TypeError, match="dataset must have numbered samples, got StreamedDataset"):
        open_dataset("pipe:cat x.tar", image_size=32, seed=0, paired_share=0.5)


def test_weights():
    assert split_weight("a.h5=3") == ("a.h5", 3.0) and split_weight("a=b/c.h5") == ("a=b/c.h5", 1.0)
    assert (
        split_weight("a=1e-1") == ("a", 0.1) and split_weight("a") == ("a", 1.0) and split_weight("a=") == ("a=", 1.0)
    )


def test_a_command_or_a_query_may_end_in_a_number():
    for spec in ("pipe:fetch --part=3", "https://host/a.tar?part=3"):
        assert split_weight(spec) == (spec, 1.0) and split_weight(f"{spec} =0.5") == (spec, 0.5)
    assert split_weight("https://host/a.tar=3") == ("https://host/a.tar", 3.0)


def test_a_run_keeps_what_it_was_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/b.h5:train=3") == f"{tmp_path}/a/b.h5:train=3" and absolute("shapes=2") == "shapes=2"
    assert absolute("hf:a/b=3") == f"hf:{tmp_path}/a/b=3" and absolute("hf:/a") == "hf:/a"
    assert absolute("https://x/{0..9}.tar=2") == "https://x/{0..9}.tar=2" and absolute("pipe:cat a") == "pipe:cat a"
    config = RunConfig(data=["shapes=2", "t.jsonl"]).resolved()
    assert config.data == ["shapes=2", f"{tmp_path}/t.jsonl"] and config.resolved() == config
    for wrong in (3, [], [3], None):
        with pytest.raises(TypeError, match="data must be a string or a list of strings, got"):
            RunConfig(data=wrong)


def test_what_a_specification_says_besides_the_place():
    same = {
        ".../a-{0..3}.tar=2": ["/x/a-{0..3}.tar=2", "/y/z/a-{0..3}.tar=2"],
        "stream:.../a.tar": ["https://x/a.tar", "gs://y/z/a.tar?token=3", "pipe:cat /x/a.tar"],
        "stream:.../a.tar?b=3 =2": ["pipe:curl https://x/a.tar?b=3 =2"],
        "hf:.../train=2": ["hf:/x/train=2", "hf:/y/z/train=2"],
        ".../a.h5:val": ["/x/a.h5:val"], "shapes=2": ["shapes=2"], ".../shapes": ["/x/shapes"],
    }  # fmt: skip
    for expected, specs in same.items():
        assert {without_place(spec) for spec in specs} == {expected}


def test_a_run_is_named_after_its_data():
    names = {"shapes": "shapes", "/d/cc.h5=3": "cc", "/d/imagenet.h5:train": "imagenet", "/d/my data.v2": "my data.v2"}
    names |= {"hf:/d/pairs=2": "pairs", "hf:pairs": "pairs"}
    names |= {"/d/cc12m-{00..11}.tar": "cc12m", "https://host/a-{0..3}.tar": "a", "x.jsonl": "x", ".": Path.cwd().name}
    assert {spec: _name_of(spec) for spec in names} == names
    assert _name_of(["/d/cc.h5=3", "t.jsonl"]) == "cc-t"
