"""Published weights against the models they are of: MAE in plain PyTorch, Transformers' ViTMAE, timm's encoder."""

import dataclasses
import json
import math
import os
import re
import struct
import warnings
import zipfile
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.models import timm_alone
from m3ae_fast import ImageTextBatch, M3AEFastWarning
from m3ae_fast.convert import convert_vit, load_vit, vit_names, write_timm, write_vitmae
from m3ae_fast.convert.vit import ratio_of
from m3ae_fast.models import M3AE, MAE, M3AEConfig
from m3ae_fast.nn.positions import resample_positions, sincos_2d
from m3ae_fast.train import load_run

WIDTH, DECODER, PATCH, SIDE = 48, 32, 8, 4
HEADS = {"heads": 4, "decoder_heads": 2}


class Published(nn.Module):
    """facebookresearch/mae's model: its parameters by their names, what it computes written out.

    arXiv:2111.06377, and models_mae.py of the public code.
    """

    def __init__(self, norm_pix=False):
        super().__init__()
        self.norm_pix, patches = norm_pix, SIDE * SIDE
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token, self.mask_token = (nn.Parameter(torch.empty(1, 1, wide)) for wide in (WIDTH, DECODER))
        for name, wide in (("pos_embed", WIDTH), ("decoder_pos_embed", DECODER)):
            table = torch.cat([torch.zeros(1, wide), published_sincos(SIDE, wide)])[None]
            self.register_parameter(name, nn.Parameter(table, requires_grad=False))
        self.blocks = nn.ModuleList(self.block(WIDTH) for _ in range(11))  # block 10 sorts before 2 as text
        self.decoder_embed = nn.Linear(WIDTH, DECODER)
        self.decoder_blocks = nn.ModuleList(self.block(DECODER) for _ in range(2))
        self.norm, self.decoder_norm = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(DECODER, eps=1e-6)
        self.decoder_pred = nn.Linear(DECODER, 3 * PATCH**2)
        assert patches == SIDE**2
        for parameter in self.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)

    @staticmethod
    def block(wide):
        block = nn.Module()
        block.norm1, block.norm2 = nn.LayerNorm(wide, eps=1e-6), nn.LayerNorm(wide, eps=1e-6)
        block.attn, block.mlp = nn.Module(), nn.Module()
        block.attn.qkv, block.attn.proj = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(wide, 4 * wide), nn.Linear(4 * wide, wide)
        return block

    @staticmethod
    def through(blocks, x, heads):
        for block in blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1)
            x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        return x

    def forward(self, imgs, ids_keep, ids_restore):
        x = self.patch_embed.proj(imgs).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        x = x.gather(1, ids_keep[..., None].expand(-1, -1, WIDTH))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        x = self.decoder_embed(self.norm(self.through(self.blocks, x, HEADS["heads"])))
        masks = self.mask_token.expand(len(x), SIDE**2 + 1 - x.shape[1], -1)
        y = torch.cat([x[:, 1:], masks], 1).gather(1, ids_restore[..., None].expand(-1, -1, DECODER))
        x = torch.cat([x[:, :1], y], 1) + self.decoder_pos_embed
        pred = self.decoder_pred(self.decoder_norm(self.through(self.decoder_blocks, x, HEADS["decoder_heads"])))[:, 1:]
        target = imgs.reshape(len(imgs), 3, SIDE, PATCH, SIDE, PATCH)
        target = torch.einsum("nchpwq->nhwpqc", target).reshape(len(imgs), SIDE**2, -1)
        if self.norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        mask = (ids_restore >= ids_keep.shape[1]).to(pred.dtype)
        return ((((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()), pred, mask.bool()


def published_sincos(side, wide):
    """util/pos_embed.py: "here w goes first"."""
    omega = 1.0 / 10000 ** (torch.arange(wide // 4, dtype=torch.float64) / (wide / 4))
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    parts = [grid.reshape(-1, 1) * omega for grid in (columns, rows)]
    return torch.cat([f(part) for part in parts for f in (torch.sin, torch.cos)], 1).float()


@pytest.fixture
def published():
    torch.manual_seed(0)
    return Published()


@pytest.fixture
def hf(tmp_path):
    """(a ViTMAEForPreTraining with random weights, the folder it was saved in)."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=SIDE * PATCH,
        patch_size=PATCH, decoder_hidden_size=DECODER, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, norm_pix_loss=True, mask_ratio=0.5,
    ))  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.data[0, 0] = 0
        table.data[0, 1:] = sincos_2d(SIDE, SIDE, table.shape[2])
    model.save_pretrained(tmp_path / "hf")
    return model.eval(), tmp_path / "hf"


def saved(path, model, **more):
    torch.save({"model": model.state_dict(), **more}, path)
    return path


def patches_kept(batch, keep):
    noise = torch.rand(batch, SIDE**2, generator=torch.Generator().manual_seed(2))
    order = noise.argsort(1)
    return order[:, :keep], order.argsort(1)


def as_published(model, gradients):
    """The gradients of ours by the published names, by way of what writes weights."""
    tables = {name: getattr(model, name) for name in ("image_position", "decoder_image_position")}
    found = vit_names.mae_of_ours(gradients, tables, decoder=True)
    return {name: gradient for name, gradient in found.items() if "pos_embed" not in name}


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_predictions_and_gradients_are_those_of_the_public_code(tmp_path, published, norm_pix):
    published.norm_pix = norm_pix
    path = saved(tmp_path / "mae.pth", published, args=Namespace(norm_pix_loss=norm_pix, lr=1e-3))
    published, ours = published.double(), load_vit(path, **HEADS).double()
    assert ours.config.norm_pix == norm_pix and ours.config.positions == "sincos"
    imgs = torch.randn(3, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)
    ids_keep, ids_restore = patches_kept(3, 5)

    loss, pred, mask = published(imgs, ids_keep, ids_restore)
    loss.backward()
    output = ours(imgs, image_mask=mask)
    output.loss.backward()

    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(output.loss.double(), loss, **close)
    torch.testing.assert_close(ours.reconstruct(imgs, image_mask=mask).image, pred, **close)
    gradients = as_published(ours, {name: p.grad for name, p in ours.named_parameters()})
    expected = {name: p.grad for name, p in published.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected, **close)
    assert len(expected) == len(list(ours.parameters()))


def test_transformers_computes_the_same(hf):
    model, folder = hf
    ours = load_vit(folder).double()
    assert (ours.config.norm_eps, ours.config.norm_pix, ours.config.image_mask_ratio) == (1e-12, True, 0.5)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model.double()(images, noise=torch.rand(2, SIDE**2))
        output = ours(images, image_mask=expected.mask.bool())
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-6, atol=1e-9)


def test_round_trip_of_transformers_is_bitwise(tmp_path, hf):
    model, folder = hf
    write_vitmae(load_vit(folder), tmp_path / "back")
    back, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    for name in ("layer_norm_eps", "norm_pix_loss", "mask_ratio", "intermediate_size", "hidden_act", "image_size"):
        assert getattr(back.config, name) == getattr(model.config, name)
    assert load_vit(tmp_path / "back").config == load_vit(folder).config


def test_an_encoder_alone_of_transformers(tmp_path, hf):
    model, folder = hf
    model.vit.save_pretrained(tmp_path / "encoder")  # names without "vit."
    with pytest.warns(M3AEFastWarning, match="there is no decoder in the weights"):
        ours = load_vit(tmp_path / "encoder", decoder_width=32, decoder_depth=1, decoder_heads=4)
    whole = load_vit(folder)
    for name, value in ours.encoder.state_dict().items():
        assert torch.equal(value, whole.encoder.state_dict()[name])
    assert ours.config.decoder_depth == 1


def test_a_cross_decoder_is_in_no_published_format(tmp_path, hf):
    """A new one goes with an encoder; as a ViTMAE it is refused by name, its encoder goes to timm."""
    model, folder = hf
    with pytest.raises(ValueError, match="decoder must be 'joint', as that in the weights is, got 'cross'"):
        load_vit(folder, decoder="cross")
    model.vit.save_pretrained(tmp_path / "encoder")
    with pytest.warns(M3AEFastWarning, match="there is no decoder in the weights"):
        ours = load_vit(tmp_path / "encoder", decoder="cross", decoder_width=32, decoder_depth=1, decoder_heads=4)
    with pytest.raises(ValueError, match="must have decoder 'joint' to be written as a ViTMAE, got 'cross'"):
        write_vitmae(ours, tmp_path / "vitmae")
    assert not (tmp_path / "vitmae").exists()
    write_timm(ours, tmp_path / "vit.safetensors")
    assert not [name for name in load_file(tmp_path / "vit.safetensors") if "decoder" in name]


def test_weights_in_a_file_of_torch_are_the_same(hf):
    _, folder = hf
    expected = load_vit(folder).state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert all(torch.equal(value, expected[name]) for name, value in load_vit(folder).state_dict().items())


@pytest.mark.parametrize(
    ("value", "shapes"), [(torch.ones(()), r"\[\(\), \(\), \(\)\]"), (None, r"\[\(48,\), \(48,\)\]")]
)
def test_queries_keys_and_values_belong_together(hf, value, shapes):
    _, folder = hf
    state = load_file(folder / "model.safetensors")
    prefix = "vit.encoder.layer.1.attention.attention"
    for name in ("query", "key", "value") if value is not None else ("key",):
        if value is None:
            del state[f"{prefix}.{name}.bias"]
        else:
            state[f"{prefix}.{name}.bias"] = value
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"blocks.1.attn.qkv.bias must be made of .*, got {shapes}"):
        load_vit(folder)


@pytest.mark.parametrize("channels", [3, 9])
def test_weights_of_our_own_compute_the_same_in_transformers(tmp_path, channels):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    ours = MAE(M3AEConfig.tiny(channels=channels)).double()  # with token types, and tanh-GELU
    write_vitmae(ours, tmp_path / "hf")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf").double()
    images = torch.randn(2, channels, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images)
        output = ours(images, image_mask=expected.mask.bool())
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-6, atol=1e-9)
    assert load_vit(tmp_path / "hf").config.channels == channels


@pytest.fixture
def vit():
    """timm's VisionTransformer of some size, with random weights."""
    try:
        timm_alone.load()
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}")
    from timm.models.vision_transformer import VisionTransformer

    def make(**options):
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "num_classes": 7}
        model = VisionTransformer(**(sizes | options)).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_an_encoder_of_timm_computes_the_same(tmp_path, vit, suffix):
    model, path = vit(), tmp_path / f"vit.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    with pytest.warns(M3AEFastWarning) as told:
        ours = load_vit(path, heads=4)
    with pytest.warns(M3AEFastWarning):
        again = load_vit(path, heads=4)
    assert [str(each.message) for each in told] == [
        f"{path}: the classifier head is left out",
        "there is no decoder in the weights: a new one is drawn from seed 0",
    ]
    assert ours.config.positions == "given"
    assert torch.equal(again.image_head.weight, ours.image_head.weight)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(images).cls, model.forward_features(images)[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "channels"), [(MAE, 3), (M3AE, 3), (MAE, 9)])
def test_our_encoders_compute_the_same_in_timm(tmp_path, vit, kind, channels):
    torch.manual_seed(0)
    ours = kind(M3AEConfig.tiny(vocab_size=50, channels=channels))
    arguments = write_timm(ours, tmp_path / "vit.safetensors")
    theirs = vit(**arguments)
    theirs.load_state_dict(load_file(tmp_path / "vit.safetensors"))
    images = torch.randn(2, channels, 64, 64)
    with torch.no_grad():
        expected = ours.encode(ImageTextBatch(images)).cls
        torch.testing.assert_close(theirs(images), expected, rtol=1e-4, atol=1e-4)


def test_positions_of_another_size_are_resampled(tmp_path, published):
    path = saved(tmp_path / "mae.pth", published)
    with pytest.warns(M3AEFastWarning, match="positions of 4 x 4 patches are resampled to 6 x 8"):
        ours = load_vit(path, image_size=(48, 64), **HEADS)
    assert ours.config.positions == "given"
    table = published.pos_embed[0, 1:]
    assert torch.equal(ours.image_position, resample_positions(table, (4, 4), (6, 8)))
    assert torch.equal(resample_positions(table, (4, 4), (4, 4)), table)
    assert ours.encode(torch.randn(1, 3, 48, 64)).cls.isfinite().all()


def test_a_model_fine_tuned_on_the_mean_says_what_becomes_of_its_norm(tmp_path, published):
    state = {n: t for n, t in published.state_dict().items() if not n.startswith(("decoder", "mask"))}
    state = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in state.items()}
    torch.save({"model": state | {"head.weight": torch.ones(5, WIDTH)}}, tmp_path / "mae_finetuned.pth")
    with pytest.warns(M3AEFastWarning) as told:
        ours = load_vit(tmp_path / "mae_finetuned.pth", heads=4)
    assert any("fc_norm becomes the LayerNorm of every token" in str(each.message) for each in told)
    assert torch.equal(ours.encoder.norm.weight, published.norm.weight)


@pytest.mark.parametrize(("name", "norm_pix"), [("mae_pretrain_vit_base", True), ("mae_visualize_vit_large", False)])
def test_normalized_pixels_follow_from_the_kind_of_file(tmp_path, published, name, norm_pix):
    assert load_vit(saved(tmp_path / f"{name}.pth", published), **HEADS).config.norm_pix == norm_pix
    assert load_vit(tmp_path / f"{name}.pth", **HEADS, norm_pix=not norm_pix).config.norm_pix != norm_pix


def test_a_converted_file_is_a_checkpoint(tmp_path, published):
    source, target = saved(tmp_path / "mae.pth", published), tmp_path / "mae.safetensors"
    config = convert_vit(source, target, **HEADS)
    run = load_run(target)
    assert (run.step, run.tokenizer, run.config.objective) == (0, None, "mae")
    assert run.model.config == config and not config.type_vectors
    expected = load_vit(source, **HEADS).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.model.state_dict().items())
    with pytest.raises(ValueError, match=r"target must name a \.safetensors file"):
        convert_vit(source, tmp_path / "mae.pt", **HEADS)


def without(state, name):
    return {each: tensor for each, tensor in state.items() if each != name}


HOSTILE = {
    "name": (lambda s: s | {"blocks.0.attn.q_norm.weight": torch.ones(4)}, "got 'blocks.0.attn.q_norm.weight'"),
    "missing": (lambda s: without(s, "blocks.1.mlp.fc2.bias"), r"encoder.blocks.1.mlp.fc2.bias .*, got none"),
    "no class token": (lambda s: without(s, "cls_token"), "must have a cls_token as wide as pos_embed, 48"),
    "gap": (lambda s: s | {"blocks.9999.norm1.weight": torch.ones(WIDTH)}, "must have blocks 0 to 11, got 9999"),
    "shape": (lambda s: s | {"norm.weight": torch.ones(3)}, r"encoder.norm.weight must have shape \(48,\), got \(3,\)"),
    "positions": (lambda s: s | {"pos_embed": torch.zeros(1, 12, WIDTH)}, r"shape \(11, 32\), got \(16, 32\)"),
    "no square": (
        lambda s: s | {f"{d}pos_embed": torch.zeros(1, 12, wide) for d, wide in (("", WIDTH), ("decoder_", DECODER))},
        "image_size must be given for 11 patches",
    ),
    "no width": (
        lambda s: s | {"cls_token": torch.ones(1, 1, 0), "pos_embed": torch.ones(1, 17, 0)},
        "must not be empty, got shape",
    ),
    "class width": (lambda s: s | {"cls_token": torch.ones(1, 1, 3)}, "as wide as pos_embed, 48"),
    "flat": (lambda s: s | {"pos_embed": torch.zeros(())}, r"pos_embed must have shape \(1, tokens, width\), got \(\)"),
    "channels": (
        lambda s: s | {"patch_embed.proj.weight": torch.ones(WIDTH, 17, 8, 8)},
        "at most 16 channels, got .48, 17",
    ),
    "class row": (lambda s: s | {"decoder_pos_embed": torch.ones(1, 17, DECODER)}, "must begin with zeros"),
    "both norms": (lambda s: s | {"fc_norm.bias": torch.ones(WIDTH)}, "one final LayerNorm"),
    "integers": (lambda s: s | {"cls_token": torch.ones(1, 1, WIDTH).long()}, "is not a dense tensor of floats"),
    "expanded": (lambda s: s | {"cls_token": torch.ones(1).expand(1, 1, 1 << 40)}, "got a file of"),
    "text": (lambda s: s | {"cls_token": "here"}, "holds a str under 'cls_token'"),
    "list": (lambda s: [1, 2], "holds a list"),
    "empty": (lambda s: {}, "it is empty"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_such_model_is_named_in_one_line(tmp_path, published, command_line, case):
    change, named = HOSTILE[case]
    torch.save(change(published.state_dict()), tmp_path / "mae.pth")
    refused(command_line, tmp_path / "mae.pth", named)


def refused(command_line, source, named):
    target = source.parent / "out.safetensors"
    status, _, err = command_line("convert", str(source), str(target), "--set", "heads=4", "--set", "decoder_heads=2")
    errors = [line for line in err.splitlines() if line and "warning: " not in line]
    assert status == 2 and len(errors) == 1, err
    assert str(source) in errors[0] and re.search(named, errors[0]), err
    assert not target.exists()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_of_a_pickle_is_run(tmp_path, published, command_line):
    saved(tmp_path / "mae.pth", published, optimizer=Touch(tmp_path / "ran"))
    refused(command_line, tmp_path / "mae.pth", "must be a file of weights")
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_named(tmp_path, published, command_line):
    path = saved(tmp_path / "mae.pth", published)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(command_line, path, "cut short")
    torch.save(published.state_dict(), path, _use_new_zipfile_serialization=False)
    refused(command_line, path, "of torch before 1.6")
    torch.save({"cls_token": torch.ones(4)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as given:
        for claim in (b"K\xff", b"J\x00\x00\x00\x10"):  # 255, or 2**28, elements of the four
            with zipfile.ZipFile(path, "w") as forged:
                for name in given.namelist():
                    data = given.read(name).replace(b"K\x04tq\x07QK\x00K\x04", claim + b"tq\x07QK\x00" + claim)
                    forged.writestr(name, data)
            refused(command_line, path, "must be a file of weights")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as forged:
            for name in given.namelist():
                forged.writestr(name, given.read(name))
        refused(command_line, path, "it is .* compressed")
    path = path.with_suffix(".safetensors")
    header = json.dumps({"cls_token": {"dtype": "F32", "shape": [1, 1, 1 << 40], "data_offsets": [0, 1 << 42]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    refused(command_line, path, "must be a file of weights")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("name", ["mae.pth", "mae.safetensors", "hf/config.json", "hf/model.safetensors"])
def test_pipes_and_devices_are_not_read(tmp_path, name, make):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "vit_mae"}')
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} must be .*: it is no regular file"):
        load_vit(tmp_path / "hf" if "hf" in name else tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "vit"}, "model_type 'vit_mae', got 'vit'"),
        ({"hidden_act": "relu"}, "hidden_act of gelu, .*, got 'relu'"),
        ({"qkv_bias": False}, "qkv_bias True, got False"),
        ({"num_channels": 1}, "num_channels 3, got 1"),
        ({"norm_pix_loss": "yes"}, "norm_pix_loss True, got 'yes'"),
        ({"image_size": 64}, "8 x 8 rows, got 16"),
        ({"image_size": [16, 64]}, None),
        ({"num_attention_heads": 5}, "width must be a multiple of heads, got 48 and 5"),
        ({"layer_norm_eps": "small"}, "norm_eps must be"),
        ({"mask_ratio": 1e999}, "image_mask_ratio must be"),
    ],
)
def test_configurations_of_transformers(hf, changes, named):
    _, folder = hf
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    if named is None:
        assert load_vit(folder).config.grid == (2, 8)
        return
    with pytest.raises(ValueError, match=named) as error:
        load_vit(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(("width", "hidden"), [(112, 976), (112, 3792), (1152, 4304), (768, 3072)])
def test_hidden_rows_are_a_multiple_of_the_width_that_rounds_to_them(width, hidden):
    assert int(width * ratio_of(hidden, width)) == hidden


def test_published_heads_are_known_and_others_are_asked_for(tmp_path, published):
    with pytest.raises(ValueError, match=r"heads must be given for width 48 \(--set heads=N\)"):
        load_vit(saved(tmp_path / "mae.pth", published))
    assert dataclasses.asdict(load_vit(tmp_path / "mae.pth", **HEADS).config)["width"] == WIDTH
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_vit(tmp_path / "mae.pth", **HEADS)


def test_the_command_line_goes_there_and_back(tmp_path, published, command_line):
    saved(tmp_path / "mae.pth", published)
    heads = ("--set", "heads=4", "--set", "decoder_heads=2")
    for arguments in (
        ("mae.pth", "mae.safetensors", *heads),
        ("mae.safetensors", "folder", "--to", "vitmae"),
        ("folder", "back.safetensors"),
        ("mae.safetensors", "vit.safetensors", "--to", "timm"),
    ):
        source, target, *options = arguments
        status, out, err = command_line("convert", str(tmp_path / source), str(tmp_path / target), *options)
        assert (status, err) == (0, "") and out.startswith(f"{tmp_path / target}: image_size 32, patch_size 8")
    model, back = (load_run(tmp_path / f"{name}.safetensors").model for name in ("mae", "back"))
    assert model.config == back.config
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    encoder = published.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in load_file(tmp_path / "vit.safetensors").items())
    for arguments, named in (
        (("mae.safetensors", "out", "--to", "timm", *heads), "--set must be given for weights"),
        (("vit.safetensors", "out", "--to", "timm"), "vit.safetensors is a safetensors file, but not a checkpoint"),
        (("nowhere.pth", "out.safetensors"), "there is no file .*nowhere.pth"),
        ((".", "out.safetensors"), r"there is no file .*config\.json, which must be of the folder of a ViTMAE"),
    ):
        source, target, *options = arguments
        status, _, err = command_line("convert", str(tmp_path / source), str(tmp_path / target), *options)
        assert status == 2 and err.count("\n") == 1 and re.search(named, err)
