"""Attention maps: the weights are those that the encoder used, rollout is their product."""

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast import ImageTextBatch, SeqLens, nn
from m3ae_fast.data import Tokenizer
from m3ae_fast.downstream.pack import pack
from m3ae_fast.downstream.tasks import attend as module
from m3ae_fast.downstream.tasks.attend import attend, by_word, draw_attention, weights_of
from m3ae_fast.models import OBJECTIVES

TEXTS = ["a red circle", "two stars on a blue ring in the middle of it"]
TOKENIZER = Tokenizer.train(TEXTS, 200)
SIZES = {"image_size": 16, "patch_size": 4, "vocab_size": TOKENIZER.vocab_size}
CONFIGS = {"supervised": {"image_size": 16, "patch_size": 4, "classes": 3}}
IMAGES = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in range(2)]


def make(objective, **changes):
    torch.manual_seed(0)
    model, config = OBJECTIVES[objective]
    return model(config.tiny(**CONFIGS.get(objective, SIZES), **changes)).train()


def batch(texts=True):
    return pack(IMAGES, TEXTS if texts else None, TOKENIZER, image_size=16, max_text_length=40)


def test_weights_are_those_that_were_used():
    """With one head: weights @ v is what attention gave, in every block and sequence."""
    torch.manual_seed(0)
    transformer, seqlens = nn.Transformer(8, 3, 1), SeqLens([5, 1, 7])
    given = []
    for block in transformer.blocks:
        block.attn.register_forward_hook(lambda attn, inputs, out: given.append((attn, inputs[0], out)))
    with torch.no_grad():
        found = weights_of(transformer, lambda: transformer(torch.randn(13, 8) * 4, seqlens))
        for (attn, x, out), weights in zip(given, found, strict=True):
            v = attn.qkv(x)[:, 16:].split(seqlens.lengths)
            torch.testing.assert_close(
                attn.proj(torch.cat([w @ each for w, each in zip(weights, v, strict=True)])), out, atol=1e-5, rtol=1e-5
            )
            assert weights[2].std() > 0.01, "not all alike"
    assert not any(block.attn._forward_pre_hooks for block in transformer.blocks)


def test_the_mean_over_heads():
    torch.manual_seed(0)
    transformer, x = nn.Transformer(8, 1, 2), torch.randn(4, 8) * 4
    block = transformer.blocks[0]
    with torch.no_grad():
        found = weights_of(transformer, lambda: transformer(x, SeqLens([4])))[0][0]
        q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
        heads = [(q[:, c] @ k[:, c].T / 2).softmax(1) for c in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(found, (heads[0] + heads[1]) / 2)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize("options", [{}, {"layer": 0}, {"rollout": True}])
def test_of_every_model(objective, texts, options):
    model = make(objective)
    found = attend(model, batch(texts), **options)
    words = batch().text_lengths.lengths if texts and objective in ("m3ae", "mamo") else (0, 0)
    assert [(each.cls.shape, each.words.shape) for each in found] == [((16,), (n, 16)) for n in words]
    for each in found:
        rows = torch.cat([each.cls[None], each.words])
        assert (rows > 0).all() and (rows.sum(1) < 1).all() and rows.dtype == torch.float32
    assert model.training


def test_a_sample_does_not_see_its_neighbors():
    one = pack(IMAGES[1:], TEXTS[1:], TOKENIZER, image_size=16, max_text_length=40)
    both, alone = attend(make("m3ae"), batch())[1], attend(make("m3ae"), one)[0]
    torch.testing.assert_close(both.words, alone.words)
    torch.testing.assert_close(both.cls, alone.cls)


def test_some_without_a_caption():
    ids = TOKENIZER.encode(TEXTS[0])
    images = torch.from_numpy(np.stack(IMAGES)).permute(0, 3, 1, 2)
    some = ImageTextBatch(images, torch.tensor(ids), [0, len(ids)])
    for objective in ("m3ae", "mamo"):
        found = attend(make(objective), some)
        assert [len(each.words) for each in found] == [0, len(ids)]


def test_rollout():
    first, second = torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    one = torch.eye(2)
    wanted = (0.5 * second + 0.5 * one) @ (0.5 * first + 0.5 * one)
    torch.testing.assert_close(module._rollout((first, second)), wanted)
    torch.testing.assert_close(wanted.sum(1), torch.ones(2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer": 2}, r"layer must be in \[0, 2\), a block of the encoder, got 2"),
        ({"layer": 0, "rollout": True}, "layer must be None with rollout, which goes through all of them, got 0"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        attend(make("mae"), batch(), **options)


def test_the_mode_is_restored_whatever_happens(monkeypatch):
    model = make("mae")
    monkeypatch.setattr(model, "encode_cls", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attend(model, batch())
    assert model.training


def test_texts_alone():
    texts = pack(None, TEXTS, TOKENIZER, image_size=16, max_text_length=40)
    with pytest.raises(ValueError, match="batch must have an image in every sample"):
        attend(make("m3ae"), texts)


def test_picture(tmp_path):
    """A line of eight panels an image; where the words are more, lines below."""
    draw_attention(make("m3ae"), batch(), TOKENIZER, tmp_path / "words.png")
    draw_attention(make("mae"), batch(), TOKENIZER, tmp_path / "cls.png")
    words, cls = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("words", "cls"))
    lines = 1 + 1 + -(-(len(TOKENIZER.encode(TEXTS[1])) + 2 - 8) // 7)
    assert words.shape[0] == pytest.approx(lines * 1.6 * 110, abs=2) and words.shape[1] == pytest.approx(8 * 154, abs=2)
    assert cls.shape[0] == pytest.approx(2 * 1.6 * 110, abs=2) and cls.shape[1] == pytest.approx(2 * 154, abs=2)
    assert cls.std() > 20


def test_the_pieces_of_a_word_share_a_map():
    maps = torch.tensor([[1.0, 0.0], [0.0, 4.0], [0.0, 2.0], [5.0, 5.0]])
    words = dict(by_word(["red", "st", "##ar", "##"], maps))
    assert {word: each.tolist() for word, each in words.items()} == {"red": [1, 0], "star": [0, 3], "##": [5, 5]}
