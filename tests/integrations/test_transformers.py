"""accelerate() for Hugging Face's ViTMAE: its own model says what is right."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from m3ae_fast import M3AEFastWarning, _backends
from m3ae_fast.integrations import _swap

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel  # noqa: E402

from m3ae_fast.integrations.transformers import accelerate, restore, vit_mae  # noqa: E402

TINY = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80, "image_size": 32,
    "patch_size": 8, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 72,
}  # fmt: skip
CASES = {
    "plain": {},
    "norm_pix": {"norm_pix_loss": True},
    "tanh": {"hidden_act": "gelu_new", "qkv_bias": False},
    "one channel": {"num_channels": 1, "mask_ratio": 0.3},
    "nearly everything masked": {"mask_ratio": 0.95},  # no patch is kept: the encoder reads CLS alone
}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def told_afresh(monkeypatch):
    monkeypatch.setattr(_swap, "_TOLD", set())


def model_of(cls=ViTMAEForPreTraining, **options):
    torch.manual_seed(0)
    model = cls(ViTMAEConfig(**(TINY | options))).train()
    for parameter in model.parameters():
        if parameter.requires_grad:  # zeros would hide what is left out
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs_of(model, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    patches = (model.vit if hasattr(model, "vit") else model).embeddings.patch_embeddings.num_patches
    images = torch.randn(batch, model.config.num_channels, height, width, generator=generator)
    return {"pixel_values": images, "noise": torch.rand(batch, patches, generator=generator)}


def run(model, **inputs):
    """The output and every gradient."""
    model.zero_grad()
    output = model(**inputs)
    (output.loss if "loss" in output else output.last_hidden_state.square().mean()).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, other, **inputs):
    (expected, gradients), (output, others) = run(model, **inputs), run(other, **inputs)
    assert output.keys() == expected.keys()
    assert others.keys() == gradients.keys()
    torch.testing.assert_close(dict(output), dict(expected), equal_nan=True, **TOLERANCE)
    torch.testing.assert_close(others, gradients, **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_transformers(case):
    model = model_of(**CASES[case])
    assert_same(model, accelerate(copy.deepcopy(model)), **inputs_of(model), output_hidden_states=True)


@pytest.mark.parametrize("batch", [1, 5])
def test_model_without_a_decoder(batch):
    model = model_of(ViTMAEModel)
    assert_same(model, accelerate(copy.deepcopy(model)), **inputs_of(model, batch))


def test_masks_are_drawn_as_transformers_draws_them():
    model = model_of()
    fast, images = accelerate(copy.deepcopy(model)), inputs_of(model)["pixel_values"]
    torch.manual_seed(3)
    expected = model(images)
    torch.manual_seed(3)
    output = fast(images)
    assert torch.equal(output.mask, expected.mask) and torch.equal(output.ids_restore, expected.ids_restore)
    torch.testing.assert_close(output.loss, expected.loss, **TOLERANCE)


def test_noise_in_double_precision_and_gradients_of_images():
    model = model_of()
    fast, inputs = accelerate(copy.deepcopy(model)), inputs_of(model)
    inputs["noise"] = inputs["noise"].double()
    images = inputs["pixel_values"].requires_grad_()
    expected, got = (torch.autograd.grad(m(**inputs).loss, images)[0] for m in (model, fast))
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_images_of_another_size():
    model = model_of()
    fast, images = accelerate(copy.deepcopy(model)), torch.randn(2, 3, 48, 48)
    inputs = {"pixel_values": images, "noise": torch.rand(2, 36), "interpolate_pos_encoding": True}
    with pytest.warns(M3AEFastWarning, match="interpolate_pos_encoding|another size"):
        assert_same(model, fast, **inputs)


def test_wrong_images_are_refused_as_before():
    model = model_of()
    fast = accelerate(copy.deepcopy(model))
    for shape in ((2, 3, 40, 40), (2, 1, 32, 32), (2, 3, 40, 32)):
        messages = []
        for each in (model, fast):
            with pytest.raises(ValueError) as error:
                each(torch.randn(shape))
            messages.append(str(error.value))
        assert messages[0] == messages[1]


# -- what falls back says so -----------------------------------------------------------------------------------------


def falls_back(model, fast, match, **inputs):
    with pytest.warns(M3AEFastWarning, match=match):
        assert_same(model, fast, **inputs)


def test_other_activations():
    model = model_of(hidden_act="relu")
    falls_back(model, accelerate(copy.deepcopy(model)), "GELU", **inputs_of(model))


def test_patches_that_leave_a_rest():
    model = model_of(ViTMAEModel, image_size=30)
    falls_back(model, accelerate(copy.deepcopy(model)), "divide the image", **inputs_of(model))


def test_attention_weights():
    model = model_of(attn_implementation="eager")
    fast, inputs = accelerate(copy.deepcopy(model)), inputs_of(model)
    falls_back(model, fast, "attention weights", **inputs, output_attentions=True)
    weights = fast(**inputs, output_attentions=True).attentions
    assert [w.shape for w in weights] == [(3, 4, 5, 5)] * 2
    assert fast(**inputs).attentions is None


def test_attention_mask():
    model = model_of(attn_implementation="eager")
    mask = torch.tensor([[1] * 5, [1] * 5, [1, 1, 1, 0, 0]])
    falls_back(model, accelerate(copy.deepcopy(model)), "attention_mask", **inputs_of(model), attention_mask=mask)


def test_dropout():
    model = model_of(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, attn_implementation="eager")
    fast, inputs = accelerate(copy.deepcopy(model)), inputs_of(model)
    torch.manual_seed(5)
    expected = model(**inputs).loss
    torch.manual_seed(5)
    with pytest.warns(M3AEFastWarning, match="dropout"):
        torch.testing.assert_close(fast(**inputs).loss, expected, **TOLERANCE)
    torch.testing.assert_close(fast.eval()(**inputs).loss, model.eval()(**inputs).loss, **TOLERANCE)


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize("name", ["attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.filterwarnings("ignore::m3ae_fast.M3AEFastWarning")
def test_layers_that_somebody_exchanged_or_hooked_are_called(name):
    model = model_of()
    fast = accelerate(copy.deepcopy(model))
    for each in (model, fast):
        each.vit.layers[0].get_submodule(name).__class__ = Scaled
        each.vit.layers[1].get_submodule(name).register_forward_hook(lambda *call: 2 * call[-1])
        each.vit.layers[1].layernorm_after.register_forward_hook(lambda *call: 3 * call[-1])
        each.vit.embeddings.patch_embeddings.projection.register_forward_hook(lambda *call: -call[-1])
    assert_same(model, fast, **inputs_of(model))


def test_hooks_on_activations_run():
    model = model_of()
    fast = accelerate(copy.deepcopy(model))
    for each in (model, fast):
        each.vit.layers[0].mlp.activation_fn.register_forward_hook(lambda *call: 2 * call[-1])
    falls_back(model, fast, "ViTMAEMLP .* hooked", **inputs_of(model))


def test_a_patch_embedding_of_another_class_is_called():
    class Stem(vit_mae.stock.ViTMAEPatchEmbeddings):
        def forward(self, pixel_values):
            return super().forward(pixel_values).tanh()

    model = model_of()
    model.vit.embeddings.patch_embeddings.__class__ = Stem
    falls_back(model, accelerate(copy.deepcopy(model)), "plain Conv2d", **inputs_of(model))


def test_an_attention_function_that_somebody_registered_is_called():
    def means(module, query, key, value, *args, **kwargs):
        return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2), None

    transformers.AttentionInterface.register("means", means)
    model = model_of(attn_implementation="means")
    falls_back(model, accelerate(copy.deepcopy(model)), "attention function", **inputs_of(model))


@pytest.mark.parametrize("name", ["layernorm_before", "layernorm_after"])
def test_other_norms(name):
    model = model_of()
    for layer in model.vit.layers:
        setattr(layer, name, nn.RMSNorm(48))
    falls_back(model, accelerate(copy.deepcopy(model)), "a LayerNorm", **inputs_of(model))


def test_layers_without_a_dropout_and_an_mlp_without_fc2():
    model = model_of(intermediate_size=48)
    for layer in model.vit.layers:
        layer.dropout, layer.mlp.fc2 = nn.Identity(), nn.Identity()
    falls_back(model, accelerate(copy.deepcopy(model)), "fc2 is not a plain Linear", **inputs_of(model))


@pytest.mark.filterwarnings("ignore:ViTMAELayer .* dropout:m3ae_fast.M3AEFastWarning")
def test_a_dropout_that_stays_on_in_evaluation_drops():
    model = model_of(hidden_dropout_prob=0.5).eval()
    for layer in model.vit.layers:
        layer.dropout.train()
    fast, inputs, losses = accelerate(copy.deepcopy(model)), inputs_of(model), []
    for each in (model, fast):
        torch.manual_seed(5)
        losses.append(each(**inputs).loss)
    torch.testing.assert_close(*losses, **TOLERANCE)


def test_bytes_are_refused_as_before():
    for model in (model_of(), accelerate(model_of())):
        with pytest.raises(RuntimeError, match="should be the same"):
            model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def hooked(model):
    """As Accelerate's dispatch_model leaves it."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    for module in (model, model.vit.embeddings, *model.vit.layers):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    return model


def test_modules_under_hooks_of_accelerate_stay_as_they_are():
    model = model_of()
    fast = hooked(copy.deepcopy(model))
    with pytest.warns(M3AEFastWarning, match="ViTMAEEmbeddings, ViTMAEForPreTraining, ViTMAELayer stay as they are"):
        accelerate(fast)
    assert type(fast) is ViTMAEForPreTraining and type(fast.decoder.decoder_layers[0]) is vit_mae.ViTMAELayer
    assert_same(model, fast, **inputs_of(model))


def test_hooks_of_accelerate_that_come_and_go():
    model = model_of(hidden_act="relu")
    fast = hooked(accelerate(copy.deepcopy(model)))
    falls_back(model, fast, "GELU", **inputs_of(model))
    with pytest.warns(M3AEFastWarning, match="stay as they are"):
        restore(fast)
    assert_same(model, fast, **inputs_of(model))
    for module in fast.modules():
        pytest.importorskip("accelerate.hooks").remove_hook_from_module(module)
    restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]
    assert_same(model, fast, **inputs_of(model))


# -- what stays as it was --------------------------------------------------------------------------------------------


def test_state_dict_and_restore():
    model = model_of()
    fast = copy.deepcopy(model)
    assert accelerate(accelerate(fast)) is fast
    assert isinstance(fast, ViTMAEForPreTraining) and fast.state_dict().keys() == model.state_dict().keys()
    names = [[type(m).__name__ for m in each.modules()] for each in (model, fast)]
    assert names[0] == names[1]  # Transformers and FSDP know layers by the names of their classes
    assert type(pickle.loads(pickle.dumps(fast))) is type(fast)
    assert restore(fast) is fast
    assert [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]


def test_save_and_load(tmp_path):
    fast = accelerate(model_of())
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ViTMAEForPreTraining"]
    loaded = transformers.AutoModelForPreTraining.from_pretrained(tmp_path).train()
    assert type(loaded) is ViTMAEForPreTraining
    inputs = inputs_of(loaded)
    torch.testing.assert_close(dict(loaded(**inputs)), dict(fast(**inputs)), **TOLERANCE)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = model_of()
    fast = accelerate(copy.deepcopy(model))
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(model, fast, **inputs_of(model))


def test_autocast():
    model = model_of()
    fast, inputs = accelerate(copy.deepcopy(model)), inputs_of(model)
    exact, exact_gradients = run(model, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        (theirs, their_gradients), (ours, our_gradients) = run(model, **inputs), run(fast, **inputs)
    assert [x.dtype for x in ours.values()] == [x.dtype for x in theirs.values()]

    def error(output, gradients):
        logits = (output.logits - exact.logits).norm() / exact.logits.norm()
        flat, expected = (torch.cat([g.flatten() for g in each.values()]) for each in (gradients, exact_gradients))
        return torch.stack([logits, (flat - expected).norm() / expected.norm()])

    assert (error(ours, our_gradients) <= 1.5 * error(theirs, their_gradients)).all()


def test_autocast_leaves_double_precision_alone():
    model = model_of().double()
    fast, inputs = accelerate(copy.deepcopy(model)), inputs_of(model)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(**inputs).logits, model(**inputs).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whole_model_in_another_dtype(dtype):
    model = model_of().to(dtype)
    fast, inputs = accelerate(copy.deepcopy(model)), inputs_of(model)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    expected, output = model(**inputs), fast(**inputs)
    assert output.logits.dtype == expected.logits.dtype and output.loss.dtype == expected.loss.dtype
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(output.logits, expected.logits, **tolerance)


def test_compiles_to_one_graph_for_any_batch():
    torch._dynamo.reset()
    model = model_of()
    fast = accelerate(copy.deepcopy(model))
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 4, 6):
        inputs = inputs_of(model, batch)
        expected, gradients = run(model, **inputs)
        fast.zero_grad()
        loss = compiled(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss, expected.loss, **TOLERANCE)
        torch.testing.assert_close({n: p.grad for n, p in fast.named_parameters() if n in gradients}, gradients,
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
    assert graphs["unique_graphs"] - before <= 2


@pytest.mark.filterwarnings("ignore:ViTMAEAttention:m3ae_fast.M3AEFastWarning")  # Transformers exports with a mask
def test_exports():
    model = accelerate(model_of()).eval()
    inputs = inputs_of(model)
    exported = torch.export.export(model, (inputs["pixel_values"],), {"noise": inputs["noise"]})
    output = exported.module()(inputs["pixel_values"], noise=inputs["noise"])
    torch.testing.assert_close(output.logits, model(**inputs).logits)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("train", [True, False])
def test_a_trace_is_refused(train):
    """It would hold the sizes of its example, and save no gradient."""
    model = accelerate(model_of(ViTMAEModel, return_dict=False)).train(train)
    images = inputs_of(model)["pixel_values"]
    message = r"^torch\.jit\.trace must not meet .*; use torch\.export or torch\.compile, or first restore\(model\)"
    with pytest.raises(RuntimeError, match=message):
        torch.jit.trace(model, images, check_trace=False)
    traced = torch.jit.trace(restore(model), images, check_trace=False)
    assert traced(images)[0].requires_grad


def test_a_second_derivative_is_refused():
    model = accelerate(model_of())
    loss = model(**inputs_of(model)).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(g.sum() for g in gradients).backward()


def test_models_without_anything_to_accelerate_are_refused():
    with pytest.raises(TypeError, match=r"ViTMAELayer.*got Linear"):
        accelerate(nn.Linear(2, 2))


@pytest.mark.skipif(_backends.INTERPRETED, reason="the interpreter's working memory is not a kernel's")
def test_a_step_holds_less_memory():
    """Peak of what PyTorch allocates, weights apart: exact and the same on every run."""
    model = model_of(num_hidden_layers=4, decoder_num_hidden_layers=4, hidden_size=96, intermediate_size=384,
                     decoder_hidden_size=64, decoder_intermediate_size=256)  # fmt: skip
    fast, inputs = accelerate(copy.deepcopy(model)), inputs_of(model, batch=16)
    stock, ours = peak(lambda: model(**inputs).loss), peak(lambda: fast(**inputs).loss)
    assert ours < 0.7 * stock


def peak(forward) -> int:
    """Bytes: the most that is allocated at a time in a forward pass whose result is kept."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = forward()
    assert kept is not None
    changes, events = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    held = most = 0
    for _, size in sorted(changes):
        held += size
        most = max(most, held)
    return most
