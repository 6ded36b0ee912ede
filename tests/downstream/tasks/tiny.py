"""Tiny models and pictures to try the tasks on."""

import numpy as np
import torch

from m3ae_fast.data import Tokenizer
from m3ae_fast.data.examples.shapes import ShapesPairs
from m3ae_fast.models import MAMO, EncodersConfig, MAMOConfig

DRAWN = [ShapesPairs(5, 32, captions="all" if i < 2 else "longest")[i] for i in range(5)]
COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (230, 230, 230)}
TOKENIZER = Tokenizer.train(
    [c for p in DRAWN for c in p.captions] + ["what color is it? both are the same", " ".join(COLORS)], 400
)
SIZES = {
    "image_size": 32, "patch_size": 8, "vocab_size": TOKENIZER.vocab_size, "max_text_length": 40, "width": 32,
    "heads": 4, "depth": 1, "text_depth": 1, "projection": 16,
}  # fmt: skip


def make(kind=MAMO, *, spread=None, **changes):
    """A model with its initial weights, or with ones of that spread: lively scores."""
    torch.manual_seed(0)
    options = {"fusion_depth": 2} if kind is MAMO else {}
    model = kind((MAMOConfig if kind is MAMO else EncodersConfig)(**SIZES, **options, **changes)).eval()
    for parameter in model.parameters() if spread else ():
        if parameter.dim():
            torch.nn.init.normal_(parameter, std=spread)
    return model


def plain(color):
    return np.full((32, 32, 3), COLORS[color], np.uint8)


def values(results):
    return {result.name: result.value for result in results}
