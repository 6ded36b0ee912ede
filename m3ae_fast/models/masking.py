"""Which tokens of a batch are kept and where every token stands. All of it is made on the host, where lengths live.

Sequences are [CLS; image patches; words] throughout: the kept ones in the encoder, beside them those to be predicted in
the decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.placed import ON_HOST, placed
from m3ae_fast.ops import sample_mask
from m3ae_fast.seqlens import SeqLens

if TYPE_CHECKING:
    from typing_extensions import Self

STREAMS = {"image": 0, "text": 1}  # of sample_mask's random numbers, by modality
PREDICTED_STREAMS = {"image": 2, "text": 3}  # likewise, of which masked tokens are predicted
KEPT, PREDICTED, SKIPPED = 0, 1, 2  # what a uint8 mask says of a token
MASKS = {torch.bool: "bool (True = removed)", torch.uint8: "uint8 (0 = kept, 1 = predicted, 2 = neither)"}
ALIGNED = 4  # int32 numbers, 16 bytes: Triton compiles a kernel again for an address that is not a multiple


@dataclasses.dataclass(frozen=True)
class MaskSource:
    """Where a step's masks come from: what a caller gave, else random numbers."""

    seed: int | None = None  # keys the random numbers, together with step and the samples' numbers
    step: int = 0
    image_mask: Tensor | None = None  # [B, P] bool, True = masked, or uint8 (see `from_mask`)
    text_mask: Tensor | None = None  # [B, at least the longest text], likewise


@dataclasses.dataclass(frozen=True)
class Masked:
    """The tokens of one modality, split: positions within the sample, packed over the B samples, on the host."""

    ids_keep: Tensor  # int32, what the encoder reads
    ids_mask: Tensor  # int32, what is removed and predicted
    keep: SeqLens
    mask: SeqLens
    ids_skip: Tensor | None = None  # int32, what is removed and not predicted: neither network has it
    skip: SeqLens | None = None  # None: there is nothing of that kind in any sample

    @property
    def lengths(self) -> list[int]:
        parts = [part.lengths for part in (self.keep, self.mask, self.skip) if part is not None]
        return [sum(counts) for counts in zip(*parts, strict=True)]

    @property
    def skipped(self) -> int:
        """How many tokens are removed and not predicted, in all samples."""
        return 0 if self.skip is None else self.skip.total

    def as_bool(self, columns: int) -> Tensor:
        """[B, columns] bool, True = removed; slots past a sample's length are False."""
        out = torch.zeros(len(self.keep), columns, dtype=torch.bool, device="cpu")
        out[sample_of(self.mask), self.ids_mask.long()] = True
        if self.skipped:
            out[sample_of(self.skip), self.ids_skip.long()] = True
        return out

    def predicting_all(self) -> Masked:
        """The same tokens kept, all others predicted."""
        if not self.skipped:
            return self
        return from_mask("mask", self.as_bool(max(self.lengths)), self.lengths)


def sample_of(seqlens: SeqLens) -> Tensor:
    """[total] int64: the sample each packed row belongs to."""
    return torch.repeat_interleave(
        torch.arange(len(seqlens), device="cpu"),
        torch.tensor(seqlens.lengths, dtype=torch.int64, device="cpu"),
        output_size=seqlens.total,
    )


def within(seqlens: SeqLens, sample: Tensor) -> Tensor:
    """[total] int32: each packed row's number within its sample; `sample`: sample_of(seqlens)."""
    return torch.arange(seqlens.total, dtype=torch.int32, device="cpu") - seqlens.cu[:-1][sample]


def keep_all(lengths: Sequence[int]) -> Masked:
    """Nothing masked."""
    keep = SeqLens(lengths)
    ids = within(keep, sample_of(keep))
    return Masked(ids, ids[:0], keep, SeqLens([0] * len(keep)))


def from_mask(
    name: str, mask: Tensor, lengths: Sequence[int], dtypes: Collection[torch.dtype] = (torch.bool,)
) -> Masked:
    """From a mask [B, columns]; what it says of slots past a sample's length does not matter.

    A mask on a GPU is copied to the host: a sync.

    Args:
        dtypes: which are allowed: bool, True = removed, and predicted; uint8, KEPT, PREDICTED or SKIPPED.
    """
    _checks.shape(name, mask, (len(lengths), None))
    if mask.dtype not in dtypes:
        allowed = " or ".join(MASKS[dtype] for dtype in dtypes)
        raise TypeError(f"{name} must be of dtype {allowed}, got {mask.dtype}")
    longest = max(lengths, default=0)
    if mask.shape[1] < longest:
        raise ValueError(
            f"{name} must have at least {longest} columns, the longest sample's tokens, got {mask.shape[1]}"
        )
    mask = mask.cpu()
    real = torch.arange(mask.shape[1], device="cpu") < torch.tensor(lengths, dtype=torch.int64, device="cpu")[:, None]
    parts = [real & (mask == state) for state in (KEPT, PREDICTED, SKIPPED)]
    keep, predicted, skip = (SeqLens(part.sum(1)) for part in parts)
    if keep.total + predicted.total + skip.total < sum(lengths):
        raise ValueError(f"{name} must be 0 (kept), 1 (predicted) or 2 (neither), got {int(mask[real].max())}")
    ids_keep, ids_mask, ids_skip = (part.nonzero()[:, 1].to(torch.int32) for part in parts)
    return Masked(ids_keep, ids_mask, keep, predicted, *((ids_skip, skip) if skip.total else ()))


def draw(
    lengths: Sequence[int], ratio: float, *, seed: int, step: int, sample_ids: Tensor, stream: int, shared: int | None
) -> Masked:
    """Random masks, int(length * (1 - ratio)) tokens kept.

    Args:
        shared: None: a mask for every sample, at least one token kept and one masked (a single token is masked).
            A number of slots: one mask for the batch, drawn over that many slots, whatever the lengths.
    """
    if shared is not None:
        count = int(shared * (1 - ratio))
        keep, _ = sample_mask([shared], [count], seed=seed, step=step, stream=stream, shared=True)
        mask = torch.ones(shared, dtype=torch.bool, device="cpu")
        mask[keep.long()] = False
        return from_mask("mask", mask.expand(len(lengths), -1), lengths)
    keep = [count_kept(n, ratio) for n in lengths]
    return draw_kept(lengths, keep, seed=seed, step=step, sample_ids=sample_ids, stream=stream)


def count_kept(length: int, ratio: float) -> int:
    """int(length * (1 - ratio)), but at least one token is masked and, of two or more, one kept."""
    return max(0, min(max(int(length * (1 - ratio)), 1), length - 1))


def draw_kept(lengths: Sequence[int], keep: Sequence[int], **keys) -> Masked:
    """Random masks that keep so many tokens of each sample; keys: of `sample_mask`."""
    ids_keep, ids_mask = sample_mask(lengths, keep, **keys)
    return Masked(ids_keep, ids_mask, SeqLens(keep), SeqLens([n - k for n, k in zip(lengths, keep, strict=True)]))


def given_or_drawn(
    modality: str,
    source: MaskSource,
    lengths: Sequence[int],
    ratio: float,
    *,
    sample_ids: Tensor,
    shared: int | None = None,
    dtypes: Collection[torch.dtype] = (torch.bool,),
) -> Masked:
    """The mask of a modality, "image" or "text", where the source has one, else a random one.

    Args:
        dtypes: of the source's mask, see `from_mask`.

    Raises:
        ValueError: neither a mask nor a seed to draw it with.
    """
    name = f"{modality}_mask"
    mask = getattr(source, name)
    if mask is not None:
        patches = max(lengths, default=0) if modality == "image" else 0
        if patches:  # a wider one is of another grid; words may be followed by padding
            _checks.shape(name, mask, (len(lengths), patches))
        return from_mask(name, mask, lengths, dtypes)
    if sum(lengths) == 0:
        return keep_all(lengths)
    if source.seed is None:
        raise ValueError(f"seed must be given to draw masks, or {name} must be, got neither")
    keys = {"seed": source.seed, "step": source.step, "stream": STREAMS[modality]}
    return draw(lengths, ratio, sample_ids=sample_ids, shared=shared, **keys)


def drawn_part(modality: str, masked: Masked, ratio: float, source: MaskSource, *, sample_ids: Tensor) -> Masked:
    """The same tokens kept, and of those to be predicted a random part: round(count * ratio) of each sample, at least
    one where there is one.

    Args:
        modality: "image" or "text". ratio: in (0, 1).

    Raises:
        ValueError: the source has no seed to draw it with.
    """
    if not masked.mask.total:
        return masked
    if source.seed is None:
        raise ValueError(f"seed must be given to draw which masked tokens are predicted (predict_ratio {ratio:g})")
    count = SeqLens([max(round(n * ratio), min(n, 1)) for n in masked.mask.lengths])
    keys = {"seed": source.seed, "step": source.step, "stream": PREDICTED_STREAMS[modality]}
    numbers, _ = sample_mask(masked.mask, count, sample_ids=sample_ids, **keys)  # among the sample's masked tokens
    of = sample_of(count)
    mask = masked.as_bool(max(masked.lengths)).to(torch.uint8) * SKIPPED
    mask[of, masked.ids_mask[(masked.mask.cu[:-1][of] + numbers).long()].long()] = PREDICTED
    return from_mask(f"{modality}_mask", mask, masked.lengths, MASKS)


def rounded(count: int, parts: int) -> int:
    """`count` rounded up to a multiple of 8, and of the power of two above it divided by `parts`: to few sizes, and not
    past that power, by which kernels choose their tiles and split their sums."""
    step = max((1 << max(count - 1, 0).bit_length()) // parts, 8)
    return -(-count // step) * step


class Room(NamedTuple):
    """The sizes of a layout's tensors: those of a batch, or those of a bucket that many batches fall into."""

    images: int
    image_keep: int  # rows for kept patches, of all samples together; likewise
    image_mask: int
    image_skip: int
    text_keep: int
    text_mask: int
    text_skip: int
    longest: tuple[int, int, int]  # sequence that kernels expect: of kept, of all, of masked tokens

    @staticmethod
    def of(image: Masked, text: Masked, images: int, longest: tuple[int, int, int], bucket: bool) -> Room:
        """For `images` images. A bucket rounds up what differs from batch to batch: the number of images to an eighth
        of a power of two, the encoder's rows, the decoder's and all tokens to a 64th, the longest sequences to an
        eighth; patches, where images keep different numbers of them, to a 16th."""
        image_keep, image_mask, image_skip = image.keep.total, image.mask.total, image.skipped
        text_keep, text_mask, text_skip = text.keep.total, text.mask.total, text.skipped
        if not bucket:
            return Room(images, image_keep, image_mask, image_skip, text_keep, text_mask, text_skip, longest)
        samples, ragged = len(image.keep), image_keep < images * image.keep.max
        images = min(rounded(images, 8), samples)
        if ragged:
            image_keep, image_mask = rounded(image_keep, 16), rounded(image_mask, 16)
            image_skip = rounded(image_skip, 16) if image_skip else 0
        else:
            image_keep, image_mask = images * image.keep.max, images * image.mask.max
            image_skip = images * image.skip.max if image_skip else 0
        if text_keep + text_mask:
            patches = samples + image_keep
            kept = rounded(patches + text_keep, 64)
            text_keep = kept - patches
            decoded = rounded(kept + image_mask + text_mask, 64)
            text_mask = decoded - kept - image_mask
            if text_skip:
                text_skip = rounded(decoded + image_skip + text_skip, 64) - decoded - image_skip
        longest = tuple(rounded(n, 8) for n in longest)
        return Room(images, image_keep, image_mask, image_skip, text_keep, text_mask, text_skip, longest)


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where every token of a batch stands in the encoder's and the decoder's packed sequences, on one device.

    In a bucket there is room for more tokens than the batch has. What is past them comes after the last sequence, where
    every op leaves rows out, and is named by -1, or by 0 among ids and words.
    """

    kept: SeqLens  # the encoder's sequences
    full: SeqLens  # the decoder's sequences: all but what is skipped
    masked: SeqLens  # predicted tokens of each sequence
    image_keep: SeqLens  # kept patches of each sample
    text_keep: SeqLens  # kept words of each sample
    text_mask: SeqLens  # predicted words of each sample
    images_keep: SeqLens  # kept patches of each image
    images_mask: SeqLens  # predicted patches of each image
    index: Tensor  # the offsets of these and all that follows, in one piece
    rows: Tensor  # [full.total] for restore_tokens: the encoder row that stands there, -1 where masked
    slots: Tensor  # [full.total] for restore_tokens: patch number, or patches + word number, or -1 (CLS)
    cls_rows: Tensor  # [B] of the encoder's rows
    masked_rows: Tensor  # decoder rows of the predicted tokens, ascending
    masked_slots: Tensor  # their slots
    image_rows: Tensor  # of masked_rows: the predicted patches
    text_rows: Tensor  # of masked_rows: the predicted words
    all_image_rows: Tensor  # decoder rows of every patch, -1 where it is skipped
    all_text_rows: Tensor  # decoder rows of every word, likewise
    image_ids_keep: Tensor
    image_ids_mask: Tensor
    text_ids_keep: Tensor
    words_keep: Tensor  # places of the kept words in the batch's packed text
    words_mask: Tensor  # places of the predicted words in the batch's packed text

    @staticmethod
    def make(
        image: Masked, text: Masked, patches: int | None, has_image: Sequence[bool], device: torch.device,
        bucket: bool = False,
    ) -> TokenLayout:  # fmt: skip
        """patches: of an image, each of which counts its own; None, for mixed sizes: counted through the batch.
        bucket: with room for more, see `Room`."""
        image_lengths, text_lengths = SeqLens(image.lengths), SeqLens(text.lengths)
        batch = range(len(image.keep))
        kept = SeqLens([1 + image.keep.lengths[b] + text.keep.lengths[b] for b in batch])
        every = SeqLens([1 + image_lengths.lengths[b] + text_lengths.lengths[b] for b in batch])
        masked = SeqLens([image.mask.lengths[b] + text.mask.lengths[b] for b in batch])
        full = SeqLens([k + m for k, m in zip(kept.lengths, masked.lengths, strict=True)])
        cls_rows = kept.cu[:-1]
        image_start = every.cu[:-1] + 1
        text_start = image_start + torch.tensor(image_lengths.lengths, dtype=torch.int32, device="cpu")

        first_patch = image_lengths.cu[:-1] if patches is None else torch.zeros_like(cls_rows)
        first_word = torch.full_like(cls_rows, image_lengths.total if patches is None else patches)

        rows = torch.full((every.total,), -1, dtype=torch.int32, device="cpu")
        slots = torch.full((every.total,), -1, dtype=torch.int32, device="cpu")
        rows[every.cu[:-1].long()] = cls_rows
        places = []  # of each modality's masked tokens among all masked tokens
        kept_start, masked_start = cls_rows + 1, masked.cu[:-1]
        for split, start, first in ((image, image_start, first_patch), (text, text_start, first_word)):
            keep_of, mask_of = sample_of(split.keep), sample_of(split.mask)
            at = (start[keep_of] + split.ids_keep).long()
            rows[at] = kept_start[keep_of] + within(split.keep, keep_of)
            slots[at] = first[keep_of] + split.ids_keep
            slots[(start[mask_of] + split.ids_mask).long()] = first[mask_of] + split.ids_mask
            if split.skipped:
                rows[(start[sample_of(split.skip)] + split.ids_skip).long()] = -2
            places.append(masked_start[mask_of] + within(split.mask, mask_of))
            kept_start = kept_start + torch.tensor(split.keep.lengths, dtype=torch.int32, device="cpu")
            masked_start = masked_start + torch.tensor(split.mask.lengths, dtype=torch.int32, device="cpu")
        all_rows = [
            start[sample_of(lengths)] + keep_all(lengths.lengths).ids_keep
            for start, lengths in ((image_start, image_lengths), (text_start, text_lengths))
        ]
        if full.total < every.total:
            there = rows > -2
            numbers = torch.where(there, there.cumsum(0) - 1, -1).to(torch.int32)
            rows, slots, all_rows = rows[there], slots[there], [numbers[each.long()] for each in all_rows]
        masked_rows = (rows < 0).nonzero()[:, 0]
        image_ids_keep = first_patch[sample_of(image.keep)] + image.ids_keep
        image_ids_mask = first_patch[sample_of(image.mask)] + image.ids_mask
        words = text_lengths.cu[:-1]
        words_keep = words[sample_of(text.keep)] + text.ids_keep
        words_mask = words[sample_of(text.mask)] + text.ids_mask
        room = Room.of(image, text, sum(has_image), (kept.max, full.max, masked.max), bucket)
        of_images = (_of_images(counts, has_image, room.images) for counts in (image.keep, image.mask))
        sequences = kept, full, masked, image.keep, text.keep, text.mask, *of_images
        masks = room.image_mask + room.text_mask
        tokens = len(kept) + room.image_keep + room.text_keep + masks
        patches = room.image_keep + room.image_mask + room.image_skip
        words = room.text_keep + room.text_mask + room.text_skip
        longest = *room.longest, *(x.max for x in sequences[3:])
        contents = (  # each with its room, and what is written where it has none itself
            (rows, tokens, -1), (slots, tokens, -1), (cls_rows, len(kept), -1), (masked_rows, masks, -1),
            (slots[masked_rows], masks, -1), (places[0], room.image_mask, -1), (places[1], room.text_mask, -1),
            (all_rows[0], patches, -1), (all_rows[1], words, -1),
            (image_ids_keep, room.image_keep, 0), (image_ids_mask, room.image_mask, 0),
            (text.ids_keep, room.text_keep, 0), (words_keep, room.text_keep, 0), (words_mask, room.text_mask, 0),
        )  # fmt: skip
        return TokenLayout._on_host(sequences, longest, contents).to(device)

    @staticmethod
    def _on_host(
        sequences: Sequence[SeqLens], longest: Sequence[int], contents: Sequence[tuple[Tensor, int, int]]
    ) -> TokenLayout:
        contents = [*((x.cu, len(x.cu), 0) for x in sequences), *contents]
        index, parts = _parts([room for _, room, _ in contents])
        for part, (values, room, rest) in zip(parts, contents, strict=True):
            if len(values) < room:
                part[len(values) :].fill_(rest)
                part = part[: len(values)]
            part.copy_(values)
        sequences = [x.at(cu, most) for x, cu, most in zip(sequences, parts, longest, strict=False)]
        return TokenLayout(*sequences, index, *parts[len(sequences) :])

    @property
    def _tensors(self) -> list[Tensor]:
        """All that is in `index`, in order."""
        return [x.cu if isinstance(x, SeqLens) else x for x in vars(self).values() if x is not self.index]

    @property
    def sizes(self) -> tuple[int, ...]:
        """What a captured pass has built in: the length of every tensor, and the longest sequences."""
        return *map(len, self._tensors), self.kept.max, self.full.max, self.masked.max

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same on a device; one transfer."""
        index = self.index.to(device, non_blocking=True)
        return self if index is self.index else self.at(index)

    def at(self, index: Tensor) -> TokenLayout:
        """The same in other memory, which holds what `index` holds or is about to."""
        parts = iter(_parts(map(len, self._tensors), index)[1])
        values = {
            name: index if x is self.index else x.at(next(parts)) if isinstance(x, SeqLens) else next(parts)
            for name, x in vars(self).items()
        }
        return TokenLayout(**values)


def _parts(sizes: Iterable[int], index: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """(index, its parts of these sizes); None: a new one on the host. Each begins where kernels like addresses best."""
    sizes = list(sizes)
    aligned = [-(-size // ALIGNED) * ALIGNED for size in sizes]
    if index is None:
        index = torch.zeros(sum(aligned), dtype=torch.int32, device="cpu")
    parts = index.split(aligned)
    return index, [x if len(x) == size else x[:size] for x, size in zip(parts, sizes, strict=True)]


def _of_images(counts: SeqLens, has_image: Sequence[bool], images: int) -> SeqLens:
    """Of the samples with an image, and none of those for which there is room besides."""
    found = [n for n, has in zip(counts.lengths, has_image, strict=True) if has]
    return SeqLens([*found, *[0] * (images - len(found))])


@dataclasses.dataclass(eq=False)
class BatchPlan:
    """All that a forward pass needs to know of a batch beyond its pixels and words; each model adds its layout.

    It is made on the host, where lengths live. A pass that is given one copies nothing to the device and waits for
    nothing, so that a CUDA graph can capture it; `copy_` then brings the next masks into the captured one.
    """

    image: Masked = dataclasses.field(metadata=ON_HOST)
    text: Masked = dataclasses.field(metadata=ON_HOST)

    def pin_memory(self) -> Self:
        """The same plan, with all that `to` moves in page-locked memory."""
        return placed(self, Tensor.pin_memory)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """The same plan with its tensors on `device`; what `forward` reads on the host stays there.

        Args:
            device: where to: that of the batch.
            non_blocking: the host does not wait where it need not: from page-locked memory to a GPU.
        """
        return placed(self, lambda x: x.to(device, non_blocking=non_blocking))

    def check(self, batch: ImageTextBatch, grid: tuple[int, int], source: MaskSource) -> None:
        """Raises ValueError unless it is of this batch, and nothing else says what is masked. grid: the model's."""
        if source.seed is not None or source.image_mask is not None or source.text_mask is not None:
            raise ValueError("plan must be given instead of seed, image_mask and text_mask, not beside them")
        if torch.compiler.is_compiling():  # it would compile again for every order of images and texts
            return
        if not self._is_of(batch, grid):
            raise ValueError("plan must be of this batch, got one of a batch with other images or text lengths")

    def _is_of(self, batch: ImageTextBatch, grid: tuple[int, int]) -> bool:
        lengths = self.image.lengths, self.text.lengths
        return lengths == (batch.patch_counts(grid), list(batch.text_lengths.lengths))

    def _copy_masks(self, other: BatchPlan) -> None:
        """Take over another plan's masks on the host. ValueError: other counts of kept or masked tokens."""
        pairs = (self.image, other.image), (self.text, other.text)
        if any(ours.keep.lengths != theirs.keep.lengths or ours.mask.lengths != theirs.mask.lengths
               for ours, theirs in pairs):  # fmt: skip
            raise ValueError("other must be a plan of the same numbers of kept and masked tokens in every sample")
        for ours, theirs in pairs:
            ours.ids_keep.copy_(theirs.ids_keep)
            ours.ids_mask.copy_(theirs.ids_mask)


@dataclasses.dataclass(eq=False)
class Plan(BatchPlan):
    """M3AE's."""

    layout: TokenLayout
    mixed: bool = dataclasses.field(metadata=ON_HOST)  # of images of mixed sizes

    @staticmethod
    def make(
        image: Masked, text: Masked, patches: int | None, has_image: Sequence[bool], device: torch.device,
        bucket: bool = False,
    ) -> Plan:  # fmt: skip
        layout = TokenLayout.make(image, text, patches, has_image, device, bucket)
        return Plan(image, text, layout, patches is None)

    def _is_of(self, batch: ImageTextBatch, grid: tuple[int, int]) -> bool:
        return self.mixed == (batch.grids is not None) and super()._is_of(batch, grid)

    @property
    def bucket(self) -> tuple[int, ...]:
        """The sizes of its tensors, the same for many batches of plans that were made with bucket=True."""
        return self.layout.sizes

    @property
    def images(self) -> int:
        """How many images there is room for."""
        return len(self.layout.images_keep)

    @property
    def words(self) -> int:
        """How many words there is room for."""
        return len(self.layout.all_text_rows)

    def clone_to(self, device: torch.device | str) -> Plan:
        """The same on a device, in memory of its own."""
        index = torch.empty_like(self.layout.index, device=device)
        layout = self.layout.at(index.copy_(self.layout.index, non_blocking=True))
        return dataclasses.replace(self, layout=layout)

    def copy_(self, other: Plan) -> None:
        """Take over another plan of the same bucket, whatever its batch, in place on the device.

        Raises:
            ValueError: another bucket: a captured graph has its sizes built in.
        """
        if self.bucket != other.bucket:
            raise ValueError(
                "other must be a plan of the same bucket (made with bucket=True, else of the same numbers of kept and "
                f"masked tokens), {self.bucket}, got {other.bucket}"
            )
        self.layout.index.copy_(other.layout.index, non_blocking=True)
        self.image, self.text, self.layout = other.image, other.text, other.layout.at(self.layout.index)
        self.mixed = other.mixed
