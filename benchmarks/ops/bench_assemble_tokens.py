"""assemble_tokens against the padded batch that users write: gather positions, add types, look words up, cat."""

import measure
import pytest
import torch
import torch.nn.functional as F

from m3ae_fast import assemble_tokens
from m3ae_fast.ops.assemble_tokens import cases


def padded(call):
    """The same inputs as a data loader and a masking step hand them to the eager chain: [B, most words], and who is
    real. Made before the clock starts."""
    o = call.kwargs
    batch = o["cu_image"].shape[0] - 1
    inputs = {"image_ids": o["image_ids"].view(batch, -1).long(), "real": None}
    if "cu_text" in o:
        lengths = o["cu_text"].diff()
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        for name, value in (("text_tokens", call.args[1]), ("text_ids", o["text_ids"])):
            inputs[name] = torch.zeros(real.shape, dtype=torch.int64).masked_scatter(real, value.long())
        images = torch.ones(batch, 1 + inputs["image_ids"].shape[1], dtype=torch.bool)
        inputs["real"] = torch.cat([images, real], dim=1)
    return inputs


def eager(inputs):
    """M3AE's encoder input on the padded batch [B, 1 + kept patches + most kept words, D]."""

    def run(image_tokens, text_tokens, *, cls_token, image_position, image_type, text_embedding=None,
            text_position=None, text_type=None, **packed):  # fmt: skip
        x = inputs[id(image_tokens)]
        batch, width = x["image_ids"].shape[0], cls_token.shape[0]
        images = image_tokens.view(batch, -1, width) + image_position[x["image_ids"]] + image_type
        parts = [cls_token.expand(batch, 1, width), images]
        if text_tokens is not None:
            parts.append(F.embedding(x["text_tokens"], text_embedding) + text_position[x["text_ids"]] + text_type)
        return torch.cat(parts, dim=1)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_assemble_tokens(benchmark, case, mode, dtype):
    calls = measure.copies(lambda: cases.make(case, dtype), 16 << 20)
    inputs = {id(call.args[0]): padded(call) for call in calls}
    first = calls[0]
    out, peer = (f(*first.args, **first.kwargs) for f in (assemble_tokens, eager(inputs)))
    real = inputs[id(first.args[0])]["real"]
    peer = peer.flatten(0, 1) if real is None else peer[real]
    torch.testing.assert_close(out, peer, rtol=3 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    once = 2 * out.numel() * dtype.itemsize  # every row is read once and written once
    if mode != "forward" and "text_embedding" in first.kwargs:
        once += first.kwargs["text_embedding"].numel() * dtype.itemsize // 2  # its dense gradient, written once
    providers = {"m3ae_fast": assemble_tokens, "eager padded": eager(inputs)}
    measure.compare_op(benchmark, "assemble_tokens", f"{case} {str(dtype)[6:]}", calls, mode, providers, once)
