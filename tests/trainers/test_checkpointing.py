"""Gradient checkpointing, ours and torch's own in both of its modes, plain and under autocast: the same bits."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from m3ae_fast import ImageTextBatch, SeqLens, testing
from m3ae_fast.models import M3AE, MAMO, M3AEConfig, MAMOConfig
from m3ae_fast.nn import Block, Transformer, checkpoint_blocks

every_device = pytest.mark.parametrize("device", testing.devices())
every_precision = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


def make_model(model, device, **changes):
    torch.manual_seed(0)
    return model({M3AE: M3AEConfig, MAMO: MAMOConfig}[model].tiny(vocab_size=101, **changes)).to(device)


def make_batch(device, lengths=(5, 3, 8)):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(lengths), 3, 64, 64), generator=generator, dtype=torch.uint8)
    words = torch.randint(0, 101, (sum(lengths),), generator=generator, dtype=torch.int32)
    return ImageTextBatch(images, words, lengths).to(device)


def step(model, batch, bf16):
    """(loss, gradients, bytes that autograd kept)."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
        loss = model(batch, seed=0).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, parameters), sum(kept.values())


@every_device
@every_precision
@pytest.mark.parametrize(("model", "changes"), [(M3AE, {}), (M3AE, {"decoder": "cross"}), (MAMO, {})])
def test_a_model_with_checkpointed_blocks(model, changes, device, bf16):
    model, batch = make_model(model, device, **changes), make_batch(device)
    loss, gradients, kept = step(model, batch, bf16)
    checkpoint_blocks(model)
    loss_again, gradients_again, kept_again = step(model, batch, bf16)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert kept_again < 0.6 * kept
    checkpoint_blocks(model, False)
    assert not any(m.checkpoint for m in model.modules() if isinstance(m, Transformer))


@every_device
@every_precision
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("rows", [None, [0, 3, 5]])
def test_torchs_checkpoint_over_blocks(use_reentrant, bf16, rows, device):
    """As trainers wrap them: through a block's arguments, one feeding the next."""
    torch.manual_seed(0)
    first, last = Block(16, 2).to(device), Block(16, 2).to(device)
    x, seqlens = torch.randn(6, 16, device=device, requires_grad=True), SeqLens([2, 4], device)
    few = (None, None) if rows is None else (torch.tensor(rows, device=device), SeqLens([1, 2], device))

    def gradients(call):
        leaves = [x, *first.parameters(), *last.parameters()]
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            y, update = call(first, x, seqlens, None, None, None, True)
            y = call(last, y, seqlens, update, *few)
        y.float().square().sum().backward()  # torch.autograd.grad does not work with use_reentrant=True
        return [leaf.grad for leaf in leaves]

    plain = gradients(lambda block, *args: block(*args))
    again = gradients(lambda block, *args: checkpoint(block, *args, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@every_device
@pytest.mark.parametrize("layer", [Block, Transformer])
def test_a_layer_under_autocast(layer, device):
    torch.manual_seed(0)
    layer = (Block(32, 2) if layer is Block else Transformer(32, 2, 2)).to(device)
    x, seqlens = torch.randn(12, 32, device=device), SeqLens([5, 7], device)
    exact = layer(x, seqlens)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x, seqlens)
    torch.testing.assert_close(y.float(), exact, rtol=3e-2, atol=3e-2)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
