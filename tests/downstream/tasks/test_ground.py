"""Grounding: how often the map points at the box, and the picture."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.downstream import Phrase
from m3ae_fast.downstream.tasks import ground as grounding
from m3ae_fast.downstream.tasks.ground import draw_ground, ground
from m3ae_fast.models import MAMO
from tests.downstream.tasks.tiny import TOKENIZER, make


@pytest.fixture
def peaks(monkeypatch):
    """peaks(patch, ...): the maps of the phrases, in order, highest at that patch of the 4 x 4."""

    def put(*patches):
        left = list(patches)

        def maps_of(model, batch, *, block=None):
            maps = torch.zeros(len(batch), 16)
            for row in maps:
                row[left.pop(0)] = 1.0
            return maps

        monkeypatch.setattr(grounding, "maps_of", maps_of)

    return put


SQUARE, WIDE = np.zeros((64, 64, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)
PHRASES = [
    Phrase(SQUARE, "red", (0, 0, 16, 16), "hit: the first patch, at half its size"),
    Phrase(SQUARE, "red", (16, 0, 64, 64), "missed"),
    Phrase(SQUARE, "red", None, "no box"),
    Phrase(WIDE, "red", (0, 0, 15, 32), "cut off: what is left of column 16"),
    Phrase(WIDE, "red", (8, 24, 24, 32), "hit: of its 16 columns 8 are left"),
]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_pointing_accuracy(peaks, size):
    peaks(0, 0, 0, 0, 12)
    (result,) = ground(make(), PHRASES, TOKENIZER, batch_size=size)
    shares = (1 / 16, 3 / 4, 8 * 8 / 32**2)
    assert (result.name, result.count) == ("pointing accuracy", 3)
    assert result.value == pytest.approx(2 / 3) and result.chance == pytest.approx(sum(shares) / 3)


def test_a_random_object_is_a_row_of_its_own(peaks):
    """Where the number of objects is known of every phrase that is scored."""
    known = [dataclasses.replace(phrase, objects=n) for phrase, n in zip(PHRASES, (2, 4, None, None, 4), strict=True)]
    peaks(0, 0, 0, 0, 12, 0, 0)
    pointing, guess = ground(make(), known, TOKENIZER)
    assert (guess.name, guess.count, guess.chance) == ("a random object", 3, pointing.chance)
    assert guess.value == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert len(ground(make(), [known[0], PHRASES[1]], TOKENIZER)) == 1


def test_no_box_no_score(peaks):
    peaks(0, 0)
    with pytest.raises(ValueError, match="none of 2 has one within the square in the middle"):
        ground(make(), PHRASES[2:4], TOKENIZER)


def test_a_box_keeps_its_place_in_a_rectangle(monkeypatch, tmp_path):
    model = MAMO(dataclasses.replace(make().config, image_size=(16, 48)))  # 2 x 6 patches
    maps = torch.zeros(2, 12)
    maps[:, 5] = 1.0  # in the upper right corner
    monkeypatch.setattr(grounding, "maps_of", lambda *_, **__: maps)
    image = np.zeros((48, 144, 3), np.uint8)
    phrases = [Phrase(image, "red", (120, 0, 144, 24), "hit"), Phrase(image, "red", (0, 0, 24, 24), "missed")]
    (result,) = ground(model, phrases, TOKENIZER)
    assert (result.value, result.count) == (0.5, 2) and result.chance == pytest.approx(1 / 12)
    draw_ground(model, phrases, TOKENIZER, tmp_path / "x.png")
    assert np.asarray(Image.open(tmp_path / "x.png")).std() > 5


def test_a_picture_of_phrases(peaks, tmp_path):
    """Green where the box is hit, red where it is missed."""
    for name, patch in (("hit", 0), ("missed", 15)):
        peaks(patch, 5)
        draw_ground(make(), [PHRASES[0], PHRASES[2]], TOKENIZER, tmp_path / f"{name}.png")
    hit, missed = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("hit", "missed"))
    assert hit.shape == missed.shape and min(hit.shape[:2]) > 200

    def count(image, color):
        return (np.abs(image - color).sum(2) < 60).sum()

    green, red = (0x17, 0x8A, 0x4C), (0xC8, 0x45, 0x2F)
    assert count(hit, green) > 100 > count(hit, red) and count(missed, red) > 100 > count(missed, green)
