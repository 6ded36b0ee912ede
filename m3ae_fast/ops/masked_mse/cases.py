"""masked_mse at the sizes of real decoders; tests run SMALL, benchmarks REAL."""

import torch

from m3ae_fast.ops.gather_patches.cases import MEAN, STD
from m3ae_fast.seqlens import SeqLens
from m3ae_fast.testing import SHAPES, Call

SMALL = (
    "sample_mean",
    "mean norm_pix",
    "sum pixels",
    "none norm_pix",
    "past the end",
    "none masked",
    "empty",
    "wide norm_pix",
    "nine channels, pixels",
)
REAL = ("m3ae_small", "mae_base norm_pix")
LOSS = True


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    first, _, _ = name.partition(" ")
    real = first in SHAPES
    shape = SHAPES[first if real else "small"]
    generator = torch.Generator().manual_seed(seed)
    # 75 values a patch: four vectors of AVX-512 and a part of one; wide: 1200, more than a GPU's warp takes
    patch = shape.patch_size if real else 20 if first == "wide" else 5
    height, width = (shape.image_size,) * 2 if real else (3 * patch, 4 * patch)
    patches = (height // patch) * (width // patch)
    count, channels = 0 if name == "empty" else shape.batch, 9 if first == "nine" else 3
    images = torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    if real:
        masked = [patches - shape.kept_patches] * count
    else:
        masked = torch.randint(0, patches + 1, (count,), generator=generator).tolist()
        images[:, :, :patch] //= 100  # patches of few colors, and one of a single color
        images[:, :, -patch:, -patch:] = 200
    if name == "none masked":
        masked = [0] * count
    ids_mask = [torch.randperm(patches, generator=generator)[:m].sort()[0] for m in masked]
    ids_mask = torch.cat([torch.zeros(0, dtype=torch.int64), *ids_mask]).int()
    if name == "past the end":  # rows of no image; what they name is not looked at
        ids_mask = torch.cat([ids_mask, torch.tensor([-1, 10**9], dtype=torch.int32)])
    if "pixels" in name or real:
        images = images.contiguous(memory_format=torch.channels_last)
    if name == "past the end":
        images = images.to(dtype) / 256
    pred = torch.randn(len(ids_mask), channels * patch * patch, generator=generator, dtype=torch.float64)
    options = {
        "patch_size": patch,
        "mean": (MEAN * 3)[:channels],
        "std": (STD * 3)[:channels],
        "norm_pix": "norm_pix" in name,
    }
    options["reduction"] = {"sum": "sum", "none": "none", "mean": "mean", "mae_base": "mean"}.get(first, "sample_mean")
    return Call((pred.to(dtype).requires_grad_(), images, ids_mask, SeqLens(masked)), options)
