"""SeqLens and ImageTextBatch: what they hold and what they refuse."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from m3ae_fast import ImageTextBatch, M3AEFastWarning, SeqLens


def test_seqlens_carries_both_views():
    seqlens = SeqLens([3, 0, 5])
    assert seqlens.cu.tolist() == [0, 3, 3, 8] and seqlens.cu.dtype == torch.int32
    assert (seqlens.lengths, seqlens.max, seqlens.total, len(seqlens)) == ((3, 0, 5), 5, 8, 3)
    assert seqlens == SeqLens(torch.tensor([3, 0, 5])) == SeqLens(iter((3, 0, 5)))
    assert seqlens.to("cpu") == seqlens and hash(seqlens) == hash(SeqLens([3, 0, 5]))
    empty = SeqLens([])
    assert (empty.cu.tolist(), empty.max, empty.total) == ([0], 0, 0)


def test_lengths_may_be_numpys():
    assert SeqLens(np.array([3, 0, 5])) == SeqLens([3, 0, 5])


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (5, TypeError, "lengths must be integers, one a sequence, got int"),
        ([1, -1], ValueError, "lengths must be at least 0, got -1"),
        ([1.5], TypeError, "lengths must be an integer, got float"),
        (torch.tensor([1.0]), TypeError, "lengths must be of dtype"),
        (torch.ones(2, 2, dtype=torch.int32), ValueError, r"lengths must have shape \(any,\)"),
        (torch.ones(2, dtype=torch.int32).to_sparse(), ValueError, "lengths must be a dense tensor that holds numbers"),
        (torch.ones(2, dtype=torch.int32, device="meta"), ValueError, "lengths must be a dense tensor .* on meta"),
        ([2**30, 2**30], ValueError, r"less than 2\*\*31"),
    ],
)
def test_bad_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        SeqLens(lengths)


IMAGES, TEXT = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(5)
FACTS = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((), {}, ValueError, "images and text must not both be None"),
        ((IMAGES[0],), {}, ValueError, r"images must have shape \(any, any, any, any\), got \(3, 8, 8\)"),
        ((torch.zeros(2, 32, 32, 3),), {}, ValueError, "images must have 1 to 16 channels, got shape .2, 32, 32, 3"),
        ((IMAGES.int(),), {}, TypeError, "images must be of dtype uint8"),
        ((IMAGES, TEXT), {}, ValueError, "text and text_lengths must be given together"),
        ((IMAGES, TEXT, [2, 2]), {}, ValueError, "text_lengths must add up to the 5 words of text, got 4 of 2"),
        ((IMAGES, TEXT.float(), [2, 3]), {}, TypeError, "text must be of dtype int32, int64"),
        ((IMAGES, TEXT, [2, 2, 1]), {}, ValueError, "images must hold the 3 images of 3 samples, got 2"),
        ((IMAGES, TEXT, [5, 0, 0]), {"has_image": [1, 1, 0]}, ValueError, "got neither in sample 2"),
        ((IMAGES, TEXT, [5, 0]), {"has_image": [1]}, ValueError, "has_image must have 2 entries"),
        ((IMAGES, TEXT, [5, 0]), {"sample_ids": [1]}, ValueError, r"sample_ids must have shape \(2,\)"),
        ((None, TEXT, [5, 0]), {}, ValueError, "got neither in sample 1"),
        ((None, [1, 2], [2]), {}, TypeError, "text must be a tensor, got list"),
        ((IMAGES,), {"sample_ids": [0.5, 1.7]}, TypeError, "sample_ids must be of dtype int32, int64"),
        ((IMAGES,), {"facts": FACTS}, ValueError, "facts and says must be given together"),
        ((IMAGES,), {"facts": FACTS, "says": FACTS[:1]}, ValueError, r"says must have shape \(2, any\), got \(1, 3\)"),
        ((IMAGES,), {"facts": FACTS.int(), "says": FACTS}, TypeError, "facts must be of dtype int64, got int32"),
    ],
)
def test_bad_batches(args, options, error, message):
    with pytest.raises(error, match=message):
        ImageTextBatch(*args, **options)


def test_a_batch_moves_whole():
    batch = ImageTextBatch(IMAGES, TEXT, [2, 3], sample_ids=[8, 9]).to("cpu")
    assert len(batch) == 2 and batch.text.dtype == torch.int32 and batch.sample_ids.tolist() == [8, 9]
    assert repr(batch) == "ImageTextBatch(2 samples, 2 images, 5 words)"


def test_all_that_is_moved_is_pinned(pinned, monkeypatch):
    batch = ImageTextBatch(IMAGES, TEXT, [2, 3], labels=torch.ones(2, 4, dtype=torch.bool), sample_ids=[8, 9])
    copy, moved = batch.pin_memory(), []
    assert torch.equal(copy.images, IMAGES) and torch.equal(copy.text, TEXT) and torch.equal(copy.labels, batch.labels)
    assert copy.text_lengths == batch.text_lengths and copy.sample_ids is batch.sample_ids
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_, **options: moved.append((pinned(x), options)) or x)
    copy.to("cuda")
    copy.to("cuda", non_blocking=False)
    copy.text_lengths.to("cuda", non_blocking=False)
    assert moved == [(True, {"non_blocking": True})] * 4 + [(True, {"non_blocking": False})] * 5
    assert pinned(SeqLens([2, 3]).pin_memory().cu) and not pinned(batch.text)


def test_has_image_may_be_an_iterator():
    assert len(ImageTextBatch(IMAGES, has_image=iter([True, True]))) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pixels_that_nobody_normalized(dtype):
    """As torchvision's ToTensor makes them, once a place in the user's code; not what is normalized, or black."""
    pixels = torch.rand(6, 3, 32, 48).to(dtype)
    with pytest.warns(
        M3AEFastWarning, match="images are floats between 0 and 1, taken as they are: .* as uint8"
    ) as caught:
        ImageTextBatch(pixels)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            ImageTextBatch(pixels)
    assert len(caught) == 1
    for images in ((pixels - 0.5) / 0.25, pixels * 255, torch.zeros_like(pixels), pixels[:0], pixels.to("meta")):
        ImageTextBatch(images, has_image=[True] * len(images))


def test_pixels_are_not_looked_at_where_that_would_cost(monkeypatch):
    """Where something traces or transforms, values are not there; on a GPU they would be waited for."""
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda *_: pytest.fail("it was looked at"))
    ImageTextBatch(torch.rand(2, 3, 8, 8, device="meta"))
    ImageTextBatch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    torch.func.vmap(lambda image: ImageTextBatch(image[None]).images)(torch.rand(2, 3, 8, 8))
    torch.compile(lambda images: ImageTextBatch(images).images + 1, backend="eager")(torch.rand(2, 3, 8, 8))


def test_a_batch_with_room_takes_over_others_in_place():
    images, text = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2), torch.arange(9)
    roomy = ImageTextBatch(images[:2], text[:4], [1, 3], labels=torch.zeros(2, 5).bool()).with_room(2, 9)
    memory = roomy.images.data_ptr(), roomy.text.data_ptr()
    assert roomy.images.stride() == images.stride() and roomy.text.tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 0]
    roomy.copy_(ImageTextBatch(images[2:], text, [2, 7], has_image=[False, True], sample_ids=[4, 5]))
    assert torch.equal(roomy.images[0], images[2]) and torch.equal(roomy.images[1], images[1])
    assert roomy.text.tolist() == text.tolist() and roomy.text_lengths.lengths == (2, 7)
    assert roomy.has_image == (False, True) and roomy.sample_ids.tolist() == [4, 5]
    assert memory == (roomy.images.data_ptr(), roomy.text.data_ptr())


def test_a_batch_without_room_refuses():
    batch = ImageTextBatch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(4), [1, 3])
    with pytest.raises(ValueError, match="images must be at least the 2 that the batch has, got 1"):
        batch.with_room(1, 9)
    with pytest.raises(ValueError, match="words must be at least the 4 that the batch has, got 3"):
        batch.with_room(2, 3)
    longer = ImageTextBatch(batch.images, torch.arange(5), [1, 4])
    with pytest.raises(ValueError, match="of 2 samples, at most 2 images and 4 words, got 2, 2 and 5"):
        batch.copy_(longer)
    with pytest.raises(ValueError, match="at most 0 images"):
        ImageTextBatch(text=torch.arange(4), text_lengths=[1, 3]).copy_(batch)
    with pytest.raises(ValueError, match="of 2 samples"):
        batch.copy_(ImageTextBatch(batch.images[:1]))
    with pytest.raises(ValueError, match=r"other.images must have shape .*, got \(2, 1, 8, 8\)"):
        batch.copy_(ImageTextBatch(batch.images[:, :1], batch.text, [1, 3]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padding_on_either_side_is_dropped(dtype):
    ids = torch.tensor([[5, 6, 0, 0], [0, 0, 0, 7], [0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).to(dtype)
    batch = ImageTextBatch.from_padded(torch.zeros(3, 3, 8, 8), ids, mask, sample_ids=[4, 5, 6])
    assert batch.text.tolist() == [5, 6, 0, 7] and batch.text_lengths.lengths == (2, 2, 0)
    assert batch.sample_ids.tolist() == [4, 5, 6] and batch.has_image == (True,) * 3
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 4\), got \(3, 3\)"):
        ImageTextBatch.from_padded(None, ids, mask[:, :3])
    with pytest.raises(TypeError, match="attention_mask must be"):
        ImageTextBatch.from_padded(None, ids, mask.float())


MIXED = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((8, 24), (16, 8), (8, 8))]


def test_images_of_mixed_sizes_are_stored_as_patches():
    batch = ImageTextBatch.from_images(MIXED, TEXT, [2, 0, 3, 0], patch_size=8, has_image=[True, True, False, True])
    assert batch.grids == ((1, 3), (2, 1), (1, 1)) and batch.images.shape == (6, 3, 8, 8)
    assert batch.images.permute(0, 2, 3, 1).is_contiguous() and len(batch) == 4
    assert batch.patch_places.tolist() == [[0, 0], [0, 1], [0, 2], [0, 0], [1, 0], [0, 0]]
    for number, patch in enumerate((MIXED[0][:, :, :8], MIXED[0][:, :, 8:16], MIXED[0][:, :, 16:], MIXED[1][:, :8])):
        assert torch.equal(batch.images[number], patch)
    assert all(map(torch.equal, batch.whole_images(), MIXED))
    assert batch.sample_grids((4, 4)) == [(1, 3), (2, 1), (0, 0), (1, 1)] and batch.patch_counts((4, 4)) == [3, 2, 0, 1]
    assert ImageTextBatch(IMAGES, TEXT, [5, 0]).sample_grids((4, 4)) == [(4, 4), (4, 4)]
    assert all(map(torch.equal, ImageTextBatch(IMAGES).whole_images(), IMAGES))
    assert ImageTextBatch(text=TEXT, text_lengths=[5]).whole_images() == []


def test_patches_of_mixed_sizes_move_with_their_batch(pinned):
    batch = ImageTextBatch.from_images(MIXED, patch_size=8)
    for moved in (batch.to("cpu"), batch.pin_memory(), pytree.tree_map(lambda x: x, batch)):
        assert moved.grids == batch.grids and torch.equal(moved.patch_places, batch.patch_places)
        assert all(map(torch.equal, moved.whole_images(), MIXED))
    assert pinned(batch.pin_memory().patch_places)
    assert batch.to("meta").patch_places.is_meta


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ImageTextBatch.from_images([], patch_size=8), ValueError, "images must hold at least one, got none"),
        (
            lambda: ImageTextBatch.from_images([MIXED[0], MIXED[1][:, 1:]], patch_size=8), ValueError,
            r"images\[1\] must be multiples of patch_size 8 high and wide, got 15 x 8",
        ),
        (
            lambda: ImageTextBatch.from_images([MIXED[0][:, :, :0]], patch_size=8), ValueError,
            r"images\[0\] must be multiples of patch_size 8 high and wide, got 8 x 0",
        ),
        (
            lambda: ImageTextBatch.from_images([MIXED[0], MIXED[1].float()], patch_size=8), TypeError,
            r"images\[1\] must be of dtype uint8, got float32",
        ),
        (lambda: ImageTextBatch.from_images(MIXED[0], patch_size=8), ValueError, r"images\[0\] must have shape"),
        (lambda: ImageTextBatch.from_images(MIXED, patch_size=0), ValueError, "patch_size must be at least 1, got 0"),
        (lambda: ImageTextBatch(IMAGES, grids=[(1, 3)]), ValueError, "images must be the 3 square patches of grids"),
        (lambda: ImageTextBatch(IMAGES[:, :, 1:], grids=[(1, 2)]), ValueError, "images must be the 2 square patches"),
        (lambda: ImageTextBatch(IMAGES[:0], grids=[]), ValueError, "grids must hold those of at least one image"),
        (lambda: ImageTextBatch(IMAGES, grids=[(-1, -2)]), ValueError, "grids must be at least 1, got -1"),
        (
            lambda: ImageTextBatch(IMAGES, grids=[(1, 2)], has_image=[True, True]), ValueError,
            "images must hold the 2 images of 2 samples, got 1",
        ),
        (
            lambda: ImageTextBatch.from_images(MIXED, patch_size=8).with_room(9, 9), ValueError,
            "images must be of one size to make room for others, got mixed sizes",
        ),
        (
            lambda: ImageTextBatch(IMAGES).copy_(ImageTextBatch(IMAGES, grids=[(1, 1), (1, 1)])), ValueError,
            "other must be a batch of images of one size, as this one, got mixed sizes",
        ),
    ],
)  # fmt: skip
def test_bad_mixed_sizes(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_mixed_sizes_that_nobody_normalized():
    """Patches are looked at all over the batch: some are between 0 and 1 in normalized images, too."""
    images = [image / 255 for image in MIXED]
    with pytest.warns(M3AEFastWarning, match="images are floats between 0 and 1"):
        ImageTextBatch.from_images(images, patch_size=8)
    ImageTextBatch.from_images([*images, images[0] - 0.5], patch_size=8)
