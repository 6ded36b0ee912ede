"""HDF5, tar shards and JSON lines: what they hold, and what is damaged in them."""

import io
import itertools
import json
import pickle
import re
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import BadSample, FolderDataset, HDF5Dataset, JSONLinesDataset, StreamedDataset, TarDataset
from m3ae_fast.data.samples import open_classes
from m3ae_fast.data.shards import expand_braces

PHOTOS = Path(__file__).parent.parent / "data" / "photos"
NAMES = ("astronaut", "camera", "coffee")
JPEGS = [(PHOTOS / f"{name}.jpg").read_bytes() for name in NAMES]
CAPTIONS = [tuple((PHOTOS / f"{name}.txt").read_text().splitlines()) for name in NAMES]
DECODED = [FolderDataset(PHOTOS)[i].image for i in range(3)]


def assert_photo(sample, number, captions=None, labels=()):
    assert np.array_equal(sample.image, DECODED[number]) and sample.image.dtype == np.uint8
    assert sample.captions == (CAPTIONS[number] if captions is None else captions)
    assert sample.labels == labels


def pairs_file(path, **columns):
    """columns: jpg a list of bytes, other names lists of str or numbers."""
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            if name.endswith("jpg"):
                column = file.create_dataset(name, len(values), h5py.vlen_dtype(np.uint8))
                for i, value in enumerate(values):
                    column[i] = np.frombuffer(value, np.uint8)
            elif name.endswith("labels"):
                file[name] = values
            else:
                file.create_dataset(name, data=values, dtype=h5py.string_dtype())
    return path


def tar(path, files):
    """files: (name, bytes) pairs, or a dict of them; None: a hard link to the first."""
    files = list(files.items() if isinstance(files, dict) else files)
    with tarfile.open(path, "w") as shard:
        for name, data in files:
            member = tarfile.TarInfo(name)
            if data is None:
                member.type, member.linkname = tarfile.LNKTYPE, files[0][0]
            else:
                member.size = len(data)
            shard.addfile(member, io.BytesIO(data or b""))
    return path


def streamed(path, count) -> list:
    """The first samples of a shard that is read forwards, or what is wrong with them."""
    found = []
    for entry in itertools.islice(StreamedDataset(f"pipe:cat {path}", buffer=1).stream(0, 0, 1), count):
        try:
            found.append(entry.sample())
        except BadSample as bad:
            found.append(bad)
    return found


def jsonl(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def all_bad(dataset) -> dict[int, BadSample]:
    """What each index that cannot be read says."""
    found = {}
    for i in range(len(dataset)):
        try:
            dataset[i]
        except BadSample as bad:
            found[i] = bad
    return found


class TestHDF5:
    def test_pairs(self, tmp_path):
        captions = [c[0] for c in CAPTIONS]
        dataset = HDF5Dataset(pairs_file(tmp_path / "cc.h5", jpg=JPEGS, caption=captions))
        assert len(dataset) == 3 and dataset.classes == ()
        for i, sample in enumerate(dataset):
            assert_photo(sample, i, (captions[i],))
            assert sample.name == f"cc.h5, row {i}"
        assert list(dataset.captions()) == captions

    def test_images_alone_and_texts_alone(self, tmp_path):
        images = HDF5Dataset(pairs_file(tmp_path / "i.h5", jpg=JPEGS))
        assert_photo(images[1], 1, ())
        assert list(images.captions()) == []
        texts = HDF5Dataset(pairs_file(tmp_path / "t.h5", text=["eins", " zwei "]))
        assert [(s.image, s.captions) for s in texts] == [(None, ("eins",)), (None, ("zwei",))]

    def test_imagenet(self, tmp_path):
        path = pairs_file(tmp_path / "i.h5", train_jpg=JPEGS, train_labels=[7, 0, 2], val_jpg=JPEGS[:1], val_labels=[1])
        train, val = HDF5Dataset(path, "train"), HDF5Dataset(path, "val")
        assert [s.labels for s in train] == [(7,), (0,), (2,)] and train.classes == tuple("01234567")
        assert len(val) == 1 and val[0].labels == (1,)
        assert_photo(train[2], 2, (), (2,))
        with pytest.raises(
            ValueError,
            match=r"path must hold jpg/caption or image/caption/label or text, got .*; its split, train or val, must",
        ):
            HDF5Dataset(path)

    def test_damaged_rows(self, tmp_path):
        path = pairs_file(tmp_path / "d.h5", jpg=[JPEGS[0], JPEGS[1][:300], b"", JPEGS[2]], caption=["a"] * 4)
        with h5py.File(path, "a") as file:
            del file["caption"]
            file.create_dataset("caption", data=[b"a", b"b", b"c", "Fuß".encode("latin-1")], dtype=h5py.string_dtype())
        dataset = HDF5Dataset(path)
        bad = all_bad(dataset)
        assert {i: b.kind for i, b in bad.items()} == {1: "image", 2: "image", 3: "caption"}
        assert bad[1].name == "d.h5, row 1"
        assert list(dataset.captions()) == ["a", "b", "c"]

    def test_a_damaged_file(self, tmp_path):
        """Bytes of a chunk overwritten: its checksum tells, that row is a damaged one, others are not."""
        path = tmp_path / "d.h5"
        with h5py.File(path, "w") as file:
            texts = np.array([b"one", b"two", b"six", b"ten"])
            file.create_dataset("text", data=texts, chunks=(1,), fletcher32=True)
        data = bytearray(path.read_bytes())
        data[data.index(b"two")] ^= 1
        path.write_bytes(data)
        assert {i: b.kind for i, b in all_bad(HDF5Dataset(path)).items()} == {1: "shard"}

    def test_a_handle_stays_in_its_process(self, tmp_path):
        dataset = HDF5Dataset(pairs_file(tmp_path / "cc.h5", jpg=JPEGS))
        dataset[0]
        assert dataset._file is not None and pickle.loads(pickle.dumps(dataset))._file is None
        assert_photo(pickle.loads(pickle.dumps(dataset))[1], 1, ())

    def test_wrong_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"path must name an HDF5 file, there is no .*none\.h5"):
            HDF5Dataset(tmp_path / "none.h5")
        (tmp_path / "text.h5").write_text("hello")
        with pytest.raises(ValueError, match=r"path must name an HDF5 file, .*text\.h5 cannot be read as one"):
            HDF5Dataset(tmp_path / "text.h5")
        with pytest.raises(
            ValueError, match=r"path must hold jpg/caption or image/caption/label or text, got other in"
        ):
            HDF5Dataset(pairs_file(tmp_path / "o.h5", other=["a"]))
        with pytest.raises(ValueError, match=r"must hold columns of one length, got \{'jpg': 3, 'caption': 1\}"):
            HDF5Dataset(pairs_file(tmp_path / "l.h5", jpg=JPEGS, caption=["a"]))
        with h5py.File(tmp_path / "g.h5", "w") as file:
            file["jpg/a"], file["text"] = [1], 3
        with pytest.raises(ValueError, match=r"g\.h5: jpg must be a column, a data set with rows, got <HDF5 group"):
            HDF5Dataset(tmp_path / "g.h5")
        for number, labels in enumerate(([[1.0, 0.0]] * 3, [0.5, 1, 2], [b"cat"] * 3, [[0, 1]] * 3)):
            path = pairs_file(tmp_path / f"l{number}.h5", train_jpg=JPEGS, train_labels=labels)
            with pytest.raises(
                ValueError, match=rf"l{number}\.h5: train_labels must hold a class's number in each row"
            ):
                HDF5Dataset(path, "train")
        path = pairs_file(tmp_path / "ids.h5", train_jpg=JPEGS, train_labels=[1, 2, 1_000_000])
        with pytest.raises(ValueError, match=r"ids\.h5: train_labels: labels must be of at most 100,000 classes"):
            HDF5Dataset(path, "train")
        with pytest.raises(ValueError, match="path must hold at least one row, got none"):
            HDF5Dataset(pairs_file(tmp_path / "e.h5", text=[]))
        with pytest.raises(ValueError, match="split must be one of None, 'train', 'val', got 'test'"):
            HDF5Dataset(tmp_path / "e.h5", "test")

    def test_h5py_is_missing(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "h5py", None)
        with pytest.raises(ModuleNotFoundError, match=r"HDF5 needs h5py: pip install '\.\[train\]'"):
            HDF5Dataset(tmp_path / "x.h5")


class TestTar:
    def test_all_that_a_sample_may_hold(self, tmp_path):
        tar(
            tmp_path / "a-00.tar",
            {
                "000.jpg": JPEGS[0],
                "000.txt": b"an astronaut\n\nin orange\n",
                "sub/001.JPEG": JPEGS[1],
                "sub/001.json": json.dumps({"caption": "a camera", "url": "x"}).encode(),
                "sub/001.url": b"not read",
                "002.txt": b"words alone",
            },
        )
        long = "a-name-of-more-than-a-hundred-characters-" * 4
        tar(tmp_path / "a-01.tar", {f"{long}.jpg": JPEGS[2], "004.json": b'{"caption": ["x", "y"]}'})
        dataset = TarDataset(tmp_path / "a-{00..01}.tar")
        assert len(dataset) == 5 and dataset.damaged == () and dataset.classes == ()
        assert_photo(dataset[0], 0, ("an astronaut", "in orange"))
        assert_photo(dataset[1], 1, ("a camera",))
        assert (dataset[2].image, dataset[2].captions) == (None, ("words alone",))
        assert_photo(dataset[3], 2, ())
        assert dataset[4].captions == ("x", "y")
        names = ["a-00.tar/000", "a-00.tar/sub/001", "a-00.tar/002", f"a-01.tar/{long}", "a-01.tar/004"]
        assert [s.name for s in dataset] == names
        assert list(dataset.captions()) == ["an astronaut", "in orange", "a camera", "words alone", "x", "y"]
        assert [s.name for s in TarDataset(tmp_path / "*.tar")] == names
        assert pickle.loads(pickle.dumps(dataset))[4].captions == ("x", "y")

    def test_a_key_that_comes_twice_is_two_samples(self, tmp_path):
        a, b, c = ("k.jpg", JPEGS[0]), ("k.txt", b"one"), ("k.txt", b"two")
        path = tar(tmp_path / "a.tar", [a, b, ("k.jpg", JPEGS[1]), c, c, ("x.jpg", JPEGS[2])])
        for samples in (list(TarDataset(path)), streamed(path, 4)):
            assert [s.captions for s in samples] == [("one",), ("two",), ("two",), ()]
            assert [s.image is None for s in samples] == [False, False, True, False]
        assert_photo(TarDataset(path)[1], 1, ("two",))

    def test_what_cat_put_behind_the_end_mark_is_told_of(self, tmp_path):
        one, two = (tar(tmp_path / f"{x}.tar", {f"{x}.txt": b"one"}).read_bytes() for x in "ab")
        (tmp_path / "c.tar").write_bytes(one + two)
        with pytest.warns(
            M3AEFastWarning, match=r"c\.tar: bytes 1,024 to 20,480 cannot .*there is more behind its end"
        ):
            assert [s.name for s in TarDataset(tmp_path / "c.tar")] == ["c.tar/a"]
        sample, damage = streamed(tmp_path / "c.tar", 2)
        assert sample.captions == ("one",) and damage.kind == "shard" and "more behind its end mark" in str(damage)

    def test_a_key_ends_at_its_first_dot(self, tmp_path):
        """What is behind it and no suffix makes a sample that says so; beside a sample it is left alone."""
        files = {"2021.01.jpg": JPEGS[0], "2021.02.jpg": JPEGS[1], "b.jpg": JPEGS[1], "b.mask.png": b"", "b.txt": b"b"}
        path = tar(tmp_path / "a.tar", {"._x.jpg": b"hidden", **files, "._b.txt": b"hidden"})
        dataset = TarDataset(path)
        assert len(dataset) == 2
        assert_photo(dataset[1], 1, ("b",))
        for bad, good in ((all_bad(dataset)[0], dataset[1]), streamed(path, 2)):
            assert str(bad).endswith("2021: there is neither an image nor a caption in it: what is behind the key's "
                                     "first dot, .01.jpg, is no known suffix")  # fmt: skip
            assert good.captions == ("b",)

    def test_hard_links_are_told_of(self, tmp_path):
        path = tar(tmp_path / "a.tar", {"a.jpg": JPEGS[0], "b.jpg": None, "b.txt": b"words", "c.txt": b"c"})
        for bad in (all_bad(TarDataset(path))[1], streamed(path, 3)[1]):
            assert "b.jpg: it is a hard link to another file of its shard" in str(bad)
        assert streamed(path, 3)[2].captions == ("c",)

    @pytest.mark.parametrize("number", [b"3000000000", b"9" * 5000])
    def test_ids_are_no_classes(self, tmp_path, number):
        with pytest.raises(ValueError, match=r"a\.tar: labels must be of at most 100,000 classes"):
            TarDataset(tar(tmp_path / "a.tar", {"a.jpg": JPEGS[0], "a.cls": number}))

    def test_classes(self, tmp_path):
        files = {"0.jpg": JPEGS[0], "0.cls": b"3", "1.jpg": JPEGS[1], "1.cls": b"0\n"}
        dataset = TarDataset(tar(tmp_path / "a.tar", files))
        assert dataset.classes == tuple("0123") and [s.labels for s in dataset] == [(3,), (0,)]
        del files["1.cls"]
        one_less = TarDataset(tar(tmp_path / "b.tar", files))
        assert one_less.classes == tuple("0123") and [s.labels for s in one_less] == [(3,), ()]

    @pytest.mark.parametrize("label", [b"cat", b"", b"-1", b"1.5", b"2 3", b"\xff", "٣".encode()])
    def test_a_bad_label_costs_its_sample_alone(self, tmp_path, label):
        files = {"0.jpg": JPEGS[0], "0.cls": b"3", "1.jpg": JPEGS[1], "1.cls": label, "2.txt": b"words", "2.cls": b"0"}
        path = tar(tmp_path / "a.tar", files)
        dataset = TarDataset(path)
        assert dataset.classes == tuple("0123") and [dataset[i].labels for i in (0, 2)] == [(3,), (0,)]
        for bad in (all_bad(dataset)[1], streamed(path, 2)[1]):
            assert re.search(r"1\.cls: it must hold a class's number, got b", str(bad)) and bad.kind == "label"

    def test_braces(self):
        assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
        assert expand_braces("a-{11..08}") == ["a-11", "a-10", "a-09", "a-08"] and expand_braces("{10..9}") == [
            "10",
            "9",
        ]
        assert expand_braces("{099..100}") == ["099", "100"]
        assert expand_braces("awk '{print $1}' {a..b} {}") == ["awk '{print $1}' {a..b} {}"]
        assert expand_braces("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]

    def test_damaged_samples(self, tmp_path):
        files = {
            "0.jpg": JPEGS[0][:200],
            "1.jpg": JPEGS[1],
            "2.jpg": JPEGS[2],
            "2.txt": "Fuß".encode("latin-1"),
            "3.txt": b" \n",
            "4.json": b"{",
            "5.json": b'{"caption": {"en": "x"}}',
            "6.json": b'{"caption": "half a pair: \\ud83d"}',
            "7.json": b"[" * 100_000,
        }
        bad = all_bad(TarDataset(tar(tmp_path / "a.tar", files)))
        kinds = {0: "image", 2: "caption", 3: "sample", 4: "caption", 5: "caption", 6: "caption", 7: "caption"}
        assert {i: b.kind for i, b in bad.items()} == kinds
        assert bad[0].name == "a.tar/0.jpg" and bad[2].name == "a.tar/2.txt"

    @pytest.mark.parametrize("damage", ["cut in an image", "cut in a header", "no end mark", "broken header"])
    def test_a_damaged_shard(self, tmp_path, damage):
        """What comes before is used, the rest is told of; other shards are whole."""
        files = {f"{i}.jpg": JPEGS[i % 3] for i in range(6)}
        whole = {"cut in an image": 4, "cut in a header": 3, "no end mark": 3, "broken header": 3}[damage]
        tar(tmp_path / "whole.tar", {"a.jpg": JPEGS[0], "b.jpg": JPEGS[1]})
        with tarfile.open(tar(tmp_path / "bad.tar", files)) as shard:
            member = shard.getmember("4.jpg")
        data = bytearray((tmp_path / "bad.tar").read_bytes())
        if damage == "broken header":
            data[member.offset + 150] ^= 0xFF
        else:
            del data[
                member.offset_data + {"cut in an image": 700, "cut in a header": -300, "no end mark": -512}[damage] :
            ]
        (tmp_path / "bad.tar").write_bytes(data)
        with pytest.warns(M3AEFastWarning, match=r"bad\.tar: bytes [\d,]+ to [\d,]+ cannot be read"):
            dataset = TarDataset(tmp_path / "*.tar")
        before = [f"bad.tar/{i}" for i in range(whole)]  # the last one before the damage may have lost its caption
        assert [s.name for s in dataset] == [*before, "whole.tar/a", "whole.tar/b"]
        assert [bad.kind for bad in dataset.damaged] == ["shard"]
        with pytest.raises(BadSample, match=r"bad\.tar: bytes"):
            TarDataset(tmp_path / "*.tar", strict=True)

    def test_a_shard_that_is_damaged_later(self, tmp_path):
        path = tar(tmp_path / "a.tar", {f"{i}.jpg": JPEGS[i] for i in range(3)})
        dataset = TarDataset(path)
        path.write_bytes(path.read_bytes()[:3000])
        bad = all_bad(dataset)
        assert 2 in bad and bad[2].kind == "shard" and bad[2].name.startswith("a.tar, byte")
        path.unlink()
        assert [b.kind for b in all_bad(dataset).values()] == ["shard"] * 3

    def test_wrong_patterns(self, tmp_path):
        tar(tmp_path / "a-0.tar", {"0.txt": b"a"})
        with pytest.raises(FileNotFoundError, match=r"pattern must name \.tar files, there is no .*a-1\.tar"):
            TarDataset(tmp_path / "a-{0..1}.tar")
        with pytest.raises(FileNotFoundError, match=r"there is no .*x\*\.tar"):
            TarDataset(tmp_path / "x*.tar")
        with pytest.raises(ValueError, match=r"pattern must name \.tar files with name\.jpg.* in them, got"):
            TarDataset(tar(tmp_path / "b.tar", {"0.csv": b"a"}))
        with tarfile.open(tmp_path / "c.tar", "w:gz") as shard:
            shard.add(PHOTOS / "coffee.jpg", "coffee.jpg")
        with (
            pytest.warns(M3AEFastWarning, match="cannot be read"),
            pytest.raises(ValueError, match="pattern must name"),
        ):
            TarDataset(tmp_path / "c.tar")


class TestJSONLines:
    def test_rows(self, tmp_path):
        for name, data in zip(NAMES, JPEGS, strict=True):
            (tmp_path / f"{name}.jpg").write_bytes(data)
        path = jsonl(
            tmp_path / "a.jsonl",
            {"image": "astronaut.jpg", "caption": "an astronaut"},
            "",
            {"image": "camera.jpg", "caption": ["a camera", " ", "on a stand"], "id": 4},
            {"image": "coffee.jpg"},
            {"text": "Füße und Wörter"},
        )
        dataset = JSONLinesDataset(path)
        assert len(dataset) == 4 and dataset.classes == ()
        assert_photo(dataset[0], 0, ("an astronaut",))
        assert_photo(dataset[1], 1, ("a camera", "on a stand"))
        assert_photo(dataset[2], 2, ())
        assert (dataset[3].image, dataset[3].captions) == (None, ("Füße und Wörter",))
        assert list(dataset.captions()) == ["an astronaut", "a camera", "on a stand", "Füße und Wörter"]
        assert dataset[3].name == "a.jsonl, row 4"

    def test_labels(self, tmp_path):
        named = JSONLinesDataset(jsonl(tmp_path / "a.jsonl", *({"text": "a", "label": x} for x in ("dog", "cat"))))
        assert named.classes == ("cat", "dog") and [s.labels for s in named] == [(1,), (0,)]
        rows = ({"text": "a", "labels": [2, 0]}, {"text": "b", "label": 1}, {"text": "c"})
        numbered = JSONLinesDataset(jsonl(tmp_path / "b.jsonl", *rows))
        assert numbered.classes == ("0", "1", "2") and [s.labels for s in numbered] == [(2, 0), (1,), ()]
        with pytest.raises(ValueError, match="labels must all be names or all be numbers, got 'dog' and 1"):
            JSONLinesDataset(jsonl(tmp_path / "c.jsonl", *({"text": "a", "label": x} for x in ("dog", 1))))

    def test_null_is_as_if_left_out(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(JPEGS[0])
        rows = (
            {"image": "a.jpg", "text": None, "caption": None, "label": None},
            {"image": None, "text": "b", "label": 1},
        )
        dataset = JSONLinesDataset(jsonl(tmp_path / "a.jsonl", *rows))
        assert_photo(dataset[0], 0, ())
        assert (dataset[1].captions, dataset[1].labels, dataset.classes) == (("b",), (1,), ("0", "1"))

    @pytest.mark.parametrize("labels", [[1_000_000], [10**30], [str(i) for i in range(100_001)]])
    def test_ids_are_no_classes(self, tmp_path, labels):
        path = jsonl(tmp_path / "a.jsonl", *({"text": "a", "label": label} for label in labels))
        with pytest.raises(
            ValueError, match=r"a\.jsonl: labels must be of at most 100,000 classes, .* got 1[\d,]+: are"
        ):
            JSONLinesDataset(path)

    def test_damaged_rows(self, tmp_path):
        (tmp_path / "cut.jpg").write_bytes(JPEGS[0][:200])
        rows = [
            {"text": "good", "label": 0},
            '{"text": "cut',
            "[1]",
            {"image": "cut.jpg"},
            {"image": "none.jpg"},
            {"image": 3},
            {"caption": "what of?"},
            {"text": " "},
            {"text": 4},
            {"text": "label", "label": -1},
            {"text": "labels", "labels": "ab"},
            {"text": "half a pair: \ud83d"},
            "[" * 100_000,
            '{"label": ' + "[" * 100_000,
        ]
        path = jsonl(tmp_path / "a.jsonl", *rows)
        path.write_bytes(path.read_bytes() + b'{"text": "Fu\xdf"}\n')
        kinds = ["row", "row", "image", "image", "row", "row", "caption", "caption", "row", "row"]
        kinds += ["caption", "row", "row", "row"]
        bad = all_bad(JSONLinesDataset(path))
        assert {i: b.kind for i, b in bad.items()} == dict(enumerate(kinds, 1))
        assert str(bad[2]) == "a.jsonl, row 3: must be a JSON object, got list"
        assert "none.jpg" in str(bad[4])

    def test_wrong_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
            JSONLinesDataset(tmp_path / "none.jsonl")
        with pytest.raises(ValueError, match="path must hold a JSON object a line, got none in"):
            JSONLinesDataset(jsonl(tmp_path / "e.jsonl", ""))


class TestImageFolder:
    def test_classes_are_numbered_as_torchvision_does(self, tmp_path):
        for split in ("train", "val"):
            for name, data in zip(("n03", "n01", "n02"), JPEGS, strict=True):
                (tmp_path / split / name).mkdir(parents=True)
                (tmp_path / split / name / "x.jpg").write_bytes(data)
        for split in ("train", "val"):
            dataset = FolderDataset(tmp_path / split)
            assert dataset.classes == ("n01", "n02", "n03")
            assert [(s.name, s.labels) for s in dataset] == [(f"n0{i + 1}/x.jpg", (i,)) for i in range(3)]
            assert_photo(dataset[2], 0, (), (2,))
        assert FolderDataset(tmp_path).classes == (), "train and val are no classes"

    def test_what_lies_beside_the_folders_of_classes(self, tmp_path):
        """A README.txt is left out and named; an image takes the classes away, as the error of who wants them says."""
        for name in ("cat/x.jpg", "dog/y.jpg"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(JPEGS[0])
        (tmp_path / "dog" / "alone.txt").write_text("a dog")
        (tmp_path / "README.txt").write_text("read me")
        (tmp_path / "cover.svg").write_text("<svg/>")
        with pytest.warns(
            M3AEFastWarning, match=r"left out, since they are in no folder of a class: README\.txt, cover\.svg$"
        ):
            dataset = FolderDataset(tmp_path)
        assert dataset.classes == ("cat", "dog") and dataset.no_classes == ""
        assert [(s.name, s.labels) for s in dataset] == [
            ("cat/x.jpg", (0,)),
            ("dog/alone.txt", (1,)),
            ("dog/y.jpg", (1,)),
        ]
        (tmp_path / "cover.jpg").write_bytes(JPEGS[0])
        dataset = FolderDataset(tmp_path)
        assert dataset.classes == () and dataset.no_classes == "cover.jpg"
        with pytest.raises(ValueError, match=r"a subfolder for each of two or more, got none: cover\.jpg lies beside"):
            open_classes(str(tmp_path), image_size=32)


class TestPixelsOfHDF5:
    """Rows of pixels, not of encoded images."""

    @pytest.fixture
    def images(self):
        return np.random.default_rng(0).integers(0, 256, (4, 20, 30, 9), dtype=np.uint8)

    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("options", [{}, {"chunks": (1, 9, 8, 8), "compression": "gzip"}])
    def test_any_channels(self, tmp_path, images, first, options):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file.create_dataset("image", data=np.moveaxis(images, -1, 1) if first else images, **options)
            file["label"] = [2, 0, 1, 2]
            file.create_dataset("caption", data=["a", "b", "c", "d"], dtype=h5py.string_dtype())
        dataset = HDF5Dataset(tmp_path / "x.h5", channels=9)
        assert dataset.classes == ("0", "1", "2") and len(dataset) == 4
        for sample, image, label, caption in zip(dataset, images, (2, 0, 1, 2), "abcd", strict=True):
            assert np.array_equal(sample.image, image)
            assert (sample.labels, sample.captions) == ((label,), (caption,))

    def test_one_channel_and_no_label(self, tmp_path, images):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["image"] = images[..., 0]
        dataset = HDF5Dataset(tmp_path / "x.h5", channels=1)
        assert np.array_equal(dataset[3].image, images[3, ..., :1]) and dataset[3].labels == () == dataset.classes

    def test_what_does_not_fit_is_refused_at_once(self, tmp_path, images):
        for values, message in (
            (images, r"x.h5: image: it has shape \(20, 30, 9\), and no axis of 3 channels"),
            (images[..., :3].astype(np.uint16), r"must have pixels of uint8 in each row, .* got uint16 \[20, 30, 3\]"),
            (images[:, :0, :, :3], r"must have pixels .* got uint8 \[0, 30, 3\]"),
        ):
            with h5py.File(tmp_path / "x.h5", "w") as file:
                file["image"] = values
            with pytest.raises(ValueError, match=message):
                HDF5Dataset(tmp_path / "x.h5")
