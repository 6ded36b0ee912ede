"""MAMO: joint masked modeling of images and texts, with a momentum network for the targets.

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
from m3ae_fast._mixed_seed import mixed_seed
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.config import MAMOConfig
from m3ae_fast.models.contrastive import ContrastiveLoss, meet, same_pairs
from m3ae_fast.models.encoders import DualEncoder, EncodedView, check_batch, reset_parameters
from m3ae_fast.models.fusion import FusionLayout, Pairs
from m3ae_fast.models.mamo_plan import MAMOPlan, TargetPlan, places
from m3ae_fast.models.masking import MaskSource, given_or_drawn
from m3ae_fast.models.model import Metric, Model
from m3ae_fast.models.peers import Peers
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
    mlm_loss: Tensor  # masked words, against the momentum network's guesses, too, where these are soft targets
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
        c, form = config, config.text_form
        self.fusion = fast.Transformer(
            c.width, c.fusion_depth, c.heads, mlp_ratio=c.mlp_ratio, activation=form.activation, eps=form.norm_eps,
            post_norm=form.post_norm,
        )  # fmt: skip
        self.image_mask_token = nn.Parameter(torch.empty(c.width))
        self.image_type, self.text_type = nn.Parameter(torch.empty(c.width)), nn.Parameter(torch.empty(c.width))

    def assemble(self, rows: Tensor, layout: FusionLayout) -> Tensor:
        """Rows of both encoders [*, D] -> [CLS; patches; words] of each pair, mask tokens where patches are gone."""
        return restore_tokens(
            repeat_rows(rows, layout.source), layout.rows, layout.slots,
            image_mask_token=self.image_mask_token, image_position=self.image.position,
            text_position=self.text.position, image_type=self.image_type, text_type=self.text_type,
        )  # fmt: skip

    def fuse(self, rows: Tensor, layout: FusionLayout) -> Tensor:
        """Rows of both encoders [*, D] -> [len(layout.wanted), D]."""
        return self.fusion(self.assemble(rows, layout), layout.seqlens, layout.wanted, layout.wanted_seqlens)


class MAMO(Model):
    """Args: config: see `MAMOConfig`. `update_target()` updates the momentum network: call it before every step."""

    METRICS: ClassVar = {
        "loss": Metric("loss"),
        "mrm_loss": Metric("MRM", "masked representations, squared error", "pair"),
        "mim_loss": Metric("MIM", "masked patches, absolute error"),
        "mlm_loss": Metric("MLM", "cross-entropy of masked words", "text"),
        "itc_loss": Metric("ITC", "images against texts", "pair"),
        "itm_loss": Metric("ITM", "does the pair belong together?", "pair"),
        "mlm_accuracy": Metric("MLM accuracy", "share of masked words guessed", "share"),
        "itm_accuracy": Metric("ITM accuracy", "share of pairs told right; no to all: 2/3", "share"),
        "target_std": Metric("spread of MRM's targets", "to 0: collapse", "watch"),
        "prediction_std": Metric("spread of MRM's predictions", "to 0: collapse", "watch"),
    }
    CAPTIONS = "required"
    ALL_GRADIENTS = False  # what is of a loss of weight 0 has none
    PICTURE = "words"

    def __init__(self, config: MAMOConfig):
        super().__init__(config)
        c = config
        self.online = Encoders(c)
        self.predictor = _mlp(c)  # of MRM, on this side only
        self.regressor = _mlp(c)  # of MIM
        self.word_head = fast.Linear(c.width, c.vocab_size)
        self.match_head = fast.Linear(c.width, 2)
        self.contrast = ContrastiveLoss(
            c.projection, temperature=c.temperature, queue_size=c.queue_size, queue_start=c.queue_start
        )
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-uniform kernels, zero biases, N(0, 1) words, N(0, .02) tokens, the temperature and the queue of the
        configuration; the momentum network is a copy."""
        for module in (self.online, self.predictor, self.regressor, self.word_head, self.match_head):
            reset_parameters(module)
        self.contrast.reset_parameters()
        self.target.load_state_dict(self.online.state_dict())

    @torch.no_grad()
    def update_target(self) -> None:
        """target = momentum * target + (1 - momentum) * online, all tensors in one call; the temperature is bounded."""
        target, online = list(self.target.parameters()), list(self.online.parameters())
        torch._foreach_lerp_(target, online, 1 - self.config.momentum)
        self.contrast.bound_temperature()

    @classmethod
    def losses_of_own_batch(cls, config: MAMOConfig) -> tuple[str, ...]:
        """ITM: its negatives are of the process's own batch, as ALBEF's are."""
        return ("itm_loss",) if config.itm_weight else ()

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
        plan: MAMOPlan | None = None,
    ) -> MAMOOutput:
        """Losses of one step.

        Args:
            batch: pairs of an image and a text of at least one word; two or more where ITC or ITM counts (of joined
                processes, ITM alone).
            seed, step: key the random masks (with batch.sample_ids) and the draw of ITM's negatives.
            image_mask, text_mask: masks to use instead of random ones: [B, P] and [B, L] bool, True = masked.
            image_ids: [B] integers, equal where two samples of any process show the same image; None: its bytes decide.
                A sample is never the negative of another with the same image or text; ITC treats both as right.
            plan: instead of seed, step and masks: what `plan` returned for them and this batch.

        On a GPU ITM waits for the [B, B] similarities: which pairs it reads, and so the sizes of all that follows,
        depends on them.

        Raises:
            ValueError: a sample without an image or a word, too few samples, neither a seed nor masks, sizes other than
                the configuration's; a plan of another batch.
        """
        plan = self._plan(batch, MaskSource(seed, step, image_mask, text_mask), plan)
        c, online, layout = self.config, self.online, plan.layout
        peers = meet(self.joined, batch, patches=plan.image.mask.total, words=plan.text.mask.total)
        losses = dict.fromkeys(self.METRICS, torch.zeros((), device=batch.device))
        words = torch.cat([batch.text, self._hide(batch.text, plan.hidden, plan.shown)])  # as they are, and masked
        texts = online.text(words.index_select(0, plan.words), plan.texts)
        rows = torch.cat([online.image(batch.images, plan.images), texts])
        targets = self._encode_target(batch, words, plan.target)
        if plan.cls is not None:
            embeddings = online.project(*take_rows(rows, plan.cls).chunk(2))
            same = same_pairs(batch, image_ids, peers)
            if c.itc_weight:
                momentum = self._momentum_embeddings(targets, plan.target)
                answers = peers.gather("pairs", *(momentum or embeddings))
                loss = self.contrast(*embeddings, *same, answers=answers, momentum=momentum, soft=plan.soft)
                losses["itc_loss"] = loss * peers.share("pairs")
            if c.itm_weight:
                own = peers.own(same[0], "pairs")
                layout = plan.with_pairs(*self._pairs_to_tell(embeddings, own, plan.seed, plan.step))
        if layout is not None:
            fused = online.fuse(rows, layout)
            losses |= self._masked_losses(batch, plan, layout, take_rows(fused, layout.masked), targets, peers)
            if c.itm_weight:
                losses |= self._itm(take_rows(fused, layout.cls), len(batch))
        losses["loss"] = sum(getattr(c, f"{name}_weight") * losses[f"{name}_loss"] for name in LOSSES)
        masks = plan.image.as_bool(c.patches), plan.text.as_bool(batch.text_lengths.max)
        return MAMOOutput(**losses, image_mask=masks[0], text_mask=masks[1])

    def plan(
        self,
        batch: ImageTextBatch,
        *,
        seed: int | None = None,
        step: int = 0,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> MAMOPlan:
        """Everything that `forward` makes on the host before it computes; arguments and errors as `forward`'s.

        Made ahead, for instance in a loader, it does not delay the step. With itm_weight 0 a step that is given one
        copies nothing to the device and never waits.
        """
        return self._plan(batch, MaskSource(seed, step, image_mask, text_mask))

    def _plan(self, batch: ImageTextBatch, source: MaskSource, plan: MAMOPlan | None = None) -> MAMOPlan:
        """The plan that a caller gave, checked, or else a new one."""
        self._check(batch)
        if plan is None:
            return MAMOPlan.make(self.config, batch, source)
        plan.check(batch, self.config.grid, source)
        return plan

    @torch.no_grad()
    def _encode_target(self, batch: ImageTextBatch, words: Tensor, plan: TargetPlan | None) -> Tensor | None:
        """The momentum network's rows of whole images and of texts, as far as the losses ask."""
        if plan is None:
            return None
        rows = [self.target.image(batch.images, plan.images)]
        if plan.texts is not None:
            rows.append(self.target.text(words.index_select(0, plan.words), plan.texts))
        return torch.cat(rows)

    @torch.no_grad()
    def _momentum_embeddings(self, targets: Tensor | None, plan: TargetPlan | None) -> tuple[Tensor, Tensor] | None:
        """Of images and texts, for ITC's queue and soft targets; None where there are neither."""
        if plan is None or plan.cls is None:
            return None
        return self.target.project(*take_rows(targets, plan.cls).chunk(2))

    def _masked_losses(
        self,
        batch: ImageTextBatch,
        plan: MAMOPlan,
        layout: FusionLayout,
        masked: Tensor,
        targets: Tensor | None,
        peers: Peers,
    ) -> dict[str, Tensor]:
        """MRM, MIM and MLM of the masked tokens [M, D], patches, then words."""
        c, found = self.config, {}
        counts, shares = [len(layout.patches), len(layout.words)], [peers.share("patches"), peers.share("words")]
        patches, words = masked.split(counts)
        if plan.target is not None and (at := plan.target.layout) is not None:
            with torch.no_grad():
                theirs = self.target.fuse(targets, at)
        if c.mrm_weight:
            predicted = self.predictor(masked)
            wanted = at.patches, at.words[: counts[1]]
            losses = [
                feature_regression(part, theirs, rows, distance="l2") * share
                for part, rows, share in zip(predicted.split(counts), wanted, shares, strict=True)
            ]
            found["mrm_loss"] = sum(losses) / len(losses)
            spread = theirs[: sum(counts)], predicted.detach()
            found["target_std"], found["prediction_std"] = map(_spread, spread)
        if c.mim_weight:
            predicted = self.regressor(patches)
            loss = feature_regression(predicted, targets, plan.target.patches, distance="l1", normalize=False)
            found["mim_loss"] = loss * shares[0]
        if c.mlm_weight:
            head, answers = self.word_head, batch.text.index_select(0, plan.hidden)
            loss, accuracy = linear_cross_entropy(words, head.weight, answers, head.bias, return_accuracy=True)
            if plan.soft_words:
                guesses = take_rows(theirs, at.words[len(at.words) - counts[1] :])
                with torch.no_grad():
                    guessed = head(guesses).float().softmax(1)
                soft = -(guessed * head(words).float().log_softmax(1)).sum() / max(counts[1], 1)
                loss = (1 - plan.soft_words) * loss + plan.soft_words * soft
            found["mlm_loss"], found["mlm_accuracy"] = loss * shares[1], accuracy * shares[1]
        return found

    def _itm(self, cls: Tensor, positives: int) -> dict[str, Tensor]:
        """Whether image and text belong together; the first `positives` pairs do."""
        logits = self.match_head(cls).float()
        label = (torch.arange(len(logits), device=logits.device) < positives).long()
        accuracy = (logits.detach().argmax(1) == label).float().mean()
        return {"itm_loss": F.cross_entropy(logits, label), "itm_accuracy": accuracy}

    @torch.no_grad()
    def _pairs_to_tell(
        self, embeddings: tuple[Tensor, Tensor], same: Tensor, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """(image, text) of ITM's pairs, on the host: all right ones, then a wrong image for each text and a wrong text
        for each image, as similar as ITC finds them (over config.hard_negatives_steps from any at all). A sample that
        is the same as all others gets none."""
        hardness = min(1.0, (step + 1) / max(self.config.hard_negatives_steps, 1))
        similarity = embeddings[0] @ embeddings[1].T * (hardness / self.contrast.temperature)
        similarity = similarity.nan_to_num(-torch.inf)  # never drawn: what is no number shows in the loss
        similarity, same = torch.stack([similarity, same.float()]).cpu()  # the one wait
        every = torch.arange(len(same), device="cpu")
        generator = torch.Generator().manual_seed(mixed_seed(seed, step))
        images, texts = [every], [every]
        for scores, wrong, given in ((similarity.T, images, texts), (similarity, texts, images)):
            chances = scores.masked_fill((same if wrong is texts else same.T) > 0, -torch.inf)
            possible = chances.isfinite().any(1)
            if possible.any():
                drawn = torch.multinomial(chances[possible].softmax(1), 1, generator=generator)[:, 0]
                wrong.append(drawn)
                given.append(every[possible])
        return torch.cat(images), torch.cat(texts)

    def _hide(self, words: Tensor, places: Tensor, shown: Tensor | None = None) -> Tensor:
        """The batch's words with [MASK] in these places, or what `stand_ins` drew for them."""
        if shown is None:
            return words.index_fill(0, places, self.online.text.mask_id)
        shown = torch.where(shown < 0, words.index_select(0, places), shown.to(words.dtype))
        return words.index_copy(0, places, shown)

    def _check(self, batch: ImageTextBatch) -> None:
        c = self.config
        check_batch(batch, c)
        compares_own = c.itm_weight if self.joined else c.itc_weight + c.itm_weight
        if compares_own > 0 and len(batch) < 2:
            raise ValueError(
                f"batch must hold at least 2 pairs, since ITC and ITM compare them, got {len(batch)}: "
                "one is enough with itc_weight and itm_weight 0"
            )

    # -- use ---------------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> EncodedView:
        """Whole images [N, C, H, W] -> their tokens and embeddings."""
        return self.online.encode_images(images)

    def encode_texts(self, text: Tensor, text_lengths: SeqLens) -> EncodedView:
        """Packed words [sum of text_lengths] -> their tokens and embeddings."""
        return self.online.encode_texts(text, text_lengths)

    def encode_cls(self, batch: ImageTextBatch) -> Tensor:
        """[B, D]: the class token of the fusion encoder, or of the image encoder where no sample has a word."""
        images = self.encode_images(batch.images)
        if not batch.text_lengths.total:
            return images.cls
        every = torch.arange(len(batch), device="cpu")
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
        texts = self.encode_texts(self._hide(batch.text, places(text).to(batch.device)), batch.text_lengths)
        every = torch.arange(len(batch), device="cpu")
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
            wanted["patches"] = torch.ones(count, self.config.patches, dtype=torch.bool, device="cpu")
            wanted["words"] = torch.ones(count, longest, dtype=torch.bool, device="cpu")
        pairs = Pairs.make(images.views, texts.views, self.config.patches).of(of_image, of_text, cls=True, **wanted)
        rows = torch.cat([images.tokens, texts.tokens])
        return rows, FusionLayout.make([pairs], rows.device)

    def match(self, images: EncodedView, texts: EncodedView, of_image: Tensor, of_text: Tensor) -> Tensor:
        """[n] fp32: how sure ITM is that image of_image[i] and text of_text[i] belong together (a log-odds)."""
        logits = self.match_head(self.online.fuse(*self.pair(images, texts, of_image, of_text))).float()
        return logits[:, 1] - logits[:, 0]


def _mlp(c: MAMOConfig) -> nn.Sequential:
    return nn.Sequential(fast.Linear(c.width, c.width), fast.Linear(c.width, c.width, input_activation=c.activation))


def _spread(rows: Tensor) -> Tensor:
    """The standard deviation over the rows, mean over the features."""
    return rows.float().std(0, correction=0).mean() if len(rows) else rows.new_zeros((), dtype=torch.float32)
