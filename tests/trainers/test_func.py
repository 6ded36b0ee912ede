"""torch.func over our ops, layers and models: grad and vmap give the same bits, what cannot be is refused by name."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import m3ae_fast
from m3ae_fast import ImageTextBatch, SeqLens, _backends, testing
from m3ae_fast.models import M3AE, M3AEConfig
from m3ae_fast.nn import Block

OPS = [
    (op, impl, device, testing.cases(op).SMALL[0])
    for device in testing.devices()
    for op in sorted(_backends.LOADED)
    for impl in testing.impls(op, device)
    if testing.cases(op).make(testing.cases(op).SMALL[0]).leaves()
]
every_op = pytest.mark.parametrize(("op", "impl", "device", "case"), OPS)
# torch says once for each op that vmap calls it once a sample.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def loss_of(op, impl, call):
    """A scalar function of the call's leaves, not linear in any output."""

    def loss(leaves):
        replacement = dict(zip(map(id, call.leaves()), leaves, strict=True))
        args, kwargs = pytree.tree_map(lambda x: replacement.get(id(x), x), (call.args, call.kwargs))
        out = pytree.tree_leaves(getattr(m3ae_fast, op)(*args, **kwargs, impl=impl))
        return sum(x.nan_to_num(0, 0, 0).square().sum() for x in out if x.is_floating_point())

    return loss


def assert_same(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True))


@every_op
def test_grad_is_autograds(op, impl, device, case):
    call = testing.cases(op).make(case).on(device)
    loss, plain = loss_of(op, impl, call), [x.detach() for x in call.leaves()]
    expected = torch.autograd.grad(loss(call.leaves()), call.leaves())
    assert_same(grad(loss)(plain), expected)
    _, pull = vjp(loss, plain)
    for _ in range(2):  # nothing is scaled in place
        assert_same(pull(torch.tensor(1.0, device=device))[0], expected)
    assert_same(pull(torch.tensor(2.0, device=device))[0], [2 * x for x in expected])


@every_op
def test_vmap_of_grad_is_a_loop(op, impl, device, case):
    call = testing.cases(op).make(case).on(device)
    loss, plain = loss_of(op, impl, call), [x.detach() for x in call.leaves()]
    many = [torch.stack([x, x * 0.5]) for x in plain]
    expected = [grad(loss)([x[i] for x in many]) for i in range(2)]
    found = vmap(grad(loss))(many)
    for i in range(2):
        assert_same([x[i] for x in found], expected[i])
    some = vmap(lambda first: loss([first, *plain[1:]]))(many[0])  # the other arguments are everyone's
    assert_same(some[1], loss([many[0][1], *plain[1:]]))


@every_op
def test_several_gradients_at_once_are_a_loop(op, impl, device, case):
    call = testing.cases(op).make(case).on(device)
    loss, leaves = loss_of(op, impl, call)(call.leaves()), call.leaves()
    along = torch.tensor([1.0, 2.0], device=device)
    expected = [torch.autograd.grad(loss, leaves, each, retain_graph=True) for each in along]
    found = torch.autograd.grad(loss, leaves, along, is_grads_batched=True)
    for i in range(2):
        assert_same([x[i] for x in found], expected[i])


@every_op
def test_forward_mode_and_second_derivatives_are_refused(op, impl, device, case):
    call = testing.cases(op).make(case).on(device)
    loss, plain = loss_of(op, impl, call), [x.detach() for x in call.leaves()]
    refusal = f"{op} has no forward-mode derivative .* impl='reference'"
    with pytest.raises(NotImplementedError, match=refusal):
        jvp(loss, (plain,), (plain,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=refusal):
        loss([forward_ad.make_dual(x, x) for x in plain])
    inner = grad(loss)
    refusal = f"{op} has no second derivative: .* impl='reference'"
    with pytest.raises(RuntimeError, match=refusal):
        grad(lambda leaves: sum(x.square().sum() for x in inner(leaves)))(plain)
    with pytest.raises(RuntimeError, match=refusal):  # an outer autograd, as in meta-learning
        sum(x.square().sum() for x in inner(call.leaves())).backward()


@pytest.mark.parametrize("op", sorted({op for op, *_ in OPS}))
def test_the_reference_has_what_is_refused(op):
    call = testing.cases(op).make(testing.cases(op).SMALL[0], torch.float64)
    loss, plain = loss_of(op, "reference", call), [x.detach() for x in call.leaves()]
    along = [testing.cotangent(x) for x in plain]
    _, slope = jvp(loss, (plain,), (along,))
    gradients = grad(loss)(plain)
    torch.testing.assert_close(slope, sum((g * a).sum() for g, a in zip(gradients, along, strict=True)))
    second = grad(lambda leaves: sum(g.square().sum() for g in grad(loss)(leaves)))(plain)
    assert any(x.any() for x in second)


def test_gradients_of_each_sample_by_a_block():
    """vmap(grad(functional_call)): what differential privacy and influence functions ask for."""
    block, seqlens, x = Block(16, 2), SeqLens([2, 4]), torch.randn(3, 6, 16)
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def loss(parameters, x):
        return functional_call(block, parameters, (x, seqlens)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = torch.autograd.grad(block(x[i], seqlens).square().sum(), block.parameters())
        for (name, ours), theirs in zip(found.items(), expected, strict=True):
            torch.testing.assert_close(ours[i], theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_grad_of_a_whole_model():
    torch.manual_seed(0)
    model = M3AE(M3AEConfig.tiny(vocab_size=101))
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    batch = ImageTextBatch(images, torch.arange(12), [5, 3, 4])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = grad(lambda p: functional_call(model, p, (batch,), {"seed": 0}).loss)(parameters)
    model(batch, seed=0).loss.backward()
    assert_same(list(found.values()), [p.grad for p in model.parameters()])
