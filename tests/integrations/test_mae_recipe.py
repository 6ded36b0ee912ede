"""examples/mae_recipe.py on a plain MAE with the attributes and methods of facebookresearch/mae's."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

EXAMPLE = Path(__file__).parents[2] / "examples/mae_recipe.py"
L, PATCH, WIDTH, DECODER = 16, 4, 24, 16


def example():
    spec = importlib.util.spec_from_file_location("mae_recipe", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class PlainAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class PlainMlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class PlainBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), PlainAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), PlainMlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainPatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_size, self.num_patches, self.proj = (16, 16), L, nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, imgs):
        return self.proj(imgs).flatten(2).transpose(1, 2)


class PlainMAE(nn.Module):
    """arXiv:2111.06377: random masking by sorted noise, an asymmetric decoder, the error of masked patches."""

    def __init__(self, norm_pix_loss=False):
        super().__init__()
        self.norm_pix_loss = norm_pix_loss
        self.patch_embed = PlainPatchEmbed()
        self.cls_token, self.mask_token = (nn.Parameter(torch.randn(1, 1, width)) for width in (WIDTH, DECODER))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + L, WIDTH), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + L, DECODER), requires_grad=False)
        self.blocks = nn.ModuleList(PlainBlock(WIDTH, 3) for _ in range(2))
        self.decoder_blocks = nn.ModuleList(PlainBlock(DECODER, 4) for _ in range(2))
        self.norm, self.decoder_norm = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(DECODER, eps=1e-6)
        self.decoder_embed, self.decoder_pred = nn.Linear(WIDTH, DECODER), nn.Linear(DECODER, PATCH * PATCH * 3)

    def random_masking(self, x, mask_ratio):
        keep = int(x.shape[1] * (1 - mask_ratio))
        order = torch.rand(x.shape[:2], device=x.device).argsort(1)
        ids_restore = order.argsort(1)
        kept = x.gather(1, order[:, :keep, None].expand(-1, -1, x.shape[2]))
        return kept, (ids_restore >= keep).to(torch.get_default_dtype()), ids_restore

    def forward_encoder(self, imgs, mask_ratio):
        x, mask, ids_restore = self.random_masking(self.patch_embed(imgs) + self.pos_embed[:, 1:], mask_ratio)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, x, ids_restore):
        x = self.decoder_embed(x)
        shuffled = torch.cat([x[:, 1:], self.mask_token.expand(len(x), L + 1 - x.shape[1], -1)], 1)
        restored = shuffled.gather(1, ids_restore[..., None].expand(-1, -1, DECODER))
        x = torch.cat([x[:, :1], restored], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, imgs, pred, mask):
        grid = imgs.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # N, 3, rows, PATCH, columns, PATCH
        target = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.3])
def test_the_recipe_has_the_same_noise_losses_and_gradients(norm_pix, mask_ratio, poison):
    class MAE(example().Packed, PlainMAE):
        pass

    torch.manual_seed(0)
    plain, ours = PlainMAE(norm_pix), MAE(norm_pix)
    assert list(ours.state_dict()) == list(plain.state_dict())  # in order, as optimizers number them
    ours.load_state_dict(plain.state_dict())
    imgs, results = torch.randn(5, 3, 16, 16), []
    for model in (ours, plain):
        torch.manual_seed(1)
        loss, pred, mask = model(imgs, mask_ratio)
        loss.backward()
        results.append([loss, pred, mask, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_images_of_another_size_are_refused():
    """Patches are counted within an image: those of a larger one would be taken for others."""

    class MAE(example().Packed, PlainMAE):
        pass

    for size in ((32, 32), (8, 32)):
        with pytest.raises(AssertionError, match="is not"):
            MAE()(torch.randn(2, 3, *size))


def test_the_recipe_takes_over_trained_weights():
    plain = PlainMAE()
    blocks = example().packed(plain.blocks)
    assert all(torch.equal(a, b) for a, b in zip(blocks.parameters(), plain.blocks.parameters(), strict=True))
