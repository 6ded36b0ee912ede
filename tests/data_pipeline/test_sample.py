"""What an image, a caption, a line and a label are does not depend on the kind of file that they are in."""

import json

import pytest

from m3ae_fast.data import BadSample, FolderDataset, JSONLinesDataset, TarDataset
from m3ae_fast.data.images import FORMATS, IMAGES, OTHERS
from tests.data_pipeline.test_readers import JPEGS, all_bad, jsonl, streamed, tar


@pytest.mark.parametrize(
    "data, captions",
    [
        (b"one\ntwo\r\nthree\rfour", ("one", "two", "three", "four")),
        (b"\xef\xbb\xbf one \n\n \t\n", ("one",)),
        ("a\x0bb\x0cc\x1cd\x85e\u2028f".encode(), ("a\x0bb\x0cc\x1cd\x85e\u2028f",)),
        ("\u00a0Fuß\u3000\n\ud7ff".encode(), ("Fuß", "\ud7ff")),
        (b"a\0b", ("a\0b",)),
        (b"good\nFu\xdf", None),
        (b"\xff\xfea\0", None),
    ],
)
def test_caption_files(tmp_path, data, captions):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_bytes(data)
    path = tar(tmp_path / "a.tar", {"a.txt": data})
    for read in (lambda: FolderDataset(tmp_path / "folder")[0], lambda: TarDataset(path)[0]):
        if captions is None:
            with pytest.raises(BadSample, match=r"a\.txt: 'utf-8' codec") as error:
                read()
            assert error.value.kind == "caption"
        else:
            assert read().captions == captions
    (sample,) = streamed(path, 1)
    assert sample.kind == "caption" if captions is None else sample.captions == captions


@pytest.mark.parametrize(
    "value, captions",
    [
        (" one\n", ("one",)),
        (["one", " ", "two\nlines"], ("one", "two\nlines")),
        (None, ()),
        ([], ()),
        (0, None),
        (False, None),
        ({}, None),
        (["one", None], None),
        (["one", ["two"]], None),
    ],
)
def test_captions_in_json(tmp_path, value, captions):
    """A string is one caption, whatever is in it, null is none, and anything else is damaged."""
    (tmp_path / "a.jpg").write_bytes(JPEGS[0])
    rows = JSONLinesDataset(jsonl(tmp_path / "a.jsonl", {"image": "a.jpg", "caption": value}))
    path = tar(tmp_path / "a.tar", {"a.jpg": JPEGS[0], "a.json": json.dumps({"caption": value}).encode()})
    for dataset in (rows, TarDataset(path)):
        if captions is None:
            assert [bad.kind for bad in all_bad(dataset).values()] == ["caption"]
        else:
            assert dataset[0].captions == captions


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_json_is_utf8(tmp_path, encoding):
    data = '{"text": "Fuß", "caption": "Fuß"}'.encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(data)
    datasets = JSONLinesDataset(tmp_path / "a.jsonl"), TarDataset(tar(tmp_path / "a.tar", {"a.json": data}))
    for dataset in datasets:
        if encoding.startswith("utf-8"):
            assert dataset[0].captions == ("Fuß",)
        else:
            assert len(all_bad(dataset)) == 1


@pytest.mark.parametrize("suffix", sorted(IMAGES))
def test_images(tmp_path, suffix):
    """Each suffix of the list, in any case, in a folder and in a shard."""
    (tmp_path / "folder").mkdir()
    for name in (f"a.{suffix}", f"b.{suffix.upper()}"):
        (tmp_path / "folder" / name).write_bytes(JPEGS[0])
        (tmp_path / "folder" / f"{name[0]}.txt").write_text("words")
    files = {path.name: path.read_bytes() for path in sorted((tmp_path / "folder").iterdir())}
    path = tar(tmp_path / "a.tar", files)
    for samples in (FolderDataset(tmp_path / "folder"), TarDataset(path), streamed(path, 2)):
        assert [s.captions for s in samples] == [("words",)] * 2 and all(s.image is not None for s in samples)


@pytest.mark.parametrize("suffix", OTHERS)
def test_what_looks_like_an_image(tmp_path, suffix):
    """Its caption is not trained on alone: the sample is damaged, which is told of; unless a good one is beside."""
    (tmp_path / "folder").mkdir()
    files = {f"a.{suffix}": b"?", "a.txt": b"words", "b.jpg": JPEGS[0], f"b.{suffix.upper()}": b"?", "b.txt": b"b"}
    for name, data in files.items():
        (tmp_path / "folder" / name).write_bytes(data)
    path = tar(tmp_path / "a.tar", files)
    folder, shard = FolderDataset(tmp_path / "folder"), TarDataset(path)
    assert folder.names == [f"a.{suffix}", "b.jpg"] and folder[1].captions == shard[1].captions == ("b",)
    for bad in (all_bad(folder)[0], all_bad(shard)[0], streamed(path, 1)[0]):
        assert str(bad).endswith(f"a.{suffix}: .{suffix} is no image that is read, those are {', '.join(FORMATS)}")
        assert bad.kind == "image"
