"""sample_mask against the chain it replaces: noise, argsort, argsort, slice, gather the mask."""

import pytest
import torch

from benchmarks import measure
from m3ae_fast import SeqLens, sample_mask
from m3ae_fast.ops.sample_mask import cases


def mae(lengths: SeqLens, num_keep: SeqLens | int, **_):
    """random_masking of MAE's public code, all but the gather of tokens; shorter samples are padded with noise 2."""
    batch, longest, device = len(lengths), lengths.max, lengths.device
    noise = torch.rand(batch, longest, device=device)
    ragged = min(lengths.lengths) != longest
    if ragged:
        noise[torch.arange(longest, device=device) >= lengths.cu.diff()[:, None]] = 2
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    most = num_keep if isinstance(num_keep, int) else num_keep.max
    ids_keep = ids_shuffle[:, :most]
    mask = torch.ones(batch, longest, device=device)
    if isinstance(num_keep, int):
        mask[:, :most] = 0
    else:
        mask[torch.arange(longest, device=device) < num_keep.cu.diff()[:, None]] = 0
    return ids_keep, ids_restore, torch.gather(mask, 1, ids_restore)


@pytest.mark.parametrize("case", cases.REAL)
def bench_sample_mask(benchmark, case):
    call = measure.make(cases, case).on(measure.SETTINGS.device)
    lengths = call.args[0]
    ours, (_, _, mask) = sample_mask(*call.args, **call.kwargs), mae(*call.args)
    padding = len(lengths) * lengths.max - lengths.total
    assert len(ours.ids_mask) == int(mask.sum()) - padding  # the same counts; other random numbers
    providers = {"m3ae_fast": sample_mask, "eager (MAE)": mae}
    measure.compare_op(benchmark, "sample_mask", case, [call], "forward", providers)
