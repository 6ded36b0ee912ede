"""The encoders of one modality each, over packed views: what MAMO, the CLIP-style and the supervised model share.

A view is a sample's image or text as one pass sees it: whole, or with some tokens gone. All views of all samples go
through an encoder in one packed call. Shapes: T packed rows, D width, P patches, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast import nn as fast
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.config import EncoderForm, EncodersConfig, ModelConfig
from m3ae_fast.models.masking import Masked, keep_all, sample_of, within
from m3ae_fast.models.placed import ON_HOST
from m3ae_fast.nn.positions import FixedPositions
from m3ae_fast.nn.rows import take_rows
from m3ae_fast.ops import assemble_tokens
from m3ae_fast.seqlens import SeqLens


@dataclasses.dataclass(frozen=True)
class Views:
    """Which tokens each view keeps, and where they stand: views of a sample side by side, sample after sample."""

    ids: Tensor  # [K] int32, the token's number in its sample
    places: Tensor  # [K] int32, the token's number in the whole batch, + view * (tokens of the batch)
    samples: SeqLens  # tokens of each sample, all its views together
    views: SeqLens  # tokens of each view
    sequences: SeqLens  # the same, with a class token each: what comes out of an encoder
    starts: Tensor = dataclasses.field(metadata=ON_HOST)  # [sequences] int64, where each of them begins
    kept: tuple[Masked, ...] = dataclasses.field(metadata=ON_HOST)  # by view

    @staticmethod
    def make(kept: Sequence[Masked], device: torch.device) -> Views:
        """Views of the same samples; each keeps `ids_keep`."""
        count, batch = len(kept), len(kept[0].keep)
        lengths = [view.keep.lengths[b] for b in range(batch) for view in kept]
        sequence = torch.cat([sample_of(view.keep) * count + number for number, view in enumerate(kept)])
        order = torch.argsort(sequence, stable=True)
        ids = torch.cat([view.ids_keep for view in kept])[order]
        tokens, sequence = SeqLens(kept[0].lengths), sequence[order]
        places = tokens.cu[sequence // count] + ids + (sequence % count * tokens.total).int()
        ids, places = torch.stack([ids, places]).to(device, non_blocking=True)
        samples = SeqLens([sum(lengths[b * count : (b + 1) * count]) for b in range(batch)])
        sequences = SeqLens([1 + n for n in lengths])
        seqlens = (x.to(device) for x in (samples, SeqLens(lengths), sequences))
        return Views(ids, places, *seqlens, sequences.cu[:-1].long(), tuple(kept))

    def cls_rows(self, view: int) -> Tensor:
        """[B] int64: where the class tokens of a view stand in the encoder's output."""
        return self.starts[view :: len(self.kept)]

    def rows(self, view: int, columns: int) -> Tensor:
        """[B, columns] int64: where a view's tokens stand in the encoder's output; -1 for those it has not."""
        kept = self.kept[view]
        sample = sample_of(kept.keep)
        out = torch.full((len(kept.keep), columns), -1, dtype=torch.int64, device="cpu")
        out[sample, kept.ids_keep.long()] = self.cls_rows(view)[sample] + 1 + within(kept.keep, sample)
        return out


def whole(lengths: Sequence[int], device: torch.device) -> Views:
    """One view of each sample, nothing masked."""
    return Views.make([keep_all(lengths)], device)


class _Encoder(FixedPositions):
    """What the two kinds have in common: CLS, a Transformer and a position table."""

    def __init__(self, config: ModelConfig, form: EncoderForm):
        super().__init__()
        self.config, self.form = config, form

    def _build(self, depth: int) -> None:
        """What follows the parameters that make tokens of patches or words: their order is that of the draws."""
        c, form = self.config, self.form
        self.cls_token = nn.Parameter(torch.empty(c.width))
        self.transformer = fast.Transformer(
            c.width, depth, c.heads, mlp_ratio=c.mlp_ratio, activation=form.activation, eps=form.norm_eps,
            post_norm=form.post_norm,
        )  # fmt: skip
        self.start_positions()

    @property
    def positions(self) -> str:
        """ "sincos" or "given", as the configuration says."""
        raise NotImplementedError

    def sincos(self) -> Tensor:
        """The table that follows from the sizes."""
        raise NotImplementedError

    def position_tables(self) -> dict[str, Tensor]:
        """That of the tokens, unless it is given."""
        return {"position": self.sincos()} if self.positions == "sincos" else {}

    def given_tables(self) -> dict[str, Tensor]:
        """That of the tokens, if it is given."""
        return {"position": self.sincos()} if self.positions == "given" else {}


class ImageEncoder(_Encoder):
    """A ViT over kept patches: [CLS; patches] of every view, fixed positions, a LayerNorm at the end."""

    def __init__(self, config: ModelConfig, depth: int):
        c, form = config, getattr(config, "image_form", EncoderForm(config.activation))
        super().__init__(c, form)
        self.patch_embed = fast.PatchEmbed(
            c.patch_size, c.width, channels=c.channels, mean=c.image_mean, std=c.image_std
        )
        self._build(depth)
        self.norm_tokens = fast.LayerNorm(c.width, form.norm_eps) if form.norm_tokens else None

    @property
    def positions(self) -> str:
        """Of the patches."""
        return self.config.positions

    def sincos(self) -> Tensor:
        """Of the patches, [P, D]."""
        return fast.sincos_2d(*self.config.grid, self.config.width)

    def forward(self, images: Tensor, views: Views) -> Tensor:
        """images [N, C, H, W] -> [views.sequences.total, D]; dropped patches are never read."""
        patches = self.patch_embed(images, views.ids, views.samples)
        tokens = assemble_tokens(
            patches, None, cls_token=self.cls_token, image_ids=views.ids, cu_image=views.views,
            image_position=self.position,
        )  # fmt: skip
        if self.norm_tokens is not None:
            tokens = self.norm_tokens(tokens)
        return self.transformer(tokens, views.sequences)

    def parts(self) -> tuple[list[nn.Parameter], fast.Transformer]:
        """(the parameters that make tokens of an image, the Transformer)."""
        norm = [] if self.norm_tokens is None else self.norm_tokens.parameters()
        return [*self.patch_embed.parameters(), self.cls_token, *norm], self.transformer


class TextEncoder(_Encoder):
    """A Transformer over [CLS; words] of every view. Its last word, number V, is [MASK]."""

    def __init__(self, config: EncodersConfig, depth: int):
        super().__init__(config, config.text_form)
        self.embedding = nn.Embedding(config.vocab_size + 1, config.width)
        self._build(depth)

    @property
    def positions(self) -> str:
        """Of the words."""
        return self.config.text_positions

    def sincos(self) -> Tensor:
        """Of the words, [max_text_length, D]."""
        places = torch.arange(self.config.max_text_length, device="cpu")
        return fast.sincos_1d(places, self.config.width)

    @property
    def mask_id(self) -> int:
        return self.embedding.num_embeddings - 1

    def forward(self, words: Tensor, views: Views) -> Tensor:
        """words [views.views.total] ids -> [views.sequences.total, D]."""
        tokens = assemble_tokens(
            None, words, cls_token=self.cls_token, text_ids=views.ids, cu_text=views.views,
            text_embedding=self.embedding.weight, text_position=self.position,
        )  # fmt: skip
        return self.transformer(tokens, views.sequences)


@dataclasses.dataclass
class EncodedView:
    """Whole images or whole texts, encoded."""

    tokens: Tensor  # [T, D], [CLS; tokens] of each, packed
    views: Views
    embedding: Tensor  # [B, E] fp32, of unit length: what contrast compares

    @property
    def cls(self) -> Tensor:
        """[B, D]: the class tokens."""
        return take_rows(self.tokens, self.views.cls_rows(0).to(self.tokens.device))


class DualEncoder(nn.Module):
    """An image encoder and a text encoder, and where they meet: a projection each. Initialised by its owner."""

    def __init__(self, config: EncodersConfig):
        super().__init__()
        c = config
        self.patches = c.patches
        self.image, self.text = ImageEncoder(c, c.depth), TextEncoder(c, c.text_depth)
        self.image_projection = fast.Linear(c.width, c.projection)
        self.text_projection = fast.Linear(c.width, c.projection)

    def project(self, image_cls: Tensor, text_cls: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens [B, D] each -> embeddings [B, E], fp32, of unit length."""
        return _unit(self.image_projection(image_cls)), _unit(self.text_projection(text_cls))

    def encode_images(self, images: Tensor) -> EncodedView:
        """Whole images [N, C, H, W] -> their tokens and embeddings."""
        views = whole([self.patches] * len(images), images.device)
        tokens = self.image(images, views)
        cls = take_rows(tokens, views.cls_rows(0).to(images.device))
        return EncodedView(tokens, views, _unit(self.image_projection(cls)))

    def encode_texts(self, text: Tensor, text_lengths: SeqLens) -> EncodedView:
        """Packed words [sum of text_lengths] -> their tokens and embeddings."""
        views = whole(text_lengths.lengths, text.device)
        tokens = self.text(text, views)
        cls = take_rows(tokens, views.cls_rows(0).to(text.device))
        return EncodedView(tokens, views, _unit(self.text_projection(cls)))


def _unit(embedding: Tensor) -> Tensor:
    return F.normalize(embedding.float(), dim=1)


def check_batch(batch: ImageTextBatch, config: ModelConfig) -> None:
    """ValueError unless every sample is an image of the configured size and a text of at least one word."""
    if not isinstance(batch, ImageTextBatch):
        raise TypeError(f"batch must be an ImageTextBatch, got {type(batch).__name__}")
    for b, (image, words) in enumerate(zip(batch.has_image, batch.text_lengths.lengths, strict=True)):
        if not image or not words:
            missing = "an empty text" if image else "no image"
            raise ValueError(f"batch must hold pairs of an image and a text, got {missing} in sample {b}")
    check_sizes(batch, config)


def check_sizes(batch: ImageTextBatch, config: ModelConfig, *, most_patches: int = 0) -> None:
    """ValueError unless images and texts are of the configuration's sizes.

    Args:
        most_patches: of a side of images of mixed sizes; 0: the model takes none of these.
    """
    if batch.images is not None and batch.images.shape[1] != config.channels:
        raise ValueError(
            f"batch.images must have {config.channels} channels, as the configuration says, got {batch.images.shape[1]}"
        )
    if batch.grids is not None:
        _check_grids(batch, config, most_patches)
    elif batch.images is not None and tuple(batch.images.shape[2:]) != config.image_shape:
        raise ValueError(
            f"batch.images must be of {config.image_shape[0]} x {config.image_shape[1]} pixels, as the configuration "
            f"says, got {batch.images.shape[2]} x {batch.images.shape[3]}"
        )
    if batch.text_lengths.max > config.max_text_length:
        raise ValueError(
            f"batch.text_lengths must be at most max_text_length {config.max_text_length}, got {batch.text_lengths.max}"
        )


def _check_grids(batch: ImageTextBatch, config: ModelConfig, most_patches: int) -> None:
    if not most_patches:
        raise ValueError("batch.images must be of one size for this model, got images of mixed sizes")
    size, longest = batch.images.shape[2], max(map(max, batch.grids))
    if size != config.patch_size:
        raise ValueError(
            f"batch.images must be patches of {config.patch_size} pixels a side, as configured, got {size}"
        )
    if longest > most_patches:
        raise ValueError(f"batch.images must have at most {most_patches} patches a side, got {longest}")


def reset_parameters(module: nn.Module) -> None:
    """Xavier-uniform kernels, zero biases, N(0, 1) words, N(0, .02) tokens, fixed positions: how all models here start.

    A position is added to each word, of sines and cosines whose mean square is a half: words of N(0, .02), which fit
    BERT's positions of the same size, would be lost beside it for hundreds of steps.
    """
    for each in module.modules():
        if isinstance(each, nn.Linear):
            nn.init.xavier_uniform_(each.weight)
            nn.init.zeros_(each.bias)
        elif isinstance(each, nn.LayerNorm):
            each.reset_parameters()
        elif isinstance(each, nn.Embedding):
            nn.init.normal_(each.weight)
        elif isinstance(each, FixedPositions):
            each.start_positions()
        for parameter in each.parameters(recurse=False):
            if parameter.dim() == 1 and not isinstance(each, nn.Linear | nn.LayerNorm):
                nn.init.normal_(parameter, std=0.02)
