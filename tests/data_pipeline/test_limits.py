"""What a file may ask of its reader: no device, no gigabytes out of a few bytes, nothing that lies elsewhere."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import (
    BadSample,
    EncodedImage,
    FolderDataset,
    HDF5Dataset,
    JSONLinesDataset,
    TarDataset,
    Tokenizer,
)
from m3ae_fast.data.shards import expand_braces
from tests.data_pipeline.test_readers import PHOTOS, all_bad, jsonl, pairs_file, streamed, tar

PHOTO = (PHOTOS / "coffee.jpg").read_bytes()


@pytest.fixture(autouse=True)
def no_waiting():
    """What waits for ever fails."""

    def late(*_):
        pytest.fail("it took more than 20 seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def odd_file(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


ODD = pytest.mark.parametrize("kind", ["pipe", "device", "folder"])


class TestNoFiles:
    @ODD
    def test_images(self, tmp_path, kind):
        (tmp_path / "data").mkdir()
        odd = odd_file(tmp_path / "x.jpg", kind)
        with pytest.raises(BadSample, match=r"x\.jpg: .*x\.jpg is no regular file") as error:
            EncodedImage(odd, "x.jpg")
        assert error.value.kind == "image"
        (tmp_path / "data" / "x.jpg").symlink_to(odd)
        (tmp_path / "data" / "y.jpg").write_bytes(PHOTO)
        if kind != "folder":
            assert [bad.kind for bad in all_bad(FolderDataset(tmp_path / "data")).values()] == ["image"]
        path = jsonl(tmp_path / "a.jsonl", {"image": "x.jpg"}, {"text": "words"})
        assert {i: bad.kind for i, bad in all_bad(JSONLinesDataset(path)).items()} == {0: "image"}

    @pytest.mark.parametrize("kind", ["pipe", "device"])
    def test_captions(self, tmp_path, kind):
        (tmp_path / "x.jpg").write_bytes(PHOTO)
        odd_file(tmp_path / "x.txt", kind)
        dataset = FolderDataset(tmp_path)
        (bad,) = all_bad(dataset).values()
        assert bad.kind == "caption" and "x.txt is no regular file" in str(bad) and list(dataset.captions()) == []

    @pytest.mark.parametrize("kind", ["pipe", "device"])  # a folder may hold one
    @pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json"])
    def test_vocabularies(self, tmp_path, kind, name):
        with pytest.raises(OSError, match=f"{name} is no regular file"):
            Tokenizer.from_vocab(odd_file(tmp_path / name, kind))

    @ODD
    def test_data_sets(self, tmp_path, kind):
        tar(tmp_path / "a.tar", {"a.txt": b"words"})
        odd_file(tmp_path / "b.tar", kind)
        with pytest.warns(M3AEFastWarning, match=r"b\.tar: .*b\.tar is no regular file"):
            assert len(TarDataset(tmp_path / "*.tar")) == 1
        with pytest.raises(OSError, match=r"a\.jsonl is no regular file"):
            JSONLinesDataset(odd_file(tmp_path / "a.jsonl", kind))
        with pytest.raises(FileNotFoundError, match=r"path must name an HDF5 file"):
            HDF5Dataset(odd_file(tmp_path / "a.h5", kind))


def png(width: int, height: int) -> bytes:
    """All black, a bit a pixel, without ever being in memory as an image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(1 + -(-width // 8)) * height, 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class TestPixels:
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [13_000, 20_000])
    def test_a_bomb(self, monkeypatch, side):
        """169 million pixels in 21 kB, of which Pillow only warns; and 400 million."""
        bomb = png(side, side)
        assert len(bomb) < 60_000
        with pytest.raises(BadSample, match=r"x\.png: .*pixels.*M3AE_FAST_MAX_PIXELS or PIL\.Image\.MAX_IMAGE_PIXELS"):
            EncodedImage(bomb, "x.png")
        for more in (side * side, None):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", more)
            assert EncodedImage(bomb, "x.png").shape == (side, side, 3)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_a_turned_bomb_is_not_turned(self, monkeypatch):
        """Which would decode it."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        monkeypatch.setattr(Image.Image, "transpose", lambda *_: pytest.fail("it was decoded"))
        exif = Image.Exif()
        exif[0x0112] = 6
        file = io.BytesIO()
        Image.new("RGB", (40, 40)).save(file, "JPEG", exif=exif)
        with pytest.raises(BadSample, match=r"it has 1,600 pixels, at most 1,000 are read"):
            EncodedImage(file.getvalue(), "x.jpg")

    @pytest.mark.parametrize(
        "most, message",
        [
            ("1000", b"x.png: it has 1,600 pixels, at most 1,000 are read"),
            ("many", b"ValueError: M3AE_FAST_MAX_PIXELS must be a number of pixels, got 'many'"),
        ],
    )
    def test_the_environment_sets_the_limit(self, most, message):
        code = "from m3ae_fast.data import EncodedImage; EncodedImage(open(0, 'rb').read(), 'x.png').decoded()"
        environment = os.environ | {"M3AE_FAST_MAX_PIXELS": most, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], input=png(40, 40), env=environment, capture_output=True)
        assert done.returncode != 0 and message in done.stderr


def shard(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join((*parts, bytes(10240))))
    return path


def member(name: str, data: bytes = b"", size: int | None = None, **fields) -> bytes:
    """A file of a shard, with a header that may lie: `size` any number, `type` and the rest of TarInfo's fields."""
    info = tarfile.TarInfo(name)
    info.size = len(data) if size is None else size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


SPARSE = {
    "GNU.sparse.major": "1",
    "GNU.sparse.minor": "0",
    "GNU.sparse.name": "b.jpg",
    "GNU.sparse.realsize": "6442450944",
}
GOOD = member("a.txt", b"one") + member("c.txt", b"two")


def sparse_pax() -> bytes:
    """1.5 kB that claim 6 GiB."""
    info = tarfile.TarInfo("b.jpg")
    info.size, info.pax_headers = 1024, SPARSE
    return info.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n512\n".ljust(512, b"\0") + bytes(512)


def sparse_gnu() -> bytes:
    header = bytearray(member("b.jpg", size=512, type=tarfile.GNUTYPE_SPARSE))
    header[386:410] = b"00000000000\0" + b"00000001000\0"  # the first part: offset, bytes
    header[483:495] = b"60000000000\0"  # the real size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header) + bytes(512)


class TestShards:
    @pytest.mark.parametrize("sparse", [sparse_pax, sparse_gnu])
    def test_sparse_files(self, tmp_path, sparse):
        path = shard(tmp_path / "a.tar", sparse(), member("b.txt", b"beside"), GOOD)
        for bad in (all_bad(TarDataset(path))[0], streamed(path, 3)[0]):
            assert re.search(r"b\.jpg: it is a sparse file, which may have any size$", str(bad))
        assert [s.captions for s in streamed(path, 3)[1:]] == [("one",), ("two",)]

    @pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Q"])
    def test_no_regular_files(self, tmp_path, kind):
        path = shard(tmp_path / "a.tar", member("b.jpg", type=kind), GOOD)
        for bad in (all_bad(TarDataset(path))[0], streamed(path, 1)[0]):
            assert "b.jpg: it is no regular file" in str(bad)

    def test_links(self, tmp_path):
        """None of them vanishes: neither one in a sample nor one that is all there is."""
        link = member("b.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        path = shard(tmp_path / "a.tar", link, member("b.txt", b"beside"), member("d.jpg", type=tarfile.LNKTYPE), GOOD)
        for one, two in (all_bad(TarDataset(path)).values(), streamed(path, 2)):
            assert "b.jpg: it is a symbolic link to another file: they are not followed" in str(one)
            assert "d.jpg: it is a hard link to another file of its shard: they are not followed" in str(two)

    def test_large_files(self, tmp_path, monkeypatch):
        """Of a file, of all files of a sample, and of what lies between them."""
        monkeypatch.setattr("m3ae_fast.data.shards.MAX_BYTES", 1 << 20)
        large = member("b.jpg", bytes((1 << 20) + 1)) + member("b.txt", b"beside")
        between = member("d.jpg", PHOTO) + member("d.bin", bytes(1 << 20)) + member("d.txt", b"beside")
        dataset = TarDataset(shard(tmp_path / "a.tar", large, GOOD, between))
        assert {i: str(bad).split(": ")[-1] for i, bad in all_bad(dataset).items()} == {
            0: "it has more than 1,048,576 bytes",
            3: "it has more than 1,048,576 bytes",
        }
        assert "it has more than 1,048,576 bytes" in str(streamed(tmp_path / "a.tar", 1)[0])
        halves = member("e.jpg", bytes(600_000)) + member("e.png", bytes(600_000))
        shard(tmp_path / "b.tar", halves, GOOD)
        assert all_bad(TarDataset(tmp_path / "b.tar")).keys() == {0}
        assert str(streamed(tmp_path / "b.tar", 1)[0]).endswith("e.png: its sample has more than 1,048,576 bytes")

    @pytest.mark.parametrize(
        "lie",
        {
            "negative size": member("b.jpg", size=-512),
            "a size that leads back": member("b.jpg", size=-1024),
            "a larger size than any disk": member("b.jpg", size=2**70),
            "a name of a negative size": member("././@LongLink", size=-512, type=tarfile.GNUTYPE_LONGNAME),
            "a name of gigabytes": member("././@LongLink", size=2**40, type=tarfile.GNUTYPE_LONGNAME),
            "names of names": member("././@LongLink", b"b.jpg\0", type=tarfile.GNUTYPE_LONGNAME) * 2000,
            "a pax header of letters": member("b", b"30 size=many\n", type=tarfile.XHDTYPE) + member("b.jpg"),
            "a pax size below zero": member("b", b"13 size=-512\n", type=tarfile.XHDTYPE) + member("b.jpg"),
            "a sparse map of letters": sparse_pax().replace(b"1\n0\n", b"x\ny\n"),
        }.items(),
        ids=lambda lie: lie[0],
    )
    def test_lies(self, tmp_path, lie):
        """What comes before is used, whatever tarfile makes of it."""
        path = shard(tmp_path / "a.tar", GOOD, lie[1], b"" if "map" in lie[0] else GOOD)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what tarfile takes for damage
            samples = TarDataset(path)
        assert samples[0].captions == ("one",)
        assert streamed(path, 1)[0].captions == ("one",)

    def test_zeros_without_end(self, tmp_path):
        path = shard(tmp_path / "a.tar", GOOD)
        *samples, damage = streamed(f"{path} /dev/zero", 3)
        assert [s.captions for s in samples] == [("one",), ("two",)]
        assert "there is no end to the zeros behind its end mark" in str(damage)

    def test_names_are_no_paths(self, tmp_path):
        """Of what a shard names nothing is opened: not a member called like a file, nor a file that its JSON names."""
        (tmp_path / "secret.txt").write_text("secret")
        outside = tmp_path / "secret.txt"
        caption = json.dumps({"image": str(outside), "caption": "c"}).encode()
        parts = (member(f"{outside}"[:99]), member("../secret.txt", b"mine"), member("b.json", caption))
        samples = [*TarDataset(shard(tmp_path / "a.tar", *parts[1:])), *streamed(tmp_path / "a.tar", 2)]
        assert [s.captions for s in samples] == [("mine",), ("c",)] * 2 and all(s.image is None for s in samples)

    def test_braces(self, monkeypatch):
        """Before anything is expanded; nested ones, too, of which less is known ahead."""
        for pattern in ("a-{0..30000000}.tar", f"{{0..{'9' * 1000}}}", "{a,b}" * 30, "{0..9}" * 7):
            with pytest.raises(ValueError, match=r"pattern must stand for at most 2,000,000 names, got "):
                expand_braces(pattern)
        monkeypatch.setattr("m3ae_fast.data.shards.MAX_SHARDS", 1000)
        with pytest.raises(ValueError, match=r"pattern must stand for at most 1,000 names, got "):
            expand_braces("{a," * 25 + "b" + "}" * 25)
        assert len(expand_braces("{0..9}" * 3)) == 1000 and expand_braces("{a,{b,c}}") == ["a", "b", "a", "c"]


class TestText:
    def test_a_caption_file_without_end(self, tmp_path):
        (tmp_path / "x.jpg").write_bytes(PHOTO)
        with open(tmp_path / "x.txt", "wb") as file:
            file.truncate(1 << 36)
        (bad,) = all_bad(FolderDataset(tmp_path)).values()
        assert str(bad) == "x.txt: it has more than 16,777,216 bytes" and bad.kind == "caption"

    def test_a_row_without_end(self, tmp_path):
        long, longest = '{"text": "' + "a" * (1 << 24) + '"}', '{"text": "' + "a" * ((1 << 24) - 13) + '"}'
        path = jsonl(
            tmp_path / "a.jsonl", {"text": "one"}, long, longest, " " * (1 << 24) + '{"text": "x"}', {"text": "two"}
        )
        dataset = JSONLinesDataset(path)
        bad = all_bad(dataset)
        assert len(dataset) == 5 and set(bad) == {1, 3} and dataset[4].captions == ("two",)
        assert str(bad[1]) == "a.jsonl, row 2: it has more than 16,777,216 bytes" and bad[1].kind == "row"

    def test_rows_may_name_any_file(self, tmp_path):
        """Of a file that the user names: README, docs."""
        (tmp_path / "data").mkdir()
        path = jsonl(tmp_path / "data" / "a.jsonl", {"image": str(PHOTOS / "coffee.jpg")}, {"image": "../x.jpg"})
        (tmp_path / "x.jpg").write_bytes(PHOTO)
        one, two = JSONLinesDataset(path)
        assert np.array_equal(one.image, two.image)

    def test_a_message_is_a_line_of_plain_characters(self, tmp_path):
        names = ("\x1b[2Jx.jpg", "a\nb.jpg", "\u202egpj.jpg")
        for name in names:
            (tmp_path / name).write_bytes(b"")
        texts = [str(bad) for bad in all_bad(FolderDataset(tmp_path)).values()]
        assert len(texts) == 3 and all(text.isprintable() for text in texts) and "\\x1b[2Jx.jpg" in texts[0]
        assert len(str(BadSample("a" * 10**6, "why"))) < 1100


def file_with(path: Path, make) -> Path:
    with h5py.File(path, "w") as file:
        make(file)
    return path


def gzip_row(file):
    column = file.create_dataset("jpg", (2, 1 << 31), np.uint8, chunks=(1, 1 << 20), compression="gzip")
    column[0, :5] = 1


def gzip_string(file):
    file.create_dataset("text", (2,), "S300000000", chunks=(1,), compression="gzip")


def gzip_chunk(file):
    column = file.create_dataset("jpg", (1 << 20, 1 << 10), np.uint8, chunks=(1 << 20, 1 << 10), compression="gzip")
    assert column.chunks


def unwritten_rows(file):
    file.create_dataset("text", (1 << 40,), "S8", chunks=(1 << 10,))


def unwritten_labels(file):
    column = file.create_dataset("train_jpg", (1 << 28,), "S8", chunks=(1 << 10,))
    column[0] = b"a"
    file.create_dataset("train_labels", (1 << 28,), np.int64, chunks=(1 << 10,))[0] = 1


def external_storage(file):
    (Path(file.filename).parent / "other").write_bytes(bytes(4096))
    file.create_dataset("text", (4,), "S1024", external="other")


def external_link(file):
    pairs_file(Path(file.filename).parent / "other.h5", jpg=[PHOTO])
    file["jpg"] = h5py.ExternalLink("other.h5", "jpg")


def external_group(file):
    external_link(file)
    del file["jpg"]
    file["group"] = h5py.ExternalLink("other.h5", "/")
    file["jpg"] = h5py.SoftLink("/group/jpg")


def external_pipe(file):
    os.mkfifo(Path(file.filename).parent / "pipe")
    file["jpg"] = h5py.ExternalLink("pipe", "jpg")


def virtual(file):
    layout = h5py.VirtualLayout((1,), h5py.string_dtype())
    layout[0] = h5py.VirtualSource("other.h5", "text", (1,))
    file.create_virtual_dataset("text", layout)


def dangling(file):
    file["jpg"] = h5py.SoftLink("/nowhere/jpg")


def round_and_round(file):
    file["jpg"], file["other"] = h5py.SoftLink("/other"), h5py.SoftLink("/jpg")


HOSTILE = {
    gzip_row: r"jpg cannot be read: its rows must have at most 268,435,456 bytes, got 2,147,483,648",
    gzip_string: r"text cannot be read: its rows must have at most 268,435,456 bytes, got 300,000,000",
    gzip_chunk: r"jpg cannot be read: its chunks must have at most 268,435,456 bytes, got 1,073,741,824",
    unwritten_rows: r"text must have at most 2,147,483,647 rows, got 1,099,511,627,776",
    unwritten_labels: r"train_labels must have at most 134,217,728 rows, got 268,435,456",
    external_storage: r"text must be stored in the file itself, got one that lies in others",
    external_link: r"jpg must be stored in the file itself, got a link that leads out of it",
    external_group: r"jpg must be stored in the file itself, got a link that leads out of it",
    external_pipe: r"jpg must be stored in the file itself, got a link that leads out of it",
    virtual: r"text must be stored in the file itself, got one that lies in others",
    dangling: r"jpg must be stored in the file itself, got a link that leads nowhere",
    round_and_round: r"jpg must be stored in the file itself, got a link that leads nowhere",
}


class TestHDF5:
    @pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
    def test_hostile_files(self, tmp_path, make):
        with pytest.raises(ValueError, match=r"a\.h5: " + HOSTILE[make]):
            HDF5Dataset(file_with(tmp_path / "a.h5", make), "train" if make is unwritten_labels else None)

    def test_links_within_the_file(self, tmp_path):
        path = pairs_file(tmp_path / "a.h5", photo_jpg=[PHOTO])
        with h5py.File(path, "a") as file:
            file["group/images"] = file["photo_jpg"]
            file["jpg"] = h5py.SoftLink("group/./images")
        assert HDF5Dataset(path)[0].image.shape == (64, 96, 3)
