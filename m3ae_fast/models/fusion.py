"""Where tokens stand in the fusion encoder's sequences [CLS; patches; words]. All of it is made on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from m3ae_fast.models.encoders import Views
from m3ae_fast.seqlens import SeqLens

CLS, PATCH, WORD = 1, 2, 3  # what is wanted of a token


@dataclasses.dataclass(frozen=True)
class Pairs:
    """n images beside n texts, each a row of index tensors on the host, and what the losses read of them."""

    image_rows: Tensor  # [n, P] int64, where each patch stands among the encoders' rows; -1: masked
    text_rows: Tensor  # [n] int64, where the text's CLS stands; its words follow
    text_lengths: Tensor  # [n] int64
    cls: bool = False  # whether CLS is wanted
    patches: Tensor | None = None  # [n, P] bool, which are
    words: Tensor | None = None  # [n, at least the longest text] bool, which are

    @staticmethod
    def make(images: Views, texts: Views, columns: int, *, image_view: int = 0, text_view: int = 0, **wanted) -> Pairs:
        """A view of each image beside a view of its text; the texts' rows follow the images'."""
        text_rows = images.sequences.total + texts.cls_rows(text_view)
        lengths = torch.tensor(texts.kept[text_view].keep.lengths, device="cpu")
        return Pairs(images.rows(image_view, columns), text_rows, lengths, **wanted)

    def of(self, of_image: Tensor, of_text: Tensor, **wanted) -> Pairs:
        """Image of_image[i] beside text of_text[i]."""
        return Pairs(self.image_rows[of_image], self.text_rows[of_text], self.text_lengths[of_text], **wanted)


@dataclasses.dataclass(frozen=True)
class FusionLayout:
    """Every sequence of a packed pass through the fusion encoder, on one device."""

    seqlens: SeqLens
    wanted_seqlens: SeqLens  # of `wanted`, by sequence
    index: Tensor  # all that follows, in one piece
    source: Tensor  # [K] the encoders' rows, in the order in which they are put; one may come often
    rows: Tensor  # [T] for restore_tokens: the row of `source` that stands there, -1 where masked
    slots: Tensor  # [T] for restore_tokens: patch number, or P + word number, or -1 (CLS)
    wanted: Tensor  # [R] rows that the losses read, ascending
    cls: Tensor  # numbers among `wanted` of: CLS
    patches: Tensor  # patches
    words: Tensor  # words

    @property
    def masked(self) -> Tensor:
        """Numbers among `wanted` of patches, then words."""
        return torch.cat([self.patches, self.words])

    @staticmethod
    def make(groups: Sequence[Pairs], device: torch.device) -> FusionLayout:
        """Groups one after the other."""
        patches = groups[0].image_rows.shape[1]
        longest = max(int(group.text_lengths.max()) if len(group.text_lengths) else 0 for group in groups)
        at = torch.arange(longest, device="cpu")
        rows, real, want = [], [], []
        for group in groups:
            count = len(group.text_rows)
            inside = at < group.text_lengths[:, None]
            start = group.text_rows[:, None]
            rows.append(torch.cat([start, group.image_rows, start + 1 + at], dim=1))
            real.append(torch.cat([torch.ones(count, 1 + patches, dtype=torch.bool, device="cpu"), inside], dim=1))
            code = torch.zeros(count, 1 + patches + longest, dtype=torch.int8, device="cpu")
            code[:, 0] = CLS if group.cls else 0
            if group.patches is not None:
                code[:, 1 : 1 + patches][group.patches] = PATCH
            if group.words is not None:
                wide = group.words[:, :longest]
                code[:, 1 + patches : 1 + patches + wide.shape[1]][wide & inside[:, : wide.shape[1]]] = WORD
            want.append(code)
        rows, real, want = torch.cat(rows), torch.cat(real), torch.cat(want)
        slots = torch.arange(-1, patches + longest, device="cpu").expand(len(rows), -1)
        lengths, wanted_lengths = real.sum(1), (want > 0).sum(1)
        rows, slots, want = rows[real], slots[real], want[real]
        there = rows >= 0
        source = rows[there]
        rows = torch.where(there, there.cumsum(0) - 1, -1)
        wanted = want.nonzero()[:, 0]
        code = want[wanted]
        index = (source, rows, slots, wanted, *((code == each).nonzero()[:, 0] for each in (CLS, PATCH, WORD)))
        on_device = torch.cat(index).to(torch.int32).to(device, non_blocking=True)  # one transfer
        sequences = SeqLens(lengths, device), SeqLens(wanted_lengths, device)
        return FusionLayout(*sequences, on_device, *on_device.split([len(x) for x in index]))
