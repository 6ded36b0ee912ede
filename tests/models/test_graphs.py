"""GraphedStep: the losses and gradients of eager passes, captured once a bucket; what stands for CUDA is a recorder."""

import dataclasses

import pytest
import torch

from m3ae_fast import ImageTextBatch, _autograd
from m3ae_fast.models import M3AE, MAE, GraphedStep, M3AEConfig, graphs
from tests.models.recorded import RecordedGraphs

CONFIG = M3AEConfig(
    image_size=16, patch_size=4, vocab_size=53, max_text_length=12, width=32, depth=2, heads=4,
    decoder_width=24, decoder_depth=2, decoder_heads=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def recorded(monkeypatch, threads):
    monkeypatch.setattr(graphs, "CudaGraphs", RecordedGraphs)
    monkeypatch.setattr(_autograd, "keep_graph", lambda: True)  # a gradient is scaled in place on the CPU alone
    threads(1)


def make_batch(seed: int, samples: int = 6, *, has_image=None, texts: bool = True) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(seed)
    images = samples if has_image is None else sum(has_image)
    pixels = torch.randint(0, 256, (images, 16, 16, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    if not texts:
        return ImageTextBatch(pixels)
    lengths = torch.randint(1, 13, (samples,), generator=generator).tolist()
    text = torch.randint(0, 53, (sum(lengths),), generator=generator, dtype=torch.int32)
    return ImageTextBatch(pixels, text, lengths, has_image=has_image)


def make_passes(model, precision: str):
    def passes(batch, plan):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(batch, plan=plan)
        output.loss.backward()
        return {name: getattr(output, name).detach() for name in model.METRICS}

    return passes


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [(M3AE, {}), (MAE, {}), (M3AE, {"decoder": "cross", "predict_ratio": 0.5}), (M3AE, {"predict_ratio": 0.5})],
)
def test_replays_are_the_eager_passes(kind, changes, to_none, precision):
    torch.manual_seed(0)
    model = kind(dataclasses.replace(CONFIG, **changes))
    passes = make_passes(model, precision)
    step, buckets = GraphedStep(passes, model), set()
    for seed in range(12):
        batch = make_batch(seed, texts=kind is M3AE)
        plan = model.plan(batch, seed=1, step=seed, bucket=True)
        buckets.add(plan.bucket)
        model.zero_grad(set_to_none=to_none)
        found, grads = step(batch, plan), gradients(model)
        found = {name: value.item() for name, value in found.items()}
        model.zero_grad()
        wanted = passes(batch, model.plan(batch, seed=1, step=seed))
        assert found == {name: value.item() for name, value in wanted.items()}
        for ours, theirs in zip(grads, gradients(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert step.graphs.warmed_up == len(buckets) <= 6
    assert 0 < step.graphs.captured <= len(buckets) and step.graphs.replayed == 12 - len(buckets)


@pytest.mark.parametrize("masking", ["multi_block", "ratio_range", "dirichlet"])
def test_images_may_keep_different_numbers_of_patches(masking):
    torch.manual_seed(0)
    model = M3AE(dataclasses.replace(CONFIG, masking=masking, mask_ratio_range=(0.2, 0.9)))
    passes = make_passes(model, "fp32")
    step = GraphedStep(passes, model)
    for seed in range(16):
        batch = make_batch(seed)
        found = step(batch, model.plan(batch, seed=1, step=seed, bucket=True))
        wanted = passes(batch, model.plan(batch, seed=1, step=seed))
        assert {n: x.item() for n, x in found.items()} == {n: x.item() for n, x in wanted.items()}
    assert step.graphs.replayed > 0


def test_gradients_add_up_over_buckets():
    """As micro-batches of a step: another graph adds to what the one before has left."""
    torch.manual_seed(0)
    model = M3AE(CONFIG)
    passes = make_passes(model, "fp32")
    step, batches = GraphedStep(passes, model), [make_batch(seed, samples=3 + seed % 2) for seed in range(4)]
    for _ in range(3):
        model.zero_grad()
        for seed, batch in enumerate(batches):
            step(batch, model.plan(batch, seed=1, step=seed, bucket=True))
    ours = gradients(model)
    assert step.graphs.captured == len(step.captured) > 1
    model.zero_grad()
    for seed, batch in enumerate(batches):
        passes(batch, model.plan(batch, seed=1, step=seed))
    for a, b in zip(ours, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_gradients_that_were_there_are_added_to():
    torch.manual_seed(0)
    model = M3AE(CONFIG)
    step, batch = GraphedStep(make_passes(model, "fp32"), model), make_batch(0)
    plan = model.plan(batch, seed=1, bucket=True)
    for _ in range(3):
        model.zero_grad()
        step(batch, plan)
    alone = gradients(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    step(batch, plan)
    for ours, theirs in zip(gradients(model), alone, strict=True):
        torch.testing.assert_close(ours, theirs + 1, rtol=0, atol=1e-6)


def test_batches_without_texts_and_of_other_dtypes_have_graphs_of_their_own():
    model = M3AE(CONFIG)
    step = GraphedStep(make_passes(model, "fp32"), model)
    batch = make_batch(0)
    floats = ImageTextBatch(batch.images / 127 - 1, batch.text, batch.text_lengths)
    texts = ImageTextBatch(text=batch.text, text_lengths=batch.text_lengths)
    for each in (batch, floats, texts, make_batch(0, texts=False)) * 3:
        wanted = model(each, seed=1).loss.item()
        assert step(each, model.plan(each, seed=1, bucket=True))["loss"].item() == wanted
    assert step.graphs.captured == step.graphs.warmed_up == 4


def test_a_plan_of_another_batch_is_refused_by_replays_too():
    model = M3AE(CONFIG)
    step = GraphedStep(make_passes(model, "fp32"), model)
    batch = make_batch(0)
    other = ImageTextBatch(batch.images, batch.text, batch.text_lengths.lengths[::-1])
    plan, of_other = (model.plan(each, seed=1, bucket=True) for each in (batch, other))
    assert plan.bucket == of_other.bucket and batch.text_lengths != other.text_lengths
    for _ in range(2):
        step(batch, plan)
    with pytest.raises(ValueError, match="plan must be of this batch"):
        step(batch, of_other)


def test_a_pass_that_waits_for_the_device_is_not_captured():
    """What the recorder refuses, CUDA refuses: that the passes above were captured says that they wait for nothing."""
    model = M3AE(CONFIG)
    step = GraphedStep(lambda batch, plan: model(batch, plan=plan).loss.item(), model)
    batch = make_batch(0)
    plan = model.plan(batch, seed=1, bucket=True)
    step(batch, plan)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        step(batch, plan)


def test_a_model_on_the_cpu_is_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"device must be a GPU to capture CUDA graphs \(cuda_graphs\), got cpu"):
        GraphedStep(lambda batch, plan: None, M3AE(CONFIG))


def test_a_plan_of_a_bucket_asks_for_room():
    model, batch = M3AE(CONFIG), make_batch(3)
    plan = model.plan(batch, seed=1, bucket=True)
    with pytest.raises(ValueError, match=f"batch must have room for 6 images and {plan.words} words .*, got "):
        model(batch, plan=plan)
    roomy = model(batch.with_room(plan.images, plan.words), plan=plan)
    torch.testing.assert_close(roomy.loss, model(batch, seed=1).loss)
