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


@pytest.fixture
def keep_everything(monkeypatch):
    """Called: from now on nothing is made again."""
    return lambda: monkeypatch.setattr("m3ae_fast.nn.recompute.top_hooks", lambda ignore_is_tracing: "hooks")


def test_a_block_frees_what_its_layer_norms_put_out():
    block, x = Block(16, 2), torch.randn(6, 16)
    kept = []

    def remember(module, inputs):
        kept.append(StorageWeakRef(inputs[0].untyped_storage()))

    for reader in (block.attn, block.mlp):
        reader.register_forward_pre_hook(remember)
    y = block(x, SeqLens([2, 4]))
    gc.collect()
    assert len(kept) == 2 and all(each.expired() for each in kept)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 3, 5], dtype=torch.int32)])
def test_the_gradients_are_those_of_a_block_that_keeps_everything(rows, keep_everything):
    block, x = Block(16, 2), torch.randn(6, 16, requires_grad=True)
    seqlens, rows_seqlens = SeqLens([2, 4]), SeqLens([1, 2])

    def gradients():
        out = block(x, seqlens, None, rows, rows_seqlens)
        return torch.autograd.grad(out.square().sum(), [x, *block.parameters()])

    ours = gradients()
    keep_everything()
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


def stirred_block():
    torch.manual_seed(0)
    block = Block(16, 2)
    for p in block.parameters():  # ones and zeros would hide what is left out
        torch.nn.init.normal_(p)
    return block, torch.randn(6, 16)


def test_the_weights_are_those_of_the_forward_pass(keep_everything):
    """functional_call gives a module its own ones back before the backward pass."""
    (block, x), other = stirred_block(), Block(16, 2)
    weights = dict(block.named_parameters())

    def gradients():
        loss = functional_call(other, weights, (x, SeqLens([2, 4]))).square().sum()
        return torch.autograd.grad(loss, list(weights.values()))

    ours = gradients()
    keep_everything()
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(), strict=True))


def changed(args):
    args[0].mul_(2)


HOOKS = {
    "norm1 gives another": lambda block: block.norm1.register_forward_hook(lambda m, args, y: y * 2),
    "norm1 gives a changed one": lambda block: block.norm1.register_forward_hook(lambda m, args, y: y.mul_(2)),
    "norm1 takes another": lambda block: block.norm1.register_forward_pre_hook(lambda m, args: args[0].exp()),
    "norm2 gives another": lambda block: block.norm2.register_forward_hook(lambda m, args, out: (out[0] * 2, out[1])),
    "attn takes a changed one": lambda block: block.attn.register_forward_pre_hook(lambda m, args: changed(args)),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_what_hooks_made_of_it_is_used(hook, keep_everything):
    block, x = stirred_block()
    HOOKS[hook](block)

    def gradients():
        return torch.autograd.grad(block(x, SeqLens([2, 4])).square().sum(), list(block.parameters()))

    ours = gradients()
    keep_everything()
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(), strict=True))


@pytest.mark.parametrize("changed", ["x", "norm1.weight", "attn.proj.weight"])
def test_what_was_changed_in_place_is_refused(changed):
    block, x = stirred_block()
    loss = block(x, SeqLens([2, 4])).square().sum()
    with torch.no_grad():
        (x if changed == "x" else block.get_parameter(changed)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, block.attn.qkv.weight)
