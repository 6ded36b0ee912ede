"""sample_mask at the sizes of real batches; tests run SMALL, benchmarks REAL."""

import torch

from m3ae_fast.seqlens import SeqLens
from m3ae_fast.testing import SHAPES, Call

SMALL = ("ragged", "images", "shared", "extremes", "empty")
REAL = ("m3ae_small images", "m3ae_small captions", "mae_base images x 64")


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    """dtype is for ops with floats: there are none here."""
    options = {"seed": 1234 + seed, "step": 10 + seed}
    if name == "ragged":  # seven samples or more, so that the batch size changes too
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 90, (7 + seed % 3,), generator=generator)
        keep = (lengths * torch.rand(len(lengths), generator=generator)).long()
        ids = torch.randint(0, 2**56, (len(lengths),), generator=generator)
        return Call((SeqLens(lengths), SeqLens(keep)), options | {"sample_ids": ids, "stream": 3})
    if name == "extremes":  # nothing kept, all kept, no positions, one position, whole blocks of words
        return Call((SeqLens([5, 70, 0, 1, 64, 128, 256]), SeqLens([0, 70, 0, 1, 32, 1, 255])), options)
    if name == "empty":
        return Call((SeqLens([]), SeqLens([])), options)
    if name == "m3ae_small captions":
        shape = SHAPES["m3ae_small"]
        return Call((SeqLens(shape.captions(seed)), SeqLens(shape.kept_words(seed))), options | {"stream": 1})
    shape = SHAPES.get(name.partition(" ")[0], SHAPES["small"])
    batch = 64 if name.endswith("x 64") else shape.batch
    if name == "shared":
        options["shared"] = True
    return Call((SeqLens([shape.patches] * batch), shape.kept_patches), options)
