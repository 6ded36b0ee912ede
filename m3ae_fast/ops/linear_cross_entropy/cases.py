"""linear_cross_entropy at the sizes of real vocabulary heads; tests run SMALL, benchmarks REAL."""

import torch

from m3ae_fast.seqlens import SeqLens
from m3ae_fast.testing import SHAPES, Call

OPTIONS = {
    "small": {"reduction": "sample_mean", "return_accuracy": True},
    "mean": {"return_accuracy": True},
    "sum": {"reduction": "sum", "label_smoothing": 0.1, "return_accuracy": True},
    "none": {"reduction": "none", "label_smoothing": 0.3, "return_accuracy": True},
    "weighted": {"label_smoothing": 0.1, "lse_square_scale": 0.01, "return_accuracy": True, "return_z_loss": True},
    "lse": {"reduction": "sample_mean", "lse_square_scale": 0.01, "return_lse": True},
    "batch": {"reduction": "none", "label_smoothing": 0.3, "return_lse": True, "return_z_loss": True},
    "all_ignored": {},
    "empty": {"reduction": "sample_mean"},
    "m3ae_small": {"reduction": "sample_mean"},
}
WEIGHTED = ("weighted", "lse", "batch")
SMALL = ("small", "mean", "sum", "none", *WEIGHTED, "no_bias", "all_ignored", "empty")
REAL = ("m3ae_small", "batch_64")  # the masked words of a batch of 8; a third of 2048 rows ignored
LOSS = True


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES["m3ae_small" if name in REAL else "small"]
    lengths = SeqLens([64] * 32 if name == "batch_64" else [] if name == "empty" else [*shape.captions(seed), 0])
    rows = lengths.total + (2 if name == "small" else 0)  # rows past the last sequence: ignored
    width, vocab = shape.decoder_width if name in REAL else shape.width, shape.vocab_size

    def param(*size, scale=1.0):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    target = torch.randint(0, vocab, (rows,), generator=generator)
    ignored = 1.0 if name == "all_ignored" else 1 / 3
    target[torch.rand(rows, generator=generator) < ignored] = -100
    options = dict(OPTIONS.get(name, {}))
    if options.get("reduction") == "sample_mean":
        options["cu_seqlens"] = lengths.cu
    bias = None if name in ("no_bias", *REAL) else param(vocab)
    x, weight = param(rows, width), param(vocab, width, scale=width**-0.5)
    if name in WEIGHTED:
        class_weight = param(vocab).detach().abs()
        class_weight[::4] = 0
        options["class_weight"] = class_weight
    if name == "batch":
        x, target = x.detach()[: rows // 2 * 2].view(2, -1, width).requires_grad_(), target[: rows // 2 * 2].view(2, -1)
    return Call((x, weight, target, bias), options)
