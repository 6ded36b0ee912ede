"""M3AE: one Transformer over image patches and words, most of them masked, rebuilding both.

Shapes: B samples, N of them with an image; T packed rows; D width; P patches; V vocabulary.
Source: arXiv:2205.14204, and the authors' public code, which `masking="shared"` follows to the number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from m3ae_fast import nn as fast
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.config import M3AEConfig
from m3ae_fast.models.encoders import check_sizes
from m3ae_fast.models.masking import MASKS, MaskSource, Plan, TokenLayout, drawn_part, given_or_drawn, keep_all
from m3ae_fast.models.masks import with_masks
from m3ae_fast.models.model import Metric, Model
from m3ae_fast.nn import take_rows
from m3ae_fast.nn.positions import FixedPositions, at_places, resample_positions
from m3ae_fast.ops import assemble_tokens, linear_cross_entropy, masked_mse, restore_tokens
from m3ae_fast.seqlens import SeqLens


@dataclasses.dataclass
class M3AEOutput:
    """What a training step needs. Losses and accuracy are fp32 scalars, means over the B samples of each sample's
    own mean over its predicted tokens (a sample without any counts as 0), so that they add up over micro-batches.
    Predicted are the masked tokens: with `predict_ratio` a part, with "multi_block" the blocks."""

    loss: Tensor  # image_loss_weight * image_loss + text_loss_weight * text_loss
    image_loss: Tensor  # squared error of the predicted patches
    text_loss: Tensor  # cross-entropy of the predicted words
    text_accuracy: Tensor  # of the predicted words; no gradient
    image_mask: Tensor  # [B, P] bool on the host, True = removed; of mixed sizes [B, most patches of an image]
    text_mask: Tensor  # [B, longest text] bool on the host, True = removed


@dataclasses.dataclass
class Reconstruction:
    """Predictions for every token, kept or masked."""

    image: Tensor  # [B, P, patch_dim] normalized pixels (row, column, channel), P as of image_mask; NaN: no patch
    text_logits: Tensor  # [sum of text lengths, V]
    image_mask: Tensor  # as in M3AEOutput
    text_mask: Tensor  # likewise
    norm_pix: bool = False  # image has been normalized by each patch's own mean and deviation, too


@dataclasses.dataclass
class Encoded:
    """The encoder's view of whole samples, nothing masked."""

    cls: Tensor  # [B, D]
    tokens: Tensor  # [T, D]: [CLS; patches; words] of each sample, packed
    seqlens: SeqLens  # of tokens


class M3AE(Model, FixedPositions):
    """Images of the configured size, or of mixed sizes (`ImageTextBatch.from_images`). Positions of these are computed
    from the row and column of each patch; given tables are resampled to each image's grid.

    Args: config: see `M3AEConfig`; with vocab_size 0 the model is of images alone.
    """

    METRICS: ClassVar = {  # of M3AEOutput
        "loss": Metric("loss"),
        "image_loss": Metric("image loss", "squared error of masked patches"),
        "text_loss": Metric("text loss", "cross-entropy of masked words", "text"),
        "text_accuracy": Metric("text accuracy", "share of masked words guessed", "share"),
    }
    CAPTIONS, BUCKETS, MIXED_SIZES = "optional", True, True
    PICTURE = "reconstruction"
    TINY_LR = 2e-3

    def __init__(self, config: M3AEConfig):
        super().__init__(config)
        c = config
        texts = c.vocab_size > 0
        types = c.type_vectors
        options = {"mlp_ratio": c.mlp_ratio, "activation": c.activation, "eps": c.norm_eps}

        def token(width: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(width)) if wanted else None

        self.patch_embed = fast.PatchEmbed(
            c.patch_size, c.width, channels=c.channels, mean=c.image_mean, std=c.image_std
        )
        self.text_embedding = nn.Embedding(c.vocab_size, c.width) if texts else None
        self.cls_token = token(c.width)
        self.image_type, self.text_type = token(c.width, types), token(c.width, texts and types)
        self.encoder = fast.Transformer(c.width, c.depth, c.heads, **options)

        cross = c.decoder == "cross"
        self.decoder_embed = None if cross else fast.Linear(c.width, c.decoder_width)
        self.image_mask_token, self.text_mask_token = token(c.decoder_width), token(c.decoder_width, texts)
        self.decoder_image_type = token(c.decoder_width, types)
        self.decoder_text_type = token(c.decoder_width, texts and types)
        decoder = functools.partial(fast.CrossTransformer, context_width=c.width) if cross else fast.Transformer
        self.decoder = decoder(c.decoder_width, c.decoder_depth, c.decoder_heads, **options)
        self.image_head = fast.Linear(c.decoder_width, c.patch_dim)
        self.text_head = fast.Linear(c.decoder_width, c.vocab_size) if texts else None
        self.reset_parameters()

    def position_tables(self) -> dict[str, Tensor | None]:
        """Those of patches and words in the encoder and in the decoder; of patches, unless they are given: of the
        configured size, and of rows or columns, for mixed sizes."""
        c = self.config
        computed = c.positions == "sincos"
        tables = self._patch_positions() if computed else {}
        places, sides = (torch.arange(count, device="cpu") for count in (c.max_text_length, c.most_patches))
        for prefix, width in (("", c.width), ("decoder_", c.decoder_width)):
            tables[f"{prefix}text_position"] = fast.sincos_1d(places, width) if c.vocab_size else None
            tables[f"{prefix}side_position"] = fast.sincos_1d(sides, width // 2) if computed else None
        return tables

    def given_tables(self) -> dict[str, Tensor]:
        """Those of patches, if they are given."""
        return self._patch_positions() if self.config.positions == "given" else {}

    def _patch_positions(self) -> dict[str, Tensor]:
        c = self.config
        widths = {"image_position": c.width, "decoder_image_position": c.decoder_width}
        return {name: fast.sincos_2d(*c.grid, width) for name, width in widths.items()}

    def reset_parameters(self) -> None:
        """Xavier-uniform kernels, zero biases, N(0, .02) tokens and types, N(0, 1) word embeddings, fixed positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)
        self.start_positions()

    # -- the three things it does ------------------------------------------------------------------------------------

    def forward(
        self,
        batch: ImageTextBatch,
        *,
        seed: int | None = None,
        step: int = 0,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        plan: Plan | None = None,
    ) -> M3AEOutput:
        """Losses of one step.

        Args:
            batch: pairs, images alone and texts alone go through one packed pass.
            seed, step: key the random masks together with batch.sample_ids, and with `predict_ratio` which tokens are
                predicted: the same on every device, for any split of a batch.
            image_mask, text_mask: masks to use instead of random ones: [B, P] and [B, L] bool, True = removed, any
                number in each sample; or uint8: 0 = kept, 1 = removed and predicted, 2 = removed, not predicted. For
                mixed sizes P is the largest number of patches of an image.
            plan: instead of these four: what `plan` returned for them and this batch.

        Raises:
            ValueError: neither a seed nor masks, or no seed for `predict_ratio`; images or texts of another size than
                the configuration's; a plan of another batch.
        """
        plan = self._plan(batch, MaskSource(seed, step, image_mask, text_mask), plan)
        image, text, layout = plan.image, plan.text, plan.layout
        encoded = self._encode(batch, layout)
        decoded = self._decode(batch, encoded, layout)

        rows = torch.cat([layout.image_rows, layout.text_rows])
        for_image, for_text = take_rows(decoded, rows).split([len(layout.image_rows), len(layout.text_rows)])
        text_loss = text_accuracy = decoded.new_zeros((), dtype=torch.float32)
        images = self._images(batch)
        image_loss = masked_mse(
            self.image_head(for_image), images, layout.image_ids_mask, layout.images_mask,
            patch_size=self.config.patch_size, norm_pix=self.config.norm_pix, **self.patch_embed.normalization(images),
        )  # fmt: skip
        if images.shape[0] != len(batch):
            image_loss = image_loss * (images.shape[0] / len(batch))
        if self.text_head is not None:
            target = batch.text.index_select(0, layout.words_mask)
            text_loss, text_accuracy = linear_cross_entropy(
                for_text, self.text_head.weight, target, self.text_head.bias,
                reduction="sample_mean", cu_seqlens=layout.text_mask, return_accuracy=True,
            )  # fmt: skip
        loss = self.config.image_loss_weight * image_loss + self.config.text_loss_weight * text_loss
        masks = image.as_bool(self._columns(batch)), text.as_bool(batch.text_lengths.max)
        return M3AEOutput(loss, image_loss, text_loss, text_accuracy, *masks)

    def plan(
        self,
        batch: ImageTextBatch,
        *,
        seed: int | None = None,
        step: int = 0,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        bucket: bool = False,
    ) -> Plan:
        """Everything that `forward` makes on the host before it computes; other arguments and errors as `forward`'s.

        Made ahead, for instance in a loader, it does not delay the step; a step to be captured in a CUDA graph must be
        given one.

        Args:
            bucket: round the sizes of its tensors up, so that batches of any lengths have one of few `Plan.bucket`: the
                same losses and gradients, a captured step for each bucket (`m3ae_fast.models.GraphedStep`).
        """
        return self._plan(batch, MaskSource(seed, step, image_mask, text_mask), bucket=bucket)

    def reconstruct(
        self,
        batch: ImageTextBatch,
        *,
        seed: int | None = None,
        step: int = 0,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Reconstruction:
        """Predictions for every patch and every word, masked or not, whatever `predict_ratio`; arguments as
        `forward`'s."""
        plan = self._plan(batch, MaskSource(seed, step, image_mask, text_mask), every=True)
        image, text, layout = plan.image, plan.text, plan.layout
        decoded = self._decode(batch, self._encode(batch, layout), layout, every=True)
        patches = self.image_head(take_rows(decoded, layout.all_image_rows))
        counts, columns = torch.tensor(image.lengths, device="cpu"), self._columns(batch)
        pixels = patches.new_full((len(batch), columns, self.config.patch_dim), math.nan)
        pixels[torch.arange(columns, device="cpu") < counts[:, None]] = patches
        logits = decoded.new_zeros(0, 0)
        if self.text_head is not None:
            logits = self.text_head(take_rows(decoded, layout.all_text_rows))
        masks = image.as_bool(columns), text.as_bool(batch.text_lengths.max)
        return Reconstruction(pixels, logits, *masks, self.config.norm_pix)

    def encode(self, batch: ImageTextBatch) -> Encoded:
        """The encoder on whole samples: CLS features for probing and fine-tuning, and every token."""
        self._check(batch)
        image, text = keep_all(batch.patch_counts(self.config.grid)), keep_all(batch.text_lengths.lengths)
        layout = TokenLayout.make(image, text, self._patches(batch), batch.has_image, batch.device)
        tokens = self._encode(batch, layout)
        return Encoded(take_rows(tokens, layout.cls_rows), tokens, layout.kept)

    def encode_cls(self, batch: ImageTextBatch) -> Tensor:
        """[B, D]: `encode(batch).cls`."""
        return self.encode(batch).cls

    def image_encoder(self) -> tuple[list[nn.Parameter], fast.Transformer]:
        """As `Model.image_encoder`."""
        tokens = [*self.patch_embed.parameters(), self.cls_token, self.image_type]
        return [each for each in tokens if each is not None], self.encoder

    def joint_encoder(self) -> fast.Transformer | None:
        """The encoder, unless the model is of images alone."""
        return self.encoder if self.config.vocab_size else None

    # -- the two halves ----------------------------------------------------------------------------------------------

    def _plan(
        self,
        batch: ImageTextBatch,
        source: MaskSource,
        plan: Plan | None = None,
        bucket: bool = False,
        every: bool = False,
    ) -> Plan:
        """The plan that a caller gave, checked, or else a new one; every: in which all masked tokens are predicted."""
        self._check(batch)
        c, ids = self.config, batch.sample_ids
        if plan is not None:
            plan.check(batch, c.grid, source)
            if not torch.compiler.is_compiling() and len(batch.text) != plan.words:
                raise ValueError(
                    f"batch must have room for {plan.images} images and {plan.words} words with a plan of a bucket "
                    f"(batch.with_room, or GraphedStep), got {len(batch.text)} words"
                )
            return plan
        if batch.grids is not None and (bucket or c.masking == "shared"):
            what = "bucket must be False" if bucket else "masking must not be 'shared', one mask for all,"
            raise ValueError(f"{what} for images of mixed sizes")
        patches, words = batch.patch_counts(c.grid), batch.text_lengths.lengths
        source = with_masks(source, c, batch.sample_grids(c.grid), words, ids)
        modalities = []
        for name, lengths, ratio, slots, part in (
            ("image", patches, c.image_mask_ratio, c.patches, c.predict_ratios[0]),
            ("text", words, c.text_mask_ratio, c.max_text_length, c.predict_ratios[1]),
        ):
            shared = slots if c.masking == "shared" else None
            masked = given_or_drawn(name, source, lengths, ratio, sample_ids=ids, shared=shared, dtypes=MASKS)
            if every:
                masked = masked.predicting_all()
            elif part < 1:
                masked = drawn_part(name, masked, part, source, sample_ids=ids)
            modalities.append(masked)
        return Plan.make(*modalities, self._patches(batch), batch.has_image, batch.device, bucket)

    def _encode(self, batch: ImageTextBatch, layout: TokenLayout) -> Tensor:
        """Kept patches and kept words -> [layout.kept.total, D]."""
        patches = self.patch_embed(self._images(batch), layout.image_ids_keep, layout.images_keep)
        words = None
        inputs = {
            "image_ids": layout.image_ids_keep, "cu_image": layout.image_keep,
            "image_position": self._image_positions(batch, "image_position", "side_position"),
            "image_type": self.image_type,
        }  # fmt: skip
        if self.text_embedding is not None:
            words = batch.text.index_select(0, layout.words_keep)
            inputs |= {
                "text_ids": layout.text_ids_keep, "cu_text": layout.text_keep,
                "text_embedding": self.text_embedding.weight,
                "text_position": self.text_position, "text_type": self.text_type,
            }  # fmt: skip
        tokens = assemble_tokens(patches, words, cls_token=self.cls_token, **inputs)
        return self.encoder(tokens, layout.kept)

    def _decode(self, batch: ImageTextBatch, encoded: Tensor, layout: TokenLayout, every: bool = False) -> Tensor:
        """[layout.kept.total, D] -> [layout.masked.total, decoder width], or every token's, [layout.full.total, ...].

        The cross decoder has a query for each, mask token + position + type, whatever it asks for: kept tokens, too.
        """
        parameters = {
            "image_mask_token": self.image_mask_token, "text_mask_token": self.text_mask_token,
            "image_position": self._image_positions(batch, "decoder_image_position", "decoder_side_position"),
            "text_position": self.decoder_text_position,
            "image_type": self.decoder_image_type, "text_type": self.decoder_text_type,
        }  # fmt: skip
        if self.config.decoder == "cross":
            slots, seqlens = (layout.slots, layout.full) if every else (layout.masked_slots, layout.masked)
            nothing = encoded.new_empty(0, self.config.decoder_width)
            queries = restore_tokens(nothing, torch.full_like(slots, -1), slots, **parameters)
            return self.decoder(queries, encoded, seqlens, layout.kept)
        tokens = restore_tokens(self.decoder_embed(encoded), layout.rows, layout.slots, **parameters)
        return self.decoder(tokens, layout.full, *(() if every else (layout.masked_rows, layout.masked)))

    def _images(self, batch: ImageTextBatch) -> Tensor:
        """The batch's images, or none of them as a tensor: every parameter has a gradient in every step, zeros where a
        modality is missing, so that ranks which hold other modalities send each other the same.

        Of mixed sizes every image is the whole batch, its patches one below the other, of which each has its own: as
        they are counted in a `TokenLayout`.
        """
        images, size = batch.images, self.config.patch_size
        if batch.grids is not None:
            column = images.permute(0, 2, 3, 1).reshape(1, -1, size, images.shape[1])
            return column.permute(0, 3, 1, 2).expand(len(batch.grids), -1, -1, -1)
        if images is not None:
            return images
        return torch.empty(0, self.config.channels, *self.config.image_shape, dtype=torch.uint8, device=batch.device)

    def _check(self, batch: ImageTextBatch) -> None:
        c = self.config
        if not isinstance(batch, ImageTextBatch):
            raise TypeError(f"batch must be an ImageTextBatch, got {type(batch).__name__}")
        if batch.text_lengths.total and c.vocab_size == 0:
            raise ValueError("batch.text must be None: this model is of images alone (vocab_size 0)")
        check_sizes(batch, c, most_patches=c.most_patches)

    def _patches(self, batch: ImageTextBatch) -> int | None:
        """As `TokenLayout.make` takes it."""
        return self.config.patches if batch.grids is None else None

    def _columns(self, batch: ImageTextBatch) -> int:
        """Of masks and reconstructions."""
        return self.config.patches if batch.grids is None else max(batch.patch_counts(self.config.grid))

    def _image_positions(self, batch: ImageTextBatch, name: str, sides: str) -> Tensor:
        """[P, D] of the configured size or, of mixed sizes, a row for each patch of the batch."""
        table = getattr(self, name)
        if batch.grids is None:
            return table
        if self.config.positions == "sincos":
            return at_places(getattr(self, sides), batch.patch_places)
        own = self.config.grid
        resampled = {grid: table if grid == own else resample_positions(table, own, grid) for grid in set(batch.grids)}
        return torch.cat([resampled[grid] for grid in batch.grids])
