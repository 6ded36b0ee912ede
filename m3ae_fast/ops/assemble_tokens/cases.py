"""assemble_tokens at the sizes of real encoders; tests run SMALL, benchmarks REAL."""

import torch

from m3ae_fast.seqlens import SeqLens
from m3ae_fast.testing import SHAPES, Call

SMALL = ("small", "images_alone", "texts_alone", "float_texts", "no_positions", "past_the_end", "empty")
REAL = ("m3ae_small", "m3ae_huge", "mae_base")


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    shape = SHAPES.get(name, SHAPES["small"])
    generator = torch.Generator().manual_seed(seed)
    width = shape.width

    def param(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def ids(lengths, counts):  # `count` of `length` positions of each sample, ascending
        kept = [torch.randperm(n, generator=generator)[:k].sort().values for n, k in zip(lengths, counts, strict=True)]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *kept]).int()

    images = [shape.kept_patches] * shape.batch
    words, kept_words = shape.captions(seed), shape.kept_words(seed)
    if name == "small":  # one sample without a text
        kept_words = [*kept_words[:-1], 0]
    if name == "empty":
        images, words, kept_words = [], [], []
    fixed = name in REAL  # M3AE's and MAE's positions are sines: no gradient
    image_tokens = text_tokens = None
    options = {"cls_token": param(width)}
    if name != "texts_alone":
        image_ids = ids([shape.patches] * len(images), images)
        spare = 3 if name == "past_the_end" else 0  # rows that belong to no sample
        image_tokens = param(len(image_ids) + spare, width)
        options |= {"cu_image": SeqLens(images).cu, "image_type": param(width)}
        if name != "no_positions":
            options["image_ids"] = torch.cat([image_ids, torch.full((spare,), -7, dtype=torch.int32)])
            options["image_position"] = param(shape.patches, width).requires_grad_(not fixed)
    if name not in ("images_alone", "mae_base"):
        text_ids = ids(words, kept_words)
        options |= {"cu_text": SeqLens(kept_words).cu, "text_type": param(width)}
        if name != "no_positions":
            options["text_ids"] = text_ids
            options["text_position"] = param(shape.max_text_length, width).requires_grad_(not fixed)
        if name == "float_texts":
            text_tokens = param(len(text_ids), width)
        else:
            text_tokens = torch.randint(0, shape.vocab_size, (len(text_ids),), generator=generator)
            options["text_embedding"] = param(shape.vocab_size, width)
    if name == "no_positions":
        del options["cls_token"], options["image_type"], options["text_type"]
    return Call((image_tokens, text_tokens), options)
