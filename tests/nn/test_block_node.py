"""A block as one autograd node: the bits of its ops one by one, and every case that is left to them."""

import contextlib
import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from m3ae_fast import SeqLens, _backends, testing
from m3ae_fast.nn import Block, Transformer, block_node, drop_paths

SEQLENS = SeqLens([2, 0, 4])


@pytest.fixture(params=testing.devices())
def device(request):
    return request.param


def stirred(dtype=torch.float32, bias=True, device="cpu"):
    torch.manual_seed(0)
    block = Block(16, 2, activation="gelu")
    if not bias:
        block.attn.qkv.bias = block.norm2.bias = None
    for p in block.parameters():  # ones and zeros would hide what is left out
        nn.init.normal_(p)
    return block.to(device, dtype)


def inputs(dtype=torch.float32, update_dtype=None, device="cpu"):
    torch.manual_seed(1)
    return [torch.randn(6, 16, device=device).to(d).requires_grad_() for d in (dtype, update_dtype or dtype)]


@pytest.fixture
def nodes(monkeypatch):
    """How often a node was made; nodes.off() leaves every block to its ops."""
    if not _backends.has_kernels(block_node.LINEAR, None, "cpu", torch.float32):
        pytest.skip("linear is PyTorch's here, so every block is left to its ops")

    class Nodes:
        made = 0

        def off(self):
            monkeypatch.setattr(block_node, "takes", lambda *args: False)

    nodes, apply = Nodes(), block_node.apply

    def counted(*args):
        nodes.made += 1
        return apply(*args)

    monkeypatch.setattr(block_node, "apply", counted)
    return nodes


def results(block, x, update, seqlens, unused=(), frozen=(), apart=True):
    """Outputs and gradients; None for what has none."""
    for name, p in block.named_parameters():
        p.requires_grad_(name not in frozen)
    torch.manual_seed(2)
    out = block(x, seqlens, update, apart=apart)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    used = [y for i, y in enumerate(out) if i not in unused and y.requires_grad]
    leaves = [t for t in (x, update, *block.parameters()) if t is not None and t.requires_grad]
    grads = torch.autograd.grad(used, leaves, list(map(testing.cotangent, used)), allow_unused=True)
    return [*out, *grads]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and torch.equal(a, b)


NAMES = [name for name, _ in Block(16, 2).named_parameters()]
FROZEN = {
    "nothing": (),
    "the LayerNorms": [name for name in NAMES if "norm" in name],
    "biases": [name for name in NAMES if "bias" in name],
    "all but fc2": [name for name in NAMES if "fc2" not in name],
    "all but proj": [name for name in NAMES if "proj" not in name],
    "all but norm1": [name for name in NAMES if "norm1" not in name],
    "all but norm2's bias": [name for name in NAMES if name != "norm2.bias"],
    "all": NAMES,
}


@pytest.mark.parametrize("rows_need", [True, False], ids=["rows need gradients", "rows need none"])
@pytest.mark.parametrize("unused", [(), (0,), (1,)], ids=["both used", "y used", "s used"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_what_needs_a_gradient_gets_that_of_the_ops(frozen, unused, rows_need, nodes):
    if frozen == "all" and not rows_need:
        pytest.skip("nothing needs a gradient")
    block, rows = stirred(), [x.requires_grad_(rows_need) for x in inputs()]
    arguments = (block, *rows, SEQLENS, unused, FROZEN[frozen])
    if unused == (1,) and frozen == "all but fc2" and not rows_need:
        pytest.skip("s needs no gradient")
    ours = results(*arguments)
    assert nodes.made == 1
    nodes.off()
    assert_equal(ours, results(*arguments))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "some biases"])
@pytest.mark.parametrize(
    ("weights", "x", "update"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_dtypes(weights, x, update, bias, autocast, nodes, device):
    block, rows = stirred(weights, bias, device), inputs(x, update, device)
    taken = torch.promote_types(weights, x) == x or (autocast and weights != torch.float64)
    taken &= not (autocast and weights == torch.float64)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        ours = results(block, *rows, SEQLENS.to(device))
        assert nodes.made == taken
        nodes.off()
        assert_equal(ours, results(block, *rows, SEQLENS.to(device)))


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("apart", [True, False], ids=["apart", "summed"])
def test_without_an_update_and_with_sequences_that_go_past(rate, apart, nodes):
    block, (x, _) = stirred(), inputs()
    block.drop_path = rate
    ours = results(block, x, None, SEQLENS, apart=apart)
    assert nodes.made == 1
    nodes.off()
    assert_equal(ours, results(block, x, None, SEQLENS, apart=apart))


def test_bfloat16_rows_without_an_update(nodes):
    """All but the rows' gradient has the bits of the ops; that one is rounded once."""
    block, (x, _) = stirred(torch.bfloat16), inputs(torch.bfloat16)
    out, dx, *others = results(block, x, None, SEQLENS, apart=False)
    nodes.off()
    expected, eager, *ops = results(block, x, None, SEQLENS, apart=False)
    assert_equal([out, *others], [expected, *ops])
    truth = results(block.double(), x.detach().double().requires_grad_(), None, SEQLENS, apart=False)[1]
    testing.assert_error_rule("dx", dx, eager, truth, factor=3)


@pytest.mark.parametrize("shape", [(0, 16), (6, 16)])
def test_rows_of_any_strides_and_none_at_all(shape, nodes):
    seqlens = SEQLENS if shape[0] else SeqLens([0])
    block = stirred()
    x, update = (torch.randn(shape[::-1]).t().requires_grad_() for _ in range(2))
    ours = results(block, x, update, seqlens)
    nodes.off()
    assert_equal(ours, results(block, x, update, seqlens))


@pytest.mark.parametrize("node", [True, False], ids=["node", "ops"])
@pytest.mark.parametrize("recorded", ["forward", "backward"])
def test_a_profiler_of_one_pass_leaves_checkpoints_as_they_are(recorded, node, nodes):
    """What a block keeps when it runs again is what it kept at first, whether a profiler records it or not."""
    if not node:
        nodes.off()
    torch.manual_seed(0)
    transformer, (x, _) = Transformer(16, 2, 2), inputs()
    expected = torch.autograd.grad(transformer(x, SEQLENS).sum(), x)[0]
    transformer.checkpoint = True
    with torch.profiler.profile() if recorded == "forward" else contextlib.nullcontext() as profile:
        loss = transformer(x, SEQLENS).sum()
    with torch.profiler.profile() if recorded == "backward" else contextlib.nullcontext() as other:
        gradient = torch.autograd.grad(loss, x)[0]
    assert torch.equal(gradient, expected)
    assert "m3ae_fast::linear" in {event.key for event in (profile or other).key_averages()}
    assert nodes.made == (6 if node else 0)


@pytest.mark.parametrize("impl", [*testing.impls("linear"), "reference"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_every_backend(impl, autocast, nodes, monkeypatch):
    """M3AE_FAST_IMPL names one for the whole process; the reference has no operators to make a node of."""
    monkeypatch.setattr(_backends, "_FORCED", impl)
    block, rows = stirred(), inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = results(block, *rows, SEQLENS)
        assert nodes.made == (impl != "reference")
        nodes.off()
        assert_equal(ours, results(block, *rows, SEQLENS))


def double(module, *args):
    return args[-1] * 2


class Widened(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def patched(block):
    block.mlp.fc1.forward = lambda x: nn.functional.linear(x, block.mlp.fc1.weight)


def replaced(block):
    block.attn.proj = Widened(16, 16)


TOUCHED = {
    "a hook on qkv": lambda block: block.attn.qkv.register_forward_hook(double),
    "a hook before the mlp": lambda block: block.mlp.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "a hook before a gradient": lambda block: block.attn.register_full_backward_pre_hook(lambda m, dy: dy),
    "a hook on a gradient": lambda block: block.norm1.register_full_backward_hook(lambda m, dx, dy: dx),
    "another forward": patched,
    "another layer": replaced,
    "an activation": lambda block: setattr(block.mlp.fc1, "activation", "gelu"),
}


@pytest.mark.parametrize("how", TOUCHED)
def test_a_block_that_was_changed_is_left_to_its_parts(how, nodes):
    block, rows = stirred(), inputs()
    before = block(rows[0], SEQLENS)
    TOUCHED[how](block)
    after = block(rows[0], SEQLENS)
    assert nodes.made == 1
    assert "gradient" in how or not torch.equal(before, after)


def test_hooks_on_all_modules_see_the_parts():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        stirred()(inputs()[0], SEQLENS)
    finally:
        handle.remove()
    assert seen.count("Linear") == 4 and seen.count("LayerNorm") == 2


def test_what_traces_transforms_or_wraps_is_left_to_the_ops(nodes):
    block, (x, _) = stirred(), inputs()
    expected = torch.autograd.grad(block(x, SEQLENS).sum(), x)[0]
    made = nodes.made
    torch.testing.assert_close(torch.func.grad(lambda x: block(x, SEQLENS).sum())(x), expected)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, SEQLENS).sum(), x)[0], expected)
    assert nodes.made == made


def test_wrong_sizes_get_the_ops_errors(nodes):
    block = stirred()
    with pytest.raises(ValueError, match="weight must have shape"):
        block(torch.randn(6, 15), SEQLENS)
    with pytest.raises(ValueError, match=r"residual must have shape \(5, 16\), got \(6, 16\)"):
        block(torch.randn(6, 16), SEQLENS, torch.randn(5, 16))
    block.mlp.fc2.weight = nn.Parameter(torch.randn(16, 63))
    with pytest.raises(ValueError, match="weight must have shape"):
        block(torch.randn(6, 16), SEQLENS)
    assert nodes.made == 0


def test_bare_offsets_are_left_to_the_ops(nodes):
    block, (x, _) = stirred(), inputs()
    assert torch.equal(block(x, SEQLENS), block(x, SEQLENS.cu)) and nodes.made == 1


def test_an_unknown_activation_gets_the_ops_error():
    with pytest.raises(ValueError, match="input_activation must be one of None, 'gelu', 'gelu_tanh', got 'relu'"):
        Block(16, 2, activation="relu")(torch.randn(6, 16), SEQLENS)


def test_offsets_past_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"cu_seqlens.* must ascend from 0 to at most 6 rows"):
        stirred()(torch.randn(6, 16), SeqLens([2, 5]))


def test_several_gradients_at_once_and_a_second_pass(nodes):
    block, (x, _) = stirred(), inputs()
    y = block(x, SEQLENS)
    dys = torch.stack([testing.cotangent(y), torch.ones_like(y)])
    batched = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)[0]
    one_by_one = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    assert torch.equal(batched, torch.stack(one_by_one)) and nodes.made == 1


def test_a_second_derivative_is_refused(nodes):
    block, (x, _) = stirred(), inputs()
    block.requires_grad_(False)
    (gradient,) = torch.autograd.grad(block(x, SEQLENS).square().sum(), x, create_graph=True)
    assert nodes.made == 1
    with pytest.raises(RuntimeError, match="block_node has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("name", "weights"),
    [("mlp.fc1.bias", torch.float32), ("mlp.fc1.weight", torch.bfloat16), ("norm2.weight", torch.bfloat16)],
    ids=str,
)
def test_a_second_derivative_is_refused_where_only_the_mlp_is_trained(name, weights, nodes):
    """The node then keeps nothing that leads to the parameter: it is a product's bias, or was cast."""
    block, (x, _) = stirred(weights), inputs()
    parameter = block.requires_grad_(False).get_parameter(name).requires_grad_()
    (gradient,) = torch.autograd.grad(block(x.detach(), SEQLENS).sum(), parameter, create_graph=True)
    assert nodes.made == 1
    with pytest.raises(RuntimeError, match="block_node has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_changed_in_place_before_the_backward_pass_are_an_error(name):
    block, (x, update) = stirred(), inputs()
    loss = sum(out.sum() for out in block(x, SEQLENS, update, apart=True))
    with torch.no_grad():
        block.get_parameter(name).mul_(2)
    if "bias" in name and "norm" not in name:
        loss.backward()  # it needs no bias of a product
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("nodes")
def test_what_the_layer_norms_put_out_is_freed(monkeypatch):
    kept, layer_norm = [], block_node._layer_norm

    def remember(*args):
        y, s, stats = layer_norm(*args)
        kept.append(StorageWeakRef(y.untyped_storage()))
        return y, s, stats

    monkeypatch.setattr(block_node, "_layer_norm", remember)
    y = stirred()(inputs()[0], SEQLENS)
    gc.collect()
    assert len(kept) == 2 and all(each.expired() for each in kept)
    y.sum().backward()


def test_a_whole_transformer_with_checkpoints(nodes):
    torch.manual_seed(0)
    transformer = Transformer(16, 3, 2)
    drop_paths(transformer, 0.3)
    x = torch.randn(6, 16, requires_grad=True)

    def gradients():
        torch.manual_seed(3)
        out = transformer(x, SEQLENS)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *transformer.parameters()])]

    plain = gradients()
    assert nodes.made == 3
    transformer.checkpoint = True
    assert_equal(plain, gradients())
    nodes.off()
    assert_equal(plain, gradients())


def test_heads_too_wide_for_the_kernels_are_left_to_the_ops(nodes, monkeypatch, device):
    """Where the reference runs the attention."""
    block, (x, _) = stirred(device=device), inputs(device=device)
    seqlens = SEQLENS.to(device)
    near = block(x, seqlens)
    made = nodes.made
    monkeypatch.setattr(block_node, "_kernels_take", block_node._kernels_take.__wrapped__)
    for impl in _backends.PREFERENCE[x.device.type]:
        monkeypatch.setitem(block_node.ATTENTION.widest, impl, 4)
    torch.testing.assert_close(block(x, seqlens), near)
    assert nodes.made == made
