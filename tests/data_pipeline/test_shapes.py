"""Scenes: deterministic, exactly where they say, and truthfully described."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from m3ae_fast.data import ShapesDataset, open_dataset
from m3ae_fast.data.scenes import Scene
from m3ae_fast.data.shapes import BACKGROUNDS, COLORS, SHAPES, SIZES, draw

SCENES = 300


def test_scene_depends_on_index_and_seed_alone():
    forward, backward = ShapesDataset(48, seed=5), ShapesDataset(48, seed=5)
    seen = [forward[i] for i in range(20)]
    for i in reversed(range(20)):
        again = backward[i]
        assert np.array_equal(again.image, seen[i].image)
        assert again.captions == seen[i].captions and again.name == seen[i].name == f"shapes/{i}"
    assert len({sample.captions for sample in seen}) == 20
    assert not np.array_equal(ShapesDataset(48, seed=6)[0].image, seen[0].image)


def test_scene_is_the_same_at_every_size():
    small, large = ShapesDataset(32, seed=1), ShapesDataset(256, seed=1)
    for i in range(50):
        a, b = small.scene(i), large.scene(i)
        assert a.captions == b.captions
        for x, y in zip(a.objects, b.objects, strict=True):
            assert (x.shape, x.color, x.size) == (y.shape, y.color, y.size)
            np.testing.assert_allclose(np.array(x.box) / 32, np.array(y.box) / 256, atol=1.01 / 32)


def test_image():
    sample = ShapesDataset(64)[3]
    assert sample.image.shape == (64, 64, 3) and sample.image.dtype == np.uint8


@pytest.mark.parametrize("size", [32, 64, 101])
def test_boxes_hold_exactly_the_drawn_pixels(size):
    """Each object, drawn alone, changes pixels inside its box only, and touches all four sides of it."""
    dataset = ShapesDataset(size, seed=2)
    for i in range(60):
        scene = dataset.scene(i)
        empty = draw(Scene(scene.background, (), ()), size)
        assert (empty == BACKGROUNDS[scene.background]).all()
        together = np.zeros((size, size), int)
        for item in scene.objects:
            changed = (draw(Scene(scene.background, (item,), ()), size) != empty).any(-1)
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == item.box, item
            together += changed
        assert together.max() == 1, "objects overlap"
        assert np.array_equal(together > 0, (draw(scene, size) != empty).any(-1))


def test_objects_have_their_color_and_size():
    dataset = ShapesDataset(128)
    for i in range(100):
        scene = dataset.scene(i)
        for item in scene.objects:
            x0, y0, x1, y1 = item.box
            pixels = dataset[i].image[y0:y1, x0:x1]
            assert (pixels == COLORS[item.color]).all(-1).mean() > 0.2
            low, high = SIZES[item.size]
            assert x1 - x0 == y1 - y0 and low * 128 - 1 <= x1 - x0 <= high * 128 + 1


def test_objects_are_darker_than_every_background():
    """By which shapes can be learned from few images: the sign of the contrast never changes."""
    luminance = lambda color: np.dot((0.299, 0.587, 0.114), color)  # noqa: E731
    assert max(map(luminance, COLORS.values())) + 30 < min(map(luminance, BACKGROUNDS.values()))
    assert not COLORS.keys() & BACKGROUNDS.keys()


def test_attributes_are_drawn_independently():
    """So that no attribute can be guessed from another: every pair occurs, about as often as chance has it."""
    dataset = ShapesDataset(32)
    objects = [item for i in range(2000) for item in dataset.scene(i).objects]
    for first, second in itertools.combinations(("shape", "color", "size"), 2):
        pairs = Counter((getattr(o, first), getattr(o, second)) for o in objects)
        options = {"shape": len(SHAPES), "color": len(COLORS), "size": len(SIZES)}
        expected = len(objects) / options[first] / options[second]
        assert len(pairs) == options[first] * options[second]
        assert all(0.5 * expected < n < 1.6 * expected for n in pairs.values())
    counts = Counter(len(dataset.scene(i).objects) for i in range(2000))
    assert sorted(counts) == [1, 2, 3, 4] and min(counts.values()) > 400


# An account of the language of its own, to check the captions with: it shares no code with what writes them.
PHRASE = re.compile(
    rf"\ban? (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<color>{'|'.join(COLORS)}) )?(?P<shape>{'|'.join(SHAPES)})\b"
    r"(?P<place> (?:in the (?:top|bottom) (?:left|right) corner|in the center|at the (?:top|bottom)"
    r"|on the (?:left|right)))?"
)
RELATIONS = {
    "above": lambda a, b: a.box[3] < b.box[1],
    "below": lambda a, b: a.box[1] > b.box[3],
    "to the left of": lambda a, b: a.box[2] < b.box[0],
    "to the right of": lambda a, b: a.box[0] > b.box[2],
}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


def third(item, axis, size):
    """Which third of the image the object's middle is in, 0, 1 or 2, or two of them where a pixel decides."""
    middle = (item.box[axis] + item.box[axis + 2]) / 2
    return {int(3 * (middle + shift) / size) for shift in (-1, 1)}


def is_at(item, place, size):
    column = 0 if "left" in place else 2 if "right" in place else 1
    row = 0 if "top" in place else 2 if "bottom" in place else 1
    return column in third(item, 0, size) and row in third(item, 1, size)


def meant(match, scene, size):
    """The objects that a phrase can mean."""
    words = {k: v for k, v in match.groupdict().items() if v and k != "place"}
    fitting = [o for o in scene.objects if all(getattr(o, k) == v for k, v in words.items())]
    return [o for o in fitting if not match["place"] or is_at(o, match["place"], size)]


def test_captions_are_true():
    dataset = ShapesDataset(128, seed=4)
    relations, places, numbers = Counter(), 0, 0
    for i in range(SCENES):
        scene = dataset.scene(i)
        for caption in scene.captions:
            about = f"scene {i}: {caption!r} of {scene}"
            ground = re.search(r"\bon (?:an? )?(\w+)(?: background\b|$)", caption)
            assert ground and ground[1] == scene.background, about
            phrases = list(PHRASE.finditer(caption))
            for phrase in phrases:
                assert meant(phrase, scene, 128), about
                places += phrase["place"] is not None
            for a, b in itertools.pairwise(phrases):
                between = caption[a.end() : b.start()].strip()
                if between in RELATIONS:
                    relations[between] += 1
                    pairs = itertools.product(meant(a, scene, 128), meant(b, scene, 128))
                    assert any(RELATIONS[between](x, y) for x, y in pairs if x is not y), about
            counts = re.findall(rf"\b({'|'.join(NUMBERS)}) (shape|{'|'.join(SHAPES)})(?:s|es)?\b", caption)
            for number, shape in counts:
                named = [o for o in scene.objects if shape in ("shape", o.shape)]
                assert len(named) == NUMBERS[number], about
            numbers += len(counts)
            assert phrases or counts, about
        assert len(PHRASE.findall(scene.captions[2])) == len(scene.objects), f"the last must name every object: {scene}"
    # the account above read what there is to read
    assert len(relations) == 4 and min(relations.values()) > 20 and places > 100 and numbers > 50


def test_scenes_fill_a_rectangle():
    """Objects are as large as in a square of the shorter side, anywhere, and the thirds are the rectangle's."""
    height, width = 48, 120
    dataset, columns, places = ShapesDataset((height, width), seed=2), set(), 0
    for i in range(80):
        scene = dataset.scene(i)
        assert dataset[i].image.shape == (height, width, 3)
        empty = draw(Scene(scene.background, (), ()), (height, width))
        for item in scene.objects:
            changed = (draw(Scene(scene.background, (item,), ()), (height, width)) != empty).any(-1)
            ys, xs = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
            assert (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1) == item.box, item
            low, high = SIZES[item.size]
            assert low * height - 1 <= xs[-1] + 1 - xs[0] <= high * height + 1
            columns |= third(item, 0, width)
        for phrase in (match for caption in scene.captions for match in PHRASE.finditer(caption) if match["place"]):
            place, places = phrase["place"], places + 1
            row = 0 if "top" in place else 2 if "bottom" in place else 1
            column = 0 if "left" in place else 2 if "right" in place else 1
            words = {k: v for k, v in phrase.groupdict().items() if v and k != "place"}
            fitting = [o for o in scene.objects if all(getattr(o, k) == v for k, v in words.items())]
            assert any(row in third(o, 1, height) and column in third(o, 0, width) for o in fitting), (i, phrase[0])
    assert columns == {0, 1, 2} and places > 30


def test_what_a_caption_says_tells_of_which_other_scenes_it_is_true():
    dataset = ShapesDataset(128, seed=4)
    scenes = [dataset.scene(i) for i in range(SCENES)]
    shared = Counter()
    for scene, other in itertools.product(scenes, scenes):
        for caption, says in zip(scene.captions, scene.says, strict=True):
            told = says <= other.facts
            assert told or scene is not other, caption
            number = re.search(rf"\b({'|'.join(NUMBERS)}|one) shapes?\b", caption)
            if number:  # as many on the same ground, no more and no fewer
                assert told == (scene.background == other.background and len(scene.objects) == len(other.objects))
            elif told:
                assert scene.background == other.background
                assert all(meant(phrase, other, 128) for phrase in PHRASE.finditer(caption)), (caption, other)
            shared[bool(number)] += told and scene is not other
    assert shared[True] > 300 and shared[False] > 20


def test_captions_differ_in_length_and_read_well():
    dataset = ShapesDataset(32)
    captions = [caption for i in range(SCENES) for caption in dataset.scene(i).captions]
    words = [len(caption.replace(",", "").split()) for caption in captions]
    assert min(words) <= 5 and max(words) >= 25 and max(words) <= 36
    for caption in captions:
        assert re.fullmatch(r"[a-z ,]+", caption) and "  " not in caption and " ," not in caption, caption
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
    assert set(itertools.islice(dataset.captions(), len(captions))) == set(captions)


def test_arguments():
    for index in (-1, 2**31 - 1):
        with pytest.raises(IndexError, match=r"index must be in \[0, 2147483647\), got"):
            ShapesDataset(32)[index]
    assert ShapesDataset(32)[2**31 - 2].image.shape == (32, 32, 3)
    with pytest.raises(ValueError, match="size must be at least 32, got 31"):
        ShapesDataset(31)
    with pytest.raises(ValueError, match="seed must be in"):
        ShapesDataset(32, seed=-1)


def test_open_dataset():
    dataset = open_dataset("shapes", image_size=40, seed=9)
    assert isinstance(dataset, ShapesDataset) and (dataset.size, dataset.seed) == (40, 9)
