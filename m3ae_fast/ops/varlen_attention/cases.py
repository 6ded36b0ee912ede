"""varlen_attention at the sizes of real encoders and decoders; tests run SMALL, benchmarks REAL."""

import torch

from m3ae_fast.seqlens import SeqLens
from m3ae_fast.testing import SHAPES, Call

SMALL = ("small", "cross", "grouped", "tail", "long", "no_keys", "empty")
REAL = (
    "m3ae_small_encoder", "m3ae_small_decoder", "m3ae_huge_encoder", "mae_base_encoder", "mae_base_decoder",
    "cross_decoder", "long_512", "long_4096",
)  # fmt: skip

# Real names: sequences, shortest and longest query and key lengths, heads, head dim. M3AE keeps 64 of 256 patches and
# a quarter of up to 64 words, and decodes all of them; MAE-B keeps 49 of 196; CrossMAE's decoder reads the kept only.
_REAL = {
    "m3ae_small_encoder": (64, (67, 81), None, 6, 64),
    "m3ae_small_decoder": (8, (265, 297), None, 16, 32),
    "m3ae_huge_encoder": (16, (67, 81), None, 16, 80),
    "mae_base_encoder": (64, (50, 50), None, 12, 64),
    "mae_base_decoder": (16, (197, 197), None, 16, 32),
    "cross_decoder": (32, (147, 147), (50, 50), 16, 32),
    "long_512": (8, (512, 512), None, 8, 64),
    "long_4096": (1, (4096, 4096), None, 8, 64),
}
# Batches that fill a GPU: every width at equal lengths, which peers need no mask for, then the models' own.
_GPU = {
    f"{length} x {width}": (256, (length, length), None, 16, width)
    for width in (64, 32, 80)
    for length in (50, 81, 128, 197, 297, 512)
} | {f"{name} x 256": (256, *_REAL[name][1:]) for name in REAL[:6]}
GPU = tuple(_GPU)


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def tokens(rows, heads, width):
        values = torch.randn(rows, heads, width, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    if name in REAL + GPU:
        batch, (low, high), of_keys, heads, width = (_REAL | _GPU)[name]
        q_lengths = torch.randint(low, high + 1, (batch,), generator=generator)
        k_lengths = None if of_keys is None else torch.randint(of_keys[0], of_keys[1] + 1, (batch,))
        key_heads = heads
    else:
        shape = SHAPES["small"]
        heads = key_heads = shape.heads
        width = shape.width // shape.heads
        q_lengths = [1 + shape.kept_patches + words for words in shape.kept_words(seed)]
        k_lengths = None
        if name == "cross":
            k_lengths, width = [n + 7 for n in q_lengths], 20
        if name == "grouped":
            heads, key_heads, width = 6, 2, 33
        if name == "long":  # more keys and queries than one block of the kernels holds
            q_lengths, k_lengths, heads, key_heads, width = [700, 3], [1200, 40], 1, 1, 16
        if name == "no_keys":
            q_lengths, k_lengths = [3, 4, 0, 2], [5, 0, 2, 1]
        if name == "empty":
            q_lengths = []
    q_lens = SeqLens(q_lengths)
    k_lens = q_lens if k_lengths is None else SeqLens(k_lengths)
    spare = 5 if name == "tail" else 0
    q = tokens(q_lens.total + spare, heads, width)
    k, v = (tokens(k_lens.total + spare, key_heads, width) for _ in range(2))
    options = {"return_lse": True} if name in ("grouped", "tail", "no_keys") else {}
    if k_lengths is None:
        return Call((q, k, v, q_lens), options)
    return Call((q, k, v, q_lens, k_lens), options)
