"""From images and sentences to the batch that a model reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from m3ae_fast import _checks
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.images import aspect_of, center_box, center_crop, keep_aspect, stack, tensors


def pack(
    images: Sequence[np.ndarray] | None,
    texts: Sequence[str] | None,
    tokenizer: Tokenizer | None,
    *,
    image_size: int | tuple[int, int],
    max_text_length: int,
    channels: int = 3,
    max_patches: int | None = None,
    patch_size: int | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
) -> ImageTextBatch:
    """B samples: image i with text i, or images alone, or texts alone.

    Args:
        images: B of [H, W, C] uint8, of any size: the largest part in the middle that has the model's aspect is taken;
            or None.
        texts: B sentences, or None. Longer ones than `max_text_length` are cut, with a warning.
        tokenizer: of the model; None is enough for images alone.
        image_size: pixels a side, or (height, width), of the model's images.
        max_text_length: words (vocabulary entries) that the model reads.
        channels: C.
        max_patches, patch_size: as of `Loader`: images are whole then, of mixed sizes.
        sample_ids: as in ImageTextBatch.
    Returns:
        On the CPU: images uint8 [B, C, height, width] in channels-last memory, or patches of whole images; text int32.
    Raises:
        ValueError, TypeError: naming the entry that is no such image, or a text without a word; lengths differ.
    """
    image_size = _checks.sides("image_size", image_size)
    _checks.integer("max_text_length", max_text_length, 1)
    if images is None and texts is None:
        raise ValueError("images and texts must not both be None: a batch needs one of them")
    if images is not None and texts is not None and len(images) != len(texts):
        raise ValueError(f"texts must be as many as the {len(images)} images, got {len(texts)}")
    if not len(images if texts is None else texts):
        raise ValueError(f"{'images' if texts is None else 'texts'} must hold at least one, got none")
    ids = None if texts is None else _encode(texts, tokenizer, max_text_length)
    text = ()
    if ids is not None:
        text = torch.tensor([i for text in ids for i in text], dtype=torch.int32, device="cpu"), list(map(len, ids))
    if images is None:
        return ImageTextBatch(None, *text, sample_ids=sample_ids)
    _check_images(images, channels)
    if max_patches is None:
        whole = stack([center_crop(image, image_size) for image in images])
        return ImageTextBatch(whole, *text, sample_ids=sample_ids)
    resized = tensors([keep_aspect(image, patch_size, max_patches) for image in images])
    return ImageTextBatch.from_images(resized, *text, patch_size=patch_size, sample_ids=sample_ids)


def pack_for(
    model: nn.Module,
    images: Sequence[np.ndarray] | None,
    texts: Sequence[str] | None,
    tokenizer: Tokenizer | None,
    *,
    cropped: bool = False,
) -> ImageTextBatch:
    """`pack` at the sizes of a model's configuration; cropped: without its max_patches."""
    config = model.config
    max_patches = None if cropped else config.max_patches
    sizes = {"max_patches": max_patches, "patch_size": config.patch_size, **config.images}
    return pack(images, texts, tokenizer, max_text_length=config.max_text_length, **sizes)


def crop_box(
    box: tuple[int, int, int, int], height: int, width: int, size: int | tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """Where a box of an image lies in what `pack` makes of the image, in its pixels; None: all of it was cut off.

    Args:
        box: (x0, y0, x1, y1) in pixels of the image.
        height, width: of the image.
        size: pixels a side of what `pack` makes, or (height, width).
    """
    left, top, right, bottom = center_box(height, width, aspect_of(size))
    high, wide = _checks.sides("size", size)
    shares = (np.array(box) - [left, top] * 2) / ([right - left, bottom - top] * 2)
    x0, y0, x1, y1 = (np.clip(shares, 0, 1) * ([wide, high] * 2)).tolist()
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def chunks(examples: Sequence, size: int) -> Iterator[list]:
    """Lists of `size` examples, in order, the last may be shorter: their images are not all in memory at once."""
    for start in range(0, len(examples), size):
        yield [examples[i] for i in range(start, min(start + size, len(examples)))]


def _check_images(images: Sequence[np.ndarray], channels: int) -> None:
    for i, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            got = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            raise TypeError(f"images[{i}] must be an array of uint8, got {got}")
        if image.ndim != 3 or image.shape[2] != channels or 0 in image.shape:
            raise ValueError(f"images[{i}] must have shape (height, width, {channels}), got {image.shape}")


def _encode(texts: Sequence[str], tokenizer: Tokenizer | None, longest: int) -> list[list[int]]:
    if tokenizer is None:
        raise TypeError("tokenizer must be given with texts, got None")
    if isinstance(texts, str):  # a sequence of letters, else
        raise TypeError("texts must be a list of strings, got one string")
    encoded = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] must be a string, got {type(text).__name__}")
        encoded.append(tokenizer.encode(text))
        if not encoded[-1]:
            raise ValueError(f"texts[{i}] must hold a word, got {text!r}")
    cut = sum(len(ids) > longest for ids in encoded)
    if cut:
        message = f"{cut} of {len(texts)} texts are longer than {longest} words: the rest of them is cut off"
        warnings.warn(message, M3AEFastWarning, stacklevel=3)
    return [ids[:longest] for ids in encoded]
