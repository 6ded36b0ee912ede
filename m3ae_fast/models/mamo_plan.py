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
from m3ae_fast.models.placed import ON_HOST
from m3ae_fast.seqlens import SeqLens


@dataclasses.dataclass(frozen=True)
class TargetPlan:
    """What the momentum network reads: whole images and whole texts, as far as the losses need them."""

    images: Views
    texts: Views | None  # of MRM and ITC
    cls: Tensor | None  # of ITC, as MAMOPlan.cls
    layout: FusionLayout | None  # of MRM: every image beside its text, the masked tokens wanted
    patches: Tensor | None  # of MIM: [M] rows of the masked patches

    @staticmethod
    def make(c: MAMOConfig, image: Masked, text: Masked, device: torch.device) -> TargetPlan | None:
        """None where no loss has targets."""
        contrast = bool(c.itc_weight and (c.queue_size or c.soft_targets))
        if not (c.mrm_weight or c.mim_weight or contrast):
            return None
        images = whole(image.lengths, device)
        texts = whole(text.lengths, device) if c.mrm_weight or contrast else None
        gone, layout, patches = image.as_bool(c.patches), None, None
        if c.mrm_weight:
            words = text.as_bool(texts.views.max)
            pairs = Pairs.make(images, texts, c.patches, patches=gone, words=words)
            layout = FusionLayout.make([pairs], device)
        if c.mim_weight:
            patches = images.rows(0, c.patches)[gone].to(device, non_blocking=True)
        return TargetPlan(images, texts, _cls(images, texts) if contrast else None, layout, patches)


@dataclasses.dataclass(eq=False)
class MAMOPlan(BatchPlan):
    """All that MAMO's forward pass needs to know of a batch beyond its pixels and words, but for ITM's negatives.

    Rows are those of the image encoder, then those of the text encoder.
    """

    images: Views  # for the image encoder: whole, then masked, as far as the losses need them
    texts: Views  # for the text encoder: likewise; a masked word stands there as [MASK]
    words: Tensor  # [texts.views.total] places among the batch's words, followed by them again, some of them [MASK]
    hidden: Tensor  # [text.mask.total] places of the masked words among the batch's words
    cls: Tensor | None  # [2B] rows of the class tokens of every whole image and text, where ITC or ITM compares them
    layout: FusionLayout | None  # what the fusion encoder reads; None: nothing, or `passes` and ITM's pairs
    passes: tuple[Pairs, ...] = dataclasses.field(metadata=ON_HOST)  # with ITM: its pairs for MRM, MIM and MLM
    whole: Pairs | None = dataclasses.field(metadata=ON_HOST)  # with ITM: what its pairs are taken from
    target: TargetPlan | None
    soft: float  # share of the momentum network's similarities in ITC's targets
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
            words=texts.places if reads_whole_text else texts.places + batch.text_lengths.total,
            hidden=places(text).to(device, non_blocking=True),
            cls=_cls(images, texts) if compared else None,
            layout=layout,
            passes=tuple(passes),
            whole=whole,
            target=TargetPlan.make(c, image, text, device),
            soft=c.soft_targets * min(1.0, (source.step + 1) / max(c.soft_targets_steps, 1)),
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
        if self.soft != other.soft:
            raise ValueError(f"other must be a plan of the same share of soft targets, {self.soft}, got {other.soft}")
        self._copy_masks(other)
        for ours, theirs in zip(self._drawn(), other._drawn(), strict=True):
            ours.copy_(theirs, non_blocking=True)

    def _drawn(self) -> list[Tensor]:
        """What the masks change on the device."""
        found, layouts = [self.images.ids, self.hidden], [self.layout]
        if self.target is not None:
            found.append(self.target.patches)
            layouts.append(self.target.layout)
        found += [layout.index for layout in layouts if layout is not None]
        return [x for x in found if x is not None]


def places(text: Masked) -> Tensor:
    """[M] int64: the masked words' places among the batch's words."""
    return SeqLens(text.lengths).cu[sample_of(text.mask)].long() + text.ids_mask


def _views(device: torch.device, *views: tuple[bool, Masked]) -> Views:
    """Those that are needed."""
    return Views.make([view for needed, view in views if needed], device)


def _cls(images: Views, texts: Views) -> Tensor:
    """[2B] int64: the rows of the class tokens of every whole image, then of every whole text."""
    rows = torch.cat([images.cls_rows(0), images.sequences.total + texts.cls_rows(0)])
    return rows.to(images.ids.device, non_blocking=True)
