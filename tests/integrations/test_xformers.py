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


@dataclasses.dataclass
class SeqLenInfoWithRoom(SeqLenInfo):
    seqlen: torch.Tensor

    @classmethod
    def of(cls, starts, lengths):
        starts = list(starts)
        return cls(torch.tensor(starts, dtype=torch.int32), max([-1, *lengths]), starts, torch.tensor(lengths).int())


class BlockDiagonalPaddedKeysMask(BlockDiagonalMask):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen, *, device="cpu"):
        starts = range(0, kv_padding * len(kv_seqlen) + 1, kv_padding)
        return cls(SeqLenInfo.of(q_seqlen, device), SeqLenInfoWithRoom.of(starts, kv_seqlen))


class BlockDiagonalGappyKeysMask(BlockDiagonalMask):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen, *, device="cpu"):
        return cls(SeqLenInfo.of(q_seqlen, device), SeqLenInfoWithRoom.of(kv_seqstarts, kv_seqlen))


class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    pass


class BlockDiagonalCausalMask(BlockDiagonalMask):
    pass


class LowerTriangularMask:
    pass


NAMES = ("BlockDiagonalMask", "BlockDiagonalPaddedKeysMask", "BlockDiagonalGappyKeysMask")
MASKS = {"stand-in": {name: globals()[name] for name in NAMES}}
with contextlib.suppress(ImportError):
    from xformers.ops.fmha import attn_bias

    MASKS["published"] = {name: getattr(attn_bias, name) for name in NAMES}


@pytest.fixture(params=["stand-in", "published"])
def mask_of(request):
    """mask_of(q_lengths, k_lengths=None): a BlockDiagonalMask. mask_of(q_lengths, padding or starts of keys, k_lengths,
    name=...): one of the others."""
    if request.param not in MASKS:
        pytest.skip("xformers cannot be imported here")

    def make(*lengths, name="BlockDiagonalMask"):
        return MASKS[request.param][name].from_seqlens(*lengths, device=torch.device("cpu"))

    return make


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
    mask = MASKS["published"]["BlockDiagonalMask"].from_seqlens([3, 41, 1], [5, 27, 9], device=torch.device("cpu"))
    q, k, v = randn(1, 45, 4, 20, dtype=dtype), randn(1, 41, 4, 20, dtype=dtype), randn(1, 41, 4, 20, dtype=dtype)

    def oracle(*qkv):
        bias = mask.materialize((1, 1, 45, 41), dtype=qkv[0].dtype)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), bias).transpose(1, 2)

    assert_as_good(testing.Call((q, k, v)), lambda *qkv: ours.memory_efficient_attention(*qkv, mask), oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "room", "starts"),
    [
        ("BlockDiagonalPaddedKeysMask", 12, [0, 12, 24, 36, 48]),
        ("BlockDiagonalGappyKeysMask", [0, 7, 19, 19, 31], [0, 7, 19, 19, 31]),
    ],
)
def test_keys_with_room_between_them(mask_of, name, room, starts, dtype, by_sequence, assert_as_good):
    """Each block has a number of keys and room behind them, where NaN stands; the last block has no query."""
    q_lengths, k_lengths = [3, 41, 4, 0], [5, 12, 0, 9]
    mask = mask_of(q_lengths, room, k_lengths, name=name)
    counts = torch.zeros(starts[-1], dtype=torch.bool)
    for start, length in zip(starts[:-1], k_lengths, strict=True):
        counts[start : start + length] = True
    q = randn(1, sum(q_lengths), 4, 20, dtype=dtype)
    k, v = (randn(1, starts[-1], 4, 20, dtype=dtype, seed=seed).detach() for seed in (1, 2))
    k, v = (x.masked_fill(~counts[:, None, None], torch.nan).requires_grad_() for x in (k, v))
    call = testing.Call((q, k, v))
    assert_as_good(
        call,
        lambda q, k, v: ours.memory_efficient_attention(q, k, v, mask),
        lambda q, k, v: by_sequence(q[0], k[0, counts], v[0, counts], q_lengths, k_lengths)[0][None],
    )
    for gradient in call.run(lambda q, k, v: ours.memory_efficient_attention(q, k, v, mask))[1][1:]:
        assert (gradient[0, ~counts] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_one_head(masked, dtype, assert_as_good):
    """Three dimensions: the heads' is left out."""
    q, k, v = (randn(1 if masked else 2, n, 20, dtype=dtype, seed=n) for n in (7, 9, 9))
    mask = BlockDiagonalMask.from_seqlens([3, 4], [5, 4]) if masked else None

    def oracle(q, k, v):
        if not masked:
            return F.scaled_dot_product_attention(q, k, v)
        parts = [x.split(n, 1) for x, n in ((q, [3, 4]), (k, [5, 4]), (v, [5, 4]))]
        return torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in zip(*parts, strict=True)], 1)

    assert_as_good(testing.Call((q, k, v)), lambda *qkv: ours.memory_efficient_attention(*qkv, mask), oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "expanded"])
def test_groups_of_heads(shared, dtype, assert_as_good):
    """Five dimensions: heads of a group, whose keys are one head, expanded, or each head's own."""
    q = randn(2, 5, 3, 4, 20, dtype=dtype)
    k, v = (randn(2, 7, 3, 1 if shared else 4, 20, dtype=dtype, seed=seed) for seed in (1, 2))

    def expanded(attention):
        return lambda q, k, v: attention(q, k.expand(-1, -1, -1, 4, -1), v.expand(-1, -1, -1, 4, -1))

    def oracle(q, k, v):
        return F.scaled_dot_product_attention(*(x.permute(0, 2, 3, 1, 4) for x in (q, k, v))).permute(0, 3, 1, 2, 4)

    assert_as_good(testing.Call((q, k, v)), expanded(ours.memory_efficient_attention), expanded(oracle))


def test_expanded_keys_are_read_once(monkeypatch):
    rows = []
    monkeypatch.setattr(ours, "varlen_attention", lambda q, *kv, **_: rows.extend([q, *kv[:2]]) or q)
    k = torch.zeros(2, 7, 3, 1, 20)
    ours.memory_efficient_attention(torch.zeros(2, 5, 3, 4, 20), *[k.expand(-1, -1, -1, 4, -1)] * 2)
    assert [x.shape for x in rows] == [(10, 12, 20), (14, 3, 20), (14, 3, 20)]
    assert all(x.data_ptr() == k.data_ptr() for x in rows[1:])


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
    for mask in (mask_of([]), BlockDiagonalPaddedKeysMask.from_seqlens([], 4, [])):
        out = ours.memory_efficient_attention(q, q, q, mask)
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
         "attn_bias must be None or a BlockDiagonalMask, BlockDiagonalPaddedKeysMask, BlockDiagonalGappyKeysMask, got "
         "BlockDiagonalCausalMask"),
        ({"attn_bias": BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([7], 7, [7])}, NotImplementedError,
         "attn_bias must be .*, got BlockDiagonalCausalWithOffsetPaddedKeysMask"),
        ({"attn_bias": BlockDiagonalPaddedKeysMask.from_seqlens([3, 4], 4, [3, 4])}, ValueError,
         "attn_bias must cover rows 0 to 7 of key, all of them, got blocks of rows 0 to 8"),
        ({"attn_bias": BlockDiagonalGappyKeysMask.from_seqlens([7], [1, 7], [3])}, ValueError,
         "attn_bias must cover rows 0 to 7 of key, all of them, got blocks of rows 1 to 7"),
        ({"attn_bias": LowerTriangularMask()}, NotImplementedError, "attn_bias must be .*, got LowerTriangularMask"),
        ({"attn_bias": torch.zeros(1, 2, 7, 7)}, NotImplementedError, "attn_bias must be .*, got Tensor"),
        ({"p": 0.1}, NotImplementedError, r"p must be 0\.0, got 0\.1"),
        ({"op": (int, int)}, NotImplementedError, "op must be None, got"),
        ({"output_dtype": torch.float16}, NotImplementedError, r"output_dtype must be None, got torch\.float16"),
        ({"query": torch.zeros(7, 2, 8)}, ValueError, "query must have shape"),
        ({"query": torch.zeros(1, 7, 1, 2, 8)}, ValueError, "query must have shape"),
        ({"key": torch.zeros(2, 7, 2, 8)}, ValueError, r"key must have shape \(1, any, any, 8\), got \(2, 7, 2, 8\)"),
        ({"value": torch.zeros(1, 7, 2, 9)}, ValueError, "value must have shape"),
        ({"key": torch.zeros(7, 8)}, ValueError, r"key must have 3, 4 or 5 dimensions, got shape \(7, 8\)"),
        ({"query": torch.zeros(1, 7, 2, 3, 8), "key": torch.zeros(1, 7, 2, 1, 8)}, ValueError,
         r"key must have shape \(1, any, 2, 3, 8\), got \(1, 7, 2, 1, 8\)"),
        ({"query": X.expand(2, 7, 2, 8), "key": X.expand(2, 7, 2, 8), "value": X.expand(2, 7, 2, 8)}, ValueError,
         "query must have batch size 1 with a BlockDiagonalMask, got 2"),
        ({"attn_bias": BlockDiagonalMask.from_seqlens([3, 3], [3, 4])}, ValueError,
         "attn_bias must cover rows 0 to 7 of query, all of them, got blocks of rows 0 to 6"),
        ({"attn_bias": BlockDiagonalMask.from_seqlens([3, 4], [3, 5])}, ValueError,
         "attn_bias must cover rows 0 to 7 of key, all of them, got blocks of rows 0 to 8"),
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
    plain = MASKS["published"]["BlockDiagonalMask"].from_seqlens([3, 4], device=torch.device("cpu"))
    offset = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        [3, 4], 4, [3, 4], device=torch.device("cpu")
    )
    for mask in (plain.make_causal(), plain.make_causal_from_bottomright(), plain.make_local_attention(2), offset):
        with pytest.raises(NotImplementedError, match=type(mask).__name__):
            ours.memory_efficient_attention(X, X, X, mask)
