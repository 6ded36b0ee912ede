"""The names of flash_attn: its signatures, its semantics, and a refusal of all that varlen_attention has not."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import SeqLens, testing
from m3ae_fast.integrations import flash_attn

pytestmark = pytest.mark.usefixtures("poison")

# Empty sequences, queries without keys and keys without queries among them.
Q_LENGTHS, K_LENGTHS = (3, 0, 41, 1, 4, 0), (5, 4, 27, 9, 0, 0)
OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)


def randn(*size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def arguments(q_lengths, k_lengths):
    q_lens, k_lens = SeqLens(q_lengths), SeqLens(k_lengths)
    return q_lens.cu, k_lens.cu, q_lens.max, k_lens.max


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("flash_attn_func", f"q, k, v, {OPTIONS}"),
        ("flash_attn_kvpacked_func", f"q, kv, {OPTIONS}"),
        ("flash_attn_qkvpacked_func", f"qkv, {OPTIONS}"),
        (  # seqused_k by keyword alone, for FlashAttention-3 has it in another place
            "flash_attn_varlen_func",
            f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {OPTIONS}, block_table=None, "
            "*, seqused_k=None",
        ),
        (
            "flash_attn_varlen_kvpacked_func",
            f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {OPTIONS}",
        ),
        ("flash_attn_varlen_qkvpacked_func", f"qkv, cu_seqlens, max_seqlen, {OPTIONS}"),
        ("unpad_input", "hidden_states, attention_mask, unused_mask=None"),
        ("unpad_input_for_concatenated_sequences", "hidden_states, attention_mask_in_length"),
        ("pad_input", "hidden_states, indices, batch, seqlen"),
        ("index_first_axis", "input, indices"),
        ("index_put_first_axis", "values, indices, first_axis_dim"),
    ],
)
def test_signatures_are_those_published(name, parameters):
    """As flash_attn 2.8 has them; the annotations are ours."""
    ours = inspect.signature(getattr(flash_attn, name))
    ours = [p.replace(annotation=inspect.Parameter.empty) for p in ours.parameters.values()]
    assert str(inspect.Signature(ours)) == f"({parameters})"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_cross_attention_of_grouped_heads(dtype, scale, by_sequence, assert_as_good):
    q = randn(sum(Q_LENGTHS), 6, 20, dtype=dtype)
    k, v = (randn(sum(K_LENGTHS), 2, 20, dtype=dtype, seed=seed) for seed in (1, 2))

    def ours(q, k, v):
        out, lse, dmask = flash_attn.flash_attn_varlen_func(
            q, k, v, *arguments(Q_LENGTHS, K_LENGTHS), softmax_scale=scale, return_attn_probs=True
        )
        assert lse.shape == (6, sum(Q_LENGTHS)) and dmask.numel() == 0
        assert (out[45:49] == 0).all() and (lse[:, 45:49] == -torch.inf).all()  # four queries without keys
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    def oracle(q, k, v):
        out, lse = by_sequence(q, k, v, Q_LENGTHS, K_LENGTHS, scale)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert_as_good(testing.Call((q, k, v)), ours, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_arguments(dtype, by_sequence, assert_as_good):
    """The very bits of three tensors, and their gradients stacked."""
    q_cu, k_cu, q_max, k_max = arguments(Q_LENGTHS, K_LENGTHS)
    q, kv = randn(sum(Q_LENGTHS), 6, 16, dtype=dtype), randn(sum(K_LENGTHS), 2, 3, 16, dtype=dtype, seed=1)
    call = testing.Call((q, kv, q_cu, k_cu, q_max, k_max), {"softmax_scale": 0.3, "return_attn_probs": True})

    def unpacked(q, kv, *args, **kwargs):
        return flash_attn.flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], *args, **kwargs)

    for ours, same in zip(call.run(flash_attn.flash_attn_varlen_kvpacked_func)[1], call.run(unpacked)[1], strict=True):
        assert torch.equal(ours, same)
    finite = testing.Call((q, kv))
    assert_as_good(
        finite,
        lambda q, kv: flash_attn.flash_attn_varlen_kvpacked_func(q, kv, q_cu, k_cu, q_max, k_max),
        lambda q, kv: by_sequence(q, *kv.unbind(1), Q_LENGTHS, K_LENGTHS)[0],
    )
    qkv = testing.Call((randn(sum(Q_LENGTHS), 3, 2, 16, dtype=dtype),))
    assert_as_good(
        qkv,
        lambda qkv: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, q_cu, q_max, return_attn_probs=True)[:2],
        lambda qkv: by_sequence(*qkv.unbind(1), Q_LENGTHS, Q_LENGTHS),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_batch_without_padding(dtype, scale, assert_as_good):
    """Grouped heads, more keys than queries; also in memory as [B, H, S, D], whose samples must be copied."""
    q = randn(3, 5, 6, 20, dtype=dtype)
    k, v = (randn(3, 2, 9, 20, dtype=dtype, seed=seed) for seed in (1, 2))

    def ours(q, k, v):
        out, lse, dmask = flash_attn.flash_attn_func(
            q, k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, return_attn_probs=True
        )
        assert lse.shape == (3, 6, 5) and dmask.numel() == 0
        return out, lse

    def oracle(q, k, v):
        q, k, v = q.transpose(1, 2), k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        lse = (q @ k.mT * (20**-0.5 if scale is None else scale)).logsumexp(-1)
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2), lse

    assert_as_good(testing.Call((q, k, v)), ours, oracle)


def test_packed_arguments_of_a_batch():
    """The very bits of three tensors, and their gradients."""
    call = testing.Call((randn(2, 5, 3, 4, 16, dtype=torch.float32),), {"return_attn_probs": True})
    three = call.run(lambda qkv, **options: flash_attn.flash_attn_func(*qkv.unbind(2), **options))
    for packed in (
        flash_attn.flash_attn_qkvpacked_func,
        lambda qkv, **options: flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options),
    ):
        for ours, same in zip([*itertools.chain(*call.run(packed))], [*itertools.chain(*three)], strict=True):
            assert torch.equal(ours, same)
    nothing = torch.zeros(0, 5, 3, 4, 16)
    assert flash_attn.flash_attn_qkvpacked_func(nothing).shape == (0, 5, 4, 16)
    assert flash_attn.flash_attn_func(*nothing.unbind(2)).shape == (0, 5, 4, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("used", [(5, 2, 27, 0, 0, 0), (1, 4, 20, 9, 0, 0)])
def test_used_keys(dtype, used, by_sequence, assert_as_good):
    """The loop over sequences, each with its first keys; the others are NaN, and have gradients 0. (float16 is the
    reference's on the CPU.)"""
    q = randn(sum(Q_LENGTHS), 6, 20, dtype=dtype)
    counts = torch.cat([torch.arange(n) < m for n, m in zip(K_LENGTHS, used, strict=True)])
    k, v = (randn(sum(K_LENGTHS), 2, 20, dtype=dtype, seed=seed).detach() for seed in (1, 2))
    k, v = (x.masked_fill(~counts[:, None, None], torch.nan).requires_grad_() for x in (k, v))
    seqused = torch.tensor(used, dtype=torch.int32)

    def ours(q, k, v):
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            q, k, v, *arguments(Q_LENGTHS, K_LENGTHS), return_attn_probs=True, seqused_k=seqused
        )
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    def oracle(q, k, v):
        out, lse = by_sequence(q, k[counts], v[counts], Q_LENGTHS, used)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    if dtype == torch.float16:
        out, _ = ours(q, k, v)
        torch.testing.assert_close(out, oracle(*(x.double() for x in (q, k, v)))[0].half(), atol=2e-3, rtol=2e-3)
    else:
        assert_as_good(testing.Call((q, k, v)), ours, oracle)
    for gradient in torch.autograd.grad(ours(q, k, v)[0].sum(), (k, v)):
        assert gradient.isfinite().all() and (gradient[~counts] == 0).all()


def test_used_keys_without_lengths_on_the_host():
    q, k = randn(7, 2, 8), randn(9, 2, 8, seed=1)
    q_lens, k_lens, used = SeqLens([3, 4]), SeqLens([5, 4]), torch.tensor([2, 4])
    given = flash_attn.flash_attn_varlen_func(q, k, k, q_lens.cu, k_lens.cu, 4, 5, seqused_k=used)
    for cu in ((q_lens, k_lens), (q_lens.cu, k_lens.cu)):
        assert torch.equal(given, flash_attn.flash_attn_varlen_func(q, k, k, *cu, None, None, seqused_k=used))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_padded_batch_by_way_of_unpad_and_pad(dtype, assert_as_good):
    """What a padded model does: scaled_dot_product_attention under a mask, holes anywhere; an empty sample too."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    real = mask.bool()[:, :, None, None]

    def ours(qkv):
        rows, indices, cu, longest, _ = flash_attn.unpad_input(qkv, mask)
        out = flash_attn.flash_attn_varlen_qkvpacked_func(rows, cu, longest, deterministic=True)
        return flash_attn.pad_input(out, indices, 4, 5)

    def oracle(qkv):
        # -1e30 and not False: the empty sample would be NaN; what padding asks is put to zero.
        bias = torch.where(mask.bool(), 0.0, -1e30).to(qkv.dtype)[:, None, None, :]
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2) * real

    assert_as_good(testing.Call((randn(4, 5, 3, 2, 24, dtype=dtype),)), ours, oracle)


def test_unpad_input():
    hidden = torch.arange(24).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]])
    rows, indices, cu, longest, used = flash_attn.unpad_input(hidden, mask.bool())
    assert indices.tolist() == [0, 1, 5, 7] and indices.dtype == torch.int64
    assert torch.equal(rows, hidden.view(8, 3)[[0, 1, 5, 7]])
    assert cu.tolist() == [0, 2, 4] and cu.dtype == torch.int32
    assert type(longest) is int and longest == 2
    assert used.tolist() == [2, 2] and used.dtype == torch.int32
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1]])  # the last one is valid, too: taken once
    rows, indices, cu, longest, used = flash_attn.unpad_input(hidden, mask, unused)
    assert indices.tolist() == [0, 1, 2, 5, 7] and cu.tolist() == [0, 3, 5] and longest == 3
    assert used.tolist() == [2, 2] and len(rows) == 5


def test_unpad_input_for_concatenated_sequences():
    """Three samples of two, none and three sequences, and what attention among their rows alone makes of them."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 4, 1, 0, 0]])
    qkv = randn(3, 6, 3, 2, 8)
    rows, indices, cu, longest = flash_attn.unpad_input_for_concatenated_sequences(qkv, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, *range(12, 18)] and indices.dtype == torch.int64
    assert torch.equal(rows, qkv.flatten(0, 1)[indices])
    assert cu.tolist() == [0, 2, 5, 6, 10, 11] and cu.dtype == torch.int32
    assert type(longest) is int and longest == 4
    out = flash_attn.flash_attn_varlen_qkvpacked_func(rows, cu, longest)
    padded = flash_attn.pad_input(out, indices, 3, 6)
    for sample, begin, end in [(0, 0, 2), (0, 2, 5), (2, 0, 1), (2, 1, 5), (2, 5, 6)]:
        q, k, v = qkv[sample, begin:end].permute(1, 2, 0, 3)
        expected = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        torch.testing.assert_close(padded[sample, begin:end], expected)
    assert (padded[1] == 0).all() and (padded[0, 5] == 0).all()
    rows, indices, cu, longest = flash_attn.unpad_input_for_concatenated_sequences(qkv[:1], lengths[1:2])
    assert rows.shape == (0, 3, 2, 8) and indices.shape == (0,) and cu.tolist() == [0] and longest == 0


def test_unpad_input_of_nothing():
    for batch in (0, 2):
        rows, indices, cu, longest, used = flash_attn.unpad_input(torch.zeros(batch, 4, 3), torch.zeros(batch, 4))
        assert rows.shape == (0, 3) and indices.shape == (0,) and longest == 0
        assert cu.tolist() == [0] * (batch + 1) and used.tolist() == [0] * batch
        assert flash_attn.pad_input(rows, indices, batch, 4).shape == (batch, 4, 3)


def test_pad_and_index_are_differentiable():
    x, places = randn(5, 2, 3), torch.tensor([7, 0, 2, 9, 4])
    torch.autograd.gradcheck(lambda x: flash_attn.pad_input(x, places, 2, 5), (x,))
    torch.autograd.gradcheck(lambda x: flash_attn.index_first_axis(x, torch.tensor([4, 0, 4])), (x,))
    torch.autograd.gradcheck(lambda x: flash_attn.unpad_input(x, torch.tensor([[1, 0], [0, 1], [1, 1]]))[0],
                             (randn(3, 2, 4),))  # fmt: skip
    torch.autograd.gradcheck(lambda x: flash_attn.index_put_first_axis(x, places, 10), (x,))
    padded = flash_attn.pad_input(x, places.int(), 2, 5)
    assert torch.equal(flash_attn.index_put_first_axis(x, places, 10), padded.flatten(0, 1))
    assert padded.shape == (2, 5, 2, 3) and (padded.flatten(0, 1)[[1, 3, 5, 6, 8]] == 0).all()
    assert torch.equal(flash_attn.index_first_axis(padded.flatten(0, 1), places), x)


@pytest.mark.parametrize("name", ["flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_func"])
def test_compiles_to_one_graph_at_most_twice(name):
    from torch._dynamo.testing import CompileCounterWithBackend

    function = getattr(flash_attn, name)
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for seed in range(20):
        lens = SeqLens(torch.randint(2, 40, (4,), generator=torch.Generator().manual_seed(seed)))
        qkv = randn(lens.total, 3, 2, 8, dtype=torch.float32, seed=seed)
        options = {"return_attn_probs": True}
        if "qkvpacked" in name:
            args = (qkv, lens.cu, lens.max)
        elif "varlen" in name:
            args = (*qkv.unbind(1), lens.cu, lens.cu, lens.max, lens.max)
            options["seqused_k"] = lens.cu.diff() // 2
        else:
            qkv = randn(lens.lengths[0], lens.lengths[1], 3, 2, 8, dtype=torch.float32, seed=seed)
            args = qkv.unbind(2)
        out, lse, _ = compiled(*args, **options)
        same, same_lse, _ = function(*args, **options)
        assert torch.equal(out, same) and torch.equal(lse, same_lse)
        assert torch.equal(torch.autograd.grad(out.sum(), qkv)[0], torch.autograd.grad(same.sum(), qkv)[0])
    assert counter.frame_count <= 2


REFUSED = [
    ({"dropout_p": 0.1}, r"dropout_p must be 0\.0 .*, got 0\.1"),
    ({"causal": True}, "causal must be False .*, got True"),
    ({"window_size": (128, 0)}, r"window_size must be \(-1, -1\) .*, got \(128, 0\)"),
    ({"window_size": (-1, 0)}, r"window_size must be \(-1, -1\) .*, got \(-1, 0\)"),
    ({"softcap": 30.0}, r"softcap must be 0\.0 .*, got 30\.0"),
    ({"alibi_slopes": torch.ones(2)}, "alibi_slopes must be None .*, got a tensor"),
]
PAGED = [({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, "block_table must be None .*, got a tensor")]


@pytest.mark.parametrize(("options", "message"), REFUSED + PAGED)
def test_what_is_not_supported_is_refused(options, message):
    qkv, (cu, _, longest, _) = torch.zeros(7, 3, 2, 8), arguments((3, 4), (3, 4))
    calls = {"flash_attn_varlen_func": (*qkv.unbind(1), cu, cu, longest, longest)}
    if "block_table" not in options:
        calls["flash_attn_varlen_kvpacked_func"] = (qkv[:, 0], qkv[:, 1:], cu, cu, longest, longest)
        calls["flash_attn_varlen_qkvpacked_func"] = (qkv, cu, longest)
        calls["flash_attn_func"] = qkv[None].unbind(2)
        calls["flash_attn_kvpacked_func"] = (qkv[None, :, 0], qkv[None, :, 1:])
        calls["flash_attn_qkvpacked_func"] = (qkv[None],)
    for name, args in calls.items():
        with pytest.raises(NotImplementedError, match=message):
            getattr(flash_attn, name)(*args, **options)


def test_defaults_by_any_spelling_are_taken():
    qkv, (cu, _, longest, _) = randn(7, 3, 2, 8), arguments((3, 4), (3, 4))
    expected = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, longest)
    options = {"dropout_p": 0, "causal": False, "window_size": [-1, -1], "softcap": -1.0, "deterministic": True}
    assert torch.equal(expected, flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, longest, **options))
    # all by position, as the published order has them
    rest = (0.0, None, False, (-1, -1), 0.0, None, False, False)
    assert torch.equal(
        expected, flash_attn.flash_attn_varlen_func(*qkv.unbind(1), cu, cu, longest, longest, *rest, None)
    )


def used(counts):
    x, cu = torch.zeros(9, 2, 8), SeqLens([5, 4])
    return flash_attn.flash_attn_varlen_func(x, x, x, cu, cu, None, None, seqused_k=torch.tensor(counts))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: flash_attn.unpad_input(torch.zeros(3), torch.ones(3)), ValueError,
         r"hidden_states must have shape \(B, S, \.\.\.\), got \(3,\)"),
        (lambda: flash_attn.unpad_input(torch.zeros(2, 3, 4), torch.ones(2, 4)), ValueError,
         r"attention_mask must have shape \(2, 3\), got \(2, 4\)"),
        (lambda: flash_attn.unpad_input(torch.zeros(2, 3, 4), torch.ones(2, 3), torch.ones(3)), ValueError,
         r"unused_mask must have shape \(2, 3\), got \(3,\)"),
        (lambda: flash_attn.pad_input(torch.zeros(2, 4), torch.tensor([0]), 1, 3), ValueError,
         r"indices must have shape \(2,\), got \(1,\)"),
        (lambda: flash_attn.pad_input(torch.zeros(2, 4), torch.tensor([0, 3]), 1, 3), ValueError,
         r"indices must be in \[0, 3\), got \[3\]"),
        (lambda: flash_attn.pad_input(torch.zeros(1, 4), torch.tensor([0]), 1, 3.0), TypeError,
         "seqlen must be an integer, got float"),
        (lambda: flash_attn.index_first_axis(torch.zeros(2, 4), torch.tensor([-1])), ValueError,
         r"indices must be in \[0, 2\), got \[-1\]"),
        (lambda: flash_attn.index_first_axis(torch.zeros(2, 4), torch.tensor([True])), TypeError,
         "indices must be of dtype int32, int64, got bool"),
        (lambda: flash_attn.flash_attn_varlen_kvpacked_func(
            torch.zeros(7, 2, 8), torch.zeros(7, 3, 2, 8), *arguments((3, 4), (3, 4))), ValueError,
         r"kv must have shape \(any, 2, any, any\), got \(7, 3, 2, 8\)"),
        (lambda: flash_attn.flash_attn_func(*torch.zeros(3, 7, 2, 8)), ValueError,
         r"q must have shape \(any, any, any, any\), got \(7, 2, 8\)"),
        (lambda: flash_attn.flash_attn_func(torch.zeros(2, 5, 2, 8), *torch.zeros(2, 3, 5, 2, 8)), ValueError,
         r"k must have shape \(2, any, any, 8\), got \(3, 5, 2, 8\)"),
        (lambda: flash_attn.flash_attn_kvpacked_func(torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 8)), ValueError,
         r"kv must have shape \(any, any, 2, any, any\), got \(2, 5, 2, 8\)"),
        (lambda: flash_attn.flash_attn_qkvpacked_func(torch.zeros(2, 5, 2, 8)), ValueError,
         r"qkv must have shape \(any, any, 3, any, any\), got \(2, 5, 2, 8\)"),
        (lambda: used([6, 4]), ValueError,
         r"seqused_k must be at most the lengths of the sequences, \[5, 4\], got \[6, 4\]"),
        (lambda: used([-1, 4]), ValueError, r"seqused_k must be at most the lengths .*, got \[-1, 4\]"),
        (lambda: used([1]), ValueError, r"seqused_k must have shape \(2,\), got \(1,\)"),
        (lambda: used([0.5, 1.0]), TypeError, "seqused_k must be of dtype int32, int64, got float32"),
        (lambda: flash_attn.unpad_input_for_concatenated_sequences(torch.zeros(1, 3, 4), torch.tensor([[2, 2, 0]])),
         ValueError, "attention_mask_in_length must hold lengths of at most 3 rows in all in each sample"),
        (lambda: flash_attn.unpad_input_for_concatenated_sequences(torch.zeros(1, 3, 4), torch.tensor([[-1, 2, 0]])),
         ValueError, "attention_mask_in_length must hold lengths .* not negative"),
        (lambda: flash_attn.unpad_input_for_concatenated_sequences(torch.zeros(1, 3, 4), torch.ones(1, 3)),
         TypeError, "attention_mask_in_length must be of dtype int64, .*, got float32"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
