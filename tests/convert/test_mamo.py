"""A MAMO made of published encoders gives their features: those of Transformers and timm, with random weights."""

import importlib
import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.models import timm_alone
from m3ae_fast import M3AEFastWarning, SeqLens
from m3ae_fast.convert import convert_mamo, load_mamo
from m3ae_fast.convert.encoder_names import CLIP, OPEN_CLIP
from m3ae_fast.models.encoders import whole
from m3ae_fast.nn.positions import resample_positions
from m3ae_fast.train import RunConfig, load_run, pretrain

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
WIDTH, SIDE, PATCH, LAYERS, WORDS = 32, 4, 8, 4, 40
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = SIZES | {"image_size": SIDE * PATCH, "patch_size": PATCH, "num_hidden_layers": 2}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
QUICK = {"image_form": {"activation": "quick_gelu"}}


def drawn(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def bert(tmp_path):
    """(a BertModel of four layers, its folder with a vocabulary)."""
    config = transformers.BertConfig(vocab_size=WORDS, num_hidden_layers=LAYERS, max_position_embeddings=80, **SIZES)
    model = drawn(transformers.BertModel(config))
    model.save_pretrained(tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "noise", "number", "with", "all", "its", "colors"]
    words += [str(i) for i in range(WORDS - len(words))]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    return model, tmp_path / "bert"


@pytest.fixture
def clip(tmp_path):
    """(a CLIPVisionModel, its folder)."""
    model = drawn(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE)))
    model.save_pretrained(tmp_path / "clip")
    return model, tmp_path / "clip"


@pytest.fixture
def vit(tmp_path):
    model = drawn(transformers.ViTModel(transformers.ViTConfig(**IMAGE)))
    model.save_pretrained(tmp_path / "vit")
    return model, tmp_path / "vit"


def images():
    return torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(mamo):
    """[2, 1 + patches, width] of `images`."""
    return mamo.online.image(images(), whole([SIDE**2] * 2, torch.device("cpu"))).unflatten(0, (2, -1))


@torch.no_grad()
def test_images_of_clip(clip, bert):
    mamo, _ = load_mamo(clip[1], bert[1])
    model = getattr(clip[0], "vision_model", clip[0])
    expected = model.post_layernorm(clip[0](images()).last_hidden_state)
    torch.testing.assert_close(features(mamo), expected, **CLOSE)
    form = mamo.config.image_form
    assert (form.activation, form.norm_eps, form.norm_tokens, form.post_norm) == ("quick_gelu", 1e-5, True, False)


@torch.no_grad()
def test_images_of_clip_beside_its_text_encoder(tmp_path, bert):
    words = SIZES | {"vocab_size": 20, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(text_config=words, vision_config=IMAGE | {"layer_norm_eps": 1e-3})
    model = drawn(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path / "clip")
    found = model.vision_model(images()).last_hidden_state
    mamo, _ = load_mamo(tmp_path / "clip", bert[1])
    torch.testing.assert_close(features(mamo), model.vision_model.post_layernorm(found), **CLOSE)


@torch.no_grad()
def test_images_of_a_vision_transformer(vit, bert):
    mamo, _ = load_mamo(vit[1], bert[1])
    torch.testing.assert_close(features(mamo), vit[0](images()).last_hidden_state, **CLOSE)


@pytest.mark.parametrize("of_clip", [False, True], ids=["deit", "clip"])
@torch.no_grad()
def test_images_of_timm(tmp_path, bert, of_clip):
    try:
        timm_alone.load()
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}")
    timm = importlib.import_module("timm.models.vision_transformer")
    options = {
        "pre_norm": True,
        "act_layer": "quick_gelu",
        "norm_layer": lambda width, **more: nn.LayerNorm(width, 1e-5, **more),
    }
    model = drawn(timm.VisionTransformer(
        img_size=SIDE * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=4, mlp_ratio=2, num_classes=3,
        **(options if of_clip else {}),
    ))  # fmt: skip
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    mamo, _ = load_mamo(tmp_path / "timm.safetensors", bert[1], **(QUICK if of_clip else {}))
    torch.testing.assert_close(features(mamo), model.forward_features(images()), **CLOSE)


def test_images_by_the_names_of_open_clip(tmp_path, clip, bert):
    """The same weights; the text tower beside them is left out."""
    outside = {ours: theirs for theirs, ours in OPEN_CLIP.outside.items()}
    state, found = (
        {"text_projection": torch.ones(2, 2), "visual.proj": torch.ones(2, 2)},
        load_file(clip[1] / "model.safetensors"),
    )
    for name, tensor in found.items():
        module, _, leaf = name.rpartition(".")
        if name in CLIP.outside:
            state[f"visual.{outside[CLIP.outside[name]]}"] = tensor
        elif module in CLIP.outside:
            state[f"visual.{outside[CLIP.outside[module]]}.{leaf}"] = tensor
    for number in range(2):
        ours, theirs = f"encoder.layers.{number}", f"visual.transformer.resblocks.{number}"
        names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
        for name, other in (names | {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}).items():
            for leaf in ("weight", "bias"):
                state[f"{theirs}.{other}.{leaf}"] = found[f"{ours}.{name}.{leaf}"]
        for leaf in ("weight", "bias"):
            three = [found[f"{ours}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            state[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(three)
    save_file(state, tmp_path / "open.safetensors")
    expected = load_mamo(clip[1], bert[1])[0].online.state_dict()
    actual = load_mamo(tmp_path / "open.safetensors", bert[1], **QUICK)[0].online.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    with pytest.raises(ValueError, match=r"image_form must say the activation, which .*open\.safetensors does not"):
        load_mamo(tmp_path / "open.safetensors", bert[1])


@torch.no_grad()
def test_words_of_bert(clip, bert):
    """The features of its first layers on [CLS] and the words; [MASK] is a word of it."""
    mamo, tokenizer = load_mamo(clip[1], bert[1])
    lengths, words = [3, 6], torch.randint(5, WORDS, (9,), generator=torch.Generator().manual_seed(2))
    words[4] = tokenizer.id_of("[MASK]")
    ours = words.clone()
    ours[4] = mamo.online.text.mask_id
    actual = mamo.online.text(ours.int(), whole(lengths, torch.device("cpu"))).split([1 + n for n in lengths])
    for ids, found in zip(words.split(lengths), actual, strict=True):
        ids = torch.cat([torch.tensor([tokenizer.id_of("[CLS]")]), ids])
        expected = bert[0](ids[None], output_hidden_states=True).hidden_states[LAYERS // 2][0]
        torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_the_fusion_encoder_is_berts_last_layers(clip, bert):
    """Behind a LayerNorm of its own."""
    mamo, _ = load_mamo(clip[1], bert[1], text_depth=3, fusion_depth=1)
    rows = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(3))
    expected = bert[0].encoder.layer[3](F.layer_norm(rows, (WIDTH,), eps=1e-12)[None])
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(mamo.online.fusion(rows, SeqLens([7])), expected.reshape(7, -1), **CLOSE)


def test_the_momentum_network_is_a_copy_and_a_run_starts_from_it(tmp_path, clip, bert):
    config = convert_mamo(clip[1], bert[1], tmp_path / "start")
    run = load_run(tmp_path / "start")
    assert run.model.config == config and run.tokenizer.id_of("[MASK]") == 4 and run.step == 0
    online, target = run.model.online.state_dict(), run.model.target.state_dict()
    assert all(torch.equal(tensor, target[name]) for name, tensor in online.items())
    settings = {"objective": "mamo", "model": "small", "init": str(tmp_path / "start"), "device": "cpu", "steps": 2}
    with pytest.warns(M3AEFastWarning, match="of the words of the first 1,000 captions are not in the vocabulary"):
        pretrain(RunConfig(batch_size=2, **settings), tmp_path / "run", progress=False)
    after = load_run(tmp_path / "run").model.online
    assert torch.equal(after.image.position, run.model.online.image.position), "given positions are not trained"
    assert not torch.equal(
        after.text.transformer.blocks[0].norm1.weight, online["text.transformer.blocks.0.norm1.weight"]
    )
    assert list((tmp_path / "run" / "pictures").glob("words-*")), "where the caption is found is drawn, too"
    with pytest.raises(FileExistsError, match="run holds a run already"):
        convert_mamo(clip[1], bert[1], tmp_path / "run")


def test_the_command_line_makes_one(tmp_path, clip, bert, command_line):
    source, words = map(str, (clip[1], bert[1]))
    option = ("--set", "text_depth=1", "--set", 'image_form={"activation": "gelu"}')
    status, out, err = command_line("convert", source, str(tmp_path / "start"), "--text", words, *option)
    assert (status, err) == (0, "") and out.startswith(
        f"{tmp_path / 'start'}: image_size 32, patch_size 8, channels 3, vocab_size 40"
    )
    config = load_run(tmp_path / "start").model.config
    assert (config.text_depth, config.fusion_depth, config.image_form.activation) == (1, 2, "gelu")
    for options, message in (
        (("--text", words, "--to", "timm"), "--text must be given for weights that become ours alone"),
        (("--text-vocab", words), "--text-vocab must be given for models that read words"),
    ):
        status, _, err = command_line("convert", source, str(tmp_path / "out"), *options)
        assert status == 2 and message in err and err.count("\n") == 1


def test_positions_of_another_size_are_resampled(clip, bert):
    with pytest.warns(M3AEFastWarning, match="positions of 4 x 4 patches are resampled to 2 x 6"):
        mamo, _ = load_mamo(clip[1], bert[1], image_size=(16, 48), max_text_length=7)
    table = load_mamo(clip[1], bert[1])[0].online.image.position
    assert torch.equal(mamo.online.image.position, resample_positions(table, (4, 4), (2, 6)))
    assert mamo.online.text.position.shape == (7, WIDTH)


def edited(path, **changes):
    """config.json with changes."""
    about = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(about | changes))


def test_a_distilled_deit_is_refused(tmp_path, bert):
    transformers.DeiTModel(transformers.DeiTConfig(**IMAGE)).save_pretrained(tmp_path / "deit")
    with pytest.raises(
        ValueError, match=r"deit does not fit: .*got embeddings.distillation_token, too, .* not distilled"
    ):
        load_mamo(tmp_path / "deit", bert[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, r"bert/config.json must be of model_type bert, got 'roberta'"),
        ({"hidden_act": "relu"}, r"must have hidden_act of gelu, .*, got 'relu'"),
        ({"position_embedding_type": "relative_key"}, "must have position_embedding_type absolute, got 'relative_key'"),
        ({"num_attention_heads": 2}, "must be of one heads, got 4 and 2"),
    ],
)
def test_what_would_compute_something_else_is_refused(clip, bert, changes, message):
    edited(bert[1], **changes)
    with pytest.raises(ValueError, match=message):
        load_mamo(clip[1], bert[1])


@pytest.mark.parametrize(
    ("of", "name", "value", "message"),
    [
        ("bert", "embeddings.token_type_embeddings.weight", torch.ones(0, WIDTH), "must not be empty"),
        ("bert", "embeddings.position_embeddings.weight", torch.ones(99), r"positions must have shape \(rows, 32\)"),
        ("bert", "embeddings.word_embeddings.weight", torch.ones(()), "of two dimensions"),
        ("bert", "encoder.layer.3.output.LayerNorm.bias", None, r"must have blocks.3.norm_out.bias"),
        ("bert", "encoder.layer.1.attention.self.key.bias", torch.ones(3), "query, key and value of one shape"),
        ("bert", "encoder.layer.0.intermediate.dense.weight", torch.ones(()), "bert does not fit"),
        ("clip", "embeddings.class_embedding", torch.ones(5), r"pos_embed must have rows of shape \(5,\)"),
        ("clip", "embeddings.position_embedding.weight", torch.ones(16, WIDTH), "of a square of patches, got 15"),
        (
            "clip",
            "embeddings.patch_embedding.weight",
            torch.ones(WIDTH, 3, 8, 4),
            "the patch embedding must have shape",
        ),
        (
            "clip",
            "embeddings.patch_embedding.weight",
            torch.ones(WIDTH, 1, 8, 8),
            "clip .* must read 3 channels,.*got 1",
        ),
        ("clip", "post_layernorm.weight", None, r"must have image.transformer.norm.weight"),
        ("clip", "encoder.layers.1.mlp.fc2.bias", torch.ones(7), r"mlp.fc2.bias must have shape \(32,\), got \(7,\)"),
    ],
)
def test_damaged_weights_are_named(clip, bert, of, name, value, message):
    path = {"clip": clip, "bert": bert}[of][1] / "model.safetensors"
    state = load_file(path)
    del state[name]
    save_file(state | ({} if value is None else {name: value}), path)
    with pytest.raises(ValueError, match=message):
        load_mamo(clip[1], bert[1])


def test_what_does_not_fit_is_refused(tmp_path, clip, bert):
    with pytest.raises(ValueError, match=re.escape("text_depth + fusion_depth must be at most 4")):
        load_mamo(clip[1], bert[1], text_depth=3)
    with pytest.raises(ValueError, match="max_text_length must be less than the 80 positions, got 80"):
        load_mamo(clip[1], bert[1], max_text_length=80)
    with pytest.raises(ValueError, match=r"text_vocab must be given beside a file, .*model.safetensors, got none"):
        load_mamo(clip[1], bert[1] / "model.safetensors")
    state = load_file(bert[1] / "model.safetensors")
    save_file({**state, "encoder.layer.0.adapter.weight": torch.ones(2)}, bert[1] / "model.safetensors")
    with pytest.raises(ValueError, match=r"bert does not fit: .*got 'encoder.layer.0.adapter.weight'"):
        load_mamo(clip[1], bert[1])
    save_file(state, bert[1] / "model.safetensors")
    (bert[1] / "vocab.txt").write_text("[UNK]\nnoise\n")
    with pytest.raises(
        ValueError, match=re.escape("text_vocab must be BERT's, 40 entries with [CLS] and [MASK], got 2")
    ):
        load_mamo(clip[1], bert[1])
