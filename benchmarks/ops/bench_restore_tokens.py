"""restore_tokens against the padded decoder input of facebookresearch/mae and of M3AE: per modality, mask tokens
repeated and concatenated, a gather by ids_restore, positions and type added; then everything concatenated."""

import itertools

import pytest
import torch

from benchmarks import measure
from m3ae_fast import restore_tokens
from m3ae_fast.ops.restore_tokens import cases
from m3ae_fast.testing import Call


def eager(cls, modalities):
    """cls [B, 1, D]; per modality: kept [B, k, D], how many masked at most, ids_restore [B, n], mask token, positions
    [n, D], type."""
    parts = [cls]
    for kept, masked, ids_restore, mask_token, position, type_ in modalities:
        x = torch.cat([kept, mask_token.repeat(kept.shape[0], masked, 1)], dim=1)
        x = torch.gather(x, 1, ids_restore.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        parts.append(x + position[: x.shape[1]] + type_)
    return torch.cat(parts, dim=1)


def padded(call):
    """The same step as a padded model holds it, made before the clock starts: (its Call, [B, n] who is real)."""
    kept, rows, slots = call.args
    o = call.kwargs
    starts = [*(slots < 0).nonzero().flatten().tolist(), len(rows)]  # a sample opens with its class token
    patches = o["image_position"].shape[0]
    samples = [slice(*ends) for ends in itertools.pairwise(starts)]
    cls = torch.stack([kept[rows[s.start]] for s in samples]).detach()[:, None].requires_grad_()
    real, modalities = [torch.ones(len(samples), 1, dtype=torch.bool)], []
    for name in ("image", "text") if "text_position" in o else ("image",):
        its = [rows[s][1 : 1 + patches] if name == "image" else rows[s][1 + patches :] for s in samples]
        most, most_kept = max(map(len, its)), max(int((r >= 0).sum()) for r in its)
        values = torch.zeros(len(samples), most_kept, kept.shape[1], dtype=kept.dtype)
        ids_restore = torch.full((len(samples), most), most_kept)
        for b, r in enumerate(its):
            here = r >= 0
            values[b, : int(here.sum())] = kept[r[here]].detach()
            rank = torch.where(here, here.cumsum(0) - 1, most_kept + (~here).cumsum(0) - 1)
            ids_restore[b, : len(r)] = rank
        real.append(torch.tensor([[i < len(r) for i in range(most)] for r in its]))
        masked = int(ids_restore.max()) + 1 - most_kept
        parameters = (o[f"{name}_{each}"] for each in ("mask_token", "position", "type"))
        modalities.append((values.requires_grad_(), masked, ids_restore, *parameters))
    return Call((cls, modalities)), torch.cat(real, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_restore_tokens(benchmark, case, mode, dtype):
    call = measure.make(cases, case, dtype)
    peer, real = padded(call)
    calls = measure.copies(call)
    peers = measure.copies(peer, len(calls))
    ours = restore_tokens(*calls[0].args, **calls[0].kwargs)
    theirs = eager(*peers[0].args)[real.to(ours.device)]
    torch.testing.assert_close(ours, theirs, rtol=3 * torch.finfo(dtype).eps, atol=6 * torch.finfo(dtype).eps)
    once = (ours.numel() + calls[0].args[0].numel()) * dtype.itemsize  # read the kept rows, write the output
    providers = {"m3ae_fast": restore_tokens, "eager padded": (eager, peers)}
    measure.compare_op(benchmark, "restore_tokens", f"{case} {str(dtype)[6:]}", calls, mode, providers, once)
