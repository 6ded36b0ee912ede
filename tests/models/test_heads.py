"""VQA, reasoning and grounding on MAMO against plain PyTorch, one sample at a time."""

import pytest
import torch
import torch.nn.functional as F

from m3ae_fast.models.ground import ground, points, to_pixels
from m3ae_fast.models.reason import Reason
from m3ae_fast.models.vqa import VQA
from tests.models.plain_mamo import CONFIG, make_batch, make_model, mlp, plain_fusion, plain_image, plain_text

EVERY = list(range(16))


def fused(mamo, image, words):
    online = mamo.online
    tokens = plain_image(online.image, CONFIG, image, EVERY)
    return plain_fusion(online, tokens, EVERY, plain_text(online.text, words.long()))


def texts(batch):
    return batch.text.split(batch.text_lengths.lengths)


def noisy(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def norm(layer, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-6)


def attention(q, k, v, heads, mask=0.0):
    q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in (q, k, v))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def plain_likelihood(vqa, image, question, answer):
    """log p(answer, end | image, question), a word at a time."""
    context, table = fused(vqa.mamo, image, question), vqa.mamo.online.text
    total, end = 0.0, CONFIG.vocab_size
    for n, word in enumerate([*answer, end]):
        x = table.embedding.weight[[end, *answer[:n]]] + table.position[: n + 1]
        for block in vqa.blocks:
            q, k, v = block.qkv(norm(block.norm1, x)).chunk(3, dim=1)
            causal = torch.full((n + 1, n + 1), -torch.inf).triu(1)
            x = x + block.proj(attention(q, k, v, block.heads, causal))
            k, v = block.cross.kv(context).chunk(2, dim=1)
            x = x + block.cross.proj(attention(block.cross.q(norm(block.norm2, x)), k, v, block.heads))
            y = F.linear(norm(block.norm3, x), block.mlp.fc1.weight, block.mlp.fc1.bias)
            x = x + F.linear(F.gelu(y), block.mlp.fc2.weight, block.mlp.fc2.bias)
        logits = F.linear(norm(vqa.norm, x[-1]), vqa.head.weight, vqa.head.bias)
        total = total + logits.log_softmax(0)[word]
    return total


ANSWERS = [[3], [7, 1, 9], [3, 2]]


@pytest.fixture
def vqa():
    return noisy(VQA(make_model()))


def test_answers_are_ranked_by_their_likelihood(vqa):
    batch = make_batch((5, 3, 8))
    ranked = vqa.rank(batch, ANSWERS)
    wanted = [
        [plain_likelihood(vqa, i, q, a) for a in ANSWERS] for i, q in zip(batch.images, texts(batch), strict=True)
    ]
    torch.testing.assert_close(ranked, torch.stack([torch.stack(row) for row in wanted]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ranked[:, :1], vqa.rank(batch, ANSWERS[:1]))  # the others do not matter


def test_the_loss_of_answering(vqa):
    batch = make_batch((5, 3, 8))
    loss = vqa(batch, ANSWERS)
    torch.testing.assert_close(loss, -vqa.rank(batch, ANSWERS).diagonal().mean())
    loss.backward()
    assert all(p.grad is not None for p in vqa.blocks.parameters())
    assert vqa.mamo.online.image.patch_embed.proj.weight.grad.abs().max() > 0


def test_answers_must_have_words(vqa):
    batch = make_batch((5, 3))
    with pytest.raises(ValueError, match="at least one word each, got none in answer 1"):
        vqa.rank(batch, [[1], []])
    with pytest.raises(ValueError, match="less than max_text_length 8 words, got 8 in answer 0"):
        vqa.rank(batch, [[1] * 8])
    with pytest.raises(ValueError, match="answers must be 2, one a question, got 3"):
        vqa(batch, ANSWERS)


def test_reason_reads_the_sentence_beside_each_image():
    model = noisy(Reason(make_model()))
    right, left = make_batch((5, 3, 8)), make_batch((5, 3, 8), seed=1).images
    logits = model(left, right)
    for b, words in enumerate(texts(right)):
        cls = [fused(model.mamo, images[b], words)[0] for images in (left, right.images)]
        torch.testing.assert_close(logits[b], mlp(model.head, torch.cat(cls))[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="left must have the shape"):
        model(left[:2], right)


@pytest.mark.parametrize("block", [0, 1])
def test_grounding_is_grad_cam_of_itm(block):
    """The gradient of the plain score by the plain attention weights of that block: from CLS and words to patches."""
    mamo = make_model()
    batch = make_batch((5, 3, 8))
    maps = ground(mamo, batch, block=block)
    for b, words in enumerate(texts(batch)):
        online = mamo.online
        image, text = plain_image(online.image, CONFIG, batch.images[b], EVERY), plain_text(online.text, words.long())
        patches = image[1:] + online.image.position + online.image_type
        x = torch.cat([text[:1], patches, text[1:] + online.text.position[: len(words)] + online.text_type])
        for number, each in enumerate(online.fusion.blocks):
            y = norm(each.norm1, x)
            q, k, v = F.linear(y, each.attn.qkv.weight, each.attn.qkv.bias).view(len(x), 3, 4, 8).permute(1, 2, 0, 3)
            weights = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1)
            if number == block:
                kept = weights
            x = x + each.attn.proj((weights @ v).transpose(0, 1).flatten(1))
            y = F.gelu(F.linear(norm(each.norm2, x), each.mlp.fc1.weight, each.mlp.fc1.bias))
            x = x + F.linear(y, each.mlp.fc2.weight, each.mlp.fc2.bias)
        logits = mamo.match_head(norm(online.fusion.norm, x)[0])
        (gradient,) = torch.autograd.grad(logits[1] - logits[0], kept)
        cam = (kept * gradient).clamp(min=0).mean(0)[[0, *range(17, len(x))], 1:17].mean(0)
        assert cam.max() > 0
        torch.testing.assert_close(maps[b], cam, rtol=1e-3, atol=1e-7)


def test_grounding_needs_no_trainable_model_and_says_which_blocks_there_are():
    mamo = make_model()
    batch = make_batch((5, 3))
    maps = ground(mamo, batch)
    with torch.no_grad():
        assert torch.equal(ground(mamo.requires_grad_(False), batch), maps)
    with pytest.raises(ValueError, match=r"block must be in \[0, 2\)"):
        ground(mamo, batch, block=2)


def test_points_are_the_highest_pixels():
    maps = torch.zeros(2, 16)
    maps[0, 0] = maps[1, 7] = 1.0  # the corner; second row, last column
    (x0, y0), (x1, y1) = points(maps, CONFIG).tolist()
    assert x0 < 4 and y0 < 4 and x1 >= 12 and 4 <= y1 < 8
    assert to_pixels(maps, CONFIG).shape == (2, 16, 16)
