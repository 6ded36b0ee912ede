"""EncodedArray: .npy files of any channels, read without pickle, and what is refused of them."""

import io

import numpy as np
import pytest

from m3ae_fast.data import BadSample
from m3ae_fast.data.arrays import EncodedArray


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 9, 16])
def test_channels_may_come_first_or_last(tmp_path, channels):
    image = noise(20, 30, channels)
    path = tmp_path / "x.npy"
    for stored in (image, np.moveaxis(image, -1, 0), np.asfortranarray(image)):
        np.save(path, stored)
        for source in (path, path.read_bytes()):
            encoded = EncodedArray(source, "x.npy", channels)
            assert encoded.shape == (20, 30, channels) and np.array_equal(encoded.decoded(), image)


def test_an_array_of_two_axes_is_one_channel():
    image = noise(20, 30)
    assert np.array_equal(EncodedArray(npy(image), "x", 1).decoded(), image[..., None])
    with pytest.raises(BadSample, match=r"x: it has shape \(20, 30, 1\), and no axis of 3 channels"):
        EncodedArray(npy(image), "x", 3)


def test_where_both_axes_fit_the_last_is_the_channels():
    image = noise(9, 30, 9)
    assert np.array_equal(EncodedArray(npy(image), "x", 9).decoded(), image)


def test_other_channels_are_named_as_such():
    with pytest.raises(BadSample, match=r"shape \(4, 20, 30\), and no axis of 9 channels") as caught:
        EncodedArray(npy(noise(4, 20, 30)), "x", 9)
    assert caught.value.kind == "channels"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.array([{}, {}, {}], dtype=object), allow_pickle=True), "must be uint8, got object"),
        (npy(noise(8, 8, 3).astype(np.uint16)), "must be uint8, got uint16: scale them to 0 .. 255 first"),
        (npy(noise(8, 8, 3))[:-1], "must have 192 bytes of pixels, got 191"),
        (npy(noise(8, 8, 3)) + b"x", "must have 192 bytes of pixels, got 193"),
        (npy(noise(0, 8, 3)), "must have pixels, got 0 x 8"),
        (npy(noise(40, 40, 3)), "it has 1,600 pixels, at most 1,000 are read"),
        (b"\x93NUMPY", "EOF"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "Header info length"),
        (b"no array", "magic string"),
        (npy(noise(8, 8, 3)).replace(b"'descr'", b"((((((("), "multi-line statement"),
        (npy(noise(8, 8, 3))[:6] + b"\x09\x00" + npy(noise(8, 8, 3))[8:], "version 1.0 or 2.0 .* got 9.0"),
    ],
)
def test_what_is_damaged_or_hostile_is_a_bad_sample(data, message):
    with pytest.raises(BadSample, match=message) as caught:
        EncodedArray(data, "x", 3, most=1000)
    assert caught.value.kind == "image"


def test_a_header_reserves_no_memory():
    """It says 12 GB, and there are none."""
    header = npy(np.zeros((1, 1, 3), np.uint8))
    forged = header.replace(b"(1, 1, 3), }" + b" " * 12, b"(65536, 65536, 3), }    ")
    assert forged != header
    with pytest.raises(BadSample, match="more than 268,435,456 bytes"):
        EncodedArray(forged, "x", 3)


def test_a_file_that_changes_is_a_bad_sample(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, noise(8, 8, 3))
    encoded = EncodedArray(path, "x", 3)
    path.write_bytes(b"")
    with pytest.raises(BadSample, match="cannot reshape"):
        encoded.decoded()
    path.unlink()
    with pytest.raises(BadSample, match="x: "):
        encoded.decoded()
    with pytest.raises(BadSample, match="is no regular file"):
        EncodedArray("/dev/zero", "x", 3)
