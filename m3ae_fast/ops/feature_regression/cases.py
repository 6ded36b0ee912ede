"""feature_regression at the sizes of MAMO's losses; tests run SMALL, benchmarks REAL."""

import torch

from m3ae_fast.seqlens import SeqLens
from m3ae_fast.testing import Call

SMALL = (
    "l2 sample_mean", "l2 plain", "l1", "l1 plain sample_mean", "cosine", "cosine plain sum", "l2 none past",
    "cosine sample_mean past", "l1 row by row past", "l2 nothing masked", "cosine empty",
)  # fmt: skip
REAL = ("mamo_base l2", "mamo_base l1", "mamo_base cosine", "mamo_small l2")
WIDTHS = {"mamo_base": 768, "mamo_small": 384}
SAMPLES, PATCHES, MASKED = 64, 196, 147  # of the real ones: 75 % of the patches of 224 px
LOSS = True


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    words = name.split()
    real = words[0] in WIDTHS
    generator = torch.Generator().manual_seed(seed)
    patches = PATCHES if real else 13
    width = WIDTHS[words[0]] if real else 75  # four vectors of AVX-512 and a part of one
    masked = [MASKED] * SAMPLES
    if not real:  # one sample without rows; twice over: two passes predict the same rows
        masked = [*torch.randint(2, patches + 1, (4,), generator=generator).tolist(), 0]
    if "nothing" in words:
        masked = [0] * 3
    if "empty" in words:
        masked = []
    rows = [patches * n + torch.randperm(patches, generator=generator)[:m].sort()[0] for n, m in enumerate(masked)]
    rows = torch.cat([torch.zeros(0, dtype=torch.int64), *rows, *([] if real else rows)]).int()
    lengths = SeqLens(masked if real else 2 * masked)
    if "past" in words:  # rows of no sample; what they name is not looked at
        rows = torch.cat([rows, torch.tensor([-1, 10**9], dtype=torch.int32)])
    by_row = "row" in words
    target = torch.randn(
        len(rows) if by_row else patches * len(masked), width, generator=generator, dtype=torch.float64
    )
    if not real:
        target[::5] = 0.3  # rows of a single value
    pred = torch.randn(len(rows), width, generator=generator, dtype=torch.float64)
    options = {
        "distance": next(d for d in ("l2", "l1", "cosine") if d in words),
        "normalize": "plain" not in words,
        "reduction": next((r for r in ("sample_mean", "sum", "none") if r in words), "mean"),
    }
    if options["reduction"] == "sample_mean" or "past" in words:
        options["cu_seqlens"] = lengths
    return Call((pred.to(dtype).requires_grad_(), target.to(dtype), None if by_row else rows), options)
