"""A whole training step, captured in a CUDA graph and replayed on other batches, against the same steps run eagerly."""

import copy

import pytest
import torch

from m3ae_fast import ImageTextBatch
from m3ae_fast.models import M3AE, MAMO, GraphedStep, M3AEConfig, MAMOConfig, ModelConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and torch sees none")
LENGTHS = [9, 12, 5, 12]  # a captured graph has its sizes built in


def make_batch(config: ModelConfig, seed: int, lengths: list[int] = LENGTHS) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 3, *config.image_shape), generator=generator, dtype=torch.uint8)
    text = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator, dtype=torch.int32)
    return ImageTextBatch(images, text, lengths).to("cuda")


def make_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)

    def step(batch, plan):
        if isinstance(model, MAMO):
            model.update_target()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch, plan=plan).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("masking", ["two_pass", "simultaneous", None])
def test_a_captured_step_trains_as_an_eager_one(masking):
    """Of a MAMO without ITM, which waits for the similarities; None: of an M3AE."""
    torch.manual_seed(0)
    if masking is None:
        eager = M3AE(M3AEConfig.tiny(vocab_size=101)).cuda()
    else:
        eager = MAMO(MAMOConfig.tiny(vocab_size=101, masking=masking, itm_weight=0)).cuda()
    config = eager.config
    captured = copy.deepcopy(eager)
    batches = [make_batch(config, seed) for seed in range(6)]
    plans = [eager.plan(batch, seed=0, step=i) for i, batch in enumerate(batches)]

    static_batch, static_plan = make_batch(config, 0), captured.plan(batches[0], seed=0, step=0)
    step = make_step(captured)

    def load(i):
        static_batch.images.copy_(batches[i].images)
        static_batch.text.copy_(batches[i].text)
        static_plan.copy_(plans[i])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # three real steps: kernels compile, moments and gradients are allocated
        losses = []
        for i in range(3):
            load(i)
            losses.append(step(static_batch, static_plan).item())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and runs nothing
        loss = step(static_batch, static_plan)
    for i in range(3, 6):
        load(i)
        graph.replay()
        losses.append(loss.item())

    step = make_step(eager)
    assert losses == [step(batch, plan).item() for batch, plan in zip(batches, plans, strict=True)]
    for ours, theirs in zip(captured.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_ragged_passes_are_captured_once_a_bucket():
    """Batches of any lengths: losses and gradients of eager passes over the same rows."""
    torch.manual_seed(0)
    model = M3AE(M3AEConfig.tiny(vocab_size=101)).cuda()

    def passes(batch, plan):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch, plan=plan).loss
        loss.backward()
        return loss.detach()

    step = GraphedStep(passes, model)
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        batch = make_batch(model.config, seed, torch.randint(1, 41, (4,), generator=generator).tolist())
        plan = model.plan(batch, seed=0, step=seed, bucket=True)
        model.zero_grad()
        loss = step(batch, plan).clone()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        assert torch.equal(passes(batch.with_room(plan.images, plan.words), plan), loss)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            assert torch.equal(gradient, parameter.grad)
    assert sum(each.replay is not None for each in step.captured.values()) > 1
