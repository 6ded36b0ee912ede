"""torch.compile of layers and of a whole step: one graph, few compilations, the same bits as without it.

By "aot_eager": what is tested is that all of it is traced, forward and backward; no code is generated.
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from m3ae_fast import ImageTextBatch, SeqLens
from m3ae_fast.models import M3AE, MAMO, M3AEConfig, MAMOConfig
from m3ae_fast.models.contrastive import ContrastiveLoss
from m3ae_fast.nn import Block, Transformer, checkpoint_blocks

TINY = {"vocab_size": 101, "width": 24}  # no length or product of sizes is another by chance
LENGTHS = ([5, 3, 8], [2, 12, 9], [4, 4, 7], [12, 12, 11], [3, 2, 2], [7, 10, 6])


def make_batch(config, lengths, seed, has_image=None):
    generator = torch.Generator().manual_seed(seed)
    count = len(lengths) if has_image is None else sum(has_image)
    images = torch.randint(0, 256, (count, 3, *config.image_shape), generator=generator, dtype=torch.uint8)
    words = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator, dtype=torch.int32)
    return ImageTextBatch(images, words, lengths, has_image=has_image)


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    """Compilations so far in this test."""
    return counters["stats"]["unique_graphs"]


def compile_whole(target):
    return torch.compile(target, backend="aot_eager", fullgraph=True, dynamic=True)


def assert_same_gradients(first, second, parameters):
    """Two losses have the same bits, and so have their gradients."""
    parameters = [p for p in parameters if p.requires_grad]
    assert torch.equal(first, second)
    ours, theirs = (torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layer", [lambda: Block(20, 2), lambda: Transformer(20, 2, 2)], ids=["Block", "Transformer"])
def test_a_layer_is_one_graph(layer):
    layer = layer()
    compiled = compile_whole(layer)
    for seed, lengths in enumerate(LENGTHS):
        seqlens = SeqLens(lengths)
        x = torch.randn(seqlens.total, 20, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        losses = (each(x, seqlens).square().mean() for each in (compiled, layer))
        assert_same_gradients(*losses, [x, *layer.parameters()])
    assert graphs() <= 2


def loss_of(model):
    return lambda batch, plan: model(batch, plan=plan).loss


@pytest.mark.parametrize("changes", [{}, {"predict_ratio": 0.5}, {"decoder": "cross", "predict_ratio": 0.5}])
def test_a_step_with_its_plan_is_one_graph(changes):
    torch.manual_seed(0)
    config = M3AEConfig.tiny(**TINY, depth=1, decoder_depth=1, **changes)
    model = M3AE(config)
    compiled = compile_whole(loss_of(model))
    for step, lengths in enumerate(LENGTHS):
        if lengths == [3, 2, 2] and changes:
            continue  # a single word is not predicted: for a size of 1 torch compiles again
        batch = make_batch(config, lengths, step)
        plan = model.plan(batch, seed=0, step=step)
        assert_same_gradients(compiled(batch, plan), loss_of(model)(batch, plan), model.parameters())
    assert graphs() <= 2
    before = graphs()
    mixed = [((True, False, True), [0, 5, 3]), ((False, True, True), [4, 6, 0]), ((True, True, False), [0, 3, 8])]
    for step, (has_image, lengths) in enumerate(mixed):  # which sample lacks what does not matter
        batch = make_batch(config, lengths, step, has_image)
        plan = model.plan(batch, seed=0, step=step)
        assert_same_gradients(compiled(batch, plan), loss_of(model)(batch, plan), model.parameters())
    assert graphs() <= before + 2


@pytest.mark.parametrize("masking", ["two_pass", "simultaneous"])
def test_a_mamo_without_itm_is_one_graph(masking):
    torch.manual_seed(0)
    sizes = {"depth": 1, "text_depth": 1, "fusion_depth": 1}
    model = MAMO(MAMOConfig.tiny(**TINY, **sizes, masking=masking, itm_weight=0))
    compiled = compile_whole(loss_of(model))
    for step, lengths in enumerate(LENGTHS[:3]):
        batch = make_batch(model.config, lengths, step)
        plan = model.plan(batch, seed=0, step=step)
        assert_same_gradients(compiled(batch, plan), loss_of(model)(batch, plan), model.parameters())
    assert graphs() <= 2


def test_contrast_with_a_queue_is_one_graph():
    eager = ContrastiveLoss(12, queue_size=5)
    model = copy.deepcopy(eager)
    compiled = compile_whole(model)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        image, text = torch.nn.functional.normalize(torch.randn(2, 3, 12, generator=generator), dim=2).requires_grad_()
        losses = [each(image, text, momentum=(image.detach(), text.detach()), soft=0.3) for each in (compiled, eager)]
        assert_same_gradients(*losses, [image, text])
        for ours, theirs in zip(model.buffers(), eager.buffers(), strict=True):
            assert torch.equal(ours, theirs)
    assert graphs() <= 2


def test_a_checkpointed_step_is_one_graph():
    torch.manual_seed(0)
    config = M3AEConfig.tiny(**TINY, depth=1, decoder_depth=1)
    model = M3AE(config)
    checkpoint_blocks(model)
    batch = make_batch(config, [5, 3, 8], 0)
    plan = model.plan(batch, seed=0)
    compiled = compile_whole(loss_of(model))
    assert_same_gradients(compiled(batch, plan), loss_of(model)(batch, plan), model.parameters())
    assert graphs() == 1


def test_blocks_compiled_where_they_stand():
    """nn.Module.compile of each block: for models that are no one graph (MAMO's ITM waits for similarities)."""
    torch.manual_seed(0)
    config = MAMOConfig.tiny(**TINY, depth=1, text_depth=1)
    model = MAMO(config)
    batches = [make_batch(config, lengths, step) for step, lengths in enumerate(LENGTHS[:3])]
    before = [model(batch, seed=0, step=step).loss for step, batch in enumerate(batches)]
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    for step, batch in enumerate(batches):
        assert_same_gradients(model(batch, seed=0, step=step).loss, before[step], model.parameters())
    assert 0 < graphs() <= 12  # first, middle, last block x with and without gradients, each at most twice
