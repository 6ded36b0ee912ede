"""varlen_attention: what the contract tests do not cover."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import SeqLens, _backends, testing, varlen_attention, varlen_attention_qkvpacked
from m3ae_fast.ops.varlen_attention import cases
from m3ae_fast.ops.varlen_attention.op import BACKENDS

IMPLS = ["reference", *testing.impls("varlen_attention")]
COMPILED = testing.impls("varlen_attention")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TYPED = [(impl, dtype) for impl in IMPLS for dtype in DTYPES if dtype in testing.dtypes(impl, "varlen_attention")]
FP32 = [impl for impl in IMPLS if torch.float32 in testing.dtypes(impl, "varlen_attention")]
EXACT = [impl for impl in IMPLS if testing.widest(impl, "varlen_attention") == torch.float64]

pytestmark = pytest.mark.usefixtures("poison")


def randn(*size, dtype=torch.float32, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def usual(impl):
    """float32, or the first dtype of a backend that leaves float32 to others."""
    return testing.dtypes(impl, "varlen_attention")[0]


def close(ours, truth, rtol, atol):
    """Within rtol and atol in float32, within four roundings in a narrower dtype."""
    if ours.dtype.itemsize == 2:
        rtol = atol = 4 * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), truth.double(), rtol=rtol, atol=atol)


def assert_error_rules(call, impl):
    """Outputs and gradients keep the error rule of the contract."""
    references = (each.run(varlen_attention, impl="reference") for each in (call, call.to(torch.float64)))
    testing.assert_error_rules(call.run(varlen_attention, impl=impl), *references)


def by_hand(q, k, v, q_lengths, k_lengths, scale):
    """One sequence and head at a time, fp64."""
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[1::-1], -torch.inf, dtype=torch.float64)
    start_q = start_k = 0
    for nq, nk in zip(q_lengths, k_lengths, strict=True):
        for h in range(q.shape[1] if nk else 0):
            rows, kh = slice(start_q, start_q + nq), h * k.shape[1] // q.shape[1]
            keys, values = (x[start_k : start_k + nk, kh].double() for x in (k, v))
            scores = q[rows, h].double() @ keys.t() * scale
            out[rows, h] = scores.softmax(-1) @ values
            lse[h, rows] = scores.logsumexp(-1)
        start_q, start_k = start_q + nq, start_k + nk
    return out, lse


@pytest.mark.parametrize("width", [1, 8, 32, 40, 64, 80, 128, 200, 264])
@pytest.mark.parametrize("impl", IMPLS)
def test_values(impl, width, isa):
    q_lengths, k_lengths = [3, 0, 81, 1, 17, 2], [5, 4, 67, 0, 1, 33]
    if impl == "cuda" and width > 128:
        pytest.skip("refused: test_cuda_refuses_wide_heads")
    q = randn(sum(q_lengths) + 2, 4, width, dtype=usual(impl))
    k, v = (randn(110, 2, width, dtype=usual(impl), seed=s) for s in (1, 2))
    out, lse = varlen_attention(
        q, k, v, SeqLens(q_lengths), SeqLens(k_lengths), softmax_scale=0.3, return_lse=True, impl=impl
    )
    true_out, true_lse = by_hand(q, k, v, q_lengths, k_lengths, 0.3)
    close(out, true_out, rtol=0, atol=3e-5)
    torch.testing.assert_close(lse.double(), true_lse, rtol=3e-6, atol=3e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_matches_scaled_dot_product_attention(impl):
    lens = SeqLens([50, 297, 197])
    q, k, v = (randn(lens.total, 4, 32, dtype=usual(impl), seed=s, grad=True) for s in range(3))
    out = varlen_attention(q, k, v, lens, impl=impl)
    dout = randn(*out.shape, dtype=usual(impl), seed=4)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    parts = [x.split(lens.lengths) for x in exact]
    peer = torch.cat(
        [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)).transpose(0, 1)
            for part in zip(*parts, strict=True)
        ]
    )
    close(out, peer, rtol=1e-5, atol=2e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(peer, exact, dout.float()), strict=True):
        close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("impl", "dtype"), TYPED)
def test_large_scores_do_not_overflow(impl, dtype, isa):
    """Scores of thousands: the largest key takes all the weight."""
    q = torch.full((40, 2, 16), 50.0, dtype=dtype)
    k = torch.cat([torch.full((39, 2, 16), -50.0, dtype=dtype), torch.full((1, 2, 16), 50.0, dtype=dtype)])
    v = randn(40, 2, 16, dtype=dtype)
    out, lse = varlen_attention(q, k, v, SeqLens([40]), return_lse=True, impl=impl)
    assert torch.equal(out, v[-1:].expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 10000.0))


@pytest.mark.parametrize(("impl", "dtype"), TYPED)
def test_a_scale_may_be_any_integer(impl, dtype):
    q, k, v = (randn(5, 2, 16, dtype=dtype) for _ in range(3))
    integer, number = (
        varlen_attention(q, k, v, SeqLens([5]), softmax_scale=scale, return_lse=True, impl=impl)
        for scale in (2**70, 2.0**70)
    )
    assert all(map(torch.equal, integer, number))


@pytest.mark.parametrize(("impl", "dtype"), TYPED)
@pytest.mark.parametrize("keys", [2, 9])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_that_is_lost_on_its_way_is_no_weight_of_zero(impl, dtype, keys, sign, isa):
    """-1e40 + 2e40 is the largest score, and in fp32 minus infinity or NaN: NaN is right, the other keys' values are
    not."""
    q = torch.tensor([[1e20, 1e20]], dtype=dtype)[:, None].requires_grad_()
    k = torch.tensor([[-1e20, 2e20], *[[1.0, 0.0]] * (keys - 1)], dtype=dtype)[:, None].mul(sign).requires_grad_()
    v = torch.tensor([[5.0, 5.0], *[[7.0, 7.0]] * (keys - 1)], dtype=dtype)[:, None].requires_grad_()
    of_q, of_k = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, keys], dtype=torch.int32)
    out = varlen_attention(q, k, v, of_q, of_k, 1, keys, softmax_scale=float(sign), impl=impl)
    dv = torch.autograd.grad(out.sum(), v)[0]
    right = dtype == torch.float64
    assert torch.equal(out, torch.full_like(out, 5)) if right else out.isnan().all()
    assert dv[:, 0, 0].tolist() == [1.0] + [0.0] * (keys - 1) if right else dv.isnan().any()


@pytest.mark.skipif("cpp" not in IMPLS, reason="the compiled module is missing, or not tested here")
def test_a_lost_score_is_found_beside_a_query_of_nan(isa):
    q = torch.tensor([[1e20, 1e20], [torch.nan, 0.0], [1.0, 1.0]])[:, None]
    k = torch.tensor([[-1e20, 2e20], [1.0, 0.0]])[:, None]
    v = torch.tensor([[5.0, 5.0], [7.0, 7.0]])[:, None]
    of_q, of_k = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    out = varlen_attention(q, k, v, of_q, of_k, 3, 2, softmax_scale=1.0, impl="cpp")
    assert out[:2].isnan().all() and out[2].isfinite().all()


@pytest.mark.skipif("cpp" not in IMPLS, reason="the compiled module is missing, or not tested here")
def test_infinite_scores_take_no_longer():
    """As in a run that has diverged."""
    q, k, v = (randn(1024, 1, 64, seed=seed) for seed in range(3))
    cu = torch.tensor([0, 1024], dtype=torch.int32)

    def seconds(q, k):
        times = []
        for _ in range(3):
            start = time.process_time()
            out = varlen_attention(q, k, v, cu, impl="cpp")
            times.append(time.process_time() - start)
        return min(times), out

    finite, _ = seconds(q, k)
    infinite, out = seconds(q * 1e20, k * 1e20)
    assert out.isnan().all() and infinite < 20 * finite + 0.05


@pytest.mark.skipif("cpp" not in IMPLS, reason="the compiled module is missing, or not tested here")
def test_a_lost_score_of_fp64_is_no_weight_of_zero(isa):
    q = torch.ones(1, 1, 5, dtype=torch.float64)
    k = torch.tensor([[-1.5e308, -1.5e308, 1.5e308, 1.5e308, 1], [0] * 5], dtype=torch.float64)[:, None]
    v = torch.tensor([[5.0] * 5, [7.0] * 5], dtype=torch.float64)[:, None]
    of_q, of_k = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    assert varlen_attention(q, k, v, of_q, of_k, 1, 2, softmax_scale=1.0, impl="cpp").isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_below_all_numbers_weighs_nothing(impl, sign, isa):
    q = torch.tensor([[1e20, 1e20]])[:, None].requires_grad_()
    k = torch.tensor([[-1e20, -2e20], [1.0, 0.0]])[:, None].mul(sign).requires_grad_()
    v = torch.tensor([[5.0, 5.0], [7.0, 7.0]])[:, None].requires_grad_()
    if torch.float32 not in testing.dtypes(impl, "varlen_attention"):
        q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    of_q, of_k = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    out = varlen_attention(q, k, v, of_q, of_k, 1, 2, softmax_scale=float(sign), impl=impl)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.flatten().tolist() == [7.0, 7.0] and dv[:, 0, 0].tolist() == [0.0, 1.0]
    assert not dq.any() and not dk.any()


@pytest.mark.parametrize(("impl", "dtype"), TYPED)
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.7])
def test_weights_of_scores_of_any_size(impl, dtype, scale, isa):
    """One key has all the weight, or two that differ where queries are 0 have half of it each."""
    cu, most = torch.tensor([0, 3], dtype=torch.int32), 3
    for size in (1e5, 1e7, 1e10, 1e20, 3e37):
        q = torch.tensor([[size, 0.0], [-size, 0.0], [size, 0.0]], dtype=dtype)[:, None].requires_grad_()
        k = torch.tensor([[1.0, 0.0], [1.0, 2.0], [-1.0, 0.0]], dtype=dtype)[:, None].requires_grad_()
        v = torch.tensor([[5.0, 1.0], [3.0, 0.0], [7.0, 2.0]], dtype=dtype)[:, None].requires_grad_()
        out = varlen_attention(q, k, v, cu, max_seqlen_q=most, softmax_scale=scale, impl=impl)
        tie, one = [4.0, 0.5], [7.0, 2.0]
        expected = [tie, one, tie] if scale > 0 else [one, tie, one]
        assert out[:, 0].tolist() == expected, size
        dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
        assert dv[:, 0, 0].tolist() == ([1.0, 1.0, 1.0] if scale > 0 else [0.5, 0.5, 2.0]), size
        # of the tie: weights of a half, values that add up to 6 and 3: dscores 0.75 and -0.75
        of_tie = torch.tensor([0.0, -1.5 * scale], dtype=torch.float64)
        rows = (0, 2) if scale > 0 else (1,)
        for row in range(3):
            want = of_tie if row in rows else torch.zeros(2, dtype=torch.float64)
            torch.testing.assert_close(
                dq[row, 0].double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
            )
        sign = len(rows) if scale > 0 else -len(rows)
        want = torch.tensor([0.75, -0.75, 0.0], dtype=torch.float64) * sign * size * scale
        torch.testing.assert_close(dk[:, 0, 0].double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_sequence(impl, isa):
    lens = SeqLens([20, 30, 3])
    q, k, v = (randn(lens.total, 2, 16, dtype=usual(impl), seed=s) for s in range(3))
    clean = varlen_attention(q, k, v, lens, impl=impl)
    k[25], v[50] = torch.nan, torch.nan
    dirty = varlen_attention(q, k, v, lens, impl=impl)
    assert torch.equal(dirty[:20], clean[:20])
    assert dirty[20:].isnan().all()


@pytest.mark.parametrize("impl", EXACT)
def test_gradient_through_lse(impl, isa):
    lens, keys = SeqLens([5, 0, 2, 9]), SeqLens([4, 3, 0, 19])
    q = randn(lens.total + 1, 4, 8, dtype=torch.float64, grad=True)
    k, v = (randn(keys.total + 2, 2, 8, dtype=torch.float64, seed=s, grad=True) for s in (1, 2))

    def run(q, k, v):
        out, lse = varlen_attention(q, k, v, lens, keys, return_lse=True, impl=impl)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


@pytest.mark.parametrize(("impl", "dtype"), TYPED)
def test_rows_past_the_end_are_zero(impl, dtype, isa):
    lens = SeqLens([3, 4])
    q, k, v = (randn(12, 2, 16, dtype=dtype, seed=s) for s in range(3))
    for x in (q, k, v):
        x[7:] = torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = varlen_attention(q, k, v, lens, return_lse=True, impl=impl)
    assert (out[7:] == 0).all() and (lse[:, 7:] == -torch.inf).all() and out[:7].isfinite().all()
    for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert (gradient[7:] == 0).all() and gradient[:7].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_sequences_and_no_rows(impl):
    for rows, lens in ((4, SeqLens([])), (0, SeqLens([])), (0, SeqLens([0, 0])), (4, SeqLens([0]))):
        q, k, v = (randn(rows, 2, 8, dtype=usual(impl), seed=s, grad=True) for s in range(3))
        out, lse = varlen_attention(q, k, v, lens, return_lse=True, impl=impl)
        assert out.shape == (rows, 2, 8) and (out == 0).all() and (lse == -torch.inf).all()
        for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
            assert (gradient == 0).all()


@pytest.mark.parametrize("impl", COMPILED)
def test_views_of_one_qkv_are_read_as_they_are(impl, isa):
    lens = SeqLens([13, 50])
    qkv = randn(63, 3, 4, 32, dtype=usual(impl))
    views = varlen_attention(*qkv.unbind(1), lens, impl=impl)
    assert torch.equal(views, varlen_attention(*(x.contiguous() for x in qkv.unbind(1)), lens, impl=impl))
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv.unbind(1)]
    assert torch.equal(views, varlen_attention(*heads_first, lens, impl=impl))


@pytest.mark.parametrize(("impl", "dtype"), TYPED)
def test_qkvpacked(impl, dtype, isa):
    """The same bits as three tensors, and one dense gradient."""
    lens = SeqLens([13, 0, 50])
    wide = randn(65, 3, 4, 40, dtype=dtype)
    qkv = wide[..., :32].requires_grad_()
    out, lse = varlen_attention_qkvpacked(qkv, lens, return_lse=True, impl=impl)
    parts = [x.detach().requires_grad_() for x in qkv.unbind(1)]
    same, same_lse = varlen_attention(*parts, lens, return_lse=True, impl=impl)
    assert torch.equal(out, same) and torch.equal(lse, same_lse)
    dout = testing.cotangent(out)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert dqkv.shape == qkv.shape
    assert torch.equal(dqkv, torch.stack(torch.autograd.grad(same, parts, dout), 1))
    assert torch.equal(out, varlen_attention_qkvpacked(qkv, lens.cu.long(), impl=impl))


@pytest.mark.parametrize("impl", COMPILED)
def test_qkvpacked_passes_opcheck_and_gradcheck(impl):
    lens = SeqLens([3, 0, 5])
    qkv = randn(9, 3, 2, 8, dtype=testing.widest(impl, "varlen_attention"), grad=True)
    if impl in EXACT:
        torch.autograd.gradcheck(lambda x: varlen_attention_qkvpacked(x, lens, impl=impl), (qkv,), fast_mode=True)
    q, k, v = qkv.detach().unbind(1)
    out, stats = torch.ops.m3ae_fast.varlen_attention(impl, q, k, v, lens.cu, None, lens.max, lens.max, None)
    args = (impl, torch.ones_like(out), None, qkv.detach(), out, stats, lens.cu, lens.max, None)
    torch.library.opcheck(torch.ops.m3ae_fast.varlen_attention_packed_backward.default, args)


@pytest.mark.parametrize("impl", IMPLS)
def test_bare_offsets(impl):
    lens, keys = SeqLens([3, 4]), SeqLens([6, 2])
    q, k, v = (randn(rows, 2, 8, dtype=usual(impl), seed=s) for s, rows in enumerate((7, 8, 8)))
    expected = varlen_attention(q, k, v, lens, keys, impl=impl)
    for cast in (torch.int32, torch.int64):
        cu, cu_k = lens.cu.to(cast), keys.cu.to(cast)
        assert torch.equal(expected, varlen_attention(q, k, v, cu, cu_k, impl=impl))
        torch.testing.assert_close(varlen_attention(q, k, v, cu, cu_k, 4, 100, impl=impl), expected)


@pytest.mark.parametrize("impl", FP32)
def test_dtypes_meet_in_the_widest(impl):
    lens = SeqLens([9])
    q, k, v = randn(9, 2, 8), randn(9, 2, 8, dtype=torch.bfloat16), randn(9, 2, 8, dtype=torch.bfloat16)
    out = varlen_attention(q, k, v, lens, impl=impl)
    assert out.dtype == torch.float32
    assert torch.equal(out, varlen_attention(q, k.float(), v.float(), lens, impl=impl))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(varlen_attention(*leaves, lens, impl=impl).sum(), leaves)
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    lens = SeqLens([9])
    q, k, v = (randn(9, 2, 8, seed=s) for s in range(3))
    expected = varlen_attention(*(x.bfloat16() for x in (q, k, v)), lens, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(expected, varlen_attention(q, k, v, lens, impl=impl))
        assert torch.equal(expected, varlen_attention_qkvpacked(torch.stack((q, k, v), 1), lens, impl=impl))
        if impl in EXACT:
            assert varlen_attention(*(x.double() for x in (q, k, v)), lens, impl=impl).dtype == torch.float64


def test_float16_on_the_cpu_is_the_reference():
    lens = SeqLens([9])
    q, k, v = (randn(9, 2, 8, dtype=torch.float16, seed=s) for s in range(3))
    assert torch.equal(varlen_attention(q, k, v, lens), varlen_attention(q, k, v, lens, impl="reference"))


@pytest.mark.parametrize("impl", COMPILED)
def test_offsets_past_int32(impl):
    """Rows 2**31 elements apart: row and head offsets are 64 bits wide. The memory is never touched, so never taken."""
    lens = SeqLens([2])
    q, k, v = (randn(2, 2, 8, dtype=usual(impl), seed=s) for s in range(3))

    def far(x):
        with far_apart():
            huge = torch.empty(2**32 + 64, dtype=x.dtype)
        view = huge.as_strided((2, 2, 8), (2**31, 2**31, 1))
        view.copy_(x)
        return view.requires_grad_()

    dense = [x.clone().requires_grad_() for x in (q, k, v)]
    sparse = [far(x) for x in (q, k, v)]
    for i in range(3):  # row 1 of head 0 and row 0 of head 1 are the same memory
        dense[i] = sparse[i].detach().clone().requires_grad_()
    ours, near = varlen_attention(*sparse, lens, impl=impl), varlen_attention(*dense, lens, impl=impl)
    assert torch.equal(ours, near)
    for a, b in zip(torch.autograd.grad(ours.sum(), sparse), torch.autograd.grad(near.sum(), dense), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif("triton" not in IMPLS, reason="Triton does not run here: set TRITON_INTERPRET=1")
@pytest.mark.parametrize("width", [8, 20, 32, 80, 96])
@pytest.mark.parametrize("short", [128, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_regimes_of_triton(dtype, short, width, monkeypatch):
    """All keys in one block, and streamed in many: values, and gradients through out and lse."""
    from m3ae_fast.ops.varlen_attention import triton_backend

    monkeypatch.setattr(triton_backend, "SHORT", short)
    tiles = {name: ((512, 32, 16, 4, 1),) for name in ("forward", "queries", "keys")}
    monkeypatch.setitem(triton_backend.TILES, "sm_90", triton_backend.TILES["sm_90"] | tiles)
    q_lens, k_lens = SeqLens([3, 0, 70, 1, 17]), SeqLens([5, 4, 40, 0, 33])
    q = randn(q_lens.total + 2, 4, width, dtype=dtype, grad=True)
    k, v = (randn(k_lens.total + 1, 2, width, dtype=dtype, seed=s, grad=True) for s in (1, 2))
    call = testing.Call((q, k, v, q_lens, k_lens), {"return_lse": True})
    assert_error_rules(call, "triton")


CUDA = pytest.mark.skipif("cuda" not in IMPLS, reason="CUDA does not run here: set M3AE_FAST_EMULATE=1")
LENGTHS = {  # of queries and keys: on both sides of a tile, of a step of keys, of what a block holds at a time
    "short": ([3, 0, 16, 17, 1], [5, 4, 15, 16, 0]),
    "long": ([65, 130, 0, 31], [129, 64, 3, 63]),
}


@CUDA
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("width", [8, 32, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kib", [227, 70, 40])
@pytest.mark.parametrize("impl", ["cuda"])
def test_every_regime_of_cuda(impl, kib, lengths, width, groups, monkeypatch):
    """Less shared memory: scores made twice, then blocks of keys and of queries, keys in chunks."""
    from m3ae_fast.ops.varlen_attention import cuda_backend

    if lengths == "short" and kib != 227:
        pytest.skip("fits in any")
    monkeypatch.setattr(cuda_backend, "shared_limit", lambda device: kib << 10)
    dtype = torch.float16 if width in (64, 72) else torch.bfloat16
    q_lens, k_lens = map(SeqLens, LENGTHS[lengths])
    q = randn(q_lens.total + 2, groups, width, dtype=dtype, grad=True)
    k, v = (randn(k_lens.total + 1, 1, width, dtype=dtype, seed=s, grad=True) for s in (1, 2))
    assert_error_rules(testing.Call((q, k, v, q_lens, k_lens), {"return_lse": True}), impl)


TURNS = {  # lengths, heads: blocks take several turns, sorted by length or as they come
    "ragged": ([(7 * i * i) % 82 for i in range(60)], 2),
    "equal": ([16] * 30, 2),
    "one past the longest class": ([20, 1100, 3, 1030], 1),
    "too many to sort": ([i % 3 for i in range(8200)], 1),
}


@CUDA
@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("impl", ["cuda"])
def test_turns_of_cuda(impl, name):
    """Several short sequences at once, the longest first, no sequence left out or taken twice."""
    lengths, heads = TURNS[name]
    lens = SeqLens(lengths)
    q, k, v = (randn(lens.total, heads, 32, dtype=torch.bfloat16, seed=s, grad=True) for s in range(3))
    assert_error_rules(testing.Call((q, k, v, lens), {"return_lse": True}), impl)


@CUDA
@pytest.mark.parametrize("longest", [2**31 - 1, 2**33 + 16])
@pytest.mark.parametrize("impl", ["cuda"])
def test_cuda_takes_any_longest_length(impl, longest):
    lens = SeqLens([20, 3, 70])
    q, k, v = (randn(lens.total, 2, 32, dtype=torch.bfloat16, seed=s, grad=True) for s in range(3))
    results = [
        testing.Call((q, k, v, lens.cu, lens.cu), {"max_seqlen_q": told, "max_seqlen_k": told}).run(
            varlen_attention, impl=impl
        )
        for told in (longest, lens.total)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@CUDA
@pytest.mark.parametrize("lengths", [[200, 16, 30], [16, 200, 30], [90, 3, 3], [1] * 8200 + [70]])
@pytest.mark.parametrize("told", [16, 80])
@pytest.mark.parametrize("impl", ["cuda"])
def test_cuda_stays_in_its_memory(impl, told, lengths):
    """Whatever is said of the longest length; on a GPU nobody can look."""
    lens = SeqLens(lengths)
    q, k, v = (randn(lens.total, 1, 8, dtype=torch.bfloat16, seed=s, grad=True) for s in range(3))
    testing.Call((q, k, v, lens.cu, lens.cu), {"max_seqlen_q": told, "max_seqlen_k": told}).run(
        varlen_attention, impl=impl
    )


@CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", cases.REAL[:6])
@pytest.mark.parametrize("impl", ["cuda"])
def test_real_shapes_of_cuda(impl, name, dtype):
    """One sequence and two heads of each, as views of wider rows."""
    _, (_, queries), of_keys, _, width = cases._REAL[name]
    q_lens, k_lens = SeqLens([queries]), SeqLens([queries if of_keys is None else of_keys[1]])
    q, k, v = (
        randn(lens.total, 3, 2, width, dtype=dtype, seed=s)[:, s].requires_grad_()
        for s, lens in enumerate((q_lens, k_lens, k_lens))
    )
    assert_error_rules(testing.Call((q, k, v, q_lens, k_lens)), impl)


@CUDA
@pytest.mark.parametrize("impl", ["cuda"])
def test_cuda_refuses_wide_heads(impl):
    x = randn(3, 1, 129, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"impl='cuda' cannot run varlen_attention: .* at most 128 .* got 129"):
        varlen_attention(x, x, x, SeqLens([3]), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_heads_of_any_width_run_or_are_refused_by_name(impl, isa):
    widest, dtype = BACKENDS.widest.get(impl, 700), torch.bfloat16
    q, k, v = (randn(40, 1, widest, dtype=dtype, seed=s, grad=True) for s in range(3))
    assert_error_rules(testing.Call((q, k, v, SeqLens([33, 7]))), impl)
    if impl in BACKENDS.widest:
        x = torch.zeros(3, 1, widest + 1, dtype=dtype)
        refused = f"impl='{impl}' cannot run varlen_attention: .* at most {widest} channels a head, got {widest + 1}"
        with pytest.raises(ValueError, match=refused):
            varlen_attention(x, x, x, SeqLens([3]), impl=impl)


@pytest.mark.skipif(_backends.TESTED is not None, reason="the CPU's kernels stand for a GPU's here")
def test_heads_too_wide_for_the_kernels_take_the_reference(monkeypatch):
    monkeypatch.setitem(BACKENDS.widest, "cpp", 64)
    for width, impl in (64, "cpp"), (65, "reference"), (64, "cpp"), (65, "reference"):
        assert _backends.pick(BACKENDS, None, torch.zeros(3, 1, width)) == impl


class far_apart:
    """torch.empty without the NaN fill of deterministic mode, which would touch every page."""

    def __enter__(self):
        torch.utils.deterministic.fill_uninitialized_memory = False

    def __exit__(self, *_):
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("impl", COMPILED)
def test_long_sequences_keep_memory_flat(impl):
    """4,096 tokens: nothing of the size of the scores (64 MiB here) is allocated through torch."""
    lens = SeqLens([4096 if impl == "cpp" else 600])  # the others run interpreted or emulated
    q, k, v = (randn(lens.total, 1, 32, dtype=usual(impl), seed=s, grad=True) for s in range(3))
    out = varlen_attention(q, k, v, lens, impl=impl)
    gradients = torch.autograd.grad(out, (q, k, v), testing.cotangent(out))
    reference = varlen_attention(q, k, v, lens, impl="reference")
    close(out, reference, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(reference, (q, k, v), testing.cotangent(out)), strict=True):
        close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("impl", COMPILED)
def test_packed_compiles_at_most_twice(impl):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(varlen_attention_qkvpacked, backend=counter, fullgraph=True, dynamic=True)
    for seed in range(6 if _backends.TESTED else 50):
        lens = SeqLens(torch.randint(2, 40, (4,), generator=torch.Generator().manual_seed(seed)))
        qkv = randn(lens.total, 3, 2, 8, dtype=usual(impl), seed=seed, grad=True)
        out, same = compiled(qkv, lens, impl=impl), varlen_attention_qkvpacked(qkv, lens, impl=impl)
        assert torch.equal(out, same)
        assert torch.equal(torch.autograd.grad(out.sum(), qkv)[0], torch.autograd.grad(same.sum(), qkv)[0])
    assert counter.frame_count <= 2


X = torch.zeros(7, 4, 8)
LENS = SeqLens([3, 4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(7, 32)}, ValueError, r"q must have shape \(any, any, any\), got \(7, 32\)"),
        ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
        ({"q": X.int()}, TypeError, "q must be of dtype float32, .*, got int32"),
        ({"k": torch.zeros(7, 4, 9)}, ValueError, r"k must have shape \(any, any, 8\), got \(7, 4, 9\)"),
        ({"v": torch.zeros(7, 2, 8)}, ValueError, r"v must have shape \(7, 4, 8\), got \(7, 2, 8\)"),
        (
            {"k": torch.zeros(7, 3, 8), "v": torch.zeros(7, 3, 8)},
            ValueError,
            "k must have a number of heads that divides q's 4, got 3",
        ),
        ({"q": torch.zeros(7, 0, 8)}, ValueError, "q must have at least one head"),
        ({"k": X.to("meta")}, ValueError, "k must be on cpu, as q is, got meta"),
        (
            {"k": torch.zeros(9, 4, 8), "v": torch.zeros(9, 4, 8)},
            ValueError,
            "cu_seqlens_k must be given where k has other rows than q",
        ),
        (
            {"cu_seqlens_k": SeqLens([7])},
            ValueError,
            "cu_seqlens_k must hold as many sequences as cu_seqlens_q, 2, got 1",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0.0, 7.0])},
            TypeError,
            "cu_seqlens_q must be of dtype int32, int64, got float32",
        ),
        ({"cu_seqlens_q": [0, 7]}, TypeError, "cu_seqlens_q must be a tensor, got list"),
        (
            {"cu_seqlens_k": torch.tensor([], dtype=torch.int32)},
            ValueError,
            "cu_seqlens_k must have at least one entry",
        ),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be at least 0, got -1"),
        ({"max_seqlen_k": 2.5, "cu_seqlens_k": LENS}, TypeError, "max_seqlen_k must be an integer, got float"),
        ({"max_seqlen_q": True}, TypeError, "max_seqlen_q must be an integer, got bool"),
        ({"max_seqlen_q": torch.tensor(-1)}, ValueError, "max_seqlen_q must be at least 0, got -1"),
        (
            {"max_seqlen_q": torch.tensor(4, device="meta")},
            TypeError,
            "max_seqlen_q must be an integer, or a tensor of",
        ),
    ],
)
def test_errors(change, error, message):
    arguments = {"q": X, "k": X, "v": X, "cu_seqlens_q": LENS} | change
    with pytest.raises(error, match=message):
        varlen_attention(**arguments)


@pytest.mark.parametrize("longest", [np.int64(4), np.int32(4), torch.tensor(4), torch.tensor(4, dtype=torch.int32)])
def test_the_longest_length_is_taken_from_whatever_holds_it_on_the_host(longest):
    x, cu = randn(7, 4, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    assert torch.equal(varlen_attention(x, x, x, cu, None, longest), varlen_attention(x, x, x, LENS))


@pytest.mark.parametrize("impl", [i for i in COMPILED if i == "cpp"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cu_seqlens_q": torch.tensor([1, 7])},
            r"cu_seqlens_q must ascend from 0 to at most 7 rows, got cu_seqlens_q\[0\] = 1",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 5, 4])},
            r"cu_seqlens_q must ascend from 0 to at most 7 rows, got cu_seqlens_q\[2\] = 4 after 5",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 8])},
            r"cu_seqlens_q must ascend from 0 to at most 7 rows, got cu_seqlens_q\[1\] = 8",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 3, 8])},
            r"cu_seqlens_k must ascend from 0 to at most 7 rows, got cu_seqlens_k\[2\] = 8",
        ),
        ({"max_seqlen_q": 3}, "max_seqlen_q must be at least the longest length, 4, got 3"),
        ({"cu_seqlens_k": LENS, "max_seqlen_k": 3}, "max_seqlen_k must be at least the longest length, 4, got 3"),
    ],
)
def test_wrong_offsets(impl, change, message):
    arguments = {"q": X, "k": X, "v": X, "cu_seqlens_q": LENS} | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments, impl=impl)


@pytest.mark.parametrize(
    ("qkv", "error", "message"),
    [
        (torch.zeros(7, 2, 4, 8), ValueError, r"qkv must have shape \(any, 3, any, any\), got \(7, 2, 4, 8\)"),
        (torch.zeros(7, 3, 4, 8).int(), TypeError, "qkv must be of dtype float32"),
        (torch.zeros(7, 3, 4, 0), ValueError, "qkv must have at least one head and one channel"),
    ],
)
def test_qkvpacked_errors(qkv, error, message):
    with pytest.raises(error, match=message):
        varlen_attention_qkvpacked(qkv, LENS)


def test_bare_offsets_on_a_gpu_need_max_seqlen():
    """meta tensors stand in for a GPU: a device on which nothing may look at the offsets."""
    q = torch.zeros(7, 4, 8, device="meta")
    with pytest.raises(ValueError, match="max_seqlen_q must be given with a bare cu_seqlens_q on meta"):
        varlen_attention(q, q, q, torch.zeros(3, dtype=torch.int32, device="meta"))


def test_explain_names_the_op():
    assert "varlen_attention" in _backends.LOADED


@pytest.mark.parametrize("impl", COMPILED)
def test_one_tensor_may_be_queries_keys_and_values(impl):
    lens, x = SeqLens([3, 4]), randn(7, 2, 8, dtype=usual(impl), grad=True)
    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(varlen_attention, backend="aot_eager", fullgraph=True)
    expected = varlen_attention(x, x.clone(), x.clone(), lens, impl=impl)
    for function in (varlen_attention, compiled):
        out = function(x, x, x, lens, lens, impl=impl)
        assert torch.equal(out, expected)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        (same,) = torch.autograd.grad(expected.sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, same)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("queries", [5, 16])
def test_an_infinite_key_of_no_weight_harms_no_key(impl, queries):
    """Its scores are -inf; rows that only fill up a tile of queries must not make 0 * inf of it."""
    q = -torch.rand(queries, 1, 32, generator=torch.Generator().manual_seed(0)) - 1
    k, v = randn(7, 1, 32), randn(7, 1, 32)
    k[0] = torch.inf
    dtype = testing.dtypes(impl, "varlen_attention")[0]
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    out = varlen_attention(q, k, v, SeqLens([queries]), SeqLens([7]), impl=impl)
    _, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert out.isfinite().all() and dk.isfinite().all() and dv.isfinite().all()
    assert not dk[0].any() and not dv[0].any() and dv[1:].all()
