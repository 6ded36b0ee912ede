"""Folders that Hugging Face datasets saved: what they hold, what is damaged in them, and what is refused.

tests/data/hf_pairs was written by datasets 5.2.0 (save_to_disk); others are written here as datasets lays them out.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from m3ae_fast.data import BadSample, HFDataset, open_dataset
from tests.data_pipeline.test_readers import CAPTIONS, JPEGS, PHOTOS, assert_photo

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
ipc = pytest.importorskip("pyarrow.ipc")

SAVED = Path(__file__).parent.parent / "data" / "hf_pairs"
IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
TEXT, TEXTS = pyarrow.string(), pyarrow.list_(pyarrow.string())
FEATURES = {  # of a column, as dataset_info.json has them
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": ["cat", "dog"]},
    "labels": {"_type": "List", "feature": {"_type": "ClassLabel", "names": ["cat", "dog"]}},
}
TYPES = {"image": IMAGE, "label": pyarrow.int64(), "labels": pyarrow.list_(pyarrow.int64())}


def save(folder, *, rows_each=2, files=1, types=None, features=None, options=None, metadata=None, **columns):
    """A folder as save_to_disk lays it out: `files` Arrow files of record batches of `rows_each` rows."""
    folder.mkdir(exist_ok=True)
    types = {name: (types or {}).get(name, TYPES.get(name, TEXT)) for name in columns}
    table = pyarrow.table(columns, pyarrow.schema(types, metadata))
    share = -(-len(table) // files)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        with ipc.new_stream(folder / name, table.schema, options=options) as stream:
            stream.write_table(table.slice(i * share, share), max_chunksize=rows_each)
    known = {name: FEATURES.get(name, {"_type": "Value", "dtype": "string"}) for name in columns}
    (folder / "dataset_info.json").write_text(json.dumps({"features": known | (features or {})}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def photos(numbers):
    return [{"bytes": JPEGS[i], "path": f"{i}.jpg"} for i in numbers]


def test_what_datasets_saved():
    dataset = open_dataset(f"hf:{SAVED}", image_size=32, seed=0)
    assert type(dataset) is HFDataset and len(dataset) == 3 and dataset.classes == ("cat", "dog")
    for i, (captions, labels) in enumerate([(("one",), (0,)), (("two",), (1,)), ((), (0,))]):
        sample = dataset[i]
        assert np.array_equal(sample.image, np.random.default_rng(i).integers(0, 256, (8, 10, 3), np.uint8))
        assert (sample.captions, sample.labels, sample.name) == (captions, labels, f"hf_pairs, row {i}")
    assert list(dataset.captions()) == ["one", "two"]


def test_what_datasets_saves_today(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features(
        {"picture": datasets.Image(), "captions": datasets.Sequence(datasets.Value("string")),
         "labels": datasets.Sequence(datasets.ClassLabel(names=["cat", "dog"]))}
    )  # fmt: skip
    paths = [str(PHOTOS / f"{name}.jpg") for name in ("astronaut", "camera", "coffee")]
    columns = {"picture": paths, "captions": [list(texts) for texts in CAPTIONS], "labels": [[0, 1], [], [1]]}
    saved = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(train=saved, val=saved.select([2, 0])).save_to_disk(tmp_path / "all")
    for split, order in (("train", [0, 1, 2]), ("val", [2, 0])):
        dataset = HFDataset(tmp_path / "all" / split)
        assert len(dataset) == len(order)
        for row, number in enumerate(order):
            assert_photo(dataset[row], number, labels=tuple(columns["labels"][number]))
    with pytest.raises(ValueError, match=r"path must name the folder of a split, .*all has several: train, val"):
        HFDataset(tmp_path / "all")


@pytest.mark.parametrize("rows_each, files", [(1, 1), (2, 2), (2, 3), (100, 1)])
def test_rows_of_batches_and_files(tmp_path, rows_each, files):
    order = [0, 2, 1, 1, 0, 2, 0]
    texts = [f"number {i}" for i in range(7)]
    save(tmp_path / "a", rows_each=rows_each, files=files, image=photos(order), caption=texts)
    dataset = HFDataset(tmp_path / "a")
    assert len(dataset) == 7 and list(dataset.captions()) == texts
    for row in (6, 0, 3, 5, 1, 4, 2):
        assert_photo(dataset[row], order[row], (texts[row],))
    again = pickle.loads(pickle.dumps(dataset))
    assert_photo(again[3], order[3], (texts[3],))
    with pytest.raises(IndexError):
        dataset[7]


def test_captions_and_images_alone(tmp_path):
    texts = HFDataset(save(tmp_path / "a", text=["one", None, "  ", "two"]))
    assert texts[0].image is None and texts[0].captions == ("one",) and list(texts.captions()) == ["one", "two"]
    for row in (1, 2):
        with pytest.raises(BadSample, match=f"a, row {row}: there is neither an image nor a word in it"):
            texts[row]
    mixed = HFDataset(
        save(tmp_path / "b", image=[None, *photos([1]), {"bytes": None, "path": None}], text=["x", None, "z"])
    )
    assert mixed[0].image is None and mixed[0].captions == ("x",) and mixed[2].captions == ("z",)
    assert_photo(mixed[1], 1, ())
    several = HFDataset(save(tmp_path / "c", types={"captions": TEXTS}, captions=[["a", "", "b"], None, []]))
    assert several[0].captions == ("a", "b") and list(several.captions()) == ["a", "b"]


def test_which_columns_are_read(tmp_path):
    columns = {
        "text": ["t"] * 2,
        "caption": ["c"] * 2,
        "other": ["o"] * 2,
        "thumb": photos([0, 0]),
        "image": photos([1, 2]),
    }
    features = {"thumb": {"_type": "Image"}}
    dataset = HFDataset(save(tmp_path / "a", types={"thumb": IMAGE}, features=features, **columns))
    assert_photo(dataset[0], 1, ("c",))
    only = HFDataset(save(tmp_path / "b", types={"thumb": IMAGE}, features=features, thumb=photos([0])))
    assert_photo(only[0], 0, ())
    numbers = HFDataset(save(tmp_path / "c", types={"caption": pyarrow.int64()}, caption=[1], text=["t"]))
    assert numbers[0].captions == ("t",)


def test_labels(tmp_path):
    one = HFDataset(save(tmp_path / "a", image=photos([0] * 5), label=[1, 0, -1, None, 2]))
    assert one.classes == ("cat", "dog") and [one.read(i).labels for i in range(4)] == [(1,), (0,), (), ()]
    with pytest.raises(BadSample, match=r"a, row 4: label must be in \[-1, 2\), got 2"):
        one[4]
    several = HFDataset(save(tmp_path / "b", image=photos([0] * 3), labels=[[1, 0], [], None]))
    assert [several.read(i).labels for i in range(3)] == [(1, 0), (), ()]
    old = {"labels": [FEATURES["label"]]}
    assert HFDataset(save(tmp_path / "c", image=photos([0]), labels=[[1]], features=old)).classes == ("cat", "dog")
    unnamed = HFDataset(save(tmp_path / "d", image=photos([0]), label=[1], features={"label": {"_type": "Value"}}))
    assert unnamed.classes == () and unnamed.read(0).labels == ()


def test_paths_in_rows_lead_to_files_in_the_folder(tmp_path):
    folder, secret = tmp_path / "a", tmp_path / "secret.jpg"
    folder.mkdir()
    (folder / "in.jpg").write_bytes(JPEGS[1])
    secret.write_bytes(JPEGS[0])
    (folder / "link.jpg").symlink_to(secret)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    outside = ["../secret.jpg", str(secret), "link.jpg", "/etc/passwd", "in.jpg/../../secret.jpg"]
    paths = ["in.jpg", str(folder / "in.jpg"), *outside, "gone.jpg", "loop.jpg", "a\0b.jpg", "."]
    dataset = HFDataset(save(folder, image=[{"bytes": None, "path": path} for path in paths]))
    assert_photo(dataset[0], 1, ())
    assert_photo(dataset[1], 1, ())
    for row, path in enumerate(outside, 2):
        with pytest.raises(BadSample, match="its image must lie in the folder, got") as caught:
            dataset[row]
        assert caught.value.kind == "row" and path in str(caught.value)
    for row in range(7, 11):
        with pytest.raises(BadSample) as caught:
            dataset[row]
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"state.json": None}, "path must name a folder that datasets' save_to_disk wrote, .* has no state.json"),
        ({"dataset_info.json": None}, "path must name a folder .* has no dataset_info.json"),
        ({"state.json": "no"}, "state.json must be a JSON object, got 'no'"),
        ({"dataset_info.json": "[" * 100_000}, "dataset_info.json must be a JSON object"),
        ({"dataset_info.json": '{"features": [1]}'}, "dataset_info.json must name features, got list"),
        ({"state.json": "{}"}, r"state.json must name files in its folder as _data_files, got \[\]"),
        ({"state.json": '{"_data_files": [{"filename": "../b.arrow"}]}'}, r"must name files in its folder .*\.\./b"),
        ({"state.json": '{"_data_files": [{"filename": 3}]}'}, r"must name files in its folder .*, got \[3\]"),
        ({"state.json": '{"_indices_data_files": [{}]}'}, r"must be saved after flatten_indices\(\)"),
        ({"dataset_info.json": '{"features": {"text": {"_type": "Image"}}}'},
         "text must be of bytes and a path, as datasets stores images, got text"),
        ({"data-00000-of-00001.arrow": ""}, "arrow cannot be read as an Arrow stream"),
        ({"data-00000-of-00001.arrow": "no Arrow"}, "arrow cannot be read as an Arrow stream"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(tmp_path, change, message):
    folder = save(tmp_path / "a", text=["one"])
    for name, text in change.items():
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        HFDataset(folder)
    assert "\n" not in str(caught.value)


def test_other_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"save_to_disk wrote, there is no .*gone"):
        open_dataset(f"hf:{tmp_path / 'gone'}", image_size=32, seed=0)
    with pytest.raises(ValueError, match=r"caption, captions, text of text, got columns title \(text\)"):
        HFDataset(save(tmp_path / "a", title=["one"]))
    with pytest.raises(ValueError, match="must have one Image column, or one that is called image, got x, y"):
        features = {"x": FEATURES["image"], "y": FEATURES["image"]}
        HFDataset(save(tmp_path / "b", types={"x": IMAGE, "y": IMAGE}, features=features, x=photos([0]), y=photos([0])))
    with pytest.raises(ValueError, match="must hold at least one row, got none"):
        HFDataset(save(tmp_path / "c", text=[]))
    for codec in ("zstd", "lz4"):
        options = ipc.IpcWriteOptions(compression=codec)
        with pytest.raises(ValueError, match="cannot be read as an Arrow stream: it must not be compressed"):
            HFDataset(save(tmp_path / codec, text=["one" * 100], options=options))
    words = pyarrow.dictionary(pyarrow.int32(), TEXT)
    with pytest.raises(ValueError, match="it must not have columns of dictionaries"):
        HFDataset(
            save(tmp_path / "d", types={"word": words}, text=["one"], word=pyarrow.array(["a"]).dictionary_encode())
        )
    save(tmp_path / "e", text=["one"] * 2, files=2)
    save(tmp_path / "f", caption=["one"], text=["two"])
    (tmp_path / "e" / "data-00001-of-00002.arrow").write_bytes(
        (tmp_path / "f" / "data-00000-of-00001.arrow").read_bytes()
    )
    with pytest.raises(ValueError, match="its columns are not those of the first file"):
        HFDataset(tmp_path / "e")


def test_a_file_that_breaks_off(tmp_path):
    folder = save(tmp_path / "a", rows_each=1, text=["one " * 50, "two", "three"])
    path = folder / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot be read as an Arrow stream: it breaks off"):
        HFDataset(folder)


def test_offsets_that_lead_out_of_a_column(tmp_path):
    """They are found where the row is read, and the others are good."""
    folder = save(tmp_path / "a", rows_each=3, text=["first", "second", "third"])
    path = folder / "data-00000-of-00001.arrow"
    data, offsets = path.read_bytes(), np.array([0, 5, 11, 16], np.int32)
    assert data.count(offsets.tobytes()) == 1
    path.write_bytes(data.replace(offsets.tobytes(), np.array([0, 5, 11, 1 << 30], np.int32).tobytes()))
    dataset = HFDataset(folder)
    assert dataset[1].captions == ("second",)
    with pytest.raises(BadSample, match="a, row 2: text: ") as caught:
        dataset[2]
    assert caught.value.kind == "shard" and list(dataset.captions()) == ["first", "second"]


def test_values_that_are_too_large(tmp_path, monkeypatch):
    from m3ae_fast.data import hf

    dataset = HFDataset(save(tmp_path / "a", image=photos([0, 1]), caption=["a" * 2000, "b"]))
    monkeypatch.setattr(hf, "MAX_TEXT", 1000)
    with pytest.raises(BadSample, match="a, row 0: caption: it has more than 1,000 bytes"):
        dataset[0]
    monkeypatch.setattr(hf, "MAX_BYTES", 1000)
    with pytest.raises(BadSample, match="a, row 1: image: it has more than 1,000 bytes"):
        dataset[1]
