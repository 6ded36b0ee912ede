"""The names of flash_attn: its signatures, its semantics, and a refusal of all that varlen_attention has not."""

import inspect

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
        (
            "flash_attn_varlen_func",
            f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {OPTIONS}, block_table=None",
        ),
        (
            "flash_attn_varlen_kvpacked_func",
            f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {OPTIONS}",
        ),
        ("flash_attn_varlen_qkvpacked_func", f"qkv, cu_seqlens, max_seqlen, {OPTIONS}"),
        ("unpad_input", "hidden_states, attention_mask, unused_mask=None"),
        ("pad_input", "hidden_states, indices, batch, seqlen"),
        ("index_first_axis", "input, indices"),
    ],
)
def test_signatures_are_those_published(name, parameters):
    """As flash_attn 2.8 has them; the annotations are ours."""
    ours = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in ours) == parameters


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
    padded = flash_attn.pad_input(x, places.int(), 2, 5)
    assert padded.shape == (2, 5, 2, 3) and (padded.flatten(0, 1)[[1, 3, 5, 6, 8]] == 0).all()
    assert torch.equal(flash_attn.index_first_axis(padded.flatten(0, 1), places), x)


@pytest.mark.parametrize("name", ["flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func"])
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
        if "qkvpacked" in name:
            args = (qkv, lens.cu, lens.max)
        else:
            args = (*qkv.unbind(1), lens.cu, lens.cu, lens.max, lens.max)
        out, lse, _ = compiled(*args, return_attn_probs=True)
        same, same_lse, _ = function(*args, return_attn_probs=True)
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
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
