"""memory_efficient_attention under xformers' BlockDiagonalMask: the package's own where it can be imported, else, and
always too, a stand-in with the attributes it publishes."""

import contextlib
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import SeqLens, testing
from m3ae_fast.integrations import xformers as ours

pytestmark = pytest.mark.usefixtures("poison")


@dataclasses.dataclass
class SeqLenInfo:
    seqstart: torch.Tensor
    max_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def of(cls, lengths, device):
        starts = [0, *itertools.accumulate(lengths)]
        return cls(torch.tensor(starts, dtype=torch.int32, device=device), max([-1, *lengths]), starts)


@dataclasses.dataclass
class BlockDiagonalMask:
    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device="cpu"):
        q_seqinfo = SeqLenInfo.of(q_seqlen, device)
        return cls(q_seqinfo, q_seqinfo if kv_seqlen is None else SeqLenInfo.of(kv_seqlen, device))


class BlockDiagonalCausalMask(BlockDiagonalMask):
    pass


class LowerTriangularMask:
    pass


MASKS = {"stand-in": BlockDiagonalMask}
with contextlib.suppress(ImportError):
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask as Published

    MASKS["published"] = Published


@pytest.fixture(params=["stand-in", "published"])
def mask_of(request):
    """mask_of(q_lengths, k_lengths=None): a BlockDiagonalMask."""
    if request.param not in MASKS:
        pytest.skip("xformers cannot be imported here")
    return lambda *lengths: MASKS[request.param].from_seqlens(*lengths, device=torch.device("cpu"))


def randn(*size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths", "scale"),
    [([3, 41, 17], None, None), ([3, 0, 41, 1, 4], [5, 4, 27, 9, 0], 0.3)],
    ids=["self", "cross"],
)
def test_a_block_diagonal_mask(mask_of, q_lengths, k_lengths, scale, dtype, by_sequence, assert_as_good):
    keys = q_lengths if k_lengths is None else k_lengths
    q = randn(1, sum(q_lengths), 4, 20, dtype=dtype)
    k, v = (randn(1, sum(keys), 4, 20, dtype=dtype, seed=seed) for seed in (1, 2))
    mask = mask_of(q_lengths) if k_lengths is None else mask_of(q_lengths, k_lengths)
    assert_as_good(
        testing.Call((q, k, v)),
        lambda q, k, v: ours.memory_efficient_attention(q, k, v, attn_bias=mask, p=0.0, scale=scale),
        lambda q, k, v: by_sequence(q[0], k[0], v[0], q_lengths, keys, scale)[0][None],
    )


@pytest.mark.skipif("published" not in MASKS, reason="xformers cannot be imported here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_published_mask_written_out(dtype, assert_as_good):
    """Its own materialize(), handed to scaled_dot_product_attention."""
    mask = MASKS["published"].from_seqlens([3, 41, 1], [5, 27, 9], device=torch.device("cpu"))
    q, k, v = randn(1, 45, 4, 20, dtype=dtype), randn(1, 41, 4, 20, dtype=dtype), randn(1, 41, 4, 20, dtype=dtype)

    def oracle(*qkv):
        bias = mask.materialize((1, 1, 45, 41), dtype=qkv[0].dtype)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), bias).transpose(1, 2)

    assert_as_good(testing.Call((q, k, v)), lambda *qkv: ours.memory_efficient_attention(*qkv, mask), oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_a_mask_a_batch_of_equal_lengths(dtype, assert_as_good):
    q, k, v = (randn(3, n, 4, 20, dtype=dtype, seed=n) for n in (5, 7, 7))

    def oracle(*qkv):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)

    assert_as_good(testing.Call((q, k, v)), ours.memory_efficient_attention, oracle)


def test_grouped_heads(by_sequence):
    q, k, v = randn(1, 9, 6, 8), randn(1, 9, 2, 8, seed=1), randn(1, 9, 2, 8, seed=2)
    out = ours.memory_efficient_attention(q, k, v, BlockDiagonalMask.from_seqlens([4, 5]))
    torch.testing.assert_close(out, by_sequence(q[0], k[0], v[0], [4, 5], [4, 5])[0][None])


def test_seqlens_of(mask_of):
    assert ours.seqlens_of(mask_of([3, 0, 41], [5, 4, 27])) == (SeqLens([3, 0, 41]), SeqLens([5, 4, 27]))
    assert ours.seqlens_of(mask_of([3, 4])) == (SeqLens([3, 4]), SeqLens([3, 4]))
    assert ours.seqlens_of(mask_of([])) == (SeqLens([]), SeqLens([]))


def test_no_blocks(mask_of):
    q = randn(1, 0, 2, 8)
    out = ours.memory_efficient_attention(q, q, q, mask_of([]))
    assert out.shape == (1, 0, 2, 8)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    empty = randn(0, 5, 2, 8)
    assert ours.memory_efficient_attention(empty, empty, empty).shape == (0, 5, 2, 8)


def test_compiles_to_one_graph_at_most_twice(mask_of):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours.memory_efficient_attention, backend=counter, fullgraph=True, dynamic=True)
    for seed in range(20):
        lengths = torch.randint(2, 40, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
        mask, qkv = mask_of(lengths), randn(1, sum(lengths), 3, 2, 8, dtype=torch.float32, seed=seed)
        out, same = (f(*qkv.unbind(2), mask) for f in (compiled, ours.memory_efficient_attention))
        assert torch.equal(out, same)
        assert torch.equal(torch.autograd.grad(out.sum(), qkv)[0], torch.autograd.grad(same.sum(), qkv)[0])
    assert counter.frame_count <= 2


X, MASK = torch.zeros(1, 7, 2, 8), BlockDiagonalMask.from_seqlens([3, 4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attn_bias": BlockDiagonalCausalMask.from_seqlens([3, 4])}, NotImplementedError,
         "attn_bias must be a BlockDiagonalMask or None, got BlockDiagonalCausalMask"),
        ({"attn_bias": LowerTriangularMask()}, NotImplementedError, "attn_bias must be .*, got LowerTriangularMask"),
        ({"attn_bias": torch.zeros(1, 2, 7, 7)}, NotImplementedError, "attn_bias must be .*, got Tensor"),
        ({"p": 0.1}, NotImplementedError, r"p must be 0\.0, got 0\.1"),
        ({"op": (int, int)}, NotImplementedError, "op must be None, got"),
        ({"output_dtype": torch.float16}, NotImplementedError, r"output_dtype must be None, got torch\.float16"),
        ({"query": torch.zeros(7, 2, 8)}, ValueError, "query must have shape"),
        ({"query": torch.zeros(1, 7, 1, 2, 8)}, ValueError, "query must have shape"),
        ({"key": torch.zeros(2, 7, 2, 8)}, ValueError, r"key must have shape \(1, any, any, 8\), got \(2, 7, 2, 8\)"),
        ({"value": torch.zeros(1, 7, 2, 9)}, ValueError, "value must have shape"),
        ({"query": X.expand(2, 7, 2, 8), "key": X.expand(2, 7, 2, 8), "value": X.expand(2, 7, 2, 8)}, ValueError,
         "query must have batch size 1 with a BlockDiagonalMask, got 2"),
        ({"attn_bias": BlockDiagonalMask.from_seqlens([3, 3], [3, 4])}, ValueError,
         "attn_bias must cover all 7 rows of query, got blocks of 6 rows"),
        ({"attn_bias": BlockDiagonalMask.from_seqlens([3, 4], [3, 5])}, ValueError,
         "attn_bias must cover all 7 rows of key, got blocks of 8 rows"),
        ({"attn_bias": BlockDiagonalMask.from_seqlens([3, 4], device="meta")}, ValueError,
         "attn_bias must be on cpu, as query is, got meta"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        ours.memory_efficient_attention(**{"query": X, "key": X, "value": X, "attn_bias": MASK} | change)


def test_seqlens_of_another_mask():
    with pytest.raises(NotImplementedError, match="must be a BlockDiagonalMask or None, got BlockDiagonalCausalMask"):
        ours.seqlens_of(BlockDiagonalCausalMask.from_seqlens([3, 4]))


@pytest.mark.skipif("published" not in MASKS, reason="xformers cannot be imported here")
def test_other_published_masks_are_refused():
    plain = MASKS["published"].from_seqlens([3, 4], device=torch.device("cpu"))
    for mask in (plain.make_causal(), plain.make_causal_from_bottomright(), plain.make_local_attention(2)):
        with pytest.raises(NotImplementedError, match=type(mask).__name__):
            ours.memory_efficient_attention(X, X, X, mask)
