"""layer_norm at the sizes of real encoders and decoders; tests run SMALL, benchmarks REAL."""

import torch

from m3ae_fast.testing import SHAPES, Call

SMALL = (
    *("small", "residual", "no_params", "wide", "empty"),
    *(f"{width} columns" for width in (300, 640, 1000, 1200, 1540, 1544)),
)
REAL = ("m3ae_small", "m3ae_huge", "m3ae_decoder")


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    shape = SHAPES["m3ae_small" if name == "m3ae_decoder" else name if name in SHAPES else "small"]
    generator = torch.Generator().manual_seed(seed)

    def param(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    if name == "m3ae_decoder":
        rows, width = shape.batch * (1 + shape.patches) + sum(shape.captions(seed)), shape.decoder_width
    else:
        rows, width = shape.batch * (1 + shape.kept_patches) + sum(shape.kept_words(seed)), shape.width
    width = 301 if name == "wide" else width  # every tail of every unrolled loop
    width = int(name.split()[0]) if name.endswith("columns") else width  # a GPU has a kernel for each
    size = (0, width) if name == "empty" else (2, 5, width) if name == "wide" or "columns" in name else (rows, width)
    options = {"residual": param(*size)} if name in ("residual", "empty", *REAL) else {}
    params = (None, None) if name == "no_params" else (param(width), param(width))
    return Call((param(*size), *params), options)
