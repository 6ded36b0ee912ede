"""Hugging Face's FLAVA before and after `accelerate`: the same losses, gradients and outputs, less stored."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import FlavaConfig, FlavaForPreTraining, FlavaTextModel

from m3ae_fast import M3AEFastWarning, testing
from m3ae_fast.integrations import _swap
from m3ae_fast.integrations.transformers import accelerate, flava, restore

tells = pytest.mark.filterwarnings("ignore::m3ae_fast.M3AEFastWarning")

SAMPLES, PATCHES, WORDS, IMAGE_VOCABULARY, TEXT_VOCABULARY = 4, 16, 9, 53, 101
MASKED_LOGITS = ("mim_logits", "mlm_logits", "mmm_image_logits", "mmm_text_logits")


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """Nothing has been told yet."""
    monkeypatch.setattr(_swap, "_TOLD", set())


def make_model(dtype=torch.float32, **options):
    """A model with two layers each, every parameter other than it is initialized: biases of 0 would hide errors."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64} | options
    config = FlavaConfig(
        image_config=shape | {"image_size": 32, "patch_size": 8, "vocab_size": IMAGE_VOCABULARY},
        text_config=shape | {"vocab_size": TEXT_VOCABULARY, "max_position_embeddings": 16},
        multimodal_config=shape,
        hidden_size=32,
        projection_dim=16,
        init_codebook=False,
        mlm_weight=0.5,
        mmm_image_weight=2.0,
    )
    torch.manual_seed(0)
    model = FlavaForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()


def accelerated(model):
    return accelerate(copy.deepcopy(model))


def make_batch(kind="pairs", dtype=torch.float32):
    """A batch of its own for each call: Transformers writes into mim_labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, TEXT_VOCABULARY, (SAMPLES, WORDS), generator=generator)
    padding = torch.ones(SAMPLES, WORDS, dtype=torch.int64)
    padding[1, 5:] = 0
    padding[2, :3] = 0
    masked = torch.rand(SAMPLES, WORDS, generator=generator) < 0.4
    masked_patches = torch.rand(SAMPLES, PATCHES, generator=generator) < 0.5
    images = {
        "pixel_values": torch.randn(SAMPLES, 3, 32, 32, generator=generator).to(dtype),
        "bool_masked_pos": masked_patches,
        "mim_labels": torch.randint(0, IMAGE_VOCABULARY, (SAMPLES, PATCHES), generator=generator),
    }
    texts = {
        "input_ids": ids,
        "input_ids_masked": ids.masked_fill(masked, 3),
        "attention_mask": padding,
        "mlm_labels": ids.masked_fill(~masked, -100),
    }
    batch = {"images": images, "texts": texts}.get(kind, images | texts)
    if kind == "pairs":
        batch["itm_labels"] = torch.tensor([1, 0, 1, 1])
    elif kind == "pairs without padding":
        batch["attention_mask"].fill_(1)
    return batch


KINDS = ["pairs", "pairs without itm_labels", "pairs without padding", "images", "texts"]


def gradients(model, batch, **context):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, **context) if context else torch.enable_grad():
        output = model(**batch)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance, leave_out=()):
    """Two outputs of Transformers', field by field and inside one another."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    elif isinstance(theirs, dict):
        assert [name for name in theirs if name not in leave_out] == list(ours)
        for name in ours:
            assert_same(ours[name], theirs[name], tolerance)
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair, tolerance)
    else:
        assert theirs is None


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_outputs_and_gradients_of_a_training_step(kind, dtype, tolerance):
    model = make_model(dtype)
    theirs, their_gradients = gradients(model, make_batch(kind, dtype))
    ours, our_gradients = gradients(accelerated(model), make_batch(kind, dtype))
    assert_same(ours, theirs, tolerance, leave_out=MASKED_LOGITS)
    assert any(name in theirs for name in MASKED_LOGITS)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@tells
@pytest.mark.parametrize("attentions", [False, True], ids=["", "attentions"])
def test_outputs_in_evaluation_are_complete(kind, attentions):
    model = make_model().eval()
    options = {"output_attentions": attentions}
    with torch.no_grad():
        assert_same(accelerated(model)(**make_batch(kind), **options), model(**make_batch(kind), **options), 1e-5)


@pytest.mark.parametrize(
    "options, left_out",
    [
        ({"return_dict": False}, {"mlm_labels": None}),
        ({"return_loss": False}, {}),
        ({}, {"mlm_labels": None}),
        ({"return_loss": False, "return_dict": False}, {"mlm_labels": None, "mim_labels": None}),
    ],
    ids=["tuple, no words", "no loss", "no words", "tuple, no labels"],
)
def test_training_leaves_out_only_logits_that_became_a_loss(options, left_out):
    model = make_model()
    ours = accelerated(model)(**make_batch() | left_out, **options)
    theirs = model(**make_batch() | left_out, **options)
    if isinstance(theirs, tuple):
        if options.get("return_loss", True):
            theirs = (*theirs[:-2], theirs[-1])  # mmm_image_logits
        assert_same(ours, theirs, 1e-5)
    else:
        assert_same(ours, theirs, 1e-5, ["mmm_image_logits"] if options.get("return_loss", True) else [])


def test_masked_logits_are_there_for_whoever_asks():
    model = make_model()
    fast = accelerated(model)
    fast.masked_logits = True
    assert_same(fast(**make_batch()), model(**make_batch()), 1e-5)


@tells
def test_torch_compile_makes_all_logits():
    model = make_model()
    ours = torch.compile(accelerated(model), backend="eager")(**make_batch())
    assert_same(ours, model(**make_batch()), 1e-5)


def test_a_head_that_is_wrapped_makes_its_logits():
    class Sharded(flava.FlavaMaskedPredictionHead):
        """As FSDP makes it: its weights are gone when the call is over."""

    model = make_model()
    fast = accelerated(model)
    fast.mmm_text_head.__class__ = Sharded
    assert_same(fast(**make_batch()), model(**make_batch()), 1e-5, ["mmm_image_logits"])


def test_a_step_without_masked_positions_has_the_loss_of_transformers():
    model = make_model()
    nothing = {"mlm_labels": torch.full((SAMPLES, WORDS), -100)}
    theirs, their_gradients = gradients(model, make_batch("texts") | nothing)
    ours, our_gradients = gradients(accelerated(model), make_batch("texts") | nothing)
    assert theirs.loss.isnan() and ours.loss.isnan()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, equal_nan=True)


def test_a_sample_of_nothing_but_padding_leaves_the_others_alone():
    model = make_model().eval()
    batch = make_batch("texts")
    batch["attention_mask"][3] = 0
    ours, theirs = (
        m.flava.text_model(batch["input_ids"], batch["attention_mask"]) for m in (accelerated(model), model)
    )
    torch.testing.assert_close(ours.last_hidden_state[:3], theirs.last_hidden_state[:3], rtol=1e-5, atol=1e-5)
    assert ours.last_hidden_state.isfinite().all()


def test_other_masks_go_to_transformers():
    model = make_model().eval()
    ids = make_batch("texts")["input_ids"]
    bias = torch.randn(SAMPLES, 1, 1, WORDS)
    with pytest.warns(M3AEFastWarning, match="a mask other than one of padding"):
        ours = accelerated(model).flava.text_model(ids, bias)
    assert_same(ours, model.flava.text_model(ids, bias), 1e-5)


@pytest.mark.parametrize(
    "reentrant",
    [False, pytest.param(True, marks=tells)],  # run again, its layers are handed copies: no `_padding`
)
def test_gradient_checkpointing(reentrant):
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours, our_gradients = gradients(accelerated(model), make_batch())
    theirs, their_gradients = gradients(model, make_batch())
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_autocast_is_as_near_to_the_truth():
    model = make_model()
    truth, true_gradients = gradients(copy.deepcopy(model).double(), make_batch(dtype=torch.float64))
    theirs, their_gradients = gradients(model, make_batch(), enabled=True)
    ours, our_gradients = gradients(accelerated(model), make_batch(), enabled=True)
    assert ours.loss.dtype == theirs.loss.dtype

    def flat(tensors):
        return torch.cat([tensors[name].flatten() for name in true_gradients])

    testing.assert_error_rule("loss", ours.loss, theirs.loss, truth.loss, factor=2)
    testing.assert_error_rule("gradients", flat(our_gradients), flat(their_gradients), flat(true_gradients), factor=3)


@tells
def test_dropout_draws_as_transformers_does():
    model = make_model(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    losses = []
    for each in (model, accelerated(model)):
        torch.manual_seed(2)
        losses.append(each(**make_batch()).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_what_hangs_on_a_module_still_runs():
    model = make_model()
    fast = accelerated(model)
    first, second = fast.flava.text_model.encoder.layer
    hooked = [
        first.layernorm_after, second.intermediate, second.output, first.attention.attention.key,
        first.attention.output.dense, second.attention.attention.dropout, fast.mmm_text_head,
        fast.mmm_image_head.decoder, fast.mmm_image_head.transform.dense,
    ]  # fmt: skip
    shapes = []
    for module in hooked:
        module.register_forward_hook(lambda module, args, output: shapes.append(output))
    with pytest.warns(M3AEFastWarning):
        ours = fast(**make_batch())
    assert len(shapes) == 2 * len(hooked) - 3  # the text encoder runs twice, the heads once
    torch.testing.assert_close(ours.loss, model(**make_batch()).loss, rtol=1e-5, atol=1e-5)
    assert ours.mmm_text_logits is not None and ours.mmm_image_logits is not None


def test_a_low_rank_update_of_a_layer_is_not_lost():
    class LowRank(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make_model()
    layer = model.flava.image_model.encoder.layer[1]
    for module in (layer.attention.attention.query, layer.intermediate.dense, layer.output.dense):
        module.__class__ = LowRank
    model.mmm_text_head.decoder.__class__ = LowRank
    with pytest.warns(M3AEFastWarning, match="runs unaccelerated"):
        ours = accelerated(model)(**make_batch())
    torch.testing.assert_close(ours.loss, model(**make_batch()).loss, rtol=1e-5, atol=1e-5)


def test_other_norms_dropouts_and_layers():
    model = make_model()
    layer, head = model.flava.image_model.encoder.layer[0], model.mmm_text_head.transform
    layer.layernorm_after, layer.attention.attention.dropout = nn.RMSNorm(32), nn.Identity()
    head.LayerNorm, model.mmm_image_head.transform.dense = nn.RMSNorm(32), nn.Identity()
    with pytest.warns(M3AEFastWarning, match="FlavaLayer|FlavaPredictionHeadTransform"):
        ours = accelerated(model)(**make_batch())
    torch.testing.assert_close(ours.loss, model(**make_batch()).loss, rtol=1e-5, atol=1e-5)


@tells
def test_a_dropout_that_stays_on_in_evaluation_drops():
    model = make_model(attention_probs_dropout_prob=0.5).eval()
    for layer in model.flava.text_model.encoder.layer:
        layer.attention.attention.dropout.train()
    losses = []
    for each in (model, accelerated(model)):
        torch.manual_seed(2)
        losses.append(each(**make_batch("texts")).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_checkpoints_are_those_of_transformers(tmp_path):
    model = make_model()
    fast = accelerated(model)
    assert fast.state_dict().keys() == model.state_dict().keys()
    fast.save_pretrained(tmp_path)
    loaded = FlavaForPreTraining.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["FlavaForPreTraining"]
    assert type(loaded) is FlavaForPreTraining
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(FlavaTextModel.from_pretrained(tmp_path).encoder.layer[0].output.dense.weight,
                       model.flava.text_model.encoder.layer[0].output.dense.weight)  # fmt: skip


def test_restore_pickle_and_names():
    model = make_model()
    fast = accelerated(model)
    exchanged = {type(module) for module in fast.modules()} - {type(module) for module in model.modules()}
    assert exchanged == set(flava.FAST.values())
    assert all(new.__name__ == old.__name__ and issubclass(new, old) for old, new in flava.FAST.items())
    again = pickle.loads(pickle.dumps(fast))
    assert type(again) is flava.FlavaForPreTraining
    output = again(**make_batch())
    torch.testing.assert_close(pickle.loads(pickle.dumps(output)).loss, output.loss)
    restore(fast)
    assert [type(module) for module in fast.modules()] == [type(module) for module in model.modules()]
    assert_same(fast(**make_batch()), model(**make_batch()), 0)


def stored(model, batch):
    """Shapes of what a training step keeps for its backward pass, other than parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = x  # alive, so that no other takes its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(**batch)
    assert output.loss.requires_grad
    return [tuple(x.shape) for x in kept.values()]


def test_logits_scores_and_what_gelu_puts_out_are_not_stored():
    model = make_model()
    ours, theirs = (stored(each, make_batch()) for each in (accelerated(model), model))
    tokens = {PATCHES + 1, WORDS, 1 + PATCHES + 1 + WORDS}

    def logits(shapes):  # the gradients that linear_cross_entropy makes are [V, D] and [V]
        return [s for s in shapes if len(s) == 2 and s[1] in (IMAGE_VOCABULARY, TEXT_VOCABULARY)]

    def scores(shapes):
        return [s for s in shapes if len(s) > 2 and s[-1] in tokens and s[-2] in tokens]

    def hidden(shapes):
        return [s for s in shapes if s[-1:] == (64,)]

    assert len(logits(theirs)) == 2 and len(scores(theirs)) == 10  # ten layers run: two encoders twice, one once
    assert not logits(ours) and not scores(ours)
    assert 2 * len(hidden(ours)) == len(hidden(theirs)) == 20


def test_layers_normalize_again_instead_of_storing(monkeypatch):
    """The profiler counts what is allocated and not freed; hooks of ours would keep `recomputed` from working."""
    model = accelerated(make_model())
    encoder = model.flava.image_model.encoder
    x = torch.randn(SAMPLES, PATCHES + 1, 32, requires_grad=True)
    encoder(x)

    def kept():
        with torch.profiler.profile(profile_memory=True) as profile:
            output = encoder(x)
        assert output.last_hidden_state.requires_grad
        return sum(event.self_cpu_memory_usage for event in profile.events())

    less = kept()
    monkeypatch.setattr("m3ae_fast.nn.recompute.top_hooks", lambda ignore_is_tracing: "none")
    assert kept() - less == 2 * len(encoder.layer) * x.nbytes
