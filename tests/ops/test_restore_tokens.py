"""restore_tokens: values, messages and edges; what every op owes is in test_contract.py."""

import pytest
import torch

from m3ae_fast import restore_tokens, testing
from m3ae_fast.ops.restore_tokens import cases

IMPLS = ["reference", *testing.impls("restore_tokens")]
pytestmark = [pytest.mark.parametrize("impl", IMPLS), pytest.mark.usefixtures("poison")]

FP32, BF16 = torch.float32, torch.bfloat16


def by_hand(kept, rows, slots, o):
    """Row by row, as the docstring says it."""
    patches = o["image_position"].shape[0]
    out = []
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        name = "image" if slot < patches else "text"
        if slot < 0:
            out.append(kept[row] if row >= 0 else torch.zeros_like(o["image_type"]))
            continue
        source = kept[row] if row >= 0 else o[f"{name}_mask_token"]
        position = o[f"{name}_position"][slot - (patches if name == "text" else 0)]
        out.append(source + (position + o[f"{name}_type"]))
    return torch.stack(out)


@pytest.mark.parametrize("case", ["small", "images_alone", "subset"])
def test_values_and_gradients_by_hand(impl, case):
    call = cases.make(case, testing.widest(impl, "restore_tokens"))
    expected = by_hand(*call.args, call.kwargs)
    out = restore_tokens(*call.args, **call.kwargs, impl=impl)
    assert torch.equal(out, expected)
    g = testing.cotangent(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, call.leaves(), g), torch.autograd.grad(expected, call.leaves(), g)
    )


@pytest.mark.parametrize("kept", [FP32, BF16], ids=["kept_fp32", "kept_bf16"])
@pytest.mark.parametrize("params", [FP32, BF16], ids=["params_fp32", "params_bf16"])
def test_every_backend_gives_the_same_bits_for_every_mix_of_dtypes(impl, kept, params):
    call = cases.make("small", params)
    rows = call.args[0].detach().to(kept).requires_grad_()
    call = testing.Call((rows, *call.args[1:]), call.kwargs)
    (out,), _ = ours = call.run(restore_tokens, impl=impl)
    (expected,), _ = eager = call.run(restore_tokens, impl="reference")
    assert out.dtype == torch.promote_types(kept, params)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    testing.assert_error_rules(ours, eager, call.to(torch.float64).run(restore_tokens, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "offset"), [(12, 0), (264, 0), (264, 4), (1032, 0)])
def test_widths_and_alignments(impl, width, offset, dtype):
    """On a GPU a lane moves eight columns or four, as these allow, in one tile or several."""
    call = cases.make("small", dtype).map(lambda x: testing.moved(testing.widened(x, width), offset))
    (out,), _ = ours = call.run(restore_tokens, impl=impl)
    (expected,), _ = eager = call.run(restore_tokens, impl="reference")
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    testing.assert_error_rules(ours, eager, call.to(torch.float64).run(restore_tokens, impl="reference"))


def test_rows_of_nothing_are_zero(impl):
    """rows -1 and slots -1: neither a source nor a place."""
    kept = torch.randn(2, 8, requires_grad=True)
    nothing = torch.tensor([-1, -1, -1])
    rows = torch.tensor([-1, 1, -1])
    assert torch.equal(restore_tokens(kept, nothing, nothing, impl=impl), torch.zeros(3, 8))
    out = restore_tokens(kept, rows, nothing, impl=impl)
    assert torch.equal(out, torch.stack([torch.zeros(8), kept[1], torch.zeros(8)]))
    (dkept,) = torch.autograd.grad(out, kept, torch.ones(3, 8))
    assert torch.equal(dkept, torch.tensor([[0.0], [1.0]]).expand(2, 8))


def test_absent_vectors_count_as_zero(impl):
    kept, position = torch.randn(1, 8), torch.randn(4, 8)
    out = restore_tokens(kept, torch.tensor([-1, 0]), torch.tensor([2, 3]), text_position=position, impl=impl)
    assert torch.equal(out, torch.stack([position[2], kept[0] + position[3]]))


def test_a_kept_row_that_is_not_named_gets_a_zero_gradient(impl):
    call = cases.make("subset")
    named = torch.zeros(call.args[0].shape[0], dtype=torch.bool)
    named[call.args[1][call.args[1] >= 0].long()] = True
    assert named.any() and not named.all()
    dkept = call.run(restore_tokens, impl=impl)[1][0]
    assert dkept[~named].eq(0).all() and dkept[named].ne(0).any(1).all()


def test_only_the_gradients_asked_for_are_made(impl):
    """Each alone equals the one made with all others; image_position learns too."""
    call = cases.make("small")
    call.kwargs["image_position"].requires_grad_()
    together = dict(zip(map(id, call.leaves()), call.run(restore_tokens, impl=impl)[1], strict=True))
    assert len(together) == 7
    for leaf in call.leaves():
        out = restore_tokens(
            *(x if x is leaf else x.detach() for x in call.args),
            **{k: x if x is leaf else x.detach() for k, x in call.kwargs.items()},
            impl=impl,
        )
        (alone,) = torch.autograd.grad(out, leaf, testing.cotangent(out))
        assert torch.equal(alone, together[id(leaf)])


def test_int64_ids_are_the_same(impl):
    kept, rows, slots = cases.make("small").args
    options = cases.make("small").kwargs
    assert torch.equal(
        restore_tokens(kept, rows, slots, **options, impl=impl),
        restore_tokens(kept, rows.long(), slots.long(), **options, impl=impl),
    )


def test_element_offsets_past_2_to_the_31(impl):
    """Kept rows and positions past 2**31 elements; only the pages that are read ever exist in memory."""
    if impl == "reference":
        pytest.skip("the reference would write copies of 16 GB")
    torch.use_deterministic_algorithms(False)  # or torch.empty would fill all of it
    width, count = 8192, 2**18 + 2
    kept, position = (torch.empty(count, width, dtype=BF16) for _ in range(2))
    kept[-2:] = torch.tensor([[3.0], [5.0]])
    position[-1] = 16.0
    rows, slots = torch.tensor([count - 1, count - 2]), torch.tensor([count - 1, -1])
    out = restore_tokens(kept, rows, slots, image_position=position, impl=impl)
    assert torch.equal(out, torch.tensor([[21.0], [3.0]], dtype=BF16).expand(2, width))


def test_fp16_runs_where_the_backend_takes_it(impl):
    call = cases.make("small", torch.float16)
    if torch.float16 in testing.dtypes(impl, "restore_tokens"):
        assert call.run(restore_tokens, impl=impl)[0][0].dtype == torch.float16
    else:
        with pytest.raises(ValueError, match=f"impl='{impl}' cannot run restore_tokens: it takes"):
            call.run(restore_tokens, impl=impl)


def arguments(**changes):
    base = {"kept": torch.zeros(3, 8), "rows": torch.tensor([2, -1, 0]), "slots": torch.tensor([-1, 1, 4])}
    return base | {"image_position": torch.zeros(4, 8), "text_position": torch.zeros(2, 8)} | changes


DOOR = {
    "kept of one dimension": (dict(kept=torch.zeros(8)), ValueError, r"kept must have shape \(any, any\), got \(8,\)"),
    "integer kept": (dict(kept=torch.zeros(3, 8).int()), TypeError, "kept must be of dtype float32.*, got int32"),
    "no tensor": (dict(kept=[1.0]), TypeError, "kept must be a tensor, got list"),
    "float rows": (dict(rows=torch.zeros(3)), TypeError, "rows must be of dtype int32, int64, got float32"),
    "short slots": (dict(slots=torch.tensor([0])), ValueError, r"slots must have shape \(3,\), got \(1,\)"),
    "width": (dict(image_mask_token=torch.zeros(9)), ValueError, r"image_mask_token must have shape \(8,\), got \(9,"),
    "table width": (dict(text_position=torch.zeros(2, 9)), ValueError, r"text_position must have shape \(any, 8\)"),
    "integer type": (dict(text_type=torch.zeros(8).int()), TypeError, "text_type must be of dtype .* got int32"),
    "device": (dict(image_type=torch.zeros(8, device="meta")), ValueError, "image_type must be on cpu, as kept is"),
    "ids' device": (dict(slots=torch.zeros(3, device="meta").int()), ValueError, "slots must be on cpu, as kept is"),
}


@pytest.mark.parametrize("what", DOOR)
def test_refused_at_the_door(impl, what):
    changes, error, message = DOOR[what]
    with pytest.raises(error, match=message):
        restore_tokens(**arguments(**changes), impl=impl)


VALUES = {
    "row": (
        dict(rows=torch.tensor([3, -1, 0])),
        r"rows must be -1 or name a row of kept, which has 3 rows",
    ),
    "row -2": (dict(rows=torch.tensor([2, -2, 0])), r"got rows\[1\] = -2"),
    "slot": (
        dict(slots=torch.tensor([-1, 1, 6])),
        r"slots must be -1 or name a row of \[image_position; text",
    ),
    "slot -2": (dict(slots=torch.tensor([-2, 1, 4])), r"which has 6 rows, got slots\[0\] = -2"),
    "no tables": (dict(image_position=None, text_position=None), r"which has 0 rows, got slots\[1\] = 1"),
    "twice": (dict(rows=torch.tensor([2, -1, 2])), r"name a row of kept at most once, got 2 again at rows\[2\]"),
}


@pytest.mark.parametrize("what", VALUES)
def test_indices_outside_their_tables(impl, what):
    if impl != "cpp":
        pytest.skip("only the C++ backend looks at values")
    changes, message = VALUES[what]
    with pytest.raises(ValueError, match=message):
        restore_tokens(**arguments(**changes), impl=impl)
