"""recomputed: the same gradients without the tensor that would have been kept."""

import gc

import pytest
import torch
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from m3ae_fast import SeqLens
from m3ae_fast.nn import Block
from m3ae_fast.nn.recompute import recomputed


def test_a_block_frees_what_its_layer_norms_put_out():
    block, x = Block(16, 2), torch.randn(6, 16)
    kept = []

    def remember(module, inputs, output):
        y = output[0] if isinstance(output, tuple) else output
        kept.append(StorageWeakRef(y.untyped_storage()))

    for norm in (block.norm1, block.norm2):
        norm.register_forward_hook(remember)
    y = block(x, SeqLens([2, 4]))
    gc.collect()
    assert len(kept) == 2 and all(each.expired() for each in kept)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 3, 5], dtype=torch.int32)])
def test_the_gradients_are_those_of_a_block_that_keeps_everything(rows, monkeypatch):
    block, x = Block(16, 2), torch.randn(6, 16, requires_grad=True)
    seqlens, rows_seqlens = SeqLens([2, 4]), SeqLens([1, 2])

    def gradients():
        out = block(x, seqlens, None, rows, rows_seqlens)
        return torch.autograd.grad(out.square().sum(), [x, *block.parameters()])

    ours = gradients()
    monkeypatch.setattr("m3ae_fast.nn.recompute.top_hooks", lambda ignore_is_tracing: "hooks of the user's")
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(), strict=True))


def test_inside_gradient_checkpointing_it_stands_back():
    block, x = Block(16, 2), torch.randn(6, 16, requires_grad=True)
    seqlens = SeqLens([2, 4])
    plain = torch.autograd.grad(block(x, seqlens).square().sum(), [x, *block.parameters()])
    again = torch.autograd.grad(
        checkpoint(block, x, seqlens, use_reentrant=False).square().sum(), [x, *block.parameters()]
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_parameters_are_those_of_the_forward_pass():
    """functional_call takes its parameters away again before the backward pass."""
    block, x, seqlens = Block(16, 2), torch.randn(6, 16), SeqLens([2, 4])
    values = {name: torch.rand_like(p).requires_grad_() for name, p in block.named_parameters()}
    called = functional_call(block, values, (x, seqlens)).square().sum()
    gradients = torch.autograd.grad(called, list(values.values()))
    block.load_state_dict(values)
    expected = torch.autograd.grad(block(x, seqlens).square().sum(), list(block.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("name", ["norm1.weight", "norm2.bias", "attn.qkv.weight", "mlp.fc2.weight"])
def test_parameters_changed_in_place_before_the_backward_pass_are_an_error(name):
    block = Block(16, 2)
    loss = block(torch.randn(6, 16), SeqLens([2, 4])).sum()
    with torch.no_grad():
        block.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_what_was_named_is_made_again():
    x, weight = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
    y, calls = (x @ weight).exp(), []

    def make():
        calls.append(1)
        return (x @ weight).exp()

    with recomputed(y, make):
        loss = (y * weight[0]).sum()
    loss.backward()
    assert calls == [1]


def test_a_view_that_was_saved_comes_back_in_its_own_order():
    x, weight = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    y = x * weight
    with recomputed(y, lambda: x * weight):
        loss = (y.t().exp() @ y.view(3, 2, 2).flatten(1) + y.t() @ y).sum()
    z = x * weight
    plain = (z.t().exp() @ z + z.t() @ z).sum()
    torch.testing.assert_close(*(torch.autograd.grad(each, weight)[0] for each in (loss, plain)))
