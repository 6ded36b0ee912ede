"""t-SNE: what is near stays near, and the picture is drawn."""

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.downstream.tasks.project import draw_projection, project


def clusters():
    labels = torch.arange(60) % 3
    return torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) + 20 * torch.eye(8)[labels], labels


def test_clusters_stay_apart():
    pytest.importorskip("sklearn", reason="scikit-learn, of the train extra, is missing")
    cls, labels = clusters()
    points = project(cls, perplexity=10)
    assert points.shape == (60, 2) and np.array_equal(points, project(cls, perplexity=10)), "the same again"
    distance = np.linalg.norm(points[:, None] - points, axis=2) + 1e9 * np.eye(60)
    assert (labels[distance.argmin(1)] == labels).all()


@pytest.mark.parametrize("classes, legend", [(["red", "$green_", "blue"], True), ([f"{i}" for i in range(21)], False)])
def test_picture(tmp_path, classes, legend):
    labels = torch.arange(60) % len(classes)
    points = np.random.default_rng(0).standard_normal((60, 2)).astype(np.float32)
    draw_projection(points, labels, classes, tmp_path / "p.png")
    drawn = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert drawn.shape[:2] == (660, 880)
    assert (drawn[:300, 800:] < 120).any() == legend, "names at the right"


@pytest.mark.parametrize(
    "count, perplexity, message",
    [
        (3, 1.0, "cls must hold 4 features or more, got 3"),
        (10, 10.0, r"perplexity must be in \(0, 10\), below the number of features, got 10"),
        (10, 0.0, r"perplexity must be in \(0, 10\)"),
    ],
)
def test_arguments(count, perplexity, message):
    with pytest.raises(ValueError, match=message):
        project(torch.ones(count, 2), perplexity=perplexity)


def test_a_class_has_the_color_it_is_named_after(tmp_path):
    """Where all classes are colors; else one may be of another color than its name says."""
    points = np.random.default_rng(0).standard_normal((60, 2)).astype(np.float32)
    reds = []
    for name, classes in (("all", ["red", "white"]), ("some", ["red", "star"])):
        draw_projection(points, torch.arange(60) % 2, classes, tmp_path / f"{name}.png")
        red, green, blue = (
            np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int).transpose(2, 0, 1)
        )
        reds.append(((red > 240) & (green < 70) & (blue < 70)).sum())
    assert reds[0] > 500 and reds[1] == 0
