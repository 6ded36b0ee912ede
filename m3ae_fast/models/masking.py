"""Which tokens of a batch are kept and where every token stands. All of it is made on the host, where lengths live.

Sequences are [CLS; image patches; words] throughout: the kept ones in the encoder, all of them in the decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
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
ALIGNED = 4  # int32 numbers, 16 bytes: Triton compiles a kernel again for an address that is not a multiple


@dataclasses.dataclass(frozen=True)
class MaskSource:
    """Where a step's masks come from: what a caller gave, else random numbers."""

    seed: int | None = None  # keys the random numbers, together with step and the samples' numbers
    step: int = 0
    image_mask: Tensor | None = None  # [B, P] bool, True = masked
    text_mask: Tensor | None = None  # [B, at least the longest text] bool, True = masked


@dataclasses.dataclass(frozen=True)
class Masked:
    """The tokens of one modality, split: positions within the sample, packed over the B samples, on the host."""

    ids_keep: Tensor  # int32
    ids_mask: Tensor  # int32
    keep: SeqLens
    mask: SeqLens

    @property
    def lengths(self) -> list[int]:
        return [k + m for k, m in zip(self.keep.lengths, self.mask.lengths, strict=True)]

    def as_bool(self, columns: int) -> Tensor:
        """[B, columns] bool, True = removed; slots past a sample's length are False."""
        out = torch.zeros(len(self.keep), columns, dtype=torch.bool, device="cpu")
        out[sample_of(self.mask), self.ids_mask.long()] = True
        return out


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


def from_bool(name: str, mask: Tensor, lengths: Sequence[int]) -> Masked:
    """From a mask [B, columns], True = removed; what it says of slots past a sample's length does not matter.

    A mask on a GPU is copied to the host: a sync.
    """
    _checks.shape(name, mask, (len(lengths), None))
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be of dtype bool (True = removed), got {mask.dtype}")
    longest = max(lengths, default=0)
    if mask.shape[1] < longest:
        raise ValueError(
            f"{name} must have at least {longest} columns, the longest sample's tokens, got {mask.shape[1]}"
        )
    mask = mask.cpu()
    real = torch.arange(mask.shape[1], device="cpu") < torch.tensor(lengths, dtype=torch.int64, device="cpu")[:, None]
    kept, masked = real & ~mask, real & mask
    ids_keep, ids_mask = (x.nonzero()[:, 1].to(torch.int32) for x in (kept, masked))
    return Masked(ids_keep, ids_mask, SeqLens(kept.sum(1)), SeqLens(masked.sum(1)))


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
        return from_bool("mask", mask.expand(len(lengths), -1), lengths)
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
) -> Masked:
    """The mask of a modality, "image" or "text", where the source has one, else a random one.

    Raises:
        ValueError: neither a mask nor a seed to draw it with.
    """
    name = f"{modality}_mask"
    mask = getattr(source, name)
    if mask is not None:
        patches = max(lengths, default=0) if modality == "image" else 0
        if patches:  # a wider one is of another grid; words may be followed by padding
            _checks.shape(name, mask, (len(lengths), patches))
        return from_bool(name, mask, lengths)
    if sum(lengths) == 0:
        return keep_all(lengths)
    if source.seed is None:
        raise ValueError(f"seed must be given to draw masks, or {name} must be, got neither")
    keys = {"seed": source.seed, "step": source.step, "stream": STREAMS[modality]}
    return draw(lengths, ratio, sample_ids=sample_ids, shared=shared, **keys)


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
    text_keep: int
    text_mask: int
    longest: tuple[int, int, int]  # sequence that kernels expect: of kept, of all, of masked tokens

    @staticmethod
    def of(image: Masked, text: Masked, images: int, longest: tuple[int, int, int], bucket: bool) -> Room:
        """For `images` images. A bucket rounds up what differs from batch to batch: the number of images to an eighth
        of a power of two, the encoder's and the decoder's rows to a 64th, the longest sequences to an eighth; patches,
        where images keep different numbers of them, to a 16th."""
        tokens = image.keep.total, image.mask.total, text.keep.total, text.mask.total
        if not bucket:
            return Room(images, *tokens, longest)
        samples = len(image.keep)
        ragged = image.keep.total < images * image.keep.max
        images = min(rounded(images, 8), samples)
        image_keep, image_mask, text_keep, text_mask = images * image.keep.max, images * image.mask.max, *tokens[2:]
        if ragged:
            image_keep, image_mask = (rounded(each, 16) for each in tokens[:2])
        if text_keep + text_mask:
            patches = samples + image_keep
            kept = rounded(patches + text_keep, 64)
            text_keep = kept - patches
            text_mask = rounded(kept + image_mask + text_mask, 64) - kept - image_mask
        return Room(images, image_keep, image_mask, text_keep, text_mask, tuple(rounded(n, 8) for n in longest))


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where every token of a batch stands in the encoder's and the decoder's packed sequences, on one device.

    In a bucket there is room for more tokens than the batch has. What is past them comes after the last sequence, where
    every op leaves rows out, and is named by -1, or by 0 among ids and words.
    """

    kept: SeqLens  # the encoder's sequences
    full: SeqLens  # the decoder's sequences
    masked: SeqLens  # masked tokens of each sequence
    image_keep: SeqLens  # kept patches of each sample
    text_keep: SeqLens  # kept words of each sample
    text_mask: SeqLens  # masked words of each sample
    images_keep: SeqLens  # kept patches of each image
    images_mask: SeqLens  # masked patches of each image
    index: Tensor  # the offsets of these and all that follows, in one piece
    rows: Tensor  # [full.total] for restore_tokens: the encoder row that stands there, -1 where masked
    slots: Tensor  # [full.total] for restore_tokens: patch number, or patches + word number, or -1 (CLS)
    cls_rows: Tensor  # [B] of the encoder's rows
    masked_rows: Tensor  # decoder rows of the masked tokens, ascending
    image_rows: Tensor  # of masked_rows: the masked patches
    text_rows: Tensor  # of masked_rows: the masked words
    all_image_rows: Tensor  # decoder rows of every patch
    all_text_rows: Tensor  # decoder rows of every word
    image_ids_keep: Tensor
    image_ids_mask: Tensor
    text_ids_keep: Tensor
    words_keep: Tensor  # places of the kept words in the batch's packed text
    words_mask: Tensor  # places of the masked words in the batch's packed text

    @staticmethod
    def make(
        image: Masked, text: Masked, patches: int, has_image: Sequence[bool], device: torch.device, bucket: bool = False
    ) -> TokenLayout:
        """bucket: with room for more, see `Room`."""
        image_lengths, text_lengths = SeqLens(image.lengths), SeqLens(text.lengths)
        batch = range(len(image.keep))
        kept = SeqLens([1 + image.keep.lengths[b] + text.keep.lengths[b] for b in batch])
        full = SeqLens([1 + image_lengths.lengths[b] + text_lengths.lengths[b] for b in batch])
        masked = SeqLens([image.mask.lengths[b] + text.mask.lengths[b] for b in batch])
        cls_rows = kept.cu[:-1]
        image_start = full.cu[:-1] + 1
        text_start = image_start + torch.tensor(image_lengths.lengths, dtype=torch.int32, device="cpu")

        rows = torch.full((full.total,), -1, dtype=torch.int32, device="cpu")
        slots = torch.full((full.total,), -1, dtype=torch.int32, device="cpu")
        rows[full.cu[:-1].long()] = cls_rows
        places = []  # of each modality's masked tokens among all masked tokens
        kept_start, masked_start = cls_rows + 1, masked.cu[:-1]
        for split, start, first_slot in ((image, image_start, 0), (text, text_start, patches)):
            keep_of, mask_of = sample_of(split.keep), sample_of(split.mask)
            at = (start[keep_of] + split.ids_keep).long()
            rows[at] = kept_start[keep_of] + within(split.keep, keep_of)
            slots[at] = first_slot + split.ids_keep
            slots[(start[mask_of] + split.ids_mask).long()] = first_slot + split.ids_mask
            places.append(masked_start[mask_of] + within(split.mask, mask_of))
            kept_start = kept_start + torch.tensor(split.keep.lengths, dtype=torch.int32, device="cpu")
            masked_start = masked_start + torch.tensor(split.mask.lengths, dtype=torch.int32, device="cpu")
        masked_rows = (rows < 0).nonzero()[:, 0].to(torch.int32)
        all_rows = [
            start[sample_of(lengths)] + keep_all(lengths.lengths).ids_keep
            for start, lengths in ((image_start, image_lengths), (text_start, text_lengths))
        ]
        words = text_lengths.cu[:-1]
        words_keep = words[sample_of(text.keep)] + text.ids_keep
        words_mask = words[sample_of(text.mask)] + text.ids_mask
        room = Room.of(image, text, sum(has_image), (kept.max, full.max, masked.max), bucket)
        of_images = (_of_images(counts, has_image, room.images) for counts in (image.keep, image.mask))
        sequences = kept, full, masked, image.keep, text.keep, text.mask, *of_images
        patches, words = room.image_keep + room.image_mask, room.text_keep + room.text_mask
        masks, tokens = room.image_mask + room.text_mask, len(kept) + patches + words
        longest = *room.longest, *(x.max for x in sequences[3:])
        contents = (  # each with its room, and what is written where it has none itself
            (rows, tokens, -1), (slots, tokens, -1), (cls_rows, len(kept), -1), (masked_rows, masks, -1),
            (places[0], room.image_mask, -1), (places[1], room.text_mask, -1),
            (all_rows[0], patches, -1), (all_rows[1], words, -1),
            (image.ids_keep, room.image_keep, 0), (image.ids_mask, room.image_mask, 0),
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

    def check(self, batch: ImageTextBatch, patches: int, source: MaskSource) -> None:
        """Raises ValueError unless it is of this batch, and nothing else says what is masked."""
        if source.seed is not None or source.image_mask is not None or source.text_mask is not None:
            raise ValueError("plan must be given instead of seed, image_mask and text_mask, not beside them")
        if torch.compiler.is_compiling():  # it would compile again for every order of images and texts
            return
        images = [patches if has else 0 for has in batch.has_image]
        if self.image.lengths != images or self.text.lengths != list(batch.text_lengths.lengths):
            raise ValueError("plan must be of this batch, got one of a batch with other images or text lengths")

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

    @staticmethod
    def make(
        image: Masked, text: Masked, patches: int, has_image: Sequence[bool], device: torch.device, bucket: bool = False
    ) -> Plan:
        return Plan(image, text, TokenLayout.make(image, text, patches, has_image, device, bucket))

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
        return Plan(self.image, self.text, self.layout.at(index.copy_(self.layout.index, non_blocking=True)))

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
