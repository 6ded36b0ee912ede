"""assemble_tokens: values, messages and edges; what every op owes is in test_contract.py."""

import pytest
import torch

from m3ae_fast import SeqLens, assemble_tokens, testing
from m3ae_fast.ops.assemble_tokens import cases

IMPLS = ["reference", *testing.impls("assemble_tokens")]
pytestmark = [pytest.mark.parametrize("impl", IMPLS), pytest.mark.usefixtures("poison")]


def by_hand(call):
    """Row by row, as the docstring says it, in fp64."""
    image_tokens, text_tokens = call.args
    o = call.kwargs
    cu_image = o["cu_image"].tolist()
    cu_text = o["cu_text"].tolist()
    out = []
    for b in range(len(cu_image) - 1):
        out.append(o["cls_token"].double())
        for k in range(cu_image[b], cu_image[b + 1]):
            out.append(
                image_tokens[k].double() + o["image_position"][o["image_ids"][k]].double() + o["image_type"].double()
            )
        for k in range(cu_text[b], cu_text[b + 1]):
            word = o["text_embedding"][text_tokens[k]].double()
            out.append(word + o["text_position"][o["text_ids"][k]].double() + o["text_type"].double())
    return torch.stack(out)


def test_values_and_gradients_by_hand(impl):
    call = cases.make("small", testing.widest(impl, "assemble_tokens"))
    expected = by_hand(call)
    out = assemble_tokens(*call.args, **call.kwargs, impl=impl)
    rounding = 45 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
    g = testing.cotangent(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, call.leaves(), g), torch.autograd.grad(expected, call.leaves(), g.double())
    )


def test_output_offsets_are_the_sum_of_the_parts(impl):
    """cu_out[b] = b + cu_image[b] + cu_text[b]: the class token opens every sample."""
    call = cases.make("small")
    images, texts = (call.kwargs[name].diff().tolist() for name in ("cu_image", "cu_text"))
    lengths = SeqLens(1 + i + t for i, t in zip(images, texts, strict=True))
    out = assemble_tokens(*call.args, **call.kwargs, impl=impl)
    assert out.shape == (lengths.total, 40)
    for start in lengths.cu[:-1].tolist():
        assert torch.equal(out[start], call.kwargs["cls_token"])


@pytest.mark.parametrize("image", [torch.float32, torch.bfloat16], ids=["image_fp32", "image_bf16"])
@pytest.mark.parametrize("text", [torch.float32, torch.bfloat16], ids=["text_fp32", "text_bf16"])
@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16], ids=["params_fp32", "params_bf16"])
@pytest.mark.parametrize("case", ["small", "float_texts"])
def test_every_backend_gives_the_same_bits_for_every_mix_of_dtypes(impl, case, image, text, params):
    call = cases.make(case, params)
    options = dict(call.kwargs)
    image_tokens = call.args[0].detach().to(image).requires_grad_()
    text_tokens = call.args[1]
    if case == "small":
        options["text_embedding"] = options["text_embedding"].detach().to(text).requires_grad_()
    else:
        text_tokens = text_tokens.detach().to(text).requires_grad_()
    mixed = testing.Call((image_tokens, text_tokens), options)
    widest = torch.promote_types(torch.promote_types(image, text), params)
    ours, eager = (mixed.run(assemble_tokens, impl=each) for each in (impl, "reference"))
    for out, expected in zip(ours[0], eager[0], strict=True):
        assert out.dtype == widest
        assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    testing.assert_error_rules(ours, eager, mixed.to(torch.float64).run(assemble_tokens, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "offset"), [(12, 0), (264, 0), (264, 4), (1032, 0)])
def test_widths_and_alignments(impl, width, offset, dtype):
    """On a GPU a lane moves eight columns or four, as these allow, in one tile or several."""
    call = cases.make("small", dtype).map(lambda x: testing.moved(testing.widened(x, width), offset))
    (out,), _ = ours = call.run(assemble_tokens, impl=impl)
    (expected,), _ = eager = call.run(assemble_tokens, impl="reference")
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    testing.assert_error_rules(ours, eager, call.to(torch.float64).run(assemble_tokens, impl="reference"))


def test_rows_past_the_last_sample(impl):
    call = cases.make("past_the_end")
    (out,), (dimage, *_) = call.run(assemble_tokens, impl=impl)
    spare = call.args[0].shape[0] - call.kwargs["cu_image"][-1].item()
    assert spare == 3
    assert out[-spare:].eq(0).all() and out[:-spare].ne(0).any(1).all()
    assert dimage[-spare:].eq(0).all() and dimage[:-spare].ne(0).any(1).all()


def test_empty_sequences_hold_only_their_class_token(impl):
    cls = torch.randn(8)
    image = torch.randn(2, 8)
    out = assemble_tokens(
        image, torch.zeros(0, 8), cu_image=SeqLens([0, 2, 0]), cu_text=SeqLens([0, 0, 0]), cls_token=cls, impl=impl
    )
    assert torch.equal(out, torch.stack([cls, cls, *image, cls]))


@pytest.mark.parametrize("absent", ["image", "text"])
def test_a_modality_without_tokens_may_keep_its_parameters(impl, absent):
    """A batch of texts alone in a model that knows images: zero gradients, as where the tensor has no rows."""
    call = cases.make("texts_alone" if absent == "image" else "images_alone")
    own = cases.make("small").kwargs
    extra = {f"{absent}_{name}": own[f"{absent}_{name}"].detach().requires_grad_() for name in ("position", "type")}
    if absent == "text":
        extra["text_embedding"] = own["text_embedding"].detach().requires_grad_()
    extra |= {f"cu_{absent}": torch.zeros(4, dtype=torch.int32), f"{absent}_ids": torch.zeros(0, dtype=torch.int64)}
    full = testing.Call(call.args, call.kwargs | extra)
    (out,), gradients = full.run(assemble_tokens, impl=impl)
    assert torch.equal(out, assemble_tokens(*call.args, **call.kwargs, impl=impl))
    for leaf, gradient in zip(full.leaves(), gradients, strict=True):
        assert gradient.any() != any(leaf is x for x in extra.values())
    short = {name: value for name, value in extra.items() if not name.endswith("ids") and name[:2] != "cu"}
    assert torch.equal(out, assemble_tokens(*call.args, **call.kwargs, **short, impl=impl))


def test_int64_ids_offsets_and_seqlens_are_the_same(impl):
    call = cases.make("small")
    wide = {k: v.long() if not v.is_floating_point() else v for k, v in call.kwargs.items()}
    lens = {k: SeqLens(call.kwargs[k].diff()) for k in ("cu_image", "cu_text")}
    out = assemble_tokens(*call.args, **call.kwargs, impl=impl)
    assert torch.equal(out, assemble_tokens(call.args[0], call.args[1].int(), **wide, impl=impl))
    assert torch.equal(out, assemble_tokens(*call.args, **(call.kwargs | lens), impl=impl))


def test_only_the_gradients_asked_for_are_made(impl):
    """Each alone equals the one made with all others."""
    full = cases.make("small")
    together = dict(zip(map(id, full.leaves()), full.run(assemble_tokens, impl=impl)[1], strict=True))
    for leaf in full.leaves():
        out = assemble_tokens(
            *(x if x is leaf else x.detach() for x in full.args),
            **{k: x if x is leaf else x.detach() for k, x in full.kwargs.items()},
            impl=impl,
        )
        (alone,) = torch.autograd.grad(out, leaf, testing.cotangent(out))
        assert torch.equal(alone, together[id(leaf)])


def test_element_offsets_past_2_to_the_31(impl):
    """Tables of more elements than int32 counts; only the rows that are read ever exist in memory."""
    width, rows = 1024, 2**21 + 4
    torch.use_deterministic_algorithms(False)  # or torch.empty would fill all of it
    embedding = torch.empty(rows, width, dtype=torch.bfloat16)
    position = torch.empty(rows, width, dtype=torch.bfloat16)
    embedding[-2:] = torch.tensor([[3.0], [5.0]])
    position[-1] = 16.0
    last = torch.tensor([rows - 2, rows - 1])
    out = assemble_tokens(
        None, last, text_ids=torch.tensor([rows - 1, rows - 1]), cu_text=SeqLens([2]), text_embedding=embedding,
        text_position=position, impl=impl,
    )  # fmt: skip
    assert torch.equal(out, torch.tensor([[19.0], [21.0]], dtype=torch.bfloat16).expand(2, width))


def test_fp16_runs_where_the_backend_takes_it(impl):
    call = cases.make("small", torch.float16)
    if torch.float16 in testing.dtypes(impl, "assemble_tokens"):
        assert call.run(assemble_tokens, impl=impl)[0][0].dtype == torch.float16
    else:
        with pytest.raises(ValueError, match=f"impl='{impl}' cannot run assemble_tokens: it takes"):
            call.run(assemble_tokens, impl=impl)


def test_compiles_whole(impl):
    call = cases.make("small")
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    compiled = torch.compile(assemble_tokens, backend="aot_eager", fullgraph=True)
    options = call.kwargs | {k: SeqLens(call.kwargs[k].diff()) for k in ("cu_image", "cu_text")}
    expected = assemble_tokens(*call.args, **options, impl=impl)
    assert torch.equal(compiled(*call.args, **options, impl=impl), expected)


def changed(call, **changes):
    args = (changes.pop("image_tokens", call.args[0]), changes.pop("text_tokens", call.args[1]))
    return args, call.kwargs | changes


DOOR = {
    "no tokens": (dict(image_tokens=None, text_tokens=None), ValueError, "must not both be None"),
    "no cu_image": (dict(cu_image=None), ValueError, "cu_image must be given with image_tokens, got None"),
    "no cu_text": (dict(cu_text=None), ValueError, "cu_text must be given with text_tokens, got None"),
    "no image_ids": (dict(image_ids=None), ValueError, "image_ids must be given with image_position"),
    "no text_position": (dict(text_position=None), ValueError, "text_position must be given with text_ids"),
    "no table": (dict(text_embedding=None), ValueError, "text_embedding must be given where text_tokens are voc"),
    "table for rows": (dict(text_tokens=torch.zeros(3, 40)), ValueError, "text_embedding must be given where"),
    "ids without images": (dict(image_tokens=None), ValueError, r"image_ids must have shape \(0,\), got \(27,\)"),
    "other width": (dict(cls_token=torch.zeros(41)), ValueError, r"cls_token must have shape \(40,\), got \(41,\)"),
    "table of vectors": (dict(image_position=torch.zeros(40)), ValueError, r"image_position must have shape \(any, 40"),
    "integer rows": (dict(image_tokens=torch.zeros(27, 40).int()), TypeError, "image_tokens must be of dtype float32"),
    "float ids": (dict(text_ids=torch.zeros(3)), (TypeError, ValueError), "text_ids must"),
    "short ids": (dict(image_ids=torch.zeros(1).int()), ValueError, r"image_ids must have shape \("),
    "batches differ": (dict(cu_text=torch.tensor([0, 1])), ValueError, r"cu_text must have shape \(4,\), got \(2,\)"),
    "not a tensor": (dict(text_tokens=[1, 2]), TypeError, "text_tokens must be a tensor, got list"),
    "a list for a table": (
        dict(text_tokens=None, text_ids=None, text_embedding=None, text_position=[1]),
        TypeError,
        "text_position must be a tensor, got list",
    ),
    "other device": (dict(image_type=torch.zeros(40, device="meta")), ValueError, "image_type must be on cpu, as"),
}


@pytest.mark.parametrize("what", DOOR)
def test_refused_at_the_door(impl, what):
    changes, error, message = DOOR[what]
    args, options = changed(cases.make("small"), **changes)
    with pytest.raises(error, match=message):
        assemble_tokens(*args, **options, impl=impl)


def _with(name, at, value):
    def change(call):
        tensor = (call.kwargs | {"text_tokens": call.args[1]})[name].clone()
        tensor[at] = value
        return {name: tensor}

    return change


VALUES = {
    "vocabulary": (_with("text_tokens", 1, 101), r"text_tokens must name a row of text_embedding, which has 101 rows"),
    "negative word": (_with("text_tokens", 0, -1), r"got text_tokens\[0\] = -1"),
    "image id": (_with("image_ids", 2, 36), r"image_ids must name a row of image_position, which has 36 rows"),
    "text id": (_with("text_ids", 0, 9), r"text_ids must name a row of text_position, which has 9 rows"),
    "decreasing": (
        _with("cu_image", 1, 100),
        r"cu_image must ascend from 0 to at most \d+ rows, got cu_image\[1\] = 100 after 0",
    ),
    "past the end": (
        _with("cu_text", -1, 100),
        r"cu_text must ascend from 0 to at most \d+ rows, got cu_text\[\d+\] = 100 after",
    ),
    "late start": (_with("cu_text", 0, 1), r"cu_text must ascend from 0 to at most \d+ rows, got cu_text\[0\] = 1"),
}


@pytest.mark.parametrize("what", VALUES)
def test_values_outside_their_tables(impl, what):
    if impl != "cpp":
        pytest.skip("only the C++ backend looks at values")
    change, message = VALUES[what]
    call = cases.make("small")
    args, options = changed(call, **change(call))
    with pytest.raises(ValueError, match=message):
        assemble_tokens(*args, **options, impl=impl)
