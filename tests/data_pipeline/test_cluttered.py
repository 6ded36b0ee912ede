"""Cluttered shapes: deterministic, truthfully named, and unreadable for a linear function of the pixels."""

import re

import numpy as np
import pytest

from m3ae_fast.data import ClutteredShapes, PairedShare, open_dataset
from m3ae_fast.data.captions import plural
from m3ae_fast.data.cluttered import COLORS
from m3ae_fast.data.shapes import SHAPES


def test_image_depends_on_index_and_seed_alone():
    forward, backward = ClutteredShapes(48, seed=5), ClutteredShapes(48, seed=5)
    seen = [forward[i] for i in range(10)]
    for i in reversed(range(10)):
        again = backward[i]
        assert np.array_equal(again.image, seen[i].image) and again.captions == seen[i].captions
    assert not np.array_equal(ClutteredShapes(48, seed=6)[0].image, seen[0].image)
    assert seen[0].image.shape == (48, 48, 3) and seen[0].image.dtype == np.uint8
    with pytest.raises(IndexError, match="index must be in"):
        forward[-1]


def test_images_may_be_rectangles():
    """The waves and shapes reach from edge to edge, and shapes are as large as in a square of the shorter side."""
    data = ClutteredShapes((40, 80), seed=5)
    columns = np.zeros(80, bool)
    for i in range(60):
        sample = data[i]
        assert sample.image.shape == (40, 80, 3)
        distance = np.abs(sample.image.astype(float) - COLORS[data.classes[sample.labels[0]]]).max(-1)
        columns |= (distance < 30).sum(0) > 3
    assert columns[:4].any() and columns[-4:].any()


def test_the_caption_says_the_label_twice_and_no_other():
    data = ClutteredShapes(32)
    for i in range(100):
        sample = data[i]
        words = re.findall("[a-z]+", sample.captions[0])
        (label,) = sample.labels
        assert [word for word in words if word in COLORS] == [data.classes[label]] * 2


def test_the_label_is_in_the_pixels_but_in_few():
    """Some pixels come as near to the label's color as noise lets them, and they are a small part of the image."""
    data, shares = ClutteredShapes(48), []
    for i in range(100):
        sample = data[i]
        distance = np.abs(sample.image.astype(float) - COLORS[data.classes[sample.labels[0]]]).max(-1)
        shares.append((distance < 40).mean())
    assert min(shares) > 0.005 and np.mean(shares) < 0.15


def test_a_caption_is_right_for_every_image_of_its_color_and_shape():
    samples = [ClutteredShapes(48, seed=3)[i] for i in range(60)]
    pairs = [(a, b) for a in samples for b in samples if a is not b]
    right = [(a, b) for a, b in pairs if a.says[0] <= b.facts]
    assert 5 < len(right) < 150
    for a, b in pairs:
        words = [set(re.findall("|".join([*COLORS, *map(plural, SHAPES)]), x.captions[0])) for x in (a, b)]
        assert (a.says[0] <= b.facts) == (words[0] == words[1])


def test_a_linear_function_of_the_pixels_tells_few_labels():
    data = ClutteredShapes(32)
    samples = [data[i] for i in range(3000)]
    pixels = np.stack([s.image.reshape(16, 2, 16, 2, 3).mean((1, 3)).ravel() for s in samples]) / 255 - 0.5
    wanted = np.eye(12)[[s.labels[0] for s in samples]] - 1 / 12
    train, test = slice(0, 2000), slice(2000, None)
    gram = pixels[train].T @ pixels[train] + 30 * np.eye(pixels.shape[1])
    weights = np.linalg.solve(gram, pixels[train].T @ wanted[train])
    accuracy = ((pixels[test] @ weights).argmax(1) == wanted[test].argmax(1)).mean()
    assert 0.15 < accuracy < 0.4


def test_paired_share_keeps_the_same_images():
    whole = open_dataset("cluttered", image_size=32, seed=1)
    some = PairedShare(whole, 0.3, seed=2)
    kept = [i for i in range(1000) if some.keeps(i)]
    assert 250 < len(kept) < 350
    for i in range(30):
        assert some[i].captions == (whole[i].captions if i in kept else ()) and some[i].labels == whole[i].labels
    assert kept == [i for i in range(1000) if PairedShare(whole, 0.3, seed=2).keeps(i)]
    assert kept != [i for i in range(1000) if PairedShare(whole, 0.3, seed=3).keeps(i)]
    assert set(kept) < {i for i in range(1000) if PairedShare(whole, 0.5, seed=2).keeps(i)}, "more pairs hold fewer"
    assert (some.endless, some.crop_scale, some.classes) == (whole.endless, whole.crop_scale, whole.classes)
    with pytest.raises(ValueError, match="share must be in"):
        PairedShare(whole, 0, seed=2)


def test_paired_share_of_files_decodes_no_more_than_it_must_and_of_several_draws_for_each():
    photos = "tests/data/photos"
    whole, some = (
        open_dataset(photos, image_size=32, seed=0),
        open_dataset(photos, image_size=32, seed=0, paired_share=0.5),
    )
    for i in range(len(whole)):
        assert some.read(i).name == whole.names[i] and not isinstance(some.read(i).image, np.ndarray)
        assert np.array_equal(some[i].image, whole[i].image)
        assert some[i].captions == some.read(i).captions == (whole[i].captions if some.keeps(i) else ())
    first, second = open_dataset(["cluttered", "cluttered"], image_size=32, seed=0, paired_share=0.5).sources
    assert [first.keeps(i) for i in range(64)] != [second.keeps(i) for i in range(64)]
