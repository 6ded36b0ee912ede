"""assemble_tokens against the padded batch that users write: gather positions, add types, look words up, cat."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure
from m3ae_fast import assemble_tokens
from m3ae_fast.ops.assemble_tokens import cases
from m3ae_fast.testing import Call


def padded(call):
    """The same step as a data loader and a masking step hand it to the eager chain, [B, most words], made before the
    clock starts: (its Call, [B, n] who is real)."""
    image_tokens, text_tokens = call.args
    o = {name: value for name, value in call.kwargs.items() if not name.startswith("cu_")}
    batch = call.kwargs["cu_image"].shape[0] - 1
    o["image_ids"] = o["image_ids"].view(batch, -1).long()
    real = torch.ones(batch, 1 + o["image_ids"].shape[1], dtype=torch.bool)
    if text_tokens is not None:
        lengths = call.kwargs["cu_text"].diff()
        words = torch.arange(int(lengths.max())) < lengths[:, None]
        text_tokens, o["text_ids"] = (
            torch.zeros(words.shape, dtype=torch.int64).masked_scatter(words, ids.long())
            for ids in (text_tokens, o["text_ids"])
        )
        real = torch.cat([real, words], dim=1)
    return Call((image_tokens, text_tokens), o), real


def eager(
    image_tokens, text_tokens, *, cls_token, image_ids, image_position, image_type, text_embedding=None, text_ids=None,
    text_position=None, text_type=None,
):  # fmt: skip
    """M3AE's encoder input on the padded batch [B, 1 + kept patches + most kept words, D]."""
    batch, width = image_ids.shape[0], cls_token.shape[0]
    images = image_tokens.view(batch, -1, width) + image_position[image_ids] + image_type
    parts = [cls_token.expand(batch, 1, width), images]
    if text_tokens is not None:
        parts.append(F.embedding(text_tokens, text_embedding) + text_position[text_ids] + text_type)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_assemble_tokens(benchmark, case, mode, dtype):
    call = measure.make(cases, case, dtype)
    peer, real = padded(call)
    calls = measure.copies(call)
    peers, first = measure.copies(peer, len(calls)), calls[0]
    out, theirs = assemble_tokens(*first.args, **first.kwargs), eager(*peers[0].args, **peers[0].kwargs)
    torch.testing.assert_close(
        out, theirs[real.to(out.device)], rtol=3 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )
    once = 2 * out.numel() * dtype.itemsize  # every row is read once and written once
    if mode != "forward" and "text_embedding" in first.kwargs:
        once += first.kwargs["text_embedding"].numel() * dtype.itemsize // 2  # its dense gradient, written once
    providers = {"m3ae_fast": assemble_tokens, "eager padded": (eager, peers)}
    measure.compare_op(benchmark, "assemble_tokens", f"{case} {str(dtype)[6:]}", calls, mode, providers, once)
