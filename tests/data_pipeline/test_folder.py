"""FolderDataset: what a folder of real files may hold."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3ae_fast.data import BadSample, FolderDataset, open_dataset

PHOTOS = Path(__file__).parent.parent / "data" / "photos"
# left half red, right half blue: survives JPEG, and shows which way up it is
HALVES = Image.new("RGB", (40, 24), "red")
HALVES.paste("blue", (20, 0, 40, 24))


def only(folder: Path) -> np.ndarray:
    dataset = FolderDataset(folder)
    assert len(dataset) == 1
    return dataset[0].image


def assert_halves(image: np.ndarray, size=(24, 40)):
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    np.testing.assert_allclose(image[4:20, 4:16].mean((0, 1)), (255, 0, 0), atol=6)
    np.testing.assert_allclose(image[4:20, 24:36].mean((0, 1)), (0, 0, 255), atol=6)


def test_photos():
    dataset = open_dataset(str(PHOTOS), image_size=32, seed=0)
    assert dataset.names == ["astronaut.jpg", "camera.jpg", "coffee.jpg"]
    assert [dataset[i].image.shape for i in range(3)] == [(96, 96, 3), (96, 96, 3), (64, 96, 3)]
    assert dataset[2].captions == ("a cup of black coffee on a saucer with a spoon", "an espresso on a wooden table")
    assert (dataset[1].image.std(-1) == 0).all(), "a grayscale photo has three equal channels"
    assert len(list(dataset.captions())) == 6


def test_layout(tmp_path):
    """Any case, nested folders, every pairing; hidden files and other suffixes are left out."""
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("b.JPG", "a.jpeg", "sub/c.PnG", "sub/deeper/d.jpg", ".e.jpg", ".hidden/f.jpg"):
        HALVES.save(tmp_path / name, "PNG")
    for name in ("b.txt", "sub/c.TXT", "sub/alone.txt", ".g.txt"):
        (tmp_path / name).write_text("one\n\n  two words \n", encoding="utf-8")
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no caption")
    dataset = FolderDataset(str(tmp_path))
    assert dataset.names == ["a.jpeg", "b.JPG", "sub/alone.txt", "sub/c.PnG", "sub/deeper/d.jpg"]
    samples = [dataset[i] for i in range(len(dataset))]
    assert [s.name for s in samples] == dataset.names
    assert [s.image is not None for s in samples] == [True, True, False, True, True]
    assert [s.captions for s in samples] == [(), ("one", "two words"), ("one", "two words"), ("one", "two words"), ()]


def test_links_are_followed_but_not_round_and_round(tmp_path):
    for name in ("data/cat", "data/dog", "elsewhere/ant"):
        (tmp_path / name).mkdir(parents=True)
        HALVES.save(tmp_path / name / "x.png")
    (tmp_path / "data" / "ant").symlink_to(tmp_path / "elsewhere" / "ant")
    (tmp_path / "data" / "dog" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "ant" / "back").symlink_to(tmp_path / "data")
    dataset = FolderDataset(tmp_path / "data")
    assert dataset.classes == ("ant", "cat", "dog") and dataset.names == ["ant/x.png", "cat/x.png", "dog/x.png"]


def test_links_that_lead_nowhere(tmp_path):
    """Each is a sample that cannot be read; no folder becomes unreadable."""
    HALVES.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("halves")
    for name, target in {"itself": "itself", "b.jpg": "b.jpg", "c.png": "none.png", "d.txt": "d.txt"}.items():
        (tmp_path / name).symlink_to(target)
    dataset = FolderDataset(tmp_path)
    assert dataset.names == ["a.png", "b.jpg", "c.png", "d.txt"] and dataset[0].captions == ("halves",)
    for index, reason in ((1, "Too many levels"), (2, "No such file"), (3, "Too many levels")):
        with pytest.raises(BadSample, match=rf"{dataset.names[index]}: .*{reason}"):
            dataset[index]
    with pytest.raises(FileNotFoundError, match=r"path must name a folder, there is no .*itself"):
        FolderDataset(tmp_path / "itself")


def test_two_images_of_a_name_share_its_captions(tmp_path):
    HALVES.save(tmp_path / "a.jpg")
    HALVES.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("halves")
    dataset = FolderDataset(tmp_path)
    assert [(s.name, s.captions) for s in (dataset[0], dataset[1])] == [("a.jpg", ("halves",)), ("a.png", ("halves",))]


def test_unicode(tmp_path):
    HALVES.save(tmp_path / "naïve 猫.png")
    (tmp_path / "naïve 猫.txt").write_bytes("\ufeffein Fuß\r\n猫\r\n".encode())
    sample = FolderDataset(tmp_path)[0]
    assert sample.name == "naïve 猫.png" and sample.captions == ("ein Fuß", "猫")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_modes(tmp_path, mode):
    image = HALVES.convert(mode)
    image.save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
    got = only(tmp_path)
    if mode in ("L", "LA", "1"):
        assert got.shape == (24, 40, 3) and (got.std(-1) == 0).all()
        np.testing.assert_allclose(got, np.asarray(image.convert("L").convert("RGB")), atol=1)
    else:
        assert_halves(got)


def test_transparency_is_white(tmp_path):
    image = HALVES.convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "x.png")
    assert (only(tmp_path) == 255).all()


def test_transparent_palette_is_white(tmp_path):
    image = HALVES.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    image.save(tmp_path / "x.png", transparency=image.getpixel((0, 0)))
    got = only(tmp_path)
    assert (got[:, :20] == 255).all() and (got[:, 20:] == (0, 0, 255)).all()


def test_sixteen_bit_gray_keeps_its_shades(tmp_path):
    shades = np.array([[0, 0x1234, 0x8000, 0xFFFF]], np.uint16)
    Image.fromarray(shades).save(tmp_path / "x.png")
    assert only(tmp_path)[0].tolist() == [[0] * 3, [0x12] * 3, [0x80] * 3, [0xFF] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """Stored turned by the inverse, tagged, and upright again when read."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = HALVES.transpose(undo[orientation]) if orientation in undo else HALVES
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", exif=exif, quality=95, subsampling=0)
    assert_halves(only(tmp_path))


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


DAMAGED = {
    "zero bytes": ("x.jpg", b""),
    "text": ("x.jpg", b"this is no image"),
    "truncated jpeg": ("x.jpg", jpeg()[:-700]),
    "header alone": ("x.jpg", jpeg()[:120]),
    "truncated png": ("x.png", png()[:-2000]),
    "flipped png": ("x.png", png()[:3000] + b"\x00\x01\x02\x03" + png()[3004:]),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_images(tmp_path, kind):
    name, content = DAMAGED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadSample, match=name) as error:
        FolderDataset(tmp_path)[0]
    assert error.value.name == name and error.value.reason


def test_bad_captions(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Fuß".encode("latin-1"))
    (tmp_path / "nothing.txt").write_bytes(b"\n \n")
    dataset = FolderDataset(tmp_path)
    with pytest.raises(BadSample, match=r"latin\.txt: .*utf-8"):
        dataset[0]
    with pytest.raises(BadSample, match=r"nothing\.txt: there is no caption in it, and no image beside it"):
        dataset[1]
    assert list(dataset.captions()) == []


def test_a_file_that_went_away(tmp_path):
    HALVES.save(tmp_path / "x.png")
    dataset = FolderDataset(tmp_path)
    (tmp_path / "x.png").unlink()
    with pytest.raises(BadSample, match=r"x\.png: .*No such file"):
        dataset[0]


def test_arrays_are_images_where_there_are_no_others(tmp_path):
    """Of a model of three channels as of nine; beside photos they may be anything, and are left alone."""
    image = np.random.default_rng(0).integers(0, 256, (9, 20, 30), dtype=np.uint8)
    np.save(tmp_path / "x.npy", image)
    (tmp_path / "x.txt").write_text("nine bands\n", encoding="utf-8")
    (sample,) = FolderDataset(tmp_path, channels=9)
    assert np.array_equal(sample.image, np.moveaxis(image, 0, -1)) and sample.captions == ("nine bands",)
    with pytest.raises(
        ValueError, match=r"images of 3 channels, .*got x\.npy: it has shape \(9, 20, 30\), and no axis"
    ):
        open_dataset(str(tmp_path), image_size=32, seed=0)
    HALVES.save(tmp_path / "x.png")
    assert_halves(only(tmp_path))


def test_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must name a folder, there is no .*missing"):
        FolderDataset(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"path must hold name\.jpg, .*got none in .*" + tmp_path.name):
        FolderDataset(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"path must name a folder, .*file is a file"):
        FolderDataset(tmp_path / "file")
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.TXT").touch()
    if len(os.listdir(tmp_path)) == 3:  # this file system tells upper from lower case
        with pytest.raises(ValueError, match=r"path must hold one \.txt a name, got a\.TXT and a\.txt"):
            FolderDataset(tmp_path)
