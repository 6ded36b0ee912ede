"""Jagged nested tensors: nothing is copied on the way in and out, and attention within them is varlen_attention's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from m3ae_fast import SeqLens, testing
from m3ae_fast.integrations.nested import attention, from_nested, to_nested

pytestmark = pytest.mark.usefixtures("poison")

Q_LENGTHS, K_LENGTHS = (3, 0, 41, 1, 4), (5, 4, 27, 9, 0)


def randn(*size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def jagged(rows, lengths):
    """As users make them: from a list, so with offsets of its own."""
    return torch.nested.as_nested_tensor(list(rows.split(list(lengths))), layout=torch.jagged)


def test_there_and_back_without_a_copy():
    rows, lens = randn(49, 2, 8), SeqLens(Q_LENGTHS)
    nested = to_nested(rows, lens)
    assert nested.shape[0] == 5 and nested.shape[2:] == (2, 8) and nested.layout == torch.jagged
    assert [len(x) for x in nested.unbind()] == list(Q_LENGTHS)
    back, back_lens = from_nested(nested)
    assert back.data_ptr() == rows.data_ptr() and torch.equal(back, rows) and back_lens == lens
    torch.autograd.gradcheck(lambda x: from_nested(to_nested(x, lens))[0], (rows,))


def test_tensors_of_one_seqlens_add_up():
    rows, lens = randn(8, 4), SeqLens([3, 0, 5])
    assert torch.equal((to_nested(rows, lens) + to_nested(2 * rows, lens)).values(), 3 * rows)


def test_rows_go_back_beside_the_tensor_they_came_from():
    nested = jagged(randn(8, 4), (3, 0, 5))
    rows, _ = from_nested(nested)
    assert torch.equal((to_nested(2 * rows, nested) + nested).values(), 3 * rows)


def test_word_ids():
    rows, lens = from_nested(torch.nested.nested_tensor([[1, 2, 3], [4]], layout=torch.jagged))
    assert rows.tolist() == [1, 2, 3, 4] and lens == SeqLens([3, 1])


def test_holes_are_left_out():
    """torch.nested.narrow leaves them between the sequences: `lengths` are less than the offsets' steps."""
    padded, lengths = randn(3, 6, 2, 8), torch.tensor([3, 2, 4])
    nested = torch.nested.narrow(padded, 1, torch.tensor([0, 1, 2]), lengths, layout=torch.jagged)
    rows, lens = from_nested(nested)
    assert lens == SeqLens(lengths)
    expected = torch.cat([padded[0, 0:3], padded[1, 1:3], padded[2, 2:6]])
    assert torch.equal(rows, expected)
    assert torch.equal(from_nested(attention(nested, nested, nested))[0],
                       from_nested(attention(*[to_nested(expected, lens)] * 3))[0])  # fmt: skip


def test_no_sequences():
    empty = to_nested(randn(0, 2, 8), SeqLens([]))
    rows, lens = from_nested(empty)
    assert rows.shape == (0, 2, 8) and lens == SeqLens([])
    assert attention(empty, empty, empty).values().shape == (0, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_cross_attention_of_grouped_heads(dtype, scale, by_sequence, assert_as_good):
    """Made from lists, each with offsets of its own; sequences without queries and without keys among them."""
    q = randn(sum(Q_LENGTHS), 6, 20, dtype=dtype)
    k, v = (randn(sum(K_LENGTHS), 2, 20, dtype=dtype, seed=seed) for seed in (1, 2))

    def ours(q, k, v):
        out = attention(jagged(q, Q_LENGTHS), jagged(k, K_LENGTHS), jagged(v, K_LENGTHS), softmax_scale=scale)
        return out.values()

    assert_as_good(testing.Call((q, k, v)), ours, lambda q, k, v: by_sequence(q, k, v, Q_LENGTHS, K_LENGTHS, scale)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_against_a_padded_batch(dtype, assert_as_good):
    """scaled_dot_product_attention of to_padded_tensor under a mask."""
    lengths = torch.tensor([3, 41, 1, 17])
    real = torch.arange(41) < lengths[:, None]

    def ours(qkv):
        lens = SeqLens(lengths)
        return attention(*(to_nested(x, lens) for x in qkv.unbind(1))).to_padded_tensor(0.0)

    def oracle(qkv):
        padded = qkv.new_zeros(4, 41, 3, 4, 16).masked_scatter(real[:, :, None, None, None], qkv)
        q, k, v = (x.transpose(1, 2) for x in padded.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, real[:, None, None, :]).transpose(1, 2)
        return out * real[:, :, None, None]

    assert_as_good(testing.Call((randn(62, 3, 4, 16, dtype=dtype),)), ours, oracle)


def test_the_gradient_of_a_nested_leaf():
    q = jagged(randn(8, 2, 8).detach(), (3, 0, 5)).requires_grad_()
    out = attention(q, q, q)
    (out + q).values().sum().backward()  # the residual: out has the offsets of q
    rows = q.detach().values().clone().requires_grad_()
    same = attention(*[to_nested(rows, SeqLens([3, 0, 5]))] * 3)
    (same.values() + rows).sum().backward()
    assert q.grad.is_nested
    torch.testing.assert_close(q.grad.values(), rows.grad)


class SelfAttention(nn.Module):
    """x + attention of one projection: nested all the way."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)) for part in self.qkv(x).chunk(3, -1))
        return x + attention(q, k, v).flatten(2)


def test_compiles_to_one_graph_at_most_twice():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    counter, module = CompileCounterWithBackend("aot_eager"), SelfAttention()
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for seed in range(20):
        lengths = torch.randint(2, 40, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
        x = jagged(randn(sum(lengths), 16, dtype=torch.float32, seed=seed).detach(), lengths)
        out, same = compiled(x), module(x)
        assert torch.equal(out.values(), same.values())
        weight = module.qkv.weight
        (gradient,), (expected,) = (torch.autograd.grad(y.values().square().sum(), weight) for y in (out, same))
        assert torch.equal(gradient, expected)
    assert counter.frame_count <= 2


X = jagged(torch.zeros(7, 2, 8), (3, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_nested(torch.zeros(2, 3)), TypeError,
         r"nested must be a nested tensor with layout torch\.jagged, got Tensor"),
        (lambda: from_nested([torch.zeros(2)]), TypeError, "nested must be a nested tensor .*, got list"),
        (lambda: from_nested(torch.nested.nested_tensor([torch.zeros(2, 3)], layout=torch.strided)), TypeError,
         "nested must be .*, got a strided nested tensor"),
        (lambda: attention(X, X, X.transpose(1, 2)), ValueError,
         "v must be ragged in dimension 1, got dimension 2: transpose it back"),
        (lambda: attention(X, jagged(torch.zeros(7, 2, 8), (7,)), X), ValueError,
         "k must hold as many sequences as q, 2, got 1"),
        (lambda: attention(X, X, jagged(torch.zeros(7, 2, 8), (4, 3))), ValueError, "v must have the lengths of k"),
        (lambda: attention(X, X, jagged(torch.zeros(7, 2, 8), (7,))), ValueError, "v must have the lengths of k"),
        (lambda: attention(X, jagged(torch.zeros(7, 2, 9), (3, 4)), X), ValueError, "k must have shape"),
        (lambda: attention(jagged(torch.zeros(7, 16), (3, 4)), X, X), ValueError,
         r"q must have shape \(any, any, any\), got \(7, 16\)"),
        (lambda: attention(X, X, X, impl="cuda"), ValueError, "impl='cuda' cannot run varlen_attention"),
        (lambda: to_nested([1], SeqLens([1])), TypeError, "rows must be a tensor, got list"),
        (lambda: to_nested(torch.zeros(3, 2), SeqLens([1])), ValueError,
         r"rows must be the 1 rows of seqlens, got shape \(3, 2\)"),
        (lambda: to_nested(torch.zeros(3, 2), torch.tensor([0, 3])), TypeError,
         "seqlens must be a nested tensor with layout torch.jagged, got Tensor"),
        (lambda: to_nested(torch.zeros(3, 2, device="meta"), SeqLens([3])), ValueError,
         "seqlens must be on meta, as rows is, got cpu"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
