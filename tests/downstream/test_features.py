"""extract: the features of every model, and every sample that has none."""

import numpy as np
import pytest
import torch

from m3ae_fast import ImageTextBatch
from m3ae_fast.data import Sample, Tokenizer
from m3ae_fast.downstream.features import extract
from m3ae_fast.downstream.pack import pack_for
from m3ae_fast.models import OBJECTIVES

WORDS = ["a red circle", "two stars", "a ring on a star"]
TOKENIZER = Tokenizer.train(WORDS, 200)
SIZES = {"image_size": 16, "patch_size": 8, "vocab_size": TOKENIZER.vocab_size}
CONFIGS = {"supervised": {"image_size": 16, "patch_size": 8, "classes": 3}}


def noise(i):
    return np.random.default_rng(i).integers(0, 256, (20, 16 + i, 3), np.uint8)


SAMPLES = [Sample(noise(i), (WORDS[i % 3], "another"), f"{i}.png", (i % 3,)) for i in range(7)]


@pytest.fixture(params=sorted(OBJECTIVES))
def model(request):
    torch.manual_seed(0)
    model, config = OBJECTIVES[request.param]
    return model(config.tiny(**CONFIGS.get(request.param, SIZES)))


def by_hand(model, batch):
    """The class tokens, by each model's own words for them."""
    name = type(model).__name__
    if name in ("M3AE", "MAE"):
        encoded = model.encode(batch)
        return encoded.tokens[encoded.seqlens.cu[:-1].long()]
    if name == "Supervised":
        return model.encode_images(batch.images)
    return model.encode_images(batch.images).tokens[:: 1 + model.config.patches]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_of_images(model, batch_size):
    model.train()
    features = extract(model, SAMPLES, batch_size=batch_size)
    assert model.training and features.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert features.cls.dtype == torch.float32 and features.labels.dtype == torch.int64
    assert not features.cls.is_inference() and not features.cls.requires_grad
    with torch.no_grad():
        wanted = by_hand(model, pack_for(model, [sample.image for sample in SAMPLES], None, None))
    torch.testing.assert_close(features.cls, wanted, atol=1e-5, rtol=1e-5)


def test_beside_text(model):
    if type(model).__name__ not in ("M3AE", "MAMO"):
        with pytest.raises(ValueError, match=f"text must be False: {type(model).__name__} encodes no image beside"):
            extract(model, SAMPLES, TOKENIZER, text=True)
        return
    features = extract(model.eval(), SAMPLES, TOKENIZER, text=True, batch_size=4)
    assert not model.training
    for i in (0, 5):  # alone, by its first caption
        batch = pack_for(model, [SAMPLES[i].image], [SAMPLES[i].captions[0]], TOKENIZER)
        with torch.no_grad():
            wanted = model.encode(batch).cls if hasattr(model, "encode") else fused(model, batch)
        torch.testing.assert_close(features.cls[i], wanted[0], atol=1e-5, rtol=1e-5)
    assert (features.cls - extract(model, SAMPLES).cls).abs().max() > 0.01


def fused(model, batch: ImageTextBatch):
    one = torch.zeros(1, dtype=torch.int64)
    images, texts = model.encode_images(batch.images), model.encode_texts(batch.text, batch.text_lengths)
    rows, layout = model.pair(images, texts, one, one, every=True)
    return model.online.fuse(rows, layout)[layout.cls]


@pytest.mark.parametrize(
    "sample, text, message",
    [
        (Sample(noise(0), (), "x.png", ()), False, "samples must have one label each, got none in x.png"),
        (Sample(noise(0), (), "x.png", (1, 2)), False, "samples must have one label each, got 2 in x.png"),
        (Sample(None, ("a",), "x.txt", (1,)), False, "samples must have an image each, got none in x.txt"),
        (Sample(noise(0), (), "x.png", (1,)), True, "samples must have a caption each, got none in x.png"),
        (None, False, "samples must hold at least one, got none"),
    ],
)
def test_what_has_none(sample, text, message):
    torch.manual_seed(0)
    model, config = OBJECTIVES["m3ae"]
    model = model(config.tiny(**SIZES)).train()
    with pytest.raises(ValueError, match=message):
        extract(model, [*SAMPLES, sample] if sample else [], TOKENIZER, text=text)
    assert model.training
