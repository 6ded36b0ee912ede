"""Images from captions alone, captions from images alone: what is rebuilt is not seen, and words come in turn."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from m3ae_fast import ImageTextBatch
from m3ae_fast._drawing import PAPER
from m3ae_fast.data import Tokenizer
from m3ae_fast.downstream.pack import pack_for
from m3ae_fast.downstream.tasks import imagine as module
from m3ae_fast.downstream.tasks.imagine import draw_imagined, image_from_words, imagine, words_from_image
from m3ae_fast.examples import Pair
from m3ae_fast.models import M3AE, MAE, M3AEConfig
from m3ae_fast.train.pictures import unpatchify

TEXTS = ["a red circle", "two stars on a blue ring in the middle of it"]
TOKENIZER = Tokenizer.train(TEXTS, 200)
IMAGES = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in range(2)]
PAIRS = [Pair(image, (text,), text) for image, text in zip(IMAGES, TEXTS, strict=True)]


def make(kind=M3AE, **changes):
    """A model whose predictions differ from place to place and are not all alike."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 1, "decoder_width": 32, "decoder_depth": 1}
    model = kind(M3AEConfig.tiny(**sizes, vocab_size=TOKENIZER.vocab_size, **changes)).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def packed(model, images=IMAGES, texts=TEXTS):
    return pack_for(model, images, texts, TOKENIZER)


def same(images, others):
    return [torch.equal(a, b) for a, b in zip(images, others, strict=True)]


@pytest.mark.parametrize("decoder", ["joint", "cross"])
def test_an_image_is_made_of_the_words_alone(decoder):
    model = make(decoder=decoder)
    found = image_from_words(model, packed(model))
    assert [(each.shape, each.dtype) for each in found] == [((16, 16, 3), torch.uint8)] * 2
    assert same(found, image_from_words(model, packed(model, IMAGES[::-1]))) == [True, True], "pixels are not seen"
    assert same(found, image_from_words(model, packed(model, None))) == [True, True], "and need not be there"
    other = packed(model, texts=["a red ring", TEXTS[1]])
    assert same(found, image_from_words(model, other)) == [False, True]
    blind = image_from_words(model, packed(model), masked=True)
    assert same(blind, image_from_words(model, other, masked=True)) == [True, True] and same(blind, found)[0] is False
    assert model.training


def test_it_is_what_the_model_rebuilds_with_every_patch_masked():
    model = make()
    batch = packed(model)
    masks = {"image_mask": torch.ones(2, 16, dtype=torch.bool), "text_mask": torch.zeros(2, 11, dtype=torch.bool)}
    with torch.no_grad():
        wanted = unpatchify(model.reconstruct(batch, **masks).image, model.config)
    assert same(image_from_words(model, batch), wanted) == [True, True]


@pytest.mark.parametrize("decoder", ["joint", "cross"])
def test_words_are_made_of_the_image_alone(decoder):
    model = make(decoder=decoder)
    batch = packed(model)
    found = words_from_image(model, batch)
    assert found.shape == batch.text.shape and found.dtype == batch.text.dtype
    lengths = batch.text_lengths
    unread = ImageTextBatch(batch.images, torch.zeros_like(batch.text), lengths)
    assert torch.equal(found, words_from_image(model, unread)), "the caption is not seen, only its length"
    other = ImageTextBatch(255 - batch.images, batch.text, lengths)
    assert not torch.equal(found, words_from_image(model, other))
    blind = words_from_image(model, batch, masked=True)
    assert torch.equal(blind, words_from_image(model, other, masked=True)) and not torch.equal(blind, found)
    assert words_from_image(model, packed(model, texts=None), words=3).shape == (6,)
    assert model.training


def filled(model, image, length, rounds):
    """One caption, by a plain loop: in each round the surest of the words that are left."""
    text, left = torch.zeros(length, dtype=torch.int32), set(range(length))
    for done in range(1, rounds + 1):
        mask = torch.tensor([[place in left for place in range(length)]])
        batch = ImageTextBatch(image[None], text, [length])
        image_mask = torch.zeros(1, 16, dtype=torch.bool)
        logits = model.reconstruct(batch, image_mask=image_mask, text_mask=mask).text_logits
        sure = logits.softmax(-1).amax(-1)
        while length - len(left) < math.ceil(length * done / rounds):
            best = max(left, key=lambda place: sure[place])
            text[best] = logits[best].argmax()
            left.remove(best)
    return text


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 99])
def test_the_surest_words_come_first(rounds):
    model = make().eval()
    batch = packed(model)
    lengths = batch.text_lengths.lengths
    found = words_from_image(model, batch, rounds=rounds).split(lengths)
    with torch.no_grad():
        wanted = [filled(model, *each, min(rounds, max(lengths))) for each in zip(batch.images, lengths, strict=True)]
    assert same(found, wanted) == [True, True]


def test_later_words_are_guessed_in_view_of_earlier_ones():
    model = make()
    found = [words_from_image(model, packed(model), rounds=rounds) for rounds in (1, 99)]
    assert not torch.equal(*found)


def test_scores(monkeypatch):
    """Of a model that rebuilds an image as half as bright, and gets the first of three words right."""
    model = make()
    batch = packed(model, IMAGES[:1], TEXTS[:1])
    dark = torch.from_numpy(IMAGES[0]) // 2
    wrong = torch.cat([batch.text[:1], batch.text[1:] + 1])
    monkeypatch.setattr(module, "image_from_words", lambda *_, masked=False: [dark * (not masked)])
    monkeypatch.setattr(module, "words_from_image", lambda *_, masked=False, rounds: wrong + masked)
    pixels = IMAGES[0].astype(np.float64)
    wanted = {
        "pixel error, from the caption": np.sqrt(np.mean((pixels - pixels // 2) ** 2)) / 255,
        "pixel error, from nothing": np.sqrt(np.mean(pixels**2)) / 255,
        "pixel error, its mean color": np.sqrt(pixels.var((0, 1)).mean()) / 255,
        "words right, from the image": 1 / len(batch.text),
        "words right, from nothing": 0,
    }
    results = imagine(model, PAIRS[:1], TOKENIZER)
    assert {r.name: pytest.approx(r.value, abs=1e-6) for r in results} == wanted
    assert {r.count for r in results} == {1} and {r.chance for r in results} == {None}


@pytest.mark.parametrize("changes", [{}, {"max_patches": 20}])
def test_scores_do_not_depend_on_the_batch(changes):
    """Nor do those of images of mixed sizes."""
    model = make(**changes)
    wide = Pair(np.ascontiguousarray(IMAGES[0][:8]), ("a ring",), "wide")
    pairs = [*PAIRS, wide]
    found = [imagine(model, pairs, TOKENIZER, batch_size=size) for size in (1, 3)]
    assert [r.count for r in found[0]] == [3] * 5
    for one, all_ in zip(*found, strict=True):
        assert one.value == pytest.approx(all_.value, abs=1e-4)


@pytest.mark.parametrize(
    "changes, call, message",
    [
        ({"kind": MAE}, lambda m: image_from_words(m, packed(m, texts=None)), "model must be an M3AE of images and w"),
        ({"kind": MAE}, lambda m: words_from_image(m, packed(m, texts=None)), "model must be an M3AE of images and w"),
        ({"norm_pix": True}, lambda m: image_from_words(m, packed(m)), "model must be trained without norm_pix"),
        ({}, lambda m: image_from_words(m, packed(m, texts=None)), "batch must have words in every sample, got one"),
        ({}, lambda m: words_from_image(m, packed(m, None)), "batch must have an image in every sample, got none"),
        ({}, lambda m: words_from_image(m, packed(m), rounds=0), "rounds must be at least 1, got 0"),
        ({}, lambda m: words_from_image(m, packed(m, texts=None), words=41), r"words must be in \[1, 41\), got 41"),
        ({}, lambda m: imagine(m, [], TOKENIZER), "pairs must hold at least one, got none"),
    ],
)
def test_arguments(changes, call, message):
    with pytest.raises(ValueError, match=message):
        call(make(**changes))


def test_some_without_an_image():
    model = make()
    batch = packed(model)
    some = ImageTextBatch(batch.images[:1], batch.text, batch.text_lengths, has_image=[True, False])
    for function in (image_from_words, words_from_image):
        with pytest.raises(ValueError, match="batch must have an image in every sample, got one without"):
            function(model, some)


@pytest.fixture
def cards(monkeypatch):
    """The cards and titles that are drawn."""
    found, draw = [], module.Cards
    monkeypatch.setattr(module, "Cards", lambda *given: (found.append(given), draw(*given))[1])
    return found


def test_picture_of_pairs(cards, tmp_path):
    model = make()
    draw_imagined(model, IMAGES, TEXTS, TOKENIZER, tmp_path / "p.png")
    shown, titles, note = cards[0]
    assert titles == ("original", "from the caption alone") and note == "words are guessed from the image alone"
    made = image_from_words(model, packed(model))
    for card, image, other in zip(shown, IMAGES, made, strict=True):
        assert np.array_equal(card.panels[0], image) and np.array_equal(card.panels[1], other.numpy())
    guesses = words_from_image(model, packed(model))
    tokens = TOKENIZER.tokens(packed(model).text.tolist())
    wanted = list(zip(tokens, TOKENIZER.tokens(guesses.tolist()), [True] * len(tokens), strict=True))
    assert [word for card in shown for word in card.words] == wanted
    assert np.asarray(Image.open(tmp_path / "p.png")).std() > 20


def test_picture_of_one_kind(cards, tmp_path):
    model = make()
    draw_imagined(model, None, TEXTS, TOKENIZER, tmp_path / "images.png")
    draw_imagined(model, IMAGES, None, TOKENIZER, tmp_path / "words.png", words=3, rounds=2)
    (of_texts, titles, note), (of_images, others, _) = cards
    assert titles == ("from the caption alone",) and note == "" and others == ("original",)
    assert [word for card in of_texts for word, *_ in card.words] == TOKENIZER.tokens(packed(model).text.tolist())
    ids = words_from_image(model, packed(model, texts=None), words=3, rounds=2)
    assert [word for card in of_images for word, *_ in card.words] == TOKENIZER.tokens(ids.tolist())
    assert not any(masked for card in (*of_texts, *of_images) for *_, masked in card.words), "there is no truth beside"


def test_a_narrow_picture_has_room_for_what_it_says(tmp_path):
    draw_imagined(make(), IMAGES[:1], TEXTS[:1], TOKENIZER, tmp_path / "p.png")
    margin = np.asarray(Image.open(tmp_path / "p.png"))[:, -20:]
    assert (margin == np.array(ImageColor.getrgb(PAPER))).all()
