"""Some samples of a data set, and random crops of them."""

import numpy as np
import pytest
from PIL import Image

from m3ae_fast.data import MixedDataset, ShapesDataset
from m3ae_fast.data.samples import COUNT, Crops, Some, open_classes, open_some


@pytest.fixture
def folder(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(5):
            pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return str(tmp_path)


@pytest.mark.parametrize("count, labels", [(None, [0] * 5 + [1] * 5), (4, [0, 0, 1, 1]), (99, [0] * 5 + [1] * 5)])
def test_of_a_folder_they_are_spread_over_the_classes(folder, count, labels):
    samples = open_classes(folder, image_size=16, count=count)
    assert samples.classes == ("ant", "bee") and [sample.labels for sample in samples] == [(n,) for n in labels]
    assert len({sample.name for sample in samples}) == len(labels)


def test_of_drawn_scenes_they_are_the_first():
    assert [sample.name for sample in open_some("shapes", image_size=32, count=3)] == [f"shapes/{i}" for i in range(3)]
    assert len(Some(ShapesDataset(32))) == COUNT


def test_crops(folder):
    whole = open_classes(folder, image_size=16, count=4)
    crops = Crops(whole, 3, 16, seed=1)
    assert len(crops) == 12 and [sample.labels[0] for sample in crops] == [0, 0, 1, 1] * 3
    assert all(sample.image.shape == (16, 16, 3) for sample in crops)
    assert not any(np.array_equal(crops[0].image, crops[i].image) for i in (4, 8)), "another one each time"
    again, other = Crops(whole, 3, 16, seed=1), Crops(whole, 3, 16, seed=2)
    assert np.array_equal(crops[7].image, again[7].image) and not np.array_equal(crops[7].image, other[7].image)
    shapes = Some(ShapesDataset(32), 2)
    assert np.array_equal(Crops(shapes, 2, 32)[3].image, shapes[1].image), "scenes are whole and never mirrored"


def test_arguments(folder):
    with pytest.raises(ValueError, match=r"must have classes, a subfolder for each of two or more, got none"):
        open_classes(folder + "/ant", image_size=16)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        open_some(folder, image_size=16, count=0)
    with pytest.raises(ValueError, match=r"dataset must be one whose samples can be .* got a MixedDataset"):
        Some(MixedDataset([ShapesDataset(32)] * 2, [1, 1]))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        Crops(Some(ShapesDataset(32), 2), 0, 32)
