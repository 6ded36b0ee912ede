"""restore_tokens at the sizes of real decoders; tests run SMALL, benchmarks REAL."""

import torch

from m3ae_fast.testing import SHAPES, Call

SMALL = ("small", "images_alone", "subset", "empty")
REAL = ("m3ae_small", "mae_base")


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    shape = SHAPES.get(name, SHAPES["small"])
    generator = torch.Generator().manual_seed(seed)

    def param(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def keep(slots, count):
        chosen = torch.zeros(slots, dtype=torch.bool)
        chosen[torch.randperm(slots, generator=generator)[:count]] = True
        return chosen

    texts = name not in ("images_alone", "mae_base")
    kept, slots = [], []  # per sample: CLS, every patch, every word
    for words, kept_words in zip(shape.captions(seed), shape.kept_words(seed), strict=True):
        kept += [torch.ones(1, dtype=torch.bool), keep(shape.patches, shape.kept_patches)]
        slots += [torch.tensor([-1]), torch.arange(shape.patches)]
        if texts:
            kept.append(keep(words, kept_words))
            slots.append(shape.patches + torch.arange(words))
    kept, slots = torch.cat(kept), torch.cat(slots).int()
    rows = torch.where(kept, kept.cumsum(0) - 1, -1).int()
    total = int(kept.sum())
    if name == "subset":  # the decoder reads some tokens only, in any order
        some = torch.randperm(len(rows), generator=generator)[: len(rows) // 2]
        rows, slots = rows[some], slots[some]
    if name == "empty":
        rows, slots, total = rows[:0], slots[:0], 0
    width = shape.decoder_width
    options = {"image_mask_token": param(width), "image_type": param(width)}
    options["image_position"] = param(shape.patches, width).detach()  # fixed in M3AE and MAE: no gradient
    if texts:
        options |= {"text_mask_token": param(width), "text_type": param(width)}
        options["text_position"] = param(shape.max_text_length, width)  # learned, as in BERT
    return Call((param(total, width), rows, slots), options)
