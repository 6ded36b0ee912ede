"""Stochastic depth over packed sequences: whole sequences, as often as asked, and not at all when evaluating."""

import pytest
import torch

from m3ae_fast import SeqLens, nn

LENGTHS = [4, 1, 0, 6] * 50
WIDTH = 8


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = nn.Block(WIDTH, 2).double()
    block.drop_path = 0.4
    return block


def parts(block, x, seqlens):
    """What attn and mlp add, each alone."""
    with torch.no_grad():
        attn = block.attn(block.norm1(x), seqlens)
        return attn, block.mlp(block.norm2(x)), block.mlp(block.norm2(x + attn / 0.6))


def test_sequences_go_past_a_branch_or_get_more_of_it(block):
    seqlens = SeqLens(LENGTHS)
    x = torch.randn(seqlens.total, WIDTH, dtype=torch.float64)
    y = block(x, seqlens).detach()
    attn, past, mlp = (part / 0.6 for part in parts(block, x, seqlens))
    four = {"neither": x, "attn": x + attn, "mlp": x + past, "both": x + attn + mlp}
    counts = dict.fromkeys(four, 0)
    for rows in torch.arange(seqlens.total).split(LENGTHS):
        if len(rows):
            counts[next(name for name, each in four.items() if torch.allclose(each[rows], y[rows]))] += 1
    for name, share in {"neither": 0.16, "attn": 0.24, "mlp": 0.24, "both": 0.36}.items():
        assert abs(counts[name] / 150 - share) < 0.12, counts


def test_torchs_generator_says_which(block):
    seqlens = SeqLens(LENGTHS)
    x = torch.randn(seqlens.total, WIDTH, dtype=torch.float64)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(block(x, seqlens))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_only_while_training(block):
    seqlens = SeqLens(LENGTHS)
    x = torch.randn(seqlens.total, WIDTH, dtype=torch.float64)
    y = block.eval()(x, seqlens)
    block.drop_path = 0.0
    assert torch.equal(y, block.train()(x, seqlens)) and torch.equal(y, block.eval()(x, seqlens))


def test_gradients(block):
    seqlens = SeqLens([3, 2, 1])
    x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)

    def call(x):
        torch.manual_seed(5)
        return block(x, seqlens)

    assert torch.autograd.gradcheck(call, x)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_of_a_transformer_whose_last_block_is_asked_for_some_rows(checkpoint):
    torch.manual_seed(0)
    transformer = nn.Transformer(WIDTH, 3, 2)
    nn.drop_paths(transformer, 0.5)
    assert [block.drop_path for block in transformer.blocks] == [0.0, 0.25, 0.5]
    seqlens, rows = SeqLens(LENGTHS), SeqLens(LENGTHS).cu[:-1][torch.tensor(LENGTHS) > 0].long()
    x = torch.randn(seqlens.total, WIDTH)
    wanted = [int(n > 0) for n in LENGTHS]
    found = []
    for transformer.checkpoint in (False, checkpoint):
        torch.manual_seed(3)
        transformer.zero_grad()
        transformer(x, seqlens, rows, SeqLens(wanted)).square().sum().backward()
        found.append(transformer.blocks[0].mlp.fc1.weight.grad.clone())
    assert torch.equal(*found) and found[0].abs().max() > 0
    torch.manual_seed(3)
    some = transformer(x, seqlens, rows, SeqLens(wanted))
    torch.manual_seed(3)
    torch.testing.assert_close(some, transformer(x, seqlens)[rows])
    nn.drop_paths(transformer, 0)
    assert torch.equal(transformer(x, seqlens), transformer(x, seqlens))


def test_in_bfloat16():
    block = nn.Block(WIDTH, 2)
    block.drop_path = 0.9
    with torch.autocast("cpu", torch.bfloat16):
        _, update = block(torch.randn(6, WIDTH), SeqLens([3, 3]), apart=True)
    assert update.dtype == torch.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rate(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got"):
        nn.drop_paths(nn.Transformer(WIDTH, 2, 2), rate)
