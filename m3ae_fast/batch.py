"""ImageTextBatch: images and packed texts of a batch, as the models take them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast import _backends, _checks, _pytree
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.seqlens import SeqLens

MAX_CHANNELS = 16  # of images: [N, H, W, C] by mistake is refused


class ImageTextBatch:
    """B samples, each with an image, a text, or both. Texts are packed: no padding is ever stored.

    It is a node of torch's pytrees, as is M3AE's plan: `torch.export` takes both, and text lengths and has_image are
    built into the program that it makes.

    Args:
        images: [N, C, H, W], C in 1 .. 16, uint8 (raw pixels) or float (already normalized: on the CPU, with a warning
            where they are all between 0 and 1), or None. Any strides: channels-last memory is the fastest for uint8. N
            is B, or the number of true entries in `has_image`, in sample order. With `grids`, their patches.
        text: [sum of text_lengths] int32 or int64 vocabulary ids, sample after sample, or None.
        text_lengths: B lengths (ints, tensor or SeqLens), 0 for a sample without a text; None: no texts.
        has_image: B bools, None: every sample has an image (or none, where images is None).
        sample_ids: [B] the samples' numbers in the whole data set, in [0, 2**56): what masks are keyed by, so that they
            do not depend on how samples are grouped into batches or ranks. None: 0 .. B-1.
        labels: [B, classes] bool, which classes a sample shows; None: not known.
        grids: of images of mixed sizes (`from_images`): N pairs, rows and columns of patches. `images` are then
            [sum of rows * columns, C, p, p], image after image, each row by row. None: images are whole, of one size.
        facts: [B, F] int64, numbers of the facts known to be true of each image, padded with 0; None: none is known.
        says: [B, S] int64, likewise the facts that each text states. A text is right for every image that has all of
            them: losses that compare pairs do not treat it as wrong. Given with `facts`.

    Attributes:
        patch_places: [sum of rows * columns, 2] int32, row and column of each patch in its image; None without grids.

    Raises:
        ValueError: sizes disagree, or a sample has neither an image nor a text. TypeError: dtypes.
    """

    __slots__ = (
        "facts", "grids", "has_image", "images", "labels", "patch_places", "sample_ids", "says", "text", "text_lengths",
    )  # fmt: skip

    def __init__(
        self,
        images: Tensor | None = None,
        text: Tensor | None = None,
        text_lengths: SeqLens | Iterable[int] | Tensor | None = None,
        *,
        has_image: Iterable[bool] | None = None,
        sample_ids: Sequence[int] | Tensor | None = None,
        labels: Tensor | None = None,
        grids: Iterable[tuple[int, int]] | None = None,
        facts: Tensor | None = None,
        says: Tensor | None = None,
    ):
        if images is None and text is None:
            raise ValueError("images and text must not both be None: a batch needs one of them")
        if images is not None:
            _checks.shape("images", images, (None, None, None, None))
            if not 1 <= images.shape[1] <= MAX_CHANNELS:
                raise ValueError(f"images must have 1 to {MAX_CHANNELS} channels, got shape {tuple(images.shape)}")
            _checks.dtype("images", images, (torch.uint8, *_checks.FLOATS))
            if images.dtype != torch.uint8 and images.device.type == "cpu" and _looks_raw(images, grids is not None):
                message = (
                    "images are floats between 0 and 1, taken as they are: where they are pixels, hand them over as "
                    "uint8, which the model normalizes, or subtract each channel's mean and divide by its deviation"
                )
                warnings.warn(message, M3AEFastWarning, stacklevel=2)
        if text is not None:
            _checks.tensor("text", text)
        if grids is not None:
            grids = _checked_grids(grids, images)
        has_image = None if has_image is None else tuple(map(bool, has_image))
        device = (images if images is not None else text).device
        if (text is None) != (text_lengths is None):
            raise ValueError("text and text_lengths must be given together")
        if text is None:
            batch = len(has_image) if has_image is not None else len(images if grids is None else grids)
            text = torch.zeros(0, dtype=torch.int32, device=device)
            text_lengths = SeqLens([0] * batch).at(torch.zeros(batch + 1, dtype=torch.int32, device=device))
        if not isinstance(text_lengths, SeqLens):
            text_lengths = SeqLens(text_lengths)
        batch = len(text_lengths)
        text = _checks.ids("text", text)
        if len(text) != text_lengths.total:
            raise ValueError(
                f"text_lengths must add up to the {len(text)} words of text, got {text_lengths.total} of {batch}"
            )
        _checks.device("text", text, "images", text if images is None else images)
        if has_image is None:
            has_image = (images is not None,) * batch
        if len(has_image) != batch:
            raise ValueError(f"has_image must have {batch} entries, as text_lengths has, got {len(has_image)}")
        stored = 0 if images is None else len(images if grids is None else grids)
        if stored != sum(has_image):
            raise ValueError(f"images must hold the {sum(has_image)} images of {batch} samples, got {stored}")
        for i, (image, length) in enumerate(zip(has_image, text_lengths.lengths, strict=True)):
            if not image and length == 0:
                raise ValueError(f"every sample must have an image or a text, got neither in sample {i}")
        if sample_ids is None:
            sample_ids = torch.arange(batch, device="cpu")
        sample_ids = torch.as_tensor(sample_ids, device="cpu")
        _checks.shape("sample_ids", sample_ids, (batch,))
        if batch:  # an empty list makes a float tensor
            _checks.dtype("sample_ids", sample_ids, _checks.INTEGERS)
        sample_ids = sample_ids.to(torch.int64)
        if labels is not None:
            _checks.shape("labels", labels, (batch, None))
            _checks.dtype("labels", labels, (torch.bool,))
            _checks.device("labels", labels, "text", text)
        if (facts is None) != (says is None):
            raise ValueError("facts and says must be given together")
        for name, numbers in (("facts", facts), ("says", says)):
            if numbers is not None:
                _checks.shape(name, numbers, (batch, None))
                _checks.dtype(name, numbers, (torch.int64,))
                _checks.device(name, numbers, "text", text)
        if text_lengths.device != device:
            text_lengths = text_lengths.to(device)
        self.images, self.text, self.text_lengths = images, text, text_lengths
        self.labels, self.facts, self.says = labels, facts, says
        self.has_image, self.sample_ids, self.grids = has_image, sample_ids, grids
        self.patch_places = None if grids is None else _places(grids).to(device, non_blocking=True)

    @classmethod
    def from_images(
        cls,
        images: Sequence[Tensor],
        text: Tensor | None = None,
        text_lengths: SeqLens | Iterable[int] | Tensor | None = None,
        *,
        patch_size: int,
        has_image: Iterable[bool] | None = None,
        sample_ids: Sequence[int] | Tensor | None = None,
        labels: Tensor | None = None,
        facts: Tensor | None = None,
        says: Tensor | None = None,
    ) -> ImageTextBatch:
        """A batch of images of mixed sizes, which `M3AE` and `MAE` take: each is cut into patches, none is padded.

        Args:
            images: N of [C, h, w] on one device, uint8 or float as of ImageTextBatch; h and w are multiples of
                patch_size, and may differ from image to image.
            patch_size: pixels a side, the model's.
            text, text_lengths, has_image, sample_ids, labels, facts, says: as of ImageTextBatch.

        Raises:
            ValueError: no image, one that is not of whole patches, or as ImageTextBatch. TypeError: as ImageTextBatch,
                or images of several dtypes.
        """
        _checks.integer("patch_size", patch_size, 1)
        if not len(images):
            raise ValueError("images must hold at least one, got none")
        grids, channels = [], None
        for i, image in enumerate(images):
            _checks.shape(f"images[{i}]", image, (channels, None, None))
            _checks.dtype(f"images[{i}]", image, (images[0].dtype,))
            _checks.device(f"images[{i}]", image, "images[0]", images[0])
            channels, height, width = image.shape
            if not height or not width or height % patch_size or width % patch_size:
                raise ValueError(
                    f"images[{i}] must be multiples of patch_size {patch_size} high and wide, got {height} x {width}"
                )
            grids.append((height // patch_size, width // patch_size))
        patches = torch.cat([_cut(image, patch_size) for image in images]).permute(0, 3, 1, 2)
        others = {"has_image": has_image, "sample_ids": sample_ids, "labels": labels, "facts": facts, "says": says}
        return cls(patches, text, text_lengths, grids=grids, **others)

    @classmethod
    def from_padded(
        cls,
        images: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        has_image: Iterable[bool] | None = None,
        sample_ids: Sequence[int] | Tensor | None = None,
        labels: Tensor | None = None,
        facts: Tensor | None = None,
        says: Tensor | None = None,
    ) -> ImageTextBatch:
        """A batch of padded texts, as tokenizers of Transformers return them; the padding, on either side, is dropped.

        Args:
            input_ids: [B, S] int32 or int64 vocabulary ids.
            attention_mask: [B, S] bool, int32 or int64, 0 where there is padding. On a GPU this synchronizes.
            images, has_image, sample_ids, labels, facts, says: as of ImageTextBatch.

        Raises:
            ValueError, TypeError: as ImageTextBatch.
        """
        _checks.shape("input_ids", input_ids, (None, None))
        _checks.shape("attention_mask", attention_mask, tuple(input_ids.shape))
        _checks.dtype("attention_mask", attention_mask, (torch.bool, *_checks.INTEGERS))
        _checks.device("attention_mask", attention_mask, "input_ids", input_ids)
        real = attention_mask != 0
        others = {"has_image": has_image, "sample_ids": sample_ids, "labels": labels}
        return cls(images, input_ids[real], real.sum(1), facts=facts, says=says, **others)

    def __len__(self) -> int:
        return len(self.text_lengths)

    def __repr__(self) -> str:
        return f"ImageTextBatch({len(self)} samples, {sum(self.has_image)} images, {self.text_lengths.total} words)"

    @property
    def device(self) -> torch.device:
        return self.text.device

    def sample_grids(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """[B] rows and columns of patches of each sample's image: `grid`, unless sizes are mixed; (0, 0) of none."""
        if self.grids is None:
            return [grid if has else (0, 0) for has in self.has_image]
        own = iter(self.grids)
        return [next(own) if has else (0, 0) for has in self.has_image]

    def patch_counts(self, grid: tuple[int, int]) -> list[int]:
        """[B] how many patches they are."""
        return [rows * columns for rows, columns in self.sample_grids(grid)]

    def whole_images(self) -> list[Tensor]:
        """N images, [C, h, w] each; those of mixed sizes are put together from their patches."""
        if self.grids is None:
            return [] if self.images is None else list(self.images)
        parts = self.images.split([rows * columns for rows, columns in self.grids])
        return [
            patches.unflatten(0, grid).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
            for patches, grid in zip(parts, self.grids, strict=True)
        ]

    def _map(self, function) -> ImageTextBatch:
        moved = object.__new__(ImageTextBatch)
        moved.images = None if self.images is None else function(self.images)
        moved.text = function(self.text)
        for name in ("labels", "facts", "says"):
            value = getattr(self, name)
            setattr(moved, name, None if value is None else function(value))
        moved.text_lengths = self.text_lengths.at(function(self.text_lengths.cu))
        moved.has_image, moved.sample_ids, moved.grids = self.has_image, self.sample_ids, self.grids
        moved.patch_places = None if self.patch_places is None else function(self.patch_places)
        return moved

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> ImageTextBatch:
        """The same batch with its tensors on `device`; what is on the host (lengths, sample ids) stays there.

        Args:
            device: where to.
            non_blocking: the host does not wait where it need not: from page-locked memory to a GPU.
        """
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageTextBatch:
        """The same batch with all that `to` moves in page-locked memory: a DataLoader with pin_memory=True calls it."""
        return self._map(lambda x: x.pin_memory())

    def with_room(self, images: int, words: int) -> ImageTextBatch:
        """A copy, without labels and facts, with room for larger batches: see `copy_`.

        Args:
            images, words: how many there is to be room for, at least those of the batch. The rest belongs to no sample.

        Raises:
            ValueError: there are more, or images are of mixed sizes.
        """
        if self.grids is not None:
            raise ValueError("images must be of one size to make room for others, got mixed sizes")
        for name, given, stored in (("images", images, self.images), ("words", words, self.text)):
            if stored is not None and given < len(stored):
                raise ValueError(f"{name} must be at least the {len(stored)} that the batch has, got {given}")
        roomy = self._map(Tensor.clone)
        roomy.labels = roomy.facts = roomy.says = None
        roomy.text_lengths = self.text_lengths.at(self.text_lengths.cu.clone())
        if self.images is not None:
            roomy.images = F.pad(self.images, (0,) * 7 + (images - len(self.images),))
        roomy.text = F.pad(self.text, (0, words - len(self.text)))
        return roomy

    def copy_(self, other: ImageTextBatch) -> None:
        """Copy another batch, for which there is room, into this one, in place on the device.

        Raises:
            ValueError: not as many samples, images where there were none or of another shape, more than there is room
                for, mixed sizes.
        """
        if self.grids is not None or other.grids is not None:
            raise ValueError("other must be a batch of images of one size, as this one, got mixed sizes")
        counts = [(len(x), 0 if x.images is None else len(x.images), len(x.text)) for x in (self, other)]
        if counts[0][0] != counts[1][0] or any(ours < theirs for ours, theirs in zip(*counts, strict=True)):
            raise ValueError(
                "other must be a batch of {} samples, at most {} images and {} words".format(*counts[0])
                + ", got {}, {} and {}".format(*counts[1])
            )
        if other.images is not None:  # of one channel they would be copied into all
            _checks.shape("other.images", other.images, (None, *self.images.shape[1:]))
        offsets = self.text_lengths.cu
        for ours, theirs in ((self.images, other.images), (self.text, other.text), (offsets, other.text_lengths.cu)):
            if theirs is not None:
                ours[: len(theirs)].copy_(theirs, non_blocking=True)
        self.text_lengths = other.text_lengths.at(offsets)
        self.has_image, self.sample_ids = other.has_image, other.sample_ids


# text_lengths before text: torch.export's guards replace names in this order, and one is the beginning of the other
_pytree.register(
    ImageTextBatch,
    ("images", "text_lengths", "text", "labels", "facts", "says", "sample_ids", "patch_places"),
    ("has_image", "grids"),
)


def _checked_grids(grids: Iterable[tuple[int, int]], images: Tensor | None) -> tuple[tuple[int, int], ...]:
    """Raises ValueError unless they are those of the patches."""
    grids = tuple((rows, columns) for rows, columns in grids)
    if not grids:
        raise ValueError("grids must hold those of at least one image, got none")
    for side in itertools.chain(*grids):
        _checks.integer("grids", side, 1)
    total = sum(rows * columns for rows, columns in grids)
    if images is None or images.shape[0] != total or images.shape[2] != images.shape[3]:
        got = None if images is None else tuple(images.shape)
        raise ValueError(f"images must be the {total} square patches of grids, got shape {got}")
    return grids


def _cut(image: Tensor, size: int) -> Tensor:
    """[C, h, w] -> [patches, size, size, C], row by row."""
    return image.unflatten(2, (-1, size)).unflatten(1, (-1, size)).permute(1, 3, 2, 4, 0).flatten(0, 1)


def _places(grids: Sequence[tuple[int, int]]) -> Tensor:
    """`patch_places`, on the CPU."""
    rows, columns = torch.tensor(grids, dtype=torch.int32, device="cpu").unbind(1)
    counts = rows * columns
    first = counts.cumsum(0) - counts
    number = torch.arange(int(counts.sum()), device="cpu") - first.repeat_interleave(counts)
    columns = columns.repeat_interleave(counts)
    return torch.stack([number // columns, number % columns], dim=1).int()


def _looks_raw(images: Tensor, patches: bool) -> bool:
    """Whether a few pixels of a few images, or of some of their patches, are all between 0 and 1, as transforms'
    ToTensor leaves them."""
    if torch.compiler.is_compiling() or not _backends.plain((images,)) or not images.numel():
        return False
    step = max(1, min(images.shape[2:]) // 8)
    some = slice(None, None, max(1, len(images) // 64)) if patches else slice(4)
    low, high = images.detach()[some, :, ::step, ::step].aminmax()
    return bool(low >= 0) and 0 < float(high) <= 1
