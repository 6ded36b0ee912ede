"""Fine-tuning for classification: targets and mixing by hand, rates by layer, and that it learns."""

import numpy as np
import pytest
import torch

from m3ae_fast.data import Sample
from m3ae_fast.downstream.tasks import finetune as module
from m3ae_fast.downstream.tasks.finetune import (
    Classifier,
    finetune,
    layer_decayed,
    mix,
    normalized,
    score_classifier,
)
from m3ae_fast.models import OBJECTIVES, M3AEConfig

SIZES = {"image_size": 16, "patch_size": 8, "vocab_size": 50}
CONFIGS = {"supervised": {"image_size": 16, "patch_size": 8, "classes": 5}}


def make(objective="m3ae", classes=3):
    torch.manual_seed(0)
    model, config = OBJECTIVES[objective]
    return Classifier(model(config.tiny(**CONFIGS.get(objective, SIZES))), classes)


class Colors(list):
    """Noise around one of three colors: samples of three classes."""

    classes = ("red", "green", "blue")

    def __init__(self, count, seed=0):
        rng = np.random.default_rng(seed)
        for i in range(count):
            pixels = rng.integers(0, 100, (20, 20, 3), np.uint8)
            pixels[..., i % 3] += 60
            self.append(Sample(pixels, (), f"{i}", (i % 3,)))


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_it_learns_and_leaves_the_rest_alone(objective):
    model = make(objective)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    losses = finetune(model, Colors(60), steps=40, batch_size=20, lr=0.02, progress=False)
    assert losses[0] == pytest.approx(np.log(3), abs=1e-5), "the head starts at 0"
    result = score_classifier(model, Colors(30, seed=1))
    assert result.value > 0.9 and result.chance == pytest.approx(1 / 3) and not model.training
    tokens, transformer = model.model.image_encoder()
    trained = {id(p) for p in [*tokens, *transformer.parameters(), *model.norm.parameters(), *model.head.parameters()]}
    after = model.state_dict()
    for name, p in model.named_parameters():
        assert torch.equal(before[name], after[name]) == (id(p) not in trained), name
        assert p.requires_grad == asked[name] and (p.grad is None or id(p) in trained), name
    assert all(block.drop_path == 0 for block in transformer.blocks)


def test_the_same_bits_again():
    runs = [finetune(make(), Colors(20), steps=4, batch_size=8, progress=False, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] and runs[0][1:] != runs[2][1:]


def test_rates_fall_from_the_head_down():
    model = make()
    optimizer = layer_decayed(model, weight_decay=0.1, layer_decay=0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    inner = model.model
    for parameter, scale, decay in [
        (inner.cls_token, 0.125, 0.0),
        (inner.image_type, 0.125, 0.0),
        (inner.patch_embed.proj.weight, 0.125, 0.1),
        (inner.encoder.blocks[0].attn.qkv.weight, 0.25, 0.1),
        (inner.encoder.blocks[1].mlp.fc1.bias, 0.5, 0.0),
        (inner.encoder.norm.weight, 1.0, 0.0),
        (model.norm.bias, 1.0, 0.0),
        (model.head.weight, 1.0, 0.1),
    ]:
        group = groups[id(parameter)]
        assert (group["scale"], group["weight_decay"]) == (scale, decay)
    assert optimizer.defaults["betas"] == (0.9, 0.999) and id(inner.text_embedding.weight) not in groups
    assert id(inner.decoder_embed.weight) not in groups
    with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\], got 0"):
        layer_decayed(model, weight_decay=0.1, layer_decay=0)


def test_a_step_has_the_rate_of_its_layer():
    """AdamW's first step is its rate, whatever the gradient: no decay on vectors."""
    model = make()
    torch.nn.init.normal_(model.head.weight)
    inner = model.model
    watched = [inner.cls_token, inner.encoder.blocks[0].norm1.bias, inner.encoder.norm.bias]
    before = [p.detach().clone() for p in watched]
    finetune(model, Colors(8), steps=1, batch_size=8, lr=32.0e-3, layer_decay=0.5, drop_path=0.0, progress=False)
    moved = [(p - b).abs().median().item() for p, b in zip(watched, before, strict=True)]
    assert moved == pytest.approx([1e-3 / 8, 1e-3 / 4, 1e-3], rel=0.01)


IMAGES = torch.rand(4, 3, 8, 8)
TARGET = torch.eye(4)


def test_mixup():
    for seed in range(5):
        mixed, target = mix(IMAGES, TARGET, np.random.default_rng(seed), mixup=0.8, cutmix=0)
        share = target[0, 0]
        assert 0 < share < 1 and target[0, 3] == pytest.approx(1 - share.item(), abs=1e-6)
        torch.testing.assert_close(mixed, share * IMAGES + (1 - share) * IMAGES[[3, 2, 1, 0]])
        torch.testing.assert_close(target.sum(1), torch.ones(4))


def test_cutmix():
    shares, before = [], IMAGES.clone()
    for seed in range(20):
        mixed, target = mix(IMAGES, TARGET, np.random.default_rng(seed), mixup=0, cutmix=1.0)
        own, others = (mixed == IMAGES).all(1), (mixed == IMAGES[[3, 2, 1, 0]]).all(1)
        assert (own | others).all(), "each pixel is of one of the two"
        box = others[0].nonzero()
        if len(box):
            (y0, x0), (y1, x1) = box.amin(0).tolist(), box.amax(0).tolist()
            assert len(box) == (y1 - y0 + 1) * (x1 - x0 + 1), "a box"
        assert torch.equal(others[0], others[1]), "the same for the whole batch"
        shares.append(target[0, 0].item())
        assert shares[-1] == pytest.approx(own[0].double().mean().item()), "the share of what is left, at the edges too"
    assert len({round(share, 3) for share in shares}) > 8
    assert torch.equal(IMAGES, before), "the caller's images are left alone"


def test_half_of_the_batches_are_pasted():
    rng = np.random.default_rng(0)
    pasted = 0
    for _ in range(200):
        mixed, _ = mix(IMAGES, TARGET, rng, mixup=0.8, cutmix=1.0)
        pasted += bool(((mixed == IMAGES) | (mixed == IMAGES[[3, 2, 1, 0]])).all())
    assert 70 < pasted < 130
    assert mix(IMAGES, TARGET, rng, mixup=0, cutmix=0) == (IMAGES, TARGET)
    with pytest.raises(ValueError, match="cutmix must be finite and not negative, got -1"):
        mix(IMAGES, TARGET, rng, mixup=0, cutmix=-1)


def test_normalized_is_what_the_model_makes_of_pixels():
    torch.manual_seed(0)
    model = make().eval()
    torch.nn.init.normal_(model.head.weight, std=model.head.in_features**-0.5)  # logits of the size of features
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), model(normalized(pixels, model.config)), atol=1e-5, rtol=1e-5)
    config = M3AEConfig(image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 1.0, 2.0))
    torch.testing.assert_close(
        normalized(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), config).flatten(), torch.tensor([1.8, 0.8, 0.35])
    )


def test_soft_targets(monkeypatch):
    """Label smoothing .1 of three classes, nothing mixed."""
    seen = []
    cross_entropy = module.F.cross_entropy
    monkeypatch.setattr(module.F, "cross_entropy", lambda x, y: seen.append(y) or cross_entropy(x, y))
    finetune(make(), Colors(3), steps=1, batch_size=3, mixup=0, cutmix=0, progress=False)
    values = torch.tensor([0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3])
    torch.testing.assert_close(seen[0].sort(1).values, values.expand(3, 3))


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ((0, 1), {}, "samples must have one label each, got none or several in batch 0"),
        ((), {}, "samples must have one label each"),
        ((1,), {"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        ((1,), {"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ((1,), {"lr": -1.0}, "lr must be finite and positive, got -1.0"),
        ((1,), {"lr": float("nan")}, "lr must be finite and positive, got nan"),
        ((1,), {"mixup": -1.0}, "mixup must be finite and not negative, got -1.0"),
    ],
)
def test_arguments(labels, options, message):
    samples = Colors(0)
    samples += [Sample(np.zeros((16, 16, 3), np.uint8), (), "x", labels)] * 4
    with pytest.raises(ValueError, match=message):
        finetune(make(), samples, steps=1, batch_size=2, progress=False, **options)


@pytest.mark.parametrize("classes", [(), tuple("abcd")])
def test_classes(classes):
    samples = Colors(4)
    samples.classes = classes
    with pytest.raises(ValueError, match=f"samples must have 1 to 3 classes, as the model has, got {len(classes)}"):
        finetune(make(), samples, steps=1, batch_size=1, progress=False)
