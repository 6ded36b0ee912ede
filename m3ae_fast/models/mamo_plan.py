"""What a step of MAMO reads of a batch: views of its images and texts, and pairs of them. All is made on the host.

Shapes: B pairs; P patches; M masked tokens of one kind.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.config import MAMOConfig
from m3ae_fast.models.encoders import Views, whole
from m3ae_fast.models.fusion import FusionLayout, Pairs
from m3ae_fast.models.masking import BatchPlan, Masked, MaskSource, given_or_drawn, keep_all, sample_of
from m3ae_fast.models.masks import stand_ins
from m3ae_fast.models.placed import ON_HOST
from m3ae_fast.seqlens import SeqLens


@dataclasses.dataclass(frozen=True)
class TargetPlan:
    """What the momentum network reads: whole images, whole texts and masked ones, as far as the losses need them."""

    images: Views
    texts: Views | None  # whole, of MRM and ITC, then masked, of MLM's soft targets
    words: Tensor | None  # of `texts`, as MAMOPlan.words
    cls: Tensor | None  # of ITC, as MAMOPlan.cls
    layout: FusionLayout | None  # of MRM: every image beside its text, the masked tokens wanted; then of MLM: likewise,
    # beside its masked text, the masked words wanted
    patches: Tensor | None  # of MIM: [M] rows of the masked patches

    @staticmethod
    def make(c: MAMOConfig, image: Masked, text: Masked, device: torch.device) -> TargetPlan | None:
        """None where no loss has targets."""
        contrast = bool(c.itc_weight and (c.queue_size or c.soft_targets))
        reads_whole_text, guesses = bool(c.mrm_weight or contrast), bool(c.mlm_weight and c.soft_words)
        if not (reads_whole_text or c.mim_weight or guesses):
            return None
        images, texts, words, layout, patches = whole(image.lengths, device), None, None, None, None
        gone, hidden = image.as_bool(c.patches), text.as_bool(max(text.lengths))
        if reads_whole_text or guesses:
            whole_text = keep_all(text.lengths)
            texts = _views(device, (reads_whole_text, whole_text), (guesses, whole_text))
            words = _words(texts, reads_whole_text)
        pairs = []
        if c.mrm_weight:
            pairs.append(Pairs.make(images, texts, c.patches, patches=gone, words=hidden))
        if guesses:
            pairs.append(Pairs.make(images, texts, c.patches, text_view=len(texts.kept) - 1, words=hidden))
        if pairs:
            layout = FusionLayout.make(pairs, device)
        if c.mim_weight:
            patches = images.rows(0, c.patches)[gone].to(device, non_blocking=True)
        return TargetPlan(images, texts, words, _cls(images, texts) if contrast else None, layout, patches)


@dataclasses.dataclass(eq=False)
class MAMOPlan(BatchPlan):
    """All that MAMO's forward pass needs to know of a batch beyond its pixels and words, but for ITM's negatives.

    Rows are those of the image encoder, then those of the text encoder.
    """

    images: Views  # for the image encoder: whole, then masked, as far as the losses need them
    texts: Views  # for the text encoder: likewise; a masked word stands there as [MASK]
    words: Tensor  # [texts.views.total] places among the batch's words, followed by them again, some of them [MASK]
    hidden: Tensor  # [text.mask.total] places of the masked words among the batch's words
    shown: Tensor | None  # [text.mask.total] what is shown there, as `stand_ins` has it; None: [MASK]
    cls: Tensor | None  # [2B] rows of the class tokens of every whole image and text, where ITC or ITM compares them
    layout: FusionLayout | None  # what the fusion encoder reads; None: nothing, or `passes` and ITM's pairs
    passes: tuple[Pairs, ...] = dataclasses.field(metadata=ON_HOST)  # with ITM: its pairs for MRM, MIM and MLM
    whole: Pairs | None = dataclasses.field(metadata=ON_HOST)  # with ITM: what its pairs are taken from
    target: TargetPlan | None
    soft: float  # share of the momentum network's similarities in ITC's targets
    soft_words: float  # and of its guesses in MLM's
    seed: int | None  # with `step`: keys the draw of ITM's negatives
    step: int

    @staticmethod
    def make(c: MAMOConfig, batch: ImageTextBatch, source: MaskSource) -> MAMOPlan:
        """Raises ValueError: there is no seed, and masks or ITM's negatives are to be drawn."""
        both, compared = c.masking == "simultaneous", bool(c.itc_weight or c.itm_weight)
        image_pass = bool(c.mim_weight or c.mrm_weight or (both and c.mlm_weight))  # masked image, whole text (or both)
        text_pass = not both and bool(c.mlm_weight or c.mrm_weight)  # whole image, masked text
        whole_image, whole_text = keep_all([c.patches] * len(batch)), keep_all(batch.text_lengths.lengths)
        image, text, ids = whole_image, whole_text, batch.sample_ids
        if image_pass or text_pass:
            image = given_or_drawn("image", source, image.lengths, c.image_mask_ratio, sample_ids=ids)
            text = given_or_drawn("text", source, text.lengths, c.text_mask_ratio, sample_ids=ids)
        if c.itm_weight and source.seed is None:
            raise ValueError("seed must be given to draw ITM's negatives, got None (or set itm_weight to 0)")

        shown = None
        if c.random_words or c.kept_words:
            if source.seed is None:
                raise ValueError("seed must be given to draw what stands in for masked words, got None")
            keys = {"seed": source.seed, "step": source.step, "sample_ids": ids}
            shown = stand_ins(text.mask.lengths, c.vocab_size, random=c.random_words, kept=c.kept_words, **keys)
            shown = shown.to(batch.device, non_blocking=True)
        grown = min(1.0, (source.step + 1) / max(c.soft_targets_steps, 1))

        device, reads_whole_text = batch.device, compared or (image_pass and not both)
        images = _views(device, (text_pass or compared, whole_image), (image_pass, image))
        texts = _views(device, (reads_whole_text, whole_text), (text_pass or (image_pass and both), whole_text))
        # a masked view is the last one
        of_image = {"image_view": len(images.kept) - 1, "patches": image.as_bool(c.patches)}
        of_text = {"text_view": len(texts.kept) - 1, "words": text.as_bool(batch.text_lengths.max)}
        passes = []
        if image_pass:
            passes.append(Pairs.make(images, texts, c.patches, **of_image, **(of_text if both else {})))
        if text_pass:
            passes.append(Pairs.make(images, texts, c.patches, **of_text))
        layout = whole = None
        if c.itm_weight:
            whole = Pairs.make(images, texts, c.patches)
        elif passes:
            layout, passes = FusionLayout.make(passes, device), []
        return MAMOPlan(
            image,
            text,
            images=images,
            texts=texts,
            words=_words(texts, reads_whole_text),
            hidden=places(text).to(device, non_blocking=True),
            shown=shown,
            cls=_cls(images, texts) if compared else None,
            layout=layout,
            passes=tuple(passes),
            whole=whole,
            target=TargetPlan.make(c, image, text, device),
            soft=c.soft_targets * grown,
            soft_words=c.soft_words * grown,
            seed=source.seed,
            step=source.step,
        )

    def with_pairs(self, of_image: Tensor, of_text: Tensor) -> FusionLayout:
        """The layout of `passes`, and of ITM's pairs: image of_image[i] beside text of_text[i], on the host."""
        return FusionLayout.make([*self.passes, self.whole.of(of_image, of_text, cls=True)], self.words.device)

    def copy_(self, other: MAMOPlan) -> None:
        """Take over another plan's masks, in place on the device and on the host.

        Raises:
            ValueError: other counts of kept or masked tokens in some sample, or another share of soft targets: a
                captured graph has them built in; a plan with ITM, whose step no graph can capture.
        """
        if self.whole is not None or other.whole is not None:
            raise ValueError("plans must be of models with itm_weight 0: a step with ITM waits for similarities")
        ours, theirs = (self.soft, self.soft_words), (other.soft, other.soft_words)
        if ours != theirs:
            raise ValueError(f"other must be a plan of the same share of soft targets, {ours}, got {theirs}")
        self._copy_masks(other)
        for ours, theirs in zip(self._drawn(), other._drawn(), strict=True):
            ours.copy_(theirs, non_blocking=True)

    def _drawn(self) -> list[Tensor]:
        """What the masks change on the device."""
        found, layouts = [self.images.ids, self.hidden, self.shown], [self.layout]
        if self.target is not None:
            found.append(self.target.patches)
            layouts.append(self.target.layout)
        found += [layout.index for layout in layouts if layout is not None]
        return [x for x in found if x is not None]


def places(text: Masked) -> Tensor:
    """[M] int64: the masked words' places among the batch's words."""
    return SeqLens(text.lengths).cu[sample_of(text.mask)].long() + text.ids_mask


def _words(texts: Views, whole_first: bool) -> Tensor:
    """[texts.views.total] places among the batch's words, followed by them again, masked. whole_first: whether the
    first view is of the words as they are."""
    return texts.places if whole_first else texts.places + texts.kept[0].keep.total


def _views(device: torch.device, *views: tuple[bool, Masked]) -> Views:
    """Those that are needed."""
    return Views.make([view for needed, view in views if needed], device)


def _cls(images: Views, texts: Views) -> Tensor:
    """[2B] int64: the rows of the class tokens of every whole image, then of every whole text."""
    rows = torch.cat([images.cls_rows(0), images.sequences.total + texts.cls_rows(0)])
    return rows.to(images.ids.device, non_blocking=True)
