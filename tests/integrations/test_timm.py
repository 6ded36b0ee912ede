"""timm's models after `accelerate`: the same state dict, numbers, hooks and wrappers; what falls back says so."""

import copy
import functools
import io

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.models import timm_alone
from m3ae_fast import M3AEFastWarning, testing
from m3ae_fast.integrations import _swap

try:
    timm_alone.load()
except ImportError as error:
    pytest.skip(f"timm is not installed: {error}", allow_module_level=True)

from timm import layers
from timm.models import naflexvit, vision_transformer

from m3ae_fast.integrations import timm as fast

pytestmark = pytest.mark.usefixtures("poison")

WIDTH = 48


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    """What is told once is told again in each test."""
    monkeypatch.setattr(_swap, "_TOLD", set())


def vit(**options):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 3} | options
    model = vision_transformer.VisionTransformer(num_classes=7, **options)
    return stirred(model)


def naflex(**options):
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": WIDTH, "depth": 2, "num_heads": 3, "pos_embed_grid_size": (4, 4)}
    return stirred(naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**(sizes | options)), num_classes=7))


def stirred(model):
    """No parameter at a value (0, 1, 1e-6) that would hide what is done with it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def accelerated(model):
    return fast.accelerate(copy.deepcopy(model))


def images(*size, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def ragged(grids, capacity):
    """A batch as timm's NaFlex collator makes it: patches of images of (rows, columns) patches, padded at the end."""
    coord, valid = torch.zeros(len(grids), capacity, 2, dtype=torch.int64), torch.zeros(len(grids), capacity).bool()
    for b, (rows, columns) in enumerate(grids):
        valid[b, : rows * columns] = True
        coord[b, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return images(len(grids), capacity, 4 * 4 * 3) * valid[..., None], coord, valid


RAGGED = ragged([(2, 3), (4, 4), (1, 1), (5, 2)], 17)


def call(model, *inputs):
    """(parameters, *inputs), for functions of `of`."""
    return testing.Call(({n: p.detach().requires_grad_() for n, p in model.named_parameters()}, *inputs))


def of(model):
    """The model as a function of its parameters and inputs, its random numbers drawn from a seed."""

    def run(parameters, *inputs):
        torch.manual_seed(2)
        return functional_call(model, parameters, inputs)

    return run


def results(model, *inputs):
    """Outputs and gradients of everything, flat."""
    outputs, gradients = call(model, *inputs).run(of(model))
    return outputs + gradients


def assert_close(ours, theirs, tolerance=1e-5):
    for each in zip(ours, theirs, strict=True):
        torch.testing.assert_close(*each, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True, "init_values": 0.3, "reg_tokens": 2, "class_token": False, "global_pool": "avg"},
        {"act_layer": "gelu_tanh", "scale_attn_norm": True, "qkv_bias": False, "proj_bias": False, "pre_norm": True},
        {"act_layer": nn.GELU, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-3, bias=False)},
        {"attn_layer": functools.partial(layers.Attention, gated=True, attn_head_dim=20), "global_pool": "map"},
        {"patch_drop_rate": 0.6},
        {"patch_drop_rate": 0.6, "reg_tokens": 2, "no_embed_class": True, "dynamic_img_size": True, "img_size": 24},
        {"patch_drop_rate": 0.6, "class_token": False, "global_pool": "avg", "pos_embed": "none"},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_and_gradients_are_timms(options, dtype, assert_as_good):
    if isinstance(options.get("attn_layer"), functools.partial):  # timm asks for a class
        options = {**options, "attn_layer": "attn"}
        stock = vit(**options)
        for block in stock.blocks:
            block.attn = stirred(layers.Attention(WIDTH, 3, gated=True, attn_head_dim=20))
    else:
        stock = vit(**options)
    ours = accelerated(stock)
    assert_as_good(call(stock.to(dtype), images(2, 3, 32, 32, dtype=dtype)), of(ours), of(stock))


def test_nothing_but_the_class_changes():
    stock = vit(patch_drop_rate=0.5)
    model = copy.deepcopy(stock)
    ids = [id(p) for p in model.parameters()]
    fast.accelerate(model)
    fast.accelerate(model)
    assert isinstance(model, fast.VisionTransformer) and isinstance(model.blocks[1].attn, fast.Attention)
    assert [id(p) for p in model.parameters()] == ids and str(model) == str(stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    assert isinstance(torch.load(saved, weights_only=False).blocks[0], fast.Block)
    fast.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_a_model_without_timms_modules_is_refused():
    with pytest.raises(TypeError, match=r"must have modules of the classes Mlp, Attention, Block, .*got Linear"):
        fast.accelerate(nn.Linear(2, 2))


def test_subclasses_stay_as_they_are():
    class Mine(vision_transformer.Block):
        pass

    model = vit(block_fn=Mine)
    fast.accelerate(model)
    assert type(model.blocks[0]) is Mine and isinstance(model.blocks[0].mlp, fast.Mlp)


@pytest.mark.parametrize("options", [{"proj_drop_rate": 0.3}, {"drop_path_rate": 0.5}], ids=str)
@pytest.mark.filterwarnings("ignore:Mlp .* dropout before fc2:m3ae_fast.M3AEFastWarning")
def test_dropout_and_drop_path_draw_what_timms_draw(options):
    """proj_drop is the dropout of fc1's rows, too: that Mlp falls back."""
    stock = vit(**options)
    assert_close(*(results(model, images(5, 3, 32, 32)) for model in (accelerated(stock), stock)))


def test_the_norms_outputs_and_the_activated_rows_are_not_kept(monkeypatch):
    """Nor is anything else of the hidden width but what fc1 put out."""
    block, x = accelerated(vit()).blocks[0], images(2, 5, WIDTH)
    kept = {"norm": [], "hidden": []}

    def remember(name, function):
        def run(*args, **kwargs):
            out = function(*args, **kwargs)
            kept[name].append(StorageWeakRef((out[0] if isinstance(out, tuple) else out).untyped_storage()))
            return out

        return run

    monkeypatch.setattr(fast, "layer_norm", remember("norm", fast.layer_norm))
    monkeypatch.setattr(fast, "project", remember("hidden", fast.project))  # qkv, proj, fc1
    y = block(x)
    assert [each.expired() for each in kept["norm"]] == [True, True]
    assert [each.expired() for each in kept["hidden"]] == [False, True, False]
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_weights_lent_to_a_model_are_those_of_its_backward_pass():
    """functional_call takes them away again in between."""
    model = vit()
    weights, x = dict(stirred(vit()).named_parameters()), images(2, 3, 32, 32)
    ours, theirs = (
        torch.autograd.grad(functional_call(each, weights, (x,)).square().sum(), list(weights.values()))
        for each in (accelerated(model), model)
    )
    assert_close(ours, theirs)


def test_hooks_on_every_module_fire():
    """Also on the layers that are bypassed where nothing hooks into them."""
    stock = vit(init_values=0.3)
    model = accelerated(stock)

    def hooked(model):
        model, called = copy.deepcopy(model), []
        for name, module in model.blocks.named_modules():
            module.register_forward_hook(lambda *_, name=name: called.append(name))
        return results(model, images(2, 3, 32, 32)), called

    theirs, called = hooked(stock)
    with pytest.warns(M3AEFastWarning) as told:
        ours, ours_called = hooked(model)
    assert ours_called == called and len(called) > 30
    assert sorted(str(w.message).split()[0] for w in told) == ["Block", "Mlp"]
    assert_close(ours, theirs)


class LowRank(nn.Linear):
    """What peft makes of a Linear, in short."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("before", [True, False])
def test_low_rank_adapters_put_in_before_or_after(before):
    stock = vit()

    def adapt(model):
        torch.manual_seed(3)
        for block in model.blocks:
            block.attn.qkv, block.attn.proj = LowRank(block.attn.qkv), LowRank(block.attn.proj)
            block.mlp.fc1, block.mlp.fc2 = LowRank(block.mlp.fc1), LowRank(block.mlp.fc2)
        return model

    model = accelerated(adapt(copy.deepcopy(stock))) if before else adapt(accelerated(stock))
    with pytest.warns(M3AEFastWarning, match="Mlp .* fc2 is no plain Linear"):
        ours = results(model, images(2, 3, 32, 32))
    assert_close(ours, results(adapt(stock), images(2, 3, 32, 32)))


def test_a_parametrised_weight_is_used():
    stock, model = vit(), accelerated(vit())
    for each in (stock, model):
        nn.utils.parametrizations.weight_norm(each.blocks[0].attn.qkv)
        each.blocks[0].attn.qkv.parametrizations.weight.original0.data.mul_(2)
    assert_close([model(images(2, 3, 32, 32))], [stock(images(2, 3, 32, 32))])


def test_a_weight_that_wraps_others_is_left_to_its_own_operations():
    """As torchao's and DTensor are: our kernels would read what is not there."""

    class Wrapped(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        def __tensor_flatten__(self):
            raise AssertionError("taken apart")

    layer = nn.Linear(2, 2)
    assert _swap.bare(nn.Linear, layer)
    layer._parameters["weight"] = layer.weight.detach().as_subclass(Wrapped)
    assert isinstance(layer.weight, Wrapped) and not _swap.bare(nn.Linear, layer)


FALLBACKS = {
    "Attention .* drops attention weights": {"attn_drop_rate": 0.2},
    "Mlp .* activation is SiLU": {"act_layer": "silu"},
    "Mlp .* norm or a dropout before fc2": {"scale_mlp_norm": True},
    "Block .* no plain LayerNorms": {"norm_layer": "rmsnorm"},
    "VisionTransformer .* dropout before patch_drop": {"patch_drop_rate": 0.5, "pos_drop_rate": 0.2},
    "VisionTransformer .* not timm's plain ones": {"patch_drop_rate": 0.5, "embed_norm_layer": "layernorm"},
    "VisionTransformer .* no whole number of square": {"patch_drop_rate": 0.5, "patch_size": (8, 4)},
}


@pytest.mark.parametrize("why", FALLBACKS)
def test_what_has_no_faster_form_runs_as_timms_and_says_so(why):
    stock = vit(**FALLBACKS[why])
    with pytest.warns(M3AEFastWarning, match=why):
        ours = results(accelerated(stock), images(2, 3, 32, 32))
    assert_close(ours, results(stock, images(2, 3, 32, 32)))


def test_an_mlp_without_dropouts():
    stock = vit()
    for block in stock.blocks:
        block.mlp.drop1 = block.mlp.drop2 = nn.Identity()
    assert_close(*(results(model, images(2, 3, 32, 32)) for model in (accelerated(stock), stock)))


@pytest.mark.filterwarnings("ignore:Mlp .* dropout before fc2:m3ae_fast.M3AEFastWarning")
def test_a_dropout_that_stays_on_in_evaluation_drops():
    stock = vit(proj_drop_rate=0.3).eval()
    for block in stock.blocks:
        block.mlp.drop1.train()
    assert_close(*(results(model, images(2, 3, 32, 32)) for model in (accelerated(stock), stock)))


def test_attention_weights_that_are_to_be_seen_are_made():
    stock = vit()
    for block in stock.blocks:
        block.attn.fused_attn = False
    with pytest.warns(M3AEFastWarning, match="Attention .* fused_attn is off"):
        ours = results(accelerated(stock), images(2, 3, 32, 32))
    assert_close(ours, results(stock, images(2, 3, 32, 32)))


@pytest.mark.parametrize("masked", [{"is_causal": True}, {"attn_mask": torch.ones(17, 17).tril().bool()}], ids=str)
def test_masks_are_met(masked):
    stock = vit()
    model = accelerated(stock)
    with pytest.warns(M3AEFastWarning, match="Attention .* given a mask"):
        ours = model.forward_features(images(2, 3, 32, 32), **masked)
    assert_close([ours], [stock.forward_features(images(2, 3, 32, 32), **masked)])
    assert (ours - model.forward_features(images(2, 3, 32, 32))).abs().max() > 1e-2


@pytest.mark.parametrize("ordered", [False, True])
def test_a_dropped_patch_is_never_read(ordered):
    """Pixels of patches that timm drops are NaN: in its own gradients they show."""
    stock = vit(patch_drop_rate=0.75)
    stock.patch_drop.ordered = ordered
    x = images(3, 3, 32, 32)
    torch.manual_seed(2)
    kept = stock.patch_drop(torch.arange(-1, 16).expand(3, -1)[..., None])[:, 1:, 0]
    dropped = torch.ones(3, 16).scatter(1, kept, 0).bool().unflatten(1, (4, 4))
    holes = x.masked_fill(dropped.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None], torch.nan)
    assert any(gradient.isnan().any() for gradient in results(stock, holes))
    assert_close(results(accelerated(stock), holes), results(stock, x))


def test_patches_that_are_not_side_by_side_are_left_to_timm():
    """3 x 3 patches of 8 pixels, 10 apart."""
    stock = vit(patch_drop_rate=0.5, img_size=24)
    stock.patch_embed.img_size, stock.patch_embed.proj.stride = (32, 32), (10, 10)
    with pytest.warns(M3AEFastWarning, match="the patches overlap"):
        ours = results(accelerated(stock), images(2, 3, 32, 32))
    assert_close(ours, results(stock, images(2, 3, 32, 32)))


def test_patch_dropout_is_off_in_eval_and_images_of_another_size_are_refused():
    stock = vit(patch_drop_rate=0.75)
    model = accelerated(stock)
    with pytest.raises(AssertionError, match="doesn't match model"), pytest.warns(M3AEFastWarning, match="square"):
        model(images(2, 3, 24, 32))
    assert_close([model.eval()(images(2, 3, 32, 32))], [stock.eval()(images(2, 3, 32, 32))])


NAFLEX = {
    "average": {"global_pool": "avg", "reg_tokens": 2},
    "attention pooling": {"global_pool": "map", "class_token": True, "qk_norm": True},
    "layer scale": {"init_values": 0.3, "global_pool": "avgmax", "fc_norm": False, "use_key_only_attn_mask": True},
    "factorized": {"pos_embed": "factorized", "act_layer": "gelu_tanh", "global_pool": "avg", "pre_norm": True},
    "patch dropout": {"patch_drop_rate": 0.5, "global_pool": "avg", "class_token": True},
}


@pytest.mark.parametrize("name", NAFLEX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ragged_batches_are_packed(name, dtype, assert_as_good):
    stock = naflex(**NAFLEX[name]).to(dtype)
    patches, coord, valid = RAGGED
    assert_as_good(call(stock, patches.to(dtype), coord, valid), of(accelerated(stock)), of(stock))


@pytest.mark.parametrize("final_norm", [True, False])
def test_ragged_features_are_timms_where_valid_and_zero_elsewhere(final_norm):
    stock = naflex(global_pool="map", class_token=True, final_norm=final_norm)
    patches, coord, valid = RAGGED
    ours, theirs = (m.forward_features(patches, coord, valid) for m in (accelerated(stock), stock))
    real = torch.cat([torch.ones(len(valid), 1).bool(), ours["patch_valid"]], 1)
    assert torch.equal(ours["patch_valid"], valid)
    assert_close([ours["patches"][real]], [theirs["patches"][real]])
    assert (ours["patches"][~real] == 0).all() and (theirs["patches"][~real] != 0).any()


def test_padding_does_not_reach_the_blocks(monkeypatch):
    model, seen = accelerated(naflex(global_pool="avg")), []
    stock = fast.Block.forward
    monkeypatch.setattr(fast.Block, "forward", lambda self, x, **kw: seen.append(x.shape) or stock(self, x, **kw))
    patches, coord, valid = RAGGED
    model({"patches": patches, "patch_coord": coord, "patch_valid": valid})
    assert seen == [(1, int(valid.sum()), WIDTH)] * 2


def test_no_valid_patch_and_no_sample():
    model = accelerated(naflex(global_pool="avg", class_token=True))
    patches, coord, valid = (x[:2] for x in RAGGED)
    some = model.forward_features(patches, coord, valid & torch.tensor([[True], [False]]))["patches"]
    assert_close([some[0]], [model.forward_features(patches, coord, valid)["patches"][0]])
    assert some.isfinite().all() and (some[1, 1:] == 0).all()
    bare = accelerated(naflex(global_pool="avg"))
    assert bare(patches, coord, torch.zeros_like(valid)).isfinite().all()


NAFLEX_FALLBACKS = {
    "it rotates queries and keys": {"rope_type": "axial"},
    "drops paths, by sample": {"drop_path_rate": 0.3},
    "in its attention, it drops attention weights": {"attn_drop_rate": 0.3},
}


@pytest.mark.parametrize("why", NAFLEX_FALLBACKS)
@pytest.mark.filterwarnings("ignore:(Attention|Mlp) runs:m3ae_fast.M3AEFastWarning")
def test_ragged_batches_that_cannot_be_packed(why):
    stock = naflex(global_pool="avg", **NAFLEX_FALLBACKS[why])
    with pytest.warns(M3AEFastWarning, match=f"NaFlexVit .*{why}"):
        ours = results(accelerated(stock), *RAGGED)
    assert_close(ours, results(stock, *RAGGED))


@pytest.mark.filterwarnings("ignore:Attention runs:m3ae_fast.M3AEFastWarning")
def test_hooks_in_the_blocks_see_the_padded_batch():
    model, seen = accelerated(naflex(global_pool="avg")), []
    model.blocks[1].mlp.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    with pytest.warns(M3AEFastWarning, match="NaFlexVit .* hooks into its blocks"):
        model(*RAGGED)
    assert seen == [(4, 17, WIDTH)]


def test_a_mask_for_a_ragged_batch_and_a_batch_of_images():
    stock = naflex(global_pool="avg", embed_proj_type="linear")
    model = accelerated(stock)
    patches, coord, valid = RAGGED
    mask = torch.zeros(4, 1, 17, 17)
    with pytest.warns(M3AEFastWarning, match="given a mask"):
        ours = model(patches, coord, valid, mask)
    assert_close([ours], [stock(patches, coord, valid, mask)])
    assert_close([model(images(2, 3, 16, 16))], [stock(images(2, 3, 16, 16))])


@pytest.mark.parametrize("make", [vit, functools.partial(naflex, global_pool="avg")], ids=["vit", "naflex"])
def test_gradient_checkpointing(make):
    model = accelerated(make())
    inputs = RAGGED if isinstance(model, fast.NaFlexVit) else (images(2, 3, 32, 32),)
    plain = results(model, *inputs)
    model.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, results(model, *inputs), strict=True))


@pytest.mark.parametrize("make", [vit, functools.partial(naflex, global_pool="avg")], ids=["vit", "naflex"])
def test_autocast(make):
    """As near to fp32 as timm's own bf16 is, twice over, and of the same dtype."""
    stock = make()
    inputs = RAGGED if isinstance(stock, naflexvit.NaFlexVit) else (images(2, 3, 32, 32),)
    exact = results(stock, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = results(stock, *inputs), results(accelerated(stock), *inputs)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + 2**-9 * c.norm()


def test_patch_dropout_under_autocast():
    stock = vit(patch_drop_rate=0.5, reg_tokens=1)
    exact = results(stock, images(2, 3, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (results(m, images(2, 3, 32, 32)) for m in (stock, accelerated(stock)))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + 2**-9 * c.norm()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_compiles_to_one_graph(qk_norm):
    torch._dynamo.reset()
    block = accelerated(vit(qk_norm=qk_norm, init_values=0.3)).blocks[0]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for batch, tokens in ((2, 9), (3, 17), (5, 4)):
        x = images(batch, tokens, WIDTH).requires_grad_()
        ours, theirs = compiled(x), block(x)
        assert_close([ours, *torch.autograd.grad(ours.square().sum(), x)],
                     [theirs, *torch.autograd.grad(theirs.square().sum(), x)])  # fmt: skip
    assert counter.frame_count <= 2


def test_a_model_with_patch_dropout_compiles_to_one_graph():
    torch._dynamo.reset()
    model, x, outputs = accelerated(vit(patch_drop_rate=0.5, depth=1)), images(2, 3, 32, 32), []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        outputs.append(run(x))
        outputs[-1].sum().backward()
    assert_close([outputs[0]], [outputs[1]])


def test_a_block_that_falls_back_compiles_to_one_graph():
    torch._dynamo.reset()
    stock = vit(attn_drop_rate=0.1).eval().blocks[0]
    block = accelerated(stock)
    block.attn.fused_attn = False
    with pytest.warns(M3AEFastWarning, match="Attention .* fused_attn is off"):
        ours = torch.compile(block, fullgraph=True, backend="aot_eager")(images(2, 5, WIDTH))
    assert_close([ours], [stock(images(2, 5, WIDTH))])


def test_no_tokens():
    block = accelerated(vit()).blocks[0]
    for shape in ((0, 5, WIDTH), (2, 0, WIDTH)):
        x = torch.zeros(shape, requires_grad=True)
        assert block(x).shape == shape
        block(x).sum().backward()
        assert x.grad.shape == shape
