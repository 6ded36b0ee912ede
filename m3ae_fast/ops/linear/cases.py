"""linear at the sizes of real blocks; tests run SMALL, benchmarks REAL."""

import torch

from m3ae_fast.testing import SHAPES, Call

# name: (leading sizes of x from the seed's row count, K, N, bias, activation)
SMALL = ("small", "gelu", "gelu_tanh", "gelu_input", "gelu_both", "no_bias", "batched", "one_row", "empty")
# The MLP, both ways, and qkv of an encoder block; a decoder's MLP and its prediction head.
REAL = ("encoder_qkv", "encoder_mlp_up", "encoder_mlp_down", "decoder_mlp_up", "decoder_mlp_down", "decoder_pixels")


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    real = name in REAL
    shape = SHAPES["m3ae_small" if real else "small"]
    encoder = shape.batch * (1 + shape.kept_patches) + sum(shape.kept_words(seed))
    decoder = shape.batch * (1 + shape.patches) + sum(shape.captions(seed))
    width, wide = shape.width, 4 * shape.width
    rows, inner, outer, *activations = {
        "encoder_qkv": (encoder, width, 3 * width),
        "encoder_mlp_up": (encoder, width, wide, "gelu"),
        "encoder_mlp_down": (encoder, wide, width, None, "gelu"),
        "decoder_mlp_up": (decoder, shape.decoder_width, 4 * shape.decoder_width, "gelu"),
        "decoder_mlp_down": (decoder, 4 * shape.decoder_width, shape.decoder_width, None, "gelu"),
        "decoder_pixels": (decoder, shape.decoder_width, shape.patch_dim),
        "gelu": (encoder, width, wide, "gelu"),
        "gelu_tanh": (encoder, width, wide, "gelu_tanh"),
        "gelu_input": (encoder, wide, width, None, "gelu"),
        "gelu_both": (encoder, wide, width, "gelu", "gelu_tanh"),
        "one_row": (1, width, wide, "gelu"),
        "empty": (0, width, wide, "gelu"),
    }.get(name, (encoder, width, wide + 1))

    def param(*size, scale=1.0):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    x = param(*((2, 3, 4) if name == "batched" else (rows,)), inner)
    bias = None if name == "no_bias" else param(outer)
    options = dict(zip(("activation", "input_activation"), activations, strict=False))
    return Call((x, param(outer, inner, scale=inner**-0.5), bias), options)
