"""The paper's public JAX code, to the number: outputs, losses and every parameter's gradient.

tests/data/m3ae_official.npz was computed by that code on a CPU at the highest product precision: a small model with
random weights. Masks are given, one shuffle for the batch; the text draw covers padded slots too.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from m3ae_fast import ImageTextBatch
from m3ae_fast.convert import config_from_flax, flax_to_torch
from m3ae_fast.models import M3AE, M3AEConfig

DATA = Path(__file__).parents[1] / "data" / "m3ae_official.npz"


@pytest.fixture(scope="module")
def official():
    return dict(np.load(DATA))


def tree(official, prefix):
    return {k.removeprefix(prefix): v for k, v in official.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def model(official):
    parameters = tree(official, "param/")
    config = config_from_flax(
        parameters,
        image_size=int(official["image"].shape[1] ** 0.5) * int((official["image"].shape[2] / 3) ** 0.5),
        max_text_length=official["text"].shape[1],
        heads=int(official["config/num_heads"]),
        decoder_heads=int(official["config/dec_num_heads"]),
        image_mask_ratio=float(official["config/image_mask_ratio"]),
        text_mask_ratio=float(official["config/text_mask_ratio"]),
        image_loss_weight=float(official["image_loss_weight"]),
        text_loss_weight=float(official["text_loss_weight"]),
    )
    model = M3AE(M3AEConfig.from_dict(config))
    assert model.config.width == int(official["config/emb_dim"]) and model.config.depth == int(official["config/depth"])
    model.load_state_dict(flax_to_torch(parameters), strict=True)
    return model


@pytest.fixture(scope="module")
def batch(official, model):
    patches = torch.from_numpy(official["image"])
    rows, columns = model.config.grid
    p = model.config.patch_size
    images = patches.view(-1, rows, columns, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, rows * p, columns * p)
    real = torch.from_numpy(official["text_padding_mask"]) == 0
    return ImageTextBatch(images, torch.from_numpy(official["text"])[real], real.sum(1))


def masks(official):
    return {f"{m}_mask": torch.from_numpy(official[f"{m}_mask"]).bool() for m in ("image", "text")}


def test_losses(official, model, batch):
    out = model(batch, **masks(official))
    for name in ("loss", "image_loss", "text_loss", "text_accuracy"):
        assert abs(getattr(out, name).item() - float(official[name])) <= 1e-5, name


def test_outputs(official, model, batch):
    out = model.reconstruct(batch, **masks(official))
    real = torch.from_numpy(official["text_padding_mask"]) == 0
    torch.testing.assert_close(out.image, torch.from_numpy(official["image_output"]), rtol=0, atol=2e-5)
    torch.testing.assert_close(out.text_logits, torch.from_numpy(official["text_output"])[real], rtol=0, atol=2e-5)


def test_gradient_of_every_parameter(official, model, batch):
    model.zero_grad()
    model(batch, **masks(official)).loss.backward()
    theirs = flax_to_torch(tree(official, "grad/"))
    ours = dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        error = (ours[name].grad - gradient).abs().max() / gradient.abs().max()
        assert error <= 1e-4, f"{name}: {error:.2e}"


def test_given_masks_that_come_from_the_shuffle(official):
    """What the fixture calls a mask is what its shuffle says: a slot is kept when its rank is under the kept count."""
    for name in ("image", "text"):
        rank = official[f"{name}_ids_restore"]
        kept = int(len(rank) * (1 - float(official[f"config/{name}_mask_ratio"])))
        np.testing.assert_array_equal(official[f"{name}_mask"][0], (rank >= kept).astype(np.float32))
