"""What every masking leaves of the same images and captions: python examples/masks.py docs/masking.png

Rows: --masking of pretrain, as a model of 16 x 16 patches has it, and score_mask by the contrast of each patch. Hatched
patches and the words that are squares are masked; gray patches are neither seen nor predicted.
"""

import dataclasses
import sys

import matplotlib
import numpy as np
import torch

from m3ae_fast import ImageTextBatch
from m3ae_fast.data import ShapesDataset
from m3ae_fast.models import M3AE, M3AEConfig, multi_block_mask, score_mask
from m3ae_fast.train.pictures import pixel_mask, striped

matplotlib.use("agg")
from matplotlib import pyplot as plt

SIZE, PATCH, SAMPLES = 128, 8, 4
pairs = [ShapesDataset(SIZE, seed=3)[i] for i in range(SAMPLES)]
images = torch.stack([torch.tensor(pair.image).permute(2, 0, 1) for pair in pairs])
captions = [pair.captions[0].split() for pair in pairs]
lengths = [len(words) for words in captions]
batch = ImageTextBatch(images, torch.zeros(sum(lengths), dtype=torch.int32), lengths)
sizes = {"image_size": SIZE, "patch_size": PATCH, "image_mask_ratio": 0.5, "dirichlet_alpha": (8, 0.5)}
config = M3AEConfig.tiny(**sizes)


def shown(image, mask):  # [3, H, W], [P] -> [H, W, 3]
    mask = pixel_mask(mask, config)[..., None]
    return np.where(mask == 2, np.uint8(150), np.where(mask == 1, striped(SIZE, SIZE), image.permute(1, 2, 0)))


def lines(words, mask):  # squares for masked words, five words a line
    text = ["■" * min(len(word), 3) if hidden else word for word, hidden in zip(words, mask.tolist(), strict=False)]
    return "\n".join(" ".join(text[i : i + 5]) for i in range(0, len(text), 5))


rows = []
for masking in M3AEConfig.MASKINGS:
    plan = M3AE(dataclasses.replace(config, masking=masking)).plan(batch, seed=0)
    image_mask = plan.image.as_bool(config.patches)
    if masking == "multi_block":
        image_mask = multi_block_mask(config.grid, seed=0, sample_ids=batch.sample_ids)  # the same, of three kinds
    rows.append((masking, image_mask, plan.text.as_bool(max(lengths))))
contrast = images.float().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).var((1, 4, 5)).flatten(1)
rows.append(("score_mask", score_mask(contrast, 0.1), torch.zeros(SAMPLES, max(lengths), dtype=torch.bool)))

figure, axes = plt.subplots(len(rows), SAMPLES, figsize=(SAMPLES * 1.75, len(rows) * 2.2), layout="constrained")
for (name, image_mask, text_mask), line in zip(rows, axes, strict=True):
    line[0].set_ylabel(name, fontsize=11)
    for axis, image, words, i, t in zip(line, images, captions, image_mask, text_mask, strict=True):
        axis.imshow(shown(image, i))
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{(i == 1).float().mean():.0%} of patches", fontsize=8)
        axis.set_xlabel(lines(words, t), fontsize=7)
figure.savefig(sys.argv[1], dpi=72, bbox_inches="tight")
