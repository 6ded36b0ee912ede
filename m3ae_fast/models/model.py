"""Model: what the trainer, the command line and the tasks ask of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.config import ModelConfig
from m3ae_fast.nn import Transformer


class Metric(NamedTuple):
    """A number of a training step, as the curves of a run show it."""

    title: str  # of the curve
    about: str = ""  # what it is, in a few words
    of: str = "image"  # "image", "text" or "pair": a loss of these; "share": in [0, 1]; "watch": neither


class Model(nn.Module):
    """A model that `m3ae-fast pretrain` trains: a subclass of this one, and a line in `m3ae_fast.models.OBJECTIVES`.

    A subclass has `forward(batch, *, seed, step)`, whose output has all METRICS as fp32 scalars, and
    `image_encoder` and `encode_cls`, by which it is probed, fine-tuned and drawn. Whatever is random in a step is a
    function of seed, step and batch.sample_ids: then a run that was stopped resumes bitwise identical.

    A model may have `plan(batch, *, seed, step)`, which makes on the host what a step needs to know of a batch, and a
    `forward` that takes this `plan` in place of seed and step: then it is made before the step (see `M3AE`).

    A task that needs more of a model asks by `offers` for methods that not every model has:
        reconstruct(batch, *, seed, step): predictions of all patches and words, see `M3AE`.
        fill_words(batch, *, seed): predictions of all words, see `MAMO`.
        encode_images(images), encode_texts(text, text_lengths): an `EncodedView` each, to be compared by retrieval,
            which is fine-tuned with `config.for_retrieval()`.
        match(images, texts, of_image, of_text): how sure it is that image and text belong together, see `MAMO`.
        pair(images, texts, of_image, of_text, every=False): encoded images beside encoded texts for a fusion encoder.
            The tasks that ask for it or for `match`, and the picture "words", also read `online`, `match_head` and
            `contrast` of a `MAMO`.

    Args:
        config: its sizes, an object of the class beside it in OBJECTIVES.

    Attributes:
        joined: whether the batches of all processes are one batch, for losses that compare samples or are means over
            words: see `Peers`. All processes must then call `forward` together, and the losses of one process are
            their mean. The trainer sets it where there are several.
    """

    METRICS: ClassVar[Mapping[str, Metric]]  # numbers of its output that a run records; the first is "loss"
    CAPTIONS: ClassVar[str] = "unused"  # in training, or "optional", or "required": images without one are left out
    LABELS: ClassVar[bool] = False  # whether it trains on the classes of images; those without are left out then
    ALL_GRADIENTS: ClassVar[bool] = True  # whether every parameter has a gradient in every step
    BUCKETS: ClassVar[bool] = False  # whether plan(batch, ..., bucket=True) makes plans of few sizes: for CUDA graphs
    MIXED_SIZES: ClassVar[bool] = False  # whether the images of a batch may have mixed sizes
    PICTURE: ClassVar[str | None] = None  # a run draws: "reconstruction", "words" (of a MAMO), or no more than curves
    TINY_LR: ClassVar[float] = 1e-3  # peak learning rate at size tiny

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.joined = False

    @classmethod
    def offers(cls, *methods: str) -> bool:
        """Whether it has all of these methods."""
        return all(hasattr(cls, name) for name in methods)

    @classmethod
    def plans_ahead(cls) -> bool:
        """Whether it has a `plan`, and a `forward` that takes it."""
        return cls.offers("plan") and "plan" in inspect.signature(cls.forward).parameters

    @classmethod
    def losses_of_own_batch(cls, config: ModelConfig) -> tuple[str, ...]:
        """The METRICS that compare a sample with those of its own process alone, even if it is `joined`."""
        return ()

    def update_target(self) -> None:
        """Update the momentum network, if there is one, and clamp what has bounds: called once for each step that is
        taken, before the next one."""

    def image_encoder(self) -> tuple[list[nn.Parameter], Transformer]:
        """The parameters that turn an image into tokens, and the Transformer that reads them."""
        raise NotImplementedError(f"{type(self).__name__} must define image_encoder")

    def joint_encoder(self) -> Transformer | None:
        """The Transformer over an image and its words together; None: images are never read beside words."""
        return None

    def encode_cls(self, batch: ImageTextBatch) -> Tensor:
        """[B, D]: the class token of images, beside their texts if the batch has any and there is a `joint_encoder`.

        Args:
            batch: an image in every sample; nothing is masked.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode_cls")
