"""Small random calls that are valid, for test_fuzz.py: of each op a function that draws its arguments, by name.

Lengths with and without rows, rows past the last sequence, views of every layout, dtypes that meet, optional arguments.
"""

import torch
from hypothesis import strategies as st

from m3ae_fast import SeqLens, testing

WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 40, 64, 75, 130)  # every tail of every vector loop
LAYOUTS = ("dense", "dense", "holes", "turned", "moved", "expanded")
DISTINCT = LAYOUTS[:-1]  # for rows of which equal ones have a gradient of 0, and eager PyTorch no rounding errors
PAST = (-1, 10**9)  # what rows past the last sequence name: nobody looks
REDUCTIONS = ("mean", "sum", "none", "sample_mean")


class Parts:
    """Draws the parts of a call. What is in a tensor comes from a seed: hypothesis chooses sizes and options."""

    def __init__(self, draw, dtypes):
        self.draw = draw
        self.generator = torch.Generator().manual_seed(self.between(0, 2**32 - 1))
        self.dtypes = dtypes
        self.dtype = self.one(*dtypes)
        self.mixed = self.dtype != torch.float64 and self.one(False, False, True)

    def between(self, low, high):
        return self.draw(st.integers(low, high))

    def one(self, *values):
        return self.draw(st.sampled_from(values))

    def float_dtype(self):
        return self.one(torch.float32, torch.bfloat16) if self.mixed else self.dtype

    def floats(self, *size, scale=1.0, layouts=LAYOUTS):
        values = torch.randn(*size, generator=self.generator, dtype=torch.float64) * scale
        x = laid_out(values.to(self.float_dtype()), self.one(*layouts))
        return x.requires_grad_(self.one(True, True, False))

    def lengths(self, most=6):
        return self.draw(st.lists(st.integers(0, most), max_size=4))

    def offsets(self, lengths):
        lengths = SeqLens(lengths)
        kind = self.one("SeqLens", "int32", "int64", "holes")
        if kind == "SeqLens":
            return lengths
        cu = lengths.cu if kind == "int32" else lengths.cu.long()
        return laid_out(cu, "holes") if kind == "holes" else cu

    def ids(self, high, count, past=0):
        """`count` numbers below `high`, then `past` that name nothing."""
        values = torch.randint(0, max(high, 1), (count,), generator=self.generator)
        values = torch.cat([values, torch.tensor([self.one(*PAST) for _ in range(past)], dtype=torch.int64)])
        return self.integers(values)

    def integers(self, values):
        return laid_out(values.to(self.one(torch.int32, torch.int64)), self.one("dense", "holes"))

    def shuffled(self, count):
        return torch.randperm(count, generator=self.generator)


def laid_out(x, layout):
    """A view with the same shape: the same values too, but where it is expanded."""
    if layout == "holes":
        return torch.stack([x, torch.full_like(x, 77)], dim=-1)[..., 0]
    if layout == "turned":
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x
    if layout == "moved":
        return testing.moved(x, 1)
    if layout == "expanded" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


def assemble_tokens(p):
    width, samples, call = p.one(*WIDTHS), p.between(0, 3), {"image_tokens": None, "text_tokens": None}
    which = p.one("both", "both", "image", "text")
    for name, rows in (("image", p.between(1, 5)), ("text", p.between(1, 5))):
        if which not in ("both", name):
            continue
        lengths, past = [p.between(0, 4) for _ in range(samples)], p.between(0, 2)
        call[f"cu_{name}"] = p.offsets(lengths)
        if name == "text" and p.one(True, False):
            call["text_tokens"], call["text_embedding"] = p.ids(7, sum(lengths), past), p.floats(7, width)
        else:
            call[f"{name}_tokens"] = p.floats(sum(lengths) + past, width)
        if p.one(True, True, False):
            call[f"{name}_ids"], call[f"{name}_position"] = p.ids(rows, sum(lengths), past), p.floats(rows, width)
        if p.one(True, False):
            call[f"{name}_type"] = p.floats(width)
    if p.one(True, False):
        call["cls_token"] = p.floats(width)
    return call


def restore_tokens(p):
    width, count, length = p.one(*WIDTHS), p.between(0, 6), p.between(0, 10)
    tables = {name: p.between(1, 5) for name in ("image", "text") if p.one(True, True, False)}
    rows = torch.cat([p.shuffled(count), torch.full((length,), -1)])[p.shuffled(count + length)]
    slots = torch.randint(-1, sum(tables.values()), (len(rows),), generator=p.generator)
    call = {"kept": p.floats(count, width), "rows": p.integers(rows), "slots": p.integers(slots)}
    for name in ("image", "text"):
        if name in tables:
            call[f"{name}_position"] = p.floats(tables[name], width)
        for part in ("mask_token", "type"):
            if p.one(True, False):
                value = p.floats(width)
                call[f"{name}_{part}"] = value if name in tables else value.detach()  # which is never read
    return call


def images_of(p):
    """Arguments that ops which read patches share, and for each image how many rows name patches of it."""
    patch, high, wide, channels = p.between(1, 5), p.between(0, 3), p.between(1, 3), p.between(1, 4)
    lengths = [n if high else 0 for n in p.lengths(4)]
    size = (len(lengths), channels, high * patch, wide * patch)
    images = torch.randint(0, 256, size, generator=p.generator, dtype=torch.uint8)
    if p.one(True, False):
        images = images.to(p.float_dtype()) / 256
    if p.one(True, False):
        images = images.contiguous(memory_format=torch.channels_last)
    else:
        images = laid_out(images, p.one(*LAYOUTS))
    call = {"images": images, "patch_size": patch}
    for name, kind in (("mean", p.one(None, tuple, torch.tensor)), ("std", p.one(None, list, torch.tensor))):
        if kind is not None:
            call[name] = kind([0.25 + 0.125 * c for c in range(channels)])
    return call, lengths, p.ids(high * wide, sum(lengths), p.between(0, 2))


def gather_patches(p):
    call, lengths, ids = images_of(p)
    call |= {"ids": ids, "seqlens": p.offsets(lengths), "dtype": p.one(None, *p.dtypes)}
    call["images"].requires_grad_(call["images"].is_floating_point() and p.one(True, True, False))
    return call


def masked_mse(p):
    call, lengths, ids = images_of(p)
    values = call["patch_size"] ** 2 * call["images"].shape[1]
    call |= {"ids_mask": ids, "cu_mask": p.offsets(lengths), "pred": p.floats(len(ids), values)}
    return call | {"norm_pix": values > 1 and p.one(True, False), "reduction": p.one(*REDUCTIONS)}


def feature_regression(p):
    lengths, past, distance = p.lengths(), p.between(0, 2), p.one("l2", "l1", "cosine")
    width = p.one(*WIDTHS[distance == "cosine" :])  # numbers are parallel: eager PyTorch's loss of 0 is exact
    reduction, rows = p.one(*REDUCTIONS), sum(lengths)
    call = {"reduction": reduction, "distance": distance, "normalize": p.one(True, False)}
    call |= {"eps": p.one(1e-6, 1e-3)}
    if reduction == "sample_mean" or p.one(True, False):
        call["cu_seqlens"], rows = p.offsets(lengths), rows + past
    call["pred"], targets = p.floats(rows, width), rows
    if p.one(True, False):
        targets = p.between(1, 8)
        call["rows"] = p.ids(targets, sum(lengths), rows - sum(lengths))
    return call | {"target": p.floats(targets, width).detach()}


def layer_norm(p):
    size = (*(p.between(0, 4) for _ in range(p.between(0, 3))), p.one(*WIDTHS))
    call = {"x": p.floats(*size), "eps": p.one(1e-6, 1e-5, 1.0), "dtype": p.one(None, p.dtype)}
    call |= {name: p.floats(size[-1]) if p.one(True, True, False) else None for name in ("weight", "bias")}
    return call | {"residual": p.floats(*size) if p.one(True, False) else None}


def linear(p):
    inner, outer = p.one(0, *WIDTHS), p.one(0, *WIDTHS)
    activation, before = (p.one(None, "gelu", "gelu_tanh") for _ in range(2))
    call = {"x": p.floats(*(p.between(0, 5) for _ in range(p.between(0, 3))), inner), "activation": activation}
    call |= {"weight": p.floats(outer, inner, scale=max(inner, 1) ** -0.5), "input_activation": before}
    return call | {"bias": p.floats(outer) if p.one(True, False) else None}


def linear_cross_entropy(p):
    inner, classes, lengths, past = p.one(0, *WIDTHS), p.one(*WIDTHS), p.lengths(), p.between(0, 2)
    reduction, rows = p.one(*REDUCTIONS), sum(lengths)
    call = {"reduction": reduction, "label_smoothing": p.one(0.0, 0.0, 0.1, 1.0), "ignore_index": p.one(-100, 0, 1)}
    call |= {"lse_square_scale": p.one(0.0, 0.0, 0.1), "return_lse": p.one(True, False, False)}
    call |= {"return_z_loss": p.one(True, False)}
    if reduction == "sample_mean" or p.one(True, False):
        call["cu_seqlens"], rows = p.offsets(lengths), rows + past
    call["x"], call["weight"] = (
        p.floats(rows, inner),
        p.floats(classes, inner, scale=max(inner, 1) ** -0.5, layouts=DISTINCT),
    )
    target = p.ids(classes, sum(lengths), rows - sum(lengths))
    target[::3] = call["ignore_index"]
    if p.one(True, False):
        call["class_weight"] = p.floats(classes).detach().clamp(min=0)
    if p.one(True, False, False):  # any leading dimensions
        call["x"] = call["x"].detach()[:, None].requires_grad_(call["x"].requires_grad)
        target = target[:, None]
    # Rounded logits may be equal where the logits are not: only wide ones say which is the largest.
    accuracy = p.dtype != torch.bfloat16 and not p.mixed and p.one(True, False)
    return call | {
        "target": target,
        "return_accuracy": accuracy,
        "bias": p.floats(classes) if p.one(True, False) else None,
    }


def sample_mask(p):
    lengths = p.draw(st.lists(st.integers(0, 70), max_size=5))
    call = {"seed": p.between(0, 2**64 - 1), "step": p.between(0, 2**32 - 1), "stream": p.between(0, 255)}
    if p.one(True, False, False):  # equal lengths
        lengths = [max(lengths, default=0)] * len(lengths)
        call |= {"num_keep": p.between(0, max(lengths, default=0)), "shared": p.one(True, False)}
    else:
        call["num_keep"] = p.one(list, SeqLens)([p.between(0, n) for n in lengths])
    if not call.get("shared") and p.one(True, False):
        ids = [p.between(0, 2**56 - 1) for _ in lengths]
        call["sample_ids"] = ids if p.one(True, False) else torch.tensor(ids, dtype=torch.int64)
    return call | {"lengths": p.one(list, SeqLens)(lengths)}


def varlen_attention(p):
    groups, key_heads, width = p.between(1, 3), p.between(1, 3), p.one(*WIDTHS)
    lengths = p.lengths(12)
    call = {"cu_seqlens_q": p.offsets(lengths), "softmax_scale": p.one(None, 0.0, 0.3, -1.0)}
    call["return_lse"], past = p.one(True, False), p.between(0, 2)
    call["q"], keys = p.floats(sum(lengths) + past, groups * key_heads, width), sum(lengths) + past
    if p.one(True, False):
        call["max_seqlen_q"] = max(lengths, default=0) + p.between(0, 3)
    if p.one(True, False):
        lengths = [p.between(0, 12) for _ in lengths]
        call["cu_seqlens_k"], keys = p.offsets(lengths), sum(lengths) + p.between(0, 2)
    return call | {name: p.floats(keys, key_heads, width, layouts=DISTINCT) for name in ("k", "v")}


def varlen_attention_qkvpacked(p):
    lengths = p.lengths(12)
    call = {"qkv": p.floats(sum(lengths) + p.between(0, 2), 3, p.between(1, 3), p.one(*WIDTHS), layouts=DISTINCT)}
    call |= {"cu_seqlens": p.offsets(lengths), "return_lse": p.one(True, False)}
    return call | {"softmax_scale": p.one(None, 0.3)}


OPS = (
    assemble_tokens,
    feature_regression,
    gather_patches,
    layer_norm,
    linear,
    linear_cross_entropy,
    masked_mse,
    restore_tokens,
    sample_mask,
    varlen_attention,
    varlen_attention_qkvpacked,
)
