"""torch takes a batch, its lengths and its plan apart and together: tree_map, torch.export."""

import pytest
import torch
from torch.utils import _pytree as pytree

from m3ae_fast import ImageTextBatch, SeqLens
from m3ae_fast.models import M3AE, M3AEConfig


def pairs(number):
    """Three texts and three images of four samples, pixels and words drawn anew for each number."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    words = torch.randint(0, 50, (12,), generator=generator)
    return ImageTextBatch(images, words, [5, 0, 4, 3], has_image=[True, True, True, False])


def test_a_batch_is_taken_apart_and_together():
    batch = pairs(0)
    leaves, spec = pytree.tree_flatten(batch)
    for leaf, tensor in zip(leaves, (batch.images, batch.text_lengths.cu, batch.text), strict=False):
        assert leaf is tensor
    again = pytree.tree_unflatten(leaves, spec)
    assert repr(again) == repr(batch) and again.text_lengths == batch.text_lengths
    assert again.has_image == batch.has_image and again.sample_ids is batch.sample_ids
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    assert spec == pytree.tree_structure(pairs(1)) != pytree.tree_structure(ImageTextBatch(batch.images))
    assert pytree.tree_map(lambda x: x + 1, SeqLens([2, 3])).cu.tolist() == [1, 3, 6]


@pytest.fixture(scope="module", params=[{}, {"decoder": "cross", "predict_ratio": 0.5}], ids=["default", "cross"])
def exported(request):
    """A tiny M3AE, and the program that torch.export makes of it."""
    torch.manual_seed(0)
    model = M3AE(M3AEConfig.tiny(vocab_size=50, image_size=32, max_text_length=8, **request.param))
    return model, torch.export.export(model, (pairs(0),), {"plan": model.plan(pairs(0), seed=0)})


def test_an_exported_m3ae_has_the_losses_of_the_eager_one(exported):
    """Of other pixels, words and masks; other lengths are refused."""
    model, program = exported
    run = program.module()
    for step in (1, 2):
        batch = pairs(step)
        plan = model.plan(batch, seed=3, step=step)
        with torch.no_grad():
            found, expected = run(batch, plan=plan), model(batch, plan=plan)
        for name in model.METRICS:
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
    other = ImageTextBatch(batch.images, batch.text, [4, 1, 4, 3], has_image=batch.has_image)
    with pytest.raises((ValueError, RuntimeError)):
        run(other, plan=model.plan(other, seed=0))
