"""Every reader against files damaged and forged at random: what is wrong with them is said in a line.

A data set opens, or raises ValueError or OSError; a sample is read, or raises BadSample: nothing else, in little time.
The draws are the same in every run; M3AE_FAST_FUZZ=10000 asks for more of them than 60 a test.
"""

import io
import json
import multiprocessing
import os
import random
import signal
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from m3ae_fast.data import BadSample, EncodedImage, FolderDataset, HDF5Dataset, HFDataset, JSONLinesDataset, TarDataset
from m3ae_fast.data.images import FORMATS, IMAGES, OTHERS, augment, open_image
from m3ae_fast.data.seeds import SAMPLE, generator
from tests.data_pipeline.test_limits import GOOD, member, no_waiting, sparse_gnu, sparse_pax  # noqa: F401  a fixture
from tests.data_pipeline.test_readers import pairs_file, streamed

EXAMPLES = int(os.environ.get("M3AE_FAST_FUZZ", "60"))
pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow, and of data sets about what is damaged
seeded = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def encoded(kind: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


ENCODED = [encoded(kind) for kind in FORMATS] + [encoded("PNG", "P"), encoded("GIF", "L"), encoded("TIFF", "CMYK")]
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF]


@st.composite
def damaged(draw, originals: list[bytes]) -> bytes:
    """One of the files, with bytes changed, left out, repeated, or written over by large numbers."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 8))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["byte", "bytes", "number", "cut", "end", "repeat"]))
        if kind == "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "bytes":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "number":
            data[at : at + 4] = bytes([draw(st.sampled_from(NUMBERS))]) * 4
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "end":
            del data[max(at, 16) :]
        else:
            data[at:at] = data[at : at + 4 * length]
    return bytes(data)


def read_all(opened) -> int:
    """Reads what there is, as evaluation and training do. Returns how many samples are good."""
    try:
        dataset = opened()
    except (BadSample, ValueError, OSError) as error:
        assert str(error)
        return 0
    good = 0
    assert all(map(is_caption, dataset.captions()))
    for index in range(min(len(dataset), 8)):
        try:
            sample = dataset[index]
            encoded = dataset.read(index).image
            if encoded is not None:
                augment(encoded, 16, generator(0, SAMPLE, index), scale=(0.2, 1.0), flip=True)
        except BadSample as bad:
            assert str(bad).isprintable()
            continue
        check(sample, len(dataset.classes))
        good += 1
    return good


def check(sample, classes: int) -> None:
    assert sample.image is not None or sample.captions
    assert sample.image is None or (sample.image.dtype == np.uint8 and sample.image.shape[2] == 3)
    assert all(map(is_caption, sample.captions)) and all(0 <= label < classes for label in sample.labels)


def is_caption(text: str) -> bool:
    return bool(text.encode("utf-8")) and text == text.strip()


@seeded
@given(damaged(ENCODED), st.integers(0, 2**32))
def test_images(data, seed):
    signal.alarm(20)  # for each example
    for take in (
        lambda image: image.decoded(),
        lambda image: augment(image, 8, generator(seed, SAMPLE), scale=(0.2, 1.0), flip=True),
    ):
        try:
            assert take(EncodedImage(data, "x")).dtype == np.uint8
        except BadSample as bad:
            assert bad.kind == "image" and str(bad).isprintable()


def of_nine_channels() -> list[bytes]:
    """As an array of NumPy's, and as the pages of a TIFF."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 20, 30), dtype=np.uint8)
    array, tiff = io.BytesIO(), io.BytesIO()
    np.save(array, pixels)
    first, *rest = map(Image.fromarray, pixels)
    first.save(tiff, "TIFF", save_all=True, append_images=rest)
    return [array.getvalue(), tiff.getvalue()]


@seeded
@given(damaged(of_nine_channels()), st.integers(0, 2**32))
def test_images_of_nine_channels(data, seed):
    signal.alarm(20)  # for each example
    for take in (
        lambda image: image.decoded(),
        lambda image: augment(image, (8, 12), generator(seed, SAMPLE), scale=(0.2, 1.0), flip=True),
    ):
        try:
            image = take(open_image(data, "x", 9))
            assert image.dtype == np.uint8 and image.shape[2] == 9
        except BadSample as bad:
            assert bad.kind in ("image", "channels") and str(bad).isprintable()


SHARD = GOOD + member("b.jpg", ENCODED[0]) + member("b.json", b'{"caption": "c"}') + member("b.cls", b"3")
SHARDS = [SHARD + bytes(1024), sparse_pax() + sparse_gnu() + SHARD + bytes(1024)]


def sealed(data: bytes) -> bytes:
    """With the checksums of what look like headers put right, so that what is in them is believed."""
    data = bytearray(data)
    for begin in range(0, len(data) - 511, 512):
        header = data[begin : begin + 512]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            data[begin + 148 : begin + 156] = b"%06o\0 " % sum(header)
    return bytes(data)


NAMES_IN_SHARDS = ["a.jpg", "a.txt", "b.cls", "b.json", "a", "././@LongLink", "\xff.png", ".", "a.svg"]
SIZES = [0, 1, 500, 2000, -(2**40), -1024, -512, -1, 2**31, 2**33, 2**63, 2**80]
KINDS = [*b"0001234567SLKxxxgXVMA", 0, 255]
SPARSE = [b"major", b"minor", b"map", b"size", b"realsize", b"numblocks", b"offset", b"name"]
PAX = [b"path", b"size", b"uid", b"mtime", b"hdrcharset", *(b"GNU.sparse." + x for x in SPARSE)]
VALUES_IN_PAX = [b"", b"0", b"1", b"-512", b"1e3", b"many", b"9" * 13, b"9" * 30, b"0,9,1", b"\xff"]


def forged(seed: int) -> bytes:
    """Members with headers that lie."""
    rng = random.Random(seed)
    parts = []
    for _ in range(rng.randint(1, 6)):
        kind = bytes([rng.choice(KINDS)])
        data = rng.choice([b"", b"words", ENCODED[0], b"1\n0\n9\n", b"\0" * 600])
        if kind in b"xgX":
            record = rng.choice(PAX) + b"=" + rng.choice(VALUES_IN_PAX) + b"\n"
            data = b"%d %s" % (rng.choice([len(record) + 3, len(record) + 3, 0, 5, 10**9]), record)
        size = rng.choice([len(data), len(data), rng.choice(SIZES)])
        parts.append(member(rng.choice(NAMES_IN_SHARDS), data, size, type=kind, linkname="a.jpg"))
    return GOOD + b"".join(parts) + rng.choice([b"", bytes(512), bytes(1024)])


@seeded
@given(st.one_of(damaged(SHARDS), damaged(SHARDS).map(sealed)))
def test_damaged_shards(data):
    """Locally and as a stream, of which no more is read than is there."""
    signal.alarm(20)  # for each example
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(data)
        read_all(lambda: TarDataset(path))
        for sample in streamed(path, 6) if data else ():  # of which not a byte comes, it is the server
            assert str(sample).isprintable() if isinstance(sample, BadSample) else all(map(is_caption, sample.captions))


@seeded
@given(st.integers(0, 2**32).map(forged))
def test_forged_shards(data):
    """What comes before the lies is read."""
    signal.alarm(20)  # for each example
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(data)
        assert TarDataset(path)[0].captions == streamed(path, 1)[0].captions == ("one",)
        read_all(lambda: TarDataset(path))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("a.jpg")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
FIELDS = st.sampled_from(["image", "caption", "text", "label", "labels", "other"])
ROWS = st.one_of(
    st.dictionaries(FIELDS, VALUES, max_size=4).map(lambda row: json.dumps(row).encode("utf-8", "surrogatepass")),
    st.binary(max_size=40),
    damaged([b'{"image": "a.jpg", "caption": ["one", "two"], "label": 3}', b'{"text": "words", "labels": [1, 2]}']),
)


@seeded
@given(st.lists(ROWS, max_size=6), st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"]))
def test_json_lines(rows, end):
    signal.alarm(20)  # for each example
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.jpg").write_bytes(ENCODED[0])
        (Path(folder) / "a.jsonl").write_bytes(end.join(rows))
        read_all(lambda: JSONLinesDataset(Path(folder) / "a.jsonl"))


NAMES = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "", "sub/", "train/", "sub/deeper/"]),
    st.one_of(st.sampled_from("abc"), st.text(st.characters(exclude_characters="/\0", codec="utf-8"), max_size=4)),
    st.sampled_from([*IMAGES[:6], "txt", "txt", "json", OTHERS[0]]),
)
CONTENTS = st.one_of(
    damaged(ENCODED), st.sampled_from(ENCODED), st.binary(max_size=30), st.text(max_size=30).map(str.encode)
)


@seeded
@given(st.lists(st.tuples(NAMES, CONTENTS, st.sampled_from(["file", "file", "link", "itself", "up"])), max_size=6))
def test_folders(files):
    """One good image is read, whatever is beside it."""
    signal.alarm(20)  # for each example
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").mkdir()
        Path(folder, "data", "0.png").write_bytes(ENCODED[1])
        for name, data, kind in files:
            path = Path(folder, "data", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file" and not path.is_symlink():
                path.write_bytes(data)
            elif not path.exists() and not path.is_symlink():
                path.symlink_to({"link": "a.jpg", "itself": path.name, "up": ".."}.get(kind, "x"))
        assert read_all(lambda: FolderDataset(Path(folder, "data")))


@st.composite
def columns(draw, file):
    """Columns under the names that are read, of any type and layout."""
    rows = draw(st.integers(0, 3))
    types = [h5py.string_dtype(), "S5", "V3", "i8", "u1", "f4", "?", h5py.vlen_dtype(np.uint8), h5py.vlen_dtype("f8")]
    types += [
        h5py.ref_dtype,
        np.dtype([("a", "i4"), ("b", "S2")]),
        h5py.enum_dtype({"a": 0}),
        h5py.string_dtype("ascii", 4),
    ]
    for name in draw(st.sets(st.sampled_from(["jpg", "caption", "text", "train_jpg", "train_labels"]), min_size=1)):
        kind = draw(st.sampled_from(["column", "column", "column", "group", "link", "empty"]))
        if kind == "group":
            file.create_group(name)
        elif kind == "link":
            file[name] = draw(st.sampled_from([h5py.SoftLink("/jpg"), h5py.ExternalLink("a.h5", "jpg")]))
        elif kind == "empty":
            file[name] = h5py.Empty("S5")
        else:
            shape = draw(st.sampled_from([(rows,), (rows,), (rows, 2), (), (rows, 0), (1 << 40,), (rows, 1 << 40)]))
            options = {"chunks": True, "compression": "gzip"} if shape and draw(st.booleans()) else {}
            try:
                file.create_dataset(name, shape, draw(st.sampled_from(types)), **options)
            except (ValueError, TypeError, OSError, RuntimeError):
                continue  # what h5py itself does not write


@seeded
@given(st.data())
def test_hdf5_columns(data):
    signal.alarm(20)  # for each example
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        with h5py.File(path, "w") as file:
            data.draw(columns(file))
        for split in (None, "train"):
            read_all(lambda split=split: HDF5Dataset(path, split))


def h5(**columns) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return pairs_file(Path(folder) / "a.h5", **columns).read_bytes()


def saved(folder: Path, data: bytes) -> Path:
    """A folder with an Arrow file of its columns, as datasets saves it."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    features["caption"] = {"_type": "List", "feature": {"_type": "Value", "dtype": "string"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    (folder / "a.arrow").write_bytes(data)
    return folder


def arrow() -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    ipc = pytest.importorskip("pyarrow.ipc")
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    types = {"image": image, "caption": pyarrow.list_(pyarrow.string()), "label": pyarrow.int64()}
    images = [{"bytes": ENCODED[0], "path": "a.jpg"}, {"bytes": None, "path": "a.arrow"}, None]
    table = pyarrow.table(
        {"image": images, "caption": [["one", "two"], [], ["three"]], "label": [0, 1, -1]}, pyarrow.schema(types)
    )
    sink = pyarrow.BufferOutputStream()
    with ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def in_a_process_of_its_own(fuzz) -> None:
    """A library may do there to a damaged file what it likes, but to crash."""
    child = multiprocessing.get_context("fork").Process(target=fuzz)
    child.start()
    child.join()
    assert child.exitcode == 0


def read_arrow(data: bytes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return read_all(lambda: HFDataset(saved(Path(folder), data)))


def test_arrow_bytes():
    signal.alarm(120)
    whole = arrow()
    assert read_arrow(whole) == 2

    @seeded
    @given(damaged([whole]))
    def fuzz(data):
        read_arrow(data)

    in_a_process_of_its_own(fuzz)


def test_hdf5_bytes():
    signal.alarm(120)
    files = [
        h5(jpg=[b"abc" * 20, ENCODED[0]], caption=["one", "two"]),
        h5(train_jpg=[ENCODED[1]] * 2, train_labels=[1, 2]),
        h5(text=["one", "two"]),
    ]

    @seeded
    @given(damaged(files))
    def fuzz(data):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.h5"
            path.write_bytes(data)
            for split in (None, "train"):
                read_all(lambda split=split: HDF5Dataset(path, split))

    in_a_process_of_its_own(fuzz)
