"""gather_patches at the sizes of real encoders; tests run SMALL, benchmarks REAL."""

import torch

from m3ae_fast.seqlens import SeqLens
from m3ae_fast.testing import SHAPES, Call

SMALL = (
    "planes", "pixels", "uint8 planes", "uint8 pixels", "one channel", "four channels", "nine channels, uint8 pixels",
    "past the end", "empty",
)  # fmt: skip
REAL = tuple(f"{model} {layout}" for model in ("m3ae_small", "mae_base") for layout in ("uint8 pixels", "uint8 planes"))
MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    model, _, layout = name.partition(" ")
    shape = SHAPES.get(model)
    if shape is None:  # patches as wide as a vector and a half of AVX2, and one of AVX-512 less a few lanes
        model, layout, shape = "small", name, SHAPES["small"]
    generator = torch.Generator().manual_seed(seed)
    patch = {"small": 12 if layout == "pixels" else 5 if layout == "one channel" else 4}.get(model, shape.patch_size)
    channels = {"one": 1, "four": 4, "nine": 9}.get(layout.partition(" ")[0], 3)
    height, width = (shape.image_size,) * 2 if model != "small" else (3 * patch, 4 * patch)
    count = 0 if layout == "empty" else shape.batch
    images = torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    patches = (height // patch) * (width // patch)
    if model == "small":
        kept = torch.randint(0, patches + 1, (count,), generator=generator).tolist()
    else:
        kept = [shape.kept_patches] * count
    ids = [torch.randperm(patches, generator=generator)[:k].sort()[0] for k in kept]
    ids = torch.cat([torch.zeros(0, dtype=torch.int64), *ids]).int()
    if layout == "four channels":  # any order, patches named twice
        ids = ids // 2
    if layout == "past the end":  # rows of no image; what they name is not looked at
        ids = torch.cat([ids, torch.tensor([-1, 10**9], dtype=torch.int32)])
    options = {"patch_size": patch, "mean": (MEAN * 3)[:channels], "std": (STD * 3)[:channels]}
    if "uint8" in layout:
        options["dtype"] = dtype
    else:
        images = images.to(dtype) / 256
    if "pixels" in layout:
        images = images.contiguous(memory_format=torch.channels_last)
    return Call((images.requires_grad_("uint8" not in layout), ids, SeqLens(kept)), options)
