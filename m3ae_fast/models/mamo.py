"""MAMO: joint masked modelling of images and texts, with a momentum network for the targets.

Shapes: B pairs; P patches; D width; E projection; V vocabulary; packed rows [T, D].
Source: arXiv:2210.04183; what it leaves open follows ALBEF (arXiv:2107.07651).

A step is six packed calls, whatever it computes: the image encoder over masked and whole images, the text encoder over
masked and whole texts, the fusion encoder over all pairs that any loss asks for, and the same three of the momentum
network over the whole pairs.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast import nn as fast
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.config import MAMOConfig
from m3ae_fast.models.contrastive import ContrastiveLoss, same_pairs
from m3ae_fast.models.encoders import DualEncoder, EncodedView, Views, check_batch, reset_parameters
from m3ae_fast.models.fusion import FusionLayout, Pairs
from m3ae_fast.models.masking import Masked, MaskSource, given_or_drawn, keep_all, sample_of
from m3ae_fast.models.model import Metric, Model
from m3ae_fast.nn.rows import repeat_rows, take_rows
from m3ae_fast.ops import feature_regression, linear_cross_entropy, restore_tokens
from m3ae_fast.seqlens import SeqLens

LOSSES = ("mrm", "mim", "mlm", "itc", "itm")


@dataclasses.dataclass
class MAMOOutput:
    """What a training step needs: fp32 scalars, 0 for a loss of weight 0. All but the losses carry no gradient."""

    loss: Tensor  # the weighted sum
    mrm_loss: Tensor  # masked representations against the momentum network's fusion; mean of the two passes' means
    mim_loss: Tensor  # masked patches against the momentum network's image encoder
    mlm_loss: Tensor  # masked words
    itc_loss: Tensor  # images and texts find one another, within the batch and the queue
    itm_loss: Tensor  # right pairs told from wrong ones
    mlm_accuracy: Tensor  # share of masked words guessed
    itm_accuracy: Tensor  # share of pairs told right
    target_std: Tensor  # of MRM's targets over the masked tokens, mean over features: near 0 means collapse
    prediction_std: Tensor  # of MRM's predictions likewise
    image_mask: Tensor  # [B, P] bool on the host, True = masked
    text_mask: Tensor  # [B, longest text] bool on the host, True = masked


class Encoders(DualEncoder):
    """What the momentum network is a copy of: the three encoders, and the projections of ITC."""

    def __init__(self, config: MAMOConfig):
        super().__init__(config)
        c = config
        options = {"mlp_ratio": c.mlp_ratio, "activation": c.activation}
        self.fusion = fast.Transformer(c.width, c.fusion_depth, c.heads, **options)
        self.image_mask_token = nn.Parameter(torch.empty(c.width))
        self.image_type, self.text_type = nn.Parameter(torch.empty(c.width)), nn.Parameter(torch.empty(c.width))

    def assemble(self, rows: Tensor, layout: FusionLayout) -> Tensor:
        """Rows of both encoders [*, D] -> [CLS; patches; words] of each pair, mask tokens where patches are gone."""
        return restore_tokens(
            repeat_rows(rows, layout.source), layout.rows, layout.slots,
            image_mask_token=self.image_mask_token, image_position=self.image.position,
            text_position=self.text.position, image_type=self.image_type, text_type=self.text_type,
        )  # fmt: skip

    def pair(
        self, images: EncodedView, texts: EncodedView, of_image: Tensor, of_text: Tensor, **wanted
    ) -> tuple[Tensor, FusionLayout]:
        """(rows, layout) for `fuse`: image of_image[i] beside text of_text[i], on the host. wanted: as Pairs has it."""
        lengths = torch.tensor(texts.views.views.lengths)[of_text]
        text_rows = (len(images.tokens) + texts.views.cls_rows(0))[of_text]
        pairs = Pairs(images.views.rows(0, self.patches)[of_image], text_rows, lengths, **wanted)
        rows = torch.cat([images.tokens, texts.tokens])
        return rows, FusionLayout.make([pairs], self.patches, rows.device)

    def fuse(self, rows: Tensor, layout: FusionLayout) -> Tensor:
        """Rows of both encoders [*, D] -> [len(layout.wanted), D]."""
        return self.fusion(self.assemble(rows, layout), layout.seqlens, layout.wanted, layout.wanted_seqlens)


class MAMO(Model):
    """Args: config: see `MAMOConfig`. `update_target()` moves the momentum network: call it before every step."""

    METRICS: ClassVar = {
        "loss": Metric("loss"),
        "mrm_loss": Metric("MRM", "masked representations, squared error", "pair"),
        "mim_loss": Metric("MIM", "masked patches, absolute error"),
        "mlm_loss": Metric("MLM", "cross-entropy of masked words", "text"),
        "itc_loss": Metric("ITC", "images against texts", "pair"),
        "itm_loss": Metric("ITM", "does the pair belong together?", "pair"),
        "mlm_accuracy": Metric("MLM accuracy", "share of masked words guessed", "share"),
        "itm_accuracy": Metric("ITM accuracy", "share of pairs told right", "share"),
        "target_std": Metric("spread of MRM's targets", "to 0: collapse", "watch"),
        "prediction_std": Metric("spread of MRM's predictions", "to 0: collapse", "watch"),
    }
    CAPTIONS, COMPARES = "required", True
    ALL_GRADIENTS = False  # what is of a loss of weight 0 has none
    PICTURE = "words"

    def __init__(self, config: MAMOConfig):
        super().__init__()
        self.config = c = config
        self.online = Encoders(c)
        self.predictor = _mlp(c)  # of MRM, on this side only
        self.regressor = _mlp(c)  # of MIM
        self.word_head = fast.Linear(c.width, c.vocab_size)
        self.match_head = fast.Linear(c.width, 2)
        reset_parameters(self)
        self.contrast = ContrastiveLoss(c.projection, temperature=c.temperature, queue_size=c.queue_size)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    @torch.no_grad()
    def update_target(self) -> None:
        """target = momentum * target + (1 - momentum) * online, all tensors in one call."""
        target, online = list(self.target.parameters()), list(self.online.parameters())
        torch._foreach_lerp_(target, online, 1 - self.config.momentum)

    @classmethod
    def check_processes(cls, config: MAMOConfig, processes: int) -> None:
        """Refuse a queue: it is no part of what processes share."""
        if config.queue_size:
            raise ValueError(
                f"queue_size must be 0 in {processes} processes, each of which would have a queue of its own"
            )

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        batch: ImageTextBatch,
        *,
        seed: int | None = None,
        step: int = 0,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> MAMOOutput:
        """Losses of one step.

        Args:
            batch: pairs of an image and a text of at least one word; two or more where ITC or ITM counts.
            seed, step: key the random masks (with batch.sample_ids) and the draw of ITM's negatives.
            image_mask, text_mask: instead of drawing: [B, P] and [B, L] bool, True = masked.
            image_ids: [B] integers, equal where two samples show the same image; None: its bytes tell. A sample is
                never the negative of another with the same image or the same text, and ITC takes both for right.

        On a GPU ITM waits for the [B, B] similarities: which pairs it reads, and so the sizes of all that follows,
        depends on them.

        Raises:
            ValueError: a sample without an image or a word, too few samples, neither a seed nor masks, sizes other than
                the configuration's.
        """
        c, online, P = self.config, self.online, self.config.patches
        self._check(batch)
        # The passes through the fusion encoder, and the views of images and texts that they read.
        both, pairs = c.masking == "simultaneous", bool(c.itc_weight or c.itm_weight)
        image_pass = bool(c.mim_weight or c.mrm_weight or (both and c.mlm_weight))  # masked image, whole text (or both)
        text_pass = not both and bool(c.mlm_weight or c.mrm_weight)  # whole image, masked text
        if image_pass or text_pass:
            image, text = self._masks(batch, MaskSource(seed, step, image_mask, text_mask))
        else:
            image, text = (keep_all(lengths) for lengths in ([P] * len(batch), batch.text_lengths.lengths))
        gone = image.as_bool(P), text.as_bool(batch.text_lengths.max)
        losses = dict.fromkeys(self.METRICS, torch.zeros((), device=batch.device))

        images = _views({"whole": text_pass or pairs, "masked": image_pass}, keep_all(image.lengths), image)
        texts = _views(
            {"whole": pairs or (image_pass and not both), "masked": text_pass or (image_pass and both)},
            *[keep_all(text.lengths)] * 2,  # a masked word stands there as [MASK]
        )

        places = _places(text).to(batch.device)
        answers = batch.text.index_select(0, places)
        words = {"whole": batch.text, "masked": self._hide(batch.text, places)}
        image_views, text_views = (Views.make(list(v.values()), batch.device) for v in (images, texts))
        words = torch.cat([words[name] for name in texts]).index_select(0, text_views.places)
        image_tokens, text_tokens = online.image(batch.images, image_views), online.text(words, text_views)
        rows = torch.cat([image_tokens, text_tokens])
        target_images, target_texts = self._encode_target(batch)

        lengths = torch.tensor(batch.text_lengths.lengths)
        image_cls = {name: image_views.cls_rows(number) for number, name in enumerate(images)}
        image_rows = {name: image_views.rows(number, P) for number, name in enumerate(images)}
        text_rows = {name: len(image_tokens) + text_views.cls_rows(number) for number, name in enumerate(texts)}
        groups = []
        if image_pass:
            hidden_words = gone[1] if both else None
            beside = text_rows["masked" if both else "whole"]
            groups.append(Pairs(image_rows["masked"], beside, lengths, patches=gone[0], words=hidden_words))
        if text_pass:
            groups.append(Pairs(image_rows["whole"], text_rows["masked"], lengths, words=gone[1]))
        if pairs:
            cls = torch.cat([image_cls["whole"], text_rows["whole"]]).to(batch.device)
            embeddings = online.project(*take_rows(rows, cls).chunk(2))
            same = same_pairs(batch, image_ids)
            if c.itc_weight:
                soft = c.soft_targets * min(1.0, (step + 1) / max(c.soft_targets_steps, 1))
                momentum = None
                if c.queue_size or c.soft_targets:
                    momentum = target_images.embedding, target_texts.embedding
                losses["itc_loss"] = self.contrast(*embeddings, same, momentum=momentum, soft=soft)
            if c.itm_weight:
                of_image, of_text = self._pairs_to_tell(embeddings, same, seed, step)
                of_images, of_texts = image_rows["whole"][of_image], text_rows["whole"][of_text]
                groups.append(Pairs(of_images, of_texts, lengths[of_text], cls=True))

        if groups:
            layout = FusionLayout.make(groups, P, batch.device)
            fused = online.fuse(rows, layout)
            losses |= self._masked_losses(
                take_rows(fused, layout.masked), layout, target_images, target_texts, gone, answers
            )
            if c.itm_weight:
                losses |= self._itm(take_rows(fused, layout.cls), len(batch))
        losses["loss"] = sum(getattr(c, f"{name}_weight") * losses[f"{name}_loss"] for name in LOSSES)
        return MAMOOutput(**losses, image_mask=gone[0], text_mask=gone[1])

    def _masked_losses(
        self,
        masked: Tensor,
        layout: FusionLayout,
        target_images: EncodedView | None,
        target_texts: EncodedView | None,
        gone: tuple[Tensor, Tensor],
        answers: Tensor,
    ) -> dict[str, Tensor]:
        """MRM, MIM and MLM of the masked tokens [M, D], patches, then words; answers: the words that were masked."""
        c, found = self.config, {}
        counts = [len(layout.patches), len(layout.words)]
        patches, words = masked.split(counts)
        if c.mrm_weight:
            with torch.no_grad():
                every = torch.arange(len(gone[0]))
                wanted = {"patches": gone[0], "words": gone[1]}
                rows, at = self.target.pair(target_images, target_texts, every, every, **wanted)
                theirs = self.target.fuse(rows, at)
            predicted = self.predictor(masked)
            losses = [
                feature_regression(part, theirs, rows, distance="l2")
                for part, rows in zip(predicted.split(counts), (at.patches, at.words), strict=True)
            ]
            found["mrm_loss"] = sum(losses) / len(losses)
            found["target_std"], found["prediction_std"] = (_spread(x.detach()) for x in (theirs, predicted))
        if c.mim_weight:
            rows = target_images.views.rows(0, c.patches)[gone[0]].to(masked.device)
            found["mim_loss"] = feature_regression(
                self.regressor(patches), target_images.tokens, rows, distance="l1", normalize=False
            )
        if c.mlm_weight:
            head = self.word_head
            found["mlm_loss"], found["mlm_accuracy"] = linear_cross_entropy(
                words, head.weight, answers, head.bias, return_accuracy=True
            )
        return found

    def _itm(self, cls: Tensor, positives: int) -> dict[str, Tensor]:
        """Whether image and text belong together; the first `positives` pairs do."""
        logits = self.match_head(cls).float()
        label = (torch.arange(len(logits), device=logits.device) < positives).long()
        accuracy = (logits.detach().argmax(1) == label).float().mean()
        return {"itm_loss": F.cross_entropy(logits, label), "itm_accuracy": accuracy}

    @torch.no_grad()
    def _pairs_to_tell(
        self, embeddings: tuple[Tensor, Tensor], same: Tensor, seed: int | None, step: int
    ) -> tuple[Tensor, Tensor]:
        """(image, text) of ITM's pairs, on the host: all right ones, then a wrong image for each text and a wrong text
        for each image, drawn as similar as ITC finds them. A sample that is the same as all others gets none."""
        if seed is None:
            raise ValueError("seed must be given to draw ITM's negatives, got None (or set itm_weight to 0)")
        similarity = embeddings[0] @ embeddings[1].T / self.contrast.temperature
        similarity = similarity.nan_to_num(-torch.inf)  # never drawn: what is no number shows in the loss
        similarity, same = torch.stack([similarity, same.float()]).cpu()  # the one wait
        every = torch.arange(len(same))
        generator = torch.Generator().manual_seed(((seed << 32) + step) % 2**64)  # any seed that masks take
        images, texts = [every], [every]
        for scores, wrong, given in ((similarity.T, images, texts), (similarity, texts, images)):
            chances = scores.masked_fill((same if wrong is texts else same.T) > 0, -torch.inf)
            possible = chances.isfinite().any(1)
            if possible.any():
                drawn = torch.multinomial(chances[possible].softmax(1), 1, generator=generator)[:, 0]
                wrong.append(drawn)
                given.append(every[possible])
        return torch.cat(images), torch.cat(texts)

    @torch.no_grad()
    def _encode_target(self, batch: ImageTextBatch) -> tuple[EncodedView | None, EncodedView | None]:
        """The momentum network's view of whole images and whole texts, as far as the losses ask."""
        c, target = self.config, self.target
        reads_texts = bool(c.mrm_weight or (c.itc_weight and (c.queue_size or c.soft_targets)))
        images = target.encode_images(batch.images) if c.mim_weight or reads_texts else None
        return images, target.encode_texts(batch.text, batch.text_lengths) if reads_texts else None

    def _hide(self, words: Tensor, places: Tensor) -> Tensor:
        """The batch's words with [MASK] in these places."""
        return words.index_fill(0, places, self.online.text.mask_id)

    def _masks(self, batch: ImageTextBatch, source: MaskSource) -> tuple[Masked, Masked]:
        c, ids = self.config, batch.sample_ids
        patches, words = [c.patches] * len(batch), batch.text_lengths.lengths
        image = given_or_drawn("image", source, patches, c.image_mask_ratio, sample_ids=ids)
        return image, given_or_drawn("text", source, words, c.text_mask_ratio, sample_ids=ids)

    def _check(self, batch: ImageTextBatch) -> None:
        c = self.config
        check_batch(batch, c)
        if c.itc_weight + c.itm_weight > 0 and len(batch) < 2:
            raise ValueError(
                f"batch must hold at least 2 pairs, since ITC and ITM compare them, got {len(batch)}: "
                "one is enough with itc_weight and itm_weight 0"
            )

    # -- use ---------------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> EncodedView:
        """Whole images [N, 3, H, W] -> their tokens and embeddings."""
        return self.online.encode_images(images)

    def encode_texts(self, text: Tensor, text_lengths: SeqLens) -> EncodedView:
        """Packed words [sum of text_lengths] -> their tokens and embeddings."""
        return self.online.encode_texts(text, text_lengths)

    def encode_cls(self, batch: ImageTextBatch) -> Tensor:
        """[B, D]: the class token of the fusion encoder, or of the image encoder where no sample has a word."""
        images = self.encode_images(batch.images)
        if not batch.text_lengths.total:
            return images.cls
        every = torch.arange(len(batch))
        texts = self.encode_texts(batch.text, batch.text_lengths)
        return self.online.fuse(*self.pair(images, texts, every, every))

    def image_encoder(self) -> tuple[list[nn.Parameter], fast.Transformer]:
        """As `Model.image_encoder`, of the online network."""
        return self.online.image.parts()

    def joint_encoder(self) -> fast.Transformer:
        """The fusion encoder."""
        return self.online.fusion

    def fill_words(
        self, batch: ImageTextBatch, *, seed: int | None = None, step: int = 0, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What MLM's head makes of every word, masked or not, beside the whole image.

        Returns:
            ([sum of text lengths, V] logits, [B, longest text] bool: True = was masked).
        """
        check_batch(batch, self.config)
        text = given_or_drawn(
            "text", MaskSource(seed, step, text_mask=text_mask), batch.text_lengths.lengths,
            self.config.text_mask_ratio, sample_ids=batch.sample_ids,
        )  # fmt: skip
        images = self.encode_images(batch.images)
        texts = self.encode_texts(self._hide(batch.text, _places(text).to(batch.device)), batch.text_lengths)
        every = torch.arange(len(batch))
        rows, layout = self.pair(images, texts, every, every, every=True)
        words = take_rows(self.online.fuse(rows, layout), layout.words)
        return self.word_head(words), text.as_bool(batch.text_lengths.max)

    def pair(
        self, images: EncodedView, texts: EncodedView, of_image: Tensor, of_text: Tensor, *, every: bool = False
    ) -> tuple[Tensor, FusionLayout]:
        """(rows, layout) for `online.fuse`: image of_image[i] beside text of_text[i], on the host.

        Args:
            every: all tokens are wanted; False: CLS alone.
        """
        wanted = {}
        if every:
            count, longest = len(of_image), texts.views.views.max
            wanted["patches"] = torch.ones(count, self.config.patches, dtype=torch.bool)
            wanted["words"] = torch.ones(count, longest, dtype=torch.bool)
        return self.online.pair(images, texts, of_image, of_text, cls=True, **wanted)

    def match(self, images: EncodedView, texts: EncodedView, of_image: Tensor, of_text: Tensor) -> Tensor:
        """[n] fp32: how sure ITM is that image of_image[i] and text of_text[i] belong together (a log-odds)."""
        logits = self.match_head(self.online.fuse(*self.pair(images, texts, of_image, of_text))).float()
        return logits[:, 1] - logits[:, 0]


def _mlp(c: MAMOConfig) -> nn.Sequential:
    return nn.Sequential(fast.Linear(c.width, c.width), fast.Linear(c.width, c.width, input_activation=c.activation))


def _views(needed: dict[str, bool], *kept: Masked) -> dict[str, Masked]:
    return {name: each for (name, is_needed), each in zip(needed.items(), kept, strict=True) if is_needed}


def _places(text: Masked) -> Tensor:
    """[M] int64: the masked words' places among the batch's words."""
    return SeqLens(text.lengths).cu[sample_of(text.mask)].long() + text.ids_mask


def _spread(rows: Tensor) -> Tensor:
    """The standard deviation over the rows, mean over the features."""
    return rows.float().std(0, correction=0).mean() if len(rows) else rows.new_zeros((), dtype=torch.float32)
