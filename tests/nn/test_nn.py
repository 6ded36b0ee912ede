"""The layers on packed sequences against torch's own layers, one sequence at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import SeqLens, nn

LENGTHS = [7, 1, 0, 12, 5]
WIDTH, HEADS = 24, 3


@pytest.fixture
def packed():
    torch.manual_seed(0)
    return torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64), SeqLens(LENGTHS)


def each(x, lengths=LENGTHS):
    return x.split(list(lengths))


def multihead(module, query, context):
    """torch's functional attention on one sequence, from our layer's parameters."""
    if isinstance(module, nn.Attention):
        q, k, v = module.qkv(query).chunk(3, dim=-1)
    else:
        q = module.q(query)
        k, v = module.kv(context).chunk(2, dim=-1)
    q, k, v = (t.view(-1, HEADS, WIDTH // HEADS).transpose(0, 1) for t in (q, k, v))
    return module.proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


def test_attention(packed):
    x, seqlens = packed
    layer = nn.Attention(WIDTH, HEADS).double()
    expected = torch.cat([multihead(layer, s, s) for s in each(x) if len(s)])
    torch.testing.assert_close(layer(x, seqlens), expected)


def test_cross_attention(packed):
    x, seqlens = packed
    layer = nn.CrossAttention(WIDTH, HEADS, context_width=16).double()
    lengths = [3, 4, 5, 2, 6]
    context = torch.randn(sum(lengths), 16, dtype=torch.float64)
    pairs = zip(each(x), each(context, lengths), strict=True)
    expected = torch.cat([multihead(layer, s, c) for s, c in pairs if len(s)])
    torch.testing.assert_close(layer(x, context, seqlens, SeqLens(lengths)), expected)


def plain_block(block, s, context=None):
    def norm(layer, x):
        return F.layer_norm(x, (WIDTH,), layer.weight, layer.bias, 1e-6)

    s = s + multihead(block.attn, norm(block.norm1, s), context)
    hidden = F.gelu(F.linear(norm(block.norm2, s), block.mlp.fc1.weight, block.mlp.fc1.bias), approximate="tanh")
    return s + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)


@pytest.fixture
def transformer():
    torch.manual_seed(1)
    module = nn.Transformer(WIDTH, 3, HEADS).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def plain_post_norm(transformer, s):
    """BERT's layers: a LayerNorm of what goes in, then layers with one after each residual sum."""

    def norm(layer, x):
        return F.layer_norm(x, (WIDTH,), layer.weight, layer.bias, 1e-6)

    s = norm(transformer.blocks[0].norm1, s)
    after = [*(block.norm1 for block in transformer.blocks[1:]), transformer.norm]
    for block, last in zip(transformer.blocks, after, strict=True):
        s = norm(block.norm2, s + multihead(block.attn, s, None))
        hidden = block.mlp.fc1(s)
        hidden = hidden * torch.sigmoid(1.702 * hidden) if block.mlp.quick_gelu else F.gelu(hidden)
        s = norm(last, s + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias))
    return s


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("rows", [None, [0, 3, 7, 20, 24]], ids=["all", "rows"])
def test_post_norm(packed, activation, rows):
    """Output and every gradient."""
    x, seqlens = packed
    torch.manual_seed(1)
    module = nn.Transformer(WIDTH, 3, HEADS, activation=activation, post_norm=True).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    weights, found = torch.randn(x.shape, dtype=x.dtype), []
    asked = () if rows is None else (torch.tensor(rows), SeqLens([2, 1, 0, 0, 2]))
    rows = slice(None) if rows is None else rows
    for plain in (False, True):
        module.zero_grad()
        y = torch.cat([plain_post_norm(module, s) for s in each(x) if len(s)])[rows] if plain else None
        y = module(x, seqlens, *asked) if y is None else y
        (y * weights[rows]).sum().backward()
        found.append({"y": y.detach(), **{name: p.grad.clone() for name, p in module.named_parameters()}})
    torch.testing.assert_close(*found)


def test_block(packed, transformer):
    x, seqlens = packed
    block = transformer.blocks[0]
    expected = torch.cat([plain_block(block, s) for s in each(x) if len(s)])
    torch.testing.assert_close(block(x, seqlens), expected)


def test_transformer(packed, transformer):
    x, seqlens = packed
    expected = []
    for s in each(x):
        if len(s):
            for block in transformer.blocks:
                s = plain_block(block, s)
            expected.append(F.layer_norm(s, (WIDTH,), transformer.norm.weight, transformer.norm.bias, 1e-6))
    torch.testing.assert_close(transformer(x, seqlens), torch.cat(expected))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_cross_transformer(packed, depth):
    """Against torch's layers; a row that is taken away changes no other one."""
    torch.manual_seed(1)
    module = nn.CrossTransformer(WIDTH, depth, HEADS, context_width=16).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, seqlens = packed
    lengths = [3, 4, 5, 2, 6]
    context = torch.randn(sum(lengths), 16, dtype=torch.float64)
    expected = []
    for s, c in zip(each(x), each(context, lengths), strict=True):
        for block in module.blocks if len(s) else ():
            s = plain_block(block, s, c)
        expected.append(F.layer_norm(s, (WIDTH,), module.norm.weight, module.norm.bias, 1e-6))
    out = module(x, context, seqlens, SeqLens(lengths))
    torch.testing.assert_close(out, torch.cat(expected))
    some = torch.arange(len(x)) != 3
    torch.testing.assert_close(module(x[some], context, SeqLens([6, *LENGTHS[1:]]), SeqLens(lengths)), out[some])


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_rows_of_a_transformer_are_the_rows_of_its_output(packed, transformer, depth):
    x, seqlens = packed
    transformer.blocks = transformer.blocks[:depth]
    rows = torch.tensor([0, 3, 7, 9, 15, 19, 20])
    rows_seqlens = SeqLens([2, 1, 0, 3, 1])
    x.requires_grad_()
    parameters = [x, *transformer.parameters()]
    some = transformer(x, seqlens, rows, rows_seqlens)
    expected = transformer(x, seqlens)[rows]
    torch.testing.assert_close(some, expected)
    cotangent = torch.randn_like(some)
    for ours, theirs in zip(
        torch.autograd.grad(some, parameters, cotangent),
        torch.autograd.grad(expected, parameters, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_patch_embed_reads_kept_patches():
    torch.manual_seed(0)
    layer = nn.PatchEmbed(4, WIDTH, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    ids, seqlens = torch.tensor([5, 0, 2]), SeqLens([1, 2])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (layer.mean, layer.std))
    normalized = (images / 255 - mean) / std
    kernel = layer.proj.weight.view(WIDTH, 4, 4, 3).permute(0, 3, 1, 2)
    everything = F.conv2d(normalized, kernel, layer.proj.bias, stride=4).flatten(2).transpose(1, 2)
    expected = torch.stack([everything[0, 5], everything[1, 0], everything[1, 2]])
    torch.testing.assert_close(layer(images, ids, seqlens), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(normalized, ids, seqlens), expected, rtol=1e-5, atol=1e-5)


def test_state_dicts_are_torchs(transformer):
    linear = torch.nn.Linear(5, 3)
    ours = nn.Linear(5, 3, activation="gelu")
    ours.load_state_dict(linear.state_dict())
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), F.gelu(linear(x)))
    norm, theirs = nn.LayerNorm(5), torch.nn.LayerNorm(5, eps=1e-6)
    norm.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(norm(x), theirs(x))
    normed, total = norm(x, residual=x)
    torch.testing.assert_close((normed, total), (theirs(2 * x), 2 * x))
    assert "blocks.0.attn.qkv.weight" in transformer.state_dict()


def test_losses():
    torch.manual_seed(0)
    head = nn.LinearCrossEntropyLoss(8, 11, reduction="sample_mean")
    x, target, seqlens = torch.randn(5, 8), torch.tensor([1, 2, -100, 4, 5]), SeqLens([3, 2])
    each = F.cross_entropy(head.head(x), target, reduction="none", ignore_index=-100)
    torch.testing.assert_close(head(x, target, seqlens), (each[:2].mean() + each[3:].mean()) / 2)
    class_weight = torch.rand(11)
    head = nn.LinearCrossEntropyLoss(8, 11, class_weight=class_weight)
    batch = x.view(5, 1, 8), target.view(5, 1)
    torch.testing.assert_close(head(*batch), F.cross_entropy(head.head(x), target, class_weight))
    assert head.double().class_weight.dtype == torch.float64
    images, pred, ids = torch.rand(1, 3, 4, 8), torch.randn(1, 48), torch.tensor([1])
    loss = nn.MaskedMSELoss(4)(pred, images, ids, SeqLens([1]))
    torch.testing.assert_close(loss, F.mse_loss(pred[0], images[0, :, :, 4:].permute(1, 2, 0).flatten()))
    features, rows = torch.randn(7, 8), torch.tensor([6, 0, 0, 3, 2])
    loss = nn.FeatureRegressionLoss(distance="l1", normalize=False, reduction="sample_mean")(x, features, rows, seqlens)
    each = (x - features[rows]).abs().mean(1)
    torch.testing.assert_close(loss, (each[:3].mean() + each[3:].mean()) / 2)


def test_positions_against_the_formula():
    width, rows, columns = 16, 3, 5
    table = nn.sincos_2d(rows, columns, width).numpy()
    for y in range(rows):
        for x in range(columns):
            omega = 10000.0 ** -(np.arange(width // 4) / (width // 4))
            expected = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)])
            np.testing.assert_allclose(table[y * columns + x], expected, atol=1e-6)
    with pytest.raises(ValueError, match="width must be a multiple of 4, got 6"):
        nn.sincos_2d(2, 2, 6)
    with pytest.raises(ValueError, match="width must be even, got 5"):
        nn.sincos_1d(torch.arange(3), 5)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width must be a multiple of heads, got width 10 and 3 heads"):
        nn.Attention(10, 3)
