"""The sizes of the models and how they mask: ModelConfig, what all have, and one class a model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from m3ae_fast import _checks
from m3ae_fast.batch import MAX_CHANNELS

if TYPE_CHECKING:
    from typing_extensions import Self

CC12M_MEAN, CC12M_STD = (0.5762, 0.5503, 0.5213), (0.3207, 0.3169, 0.3307)
OTHER_MEAN, OTHER_STD = 0.5, 0.25  # of every channel, where there are not three

SIZES = {
    "tiny": {
        "image_size": 64, "patch_size": 8, "max_text_length": 40, "width": 128, "depth": 2, "heads": 4,
        "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4, "text_depth": 2, "fusion_depth": 2,
        "projection": 128,
    },
    "small": {},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16},
}  # fmt: skip


RENAMED = {"image_depth": "depth"}  # fields of older runs, by which they are read


@dataclasses.dataclass
class ModelConfig:
    """What every model has. The defaults are a ViT-S at 256 pixels.

    Attributes:
        image_size: pixels a side, or (height, width); a multiple of patch_size, the pixels a side of a patch.
        channels: of the images, 1 to 16.
        vocab_size: entries of the vocabulary.
        max_text_length: rows of the text position table; a longer text is refused.
        depth: blocks of the image encoder (of M3AE's only encoder, which reads words, too).
        width, heads: of the Transformers. mlp_ratio: hidden rows of their MLPs, as a multiple of the width.
        activation: of the MLPs, "gelu" (erf) or "gelu_tanh".
        positions: of patches, "sincos": computed from the sizes. "given": tables that the weights hold, not trained;
            sine-cosine until weights with others are loaded.
        image_mean, image_std: of uint8 pixels scaled to [0, 1], a value a channel; None: CC12M's of three channels, 0.5
            and 0.25 of any others. Float images are taken as normalized already.
    """

    image_size: int | tuple[int, int] = 256
    patch_size: int = 16
    channels: int = 3
    vocab_size: int = 30522
    max_text_length: int = 64
    depth: int = 12
    width: int = 384
    heads: int = 6
    mlp_ratio: float = 4.0
    activation: str = "gelu_tanh"
    positions: str = "sincos"
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    max_patches: ClassVar[int | None] = None  # of images that keep their aspect: a model of one size reads none

    def __post_init__(self):
        if not isinstance(self.image_size, int):
            self.image_size = _checks.sides("image_size", self.image_size)
        self._integers(1, "patch_size", "width", "heads")
        _checks.integer("channels", self.channels, 1, MAX_CHANNELS + 1)
        self._integers(0, "vocab_size", "max_text_length", "depth")
        if any(side < 1 or side % self.patch_size for side in self.image_shape):
            raise ValueError(f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}")
        for name, of_three, of_others in (("image_mean", CC12M_MEAN, OTHER_MEAN), ("image_std", CC12M_STD, OTHER_STD)):
            if getattr(self, name) is None:
                setattr(self, name, of_three if self.channels == 3 else (of_others,) * self.channels)
            values = tuple(getattr(self, name))
            if len(values) != self.channels:
                raise ValueError(f"{name} must have {self.channels} values, one a channel, got {values}")
            setattr(self, name, values)
        if not all(std > 0 for std in self.image_std):
            raise ValueError(f"image_std must be positive, got {self.image_std}")
        self._numbers("mlp_ratio")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        self._heads("width", "heads")
        _checks.choice("activation", self.activation, ("gelu", "gelu_tanh"))
        _checks.choice("positions", self.positions, ("sincos", "given"))

    def _integers(self, low: int, *names: str) -> None:
        for name in names:
            _checks.integer(name, getattr(self, name), low)

    def _numbers(self, *names: str) -> None:
        for name in names:
            _checks.number(name, getattr(self, name))

    def _heads(self, width: str, heads: str) -> None:
        wide, many = getattr(self, width), getattr(self, heads)
        if wide % 4:
            raise ValueError(f"{width} must be a multiple of 4 (2-D sine-cosine positions), got {wide}")
        if wide % many:
            raise ValueError(f"{width} must be a multiple of {heads}, got {wide} and {many}")

    def _shares(self, *names: str) -> None:
        for name in names:
            _checks.real(name, getattr(self, name), "[0, 1)")

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def images(self) -> dict[str, Any]:
        """What `open_dataset` and `pack` take of it: image_size and channels."""
        return {"image_size": self.image_size, "channels": self.channels}

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        return self.channels * self.patch_size**2

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def preset(cls, size: str, **changes: Any) -> Self:
        """The sizes named "tiny", "small", "base", "large" or "huge", with changes."""
        _checks.choice("size", size, SIZES)
        fields = {field.name for field in dataclasses.fields(cls)}
        sizes = {name: value for name, value in SIZES[size].items() if name in fields}
        return cls(**(sizes | changes))

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """64-pixel images in 64 patches; learns within minutes on a laptop."""
        return cls.preset("tiny", **changes)

    @classmethod
    def small(cls, **changes: Any) -> Self:
        """ViT-S/16 at 256 pixels."""
        return cls.preset("small", **changes)

    @classmethod
    def base(cls, **changes: Any) -> Self:
        """ViT-B/16 at 256 pixels."""
        return cls.preset("base", **changes)

    @classmethod
    def large(cls, **changes: Any) -> Self:
        """ViT-L/16 at 256 pixels."""
        return cls.preset("large", **changes)

    @classmethod
    def huge(cls, **changes: Any) -> Self:
        """ViT-H/16 at 256 pixels: head dimension 80."""
        return cls.preset("huge", **changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError for a field it does not know."""
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"the configuration must have fields of {cls.__name__} only, got {', '.join(unknown)}")
        return cls(**values)


@dataclasses.dataclass
class M3AEConfig(ModelConfig):
    """Sizes of an M3AE (arXiv:2205.14204). The defaults are the paper's ViT-S: width 384, depth 12, 6 heads.

    Attributes, beside ModelConfig's (vocab_size 0 makes a model of images alone, without any text parameter):
        image_mask_ratio, text_mask_ratio: share of tokens removed, in [0, 1).
        decoder: "joint": a Transformer over kept and mask tokens. "cross": CrossMAE's (arXiv:2401.14391, section 3),
            blocks of cross-attention and an MLP through which mask tokens attend to the encoder's output, and not to
            one another. Inter-block attention, CrossMAE's learned mixture of the outputs of all encoder blocks for
            each decoder block, is not there: every block reads the encoder's output.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        predict_ratio: share of the masked tokens that a training step predicts, in (0, 1], a number or one of images
            and one of texts; they are drawn for each sample and step, at least one of each kind, and the others never
            enter the decoder. CrossMAE's prediction ratio is a share of all tokens: 25 % there, of 75 % masked, is 1/3
            here.
        image_loss_weight, text_loss_weight: of the two losses in their sum.
        masking: "sample": every sample has masks of its own, drawn over its real tokens, at least one kept and one
            masked (a text of one word is masked whole). "shared": as the paper's public code: one image mask and one
            text mask for the whole batch, the text mask drawn over max_text_length slots, padding included. The others
            differ from "sample" in images alone, "block" (`block_mask`) and "multi_block" (`multi_block_mask`, which
            sets the shares itself), or in how many tokens are masked, "ratio_range" and "dirichlet".
        mask_ratio_range: (low, high) of the share that "ratio_range" masks of each image and each text
            (`random_mask`), in place of the two ratios.
        dirichlet_alpha: of "dirichlet" (`dirichlet_masks`), a number or one of images and one of texts: each sample
            keeps as many tokens as by "sample", but the shares of image and text are drawn.
        norm_pix: normalize the target pixels of every patch (MAE's option; M3AE does not).
        type_vectors: learn a vector for each modality, added to its tokens. MAE's own code has none.
        norm_eps: of the LayerNorms.
        max_patches: the data's images keep their aspect, each resized to at most so many patches; None: they are
            cropped to image_size. The model takes both, and patches up to this number a side.
    """

    DECODERS: ClassVar[tuple[str, ...]] = ("joint", "cross")
    MASKINGS: ClassVar[tuple[str, ...]] = ("sample", "shared", "block", "multi_block", "ratio_range", "dirichlet")

    decoder: str = "joint"
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    predict_ratio: float | tuple[float, float] = 1.0
    image_mask_ratio: float = 0.75
    text_mask_ratio: float = 0.75
    image_loss_weight: float = 1.0
    text_loss_weight: float = 0.5
    masking: str = "sample"
    mask_ratio_range: tuple[float, float] = (0.5, 0.9)
    dirichlet_alpha: float | tuple[float, float] = 1.0
    norm_pix: bool = False
    type_vectors: bool = True
    norm_eps: float = 1e-6
    max_patches: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self._integers(1, "decoder_width", "decoder_heads", *["max_patches"] * (self.max_patches is not None))
        self._integers(0, "decoder_depth")
        self._heads("decoder_width", "decoder_heads")
        _checks.choice("decoder", self.decoder, self.DECODERS)
        self._by_modality("predict_ratio", "(0, 1]")
        self._shares("image_mask_ratio", "text_mask_ratio")
        self._numbers("image_loss_weight", "text_loss_weight")
        _checks.choice("masking", self.masking, self.MASKINGS)
        _checks.interval("mask_ratio_range", self.mask_ratio_range, "[0, 1)")
        self.mask_ratio_range = tuple(self.mask_ratio_range)
        self._by_modality("dirichlet_alpha", "[0.001, 1000]")
        _checks.real("norm_eps", self.norm_eps, "(0, 1)")
        if self.max_patches is not None and self.masking == "shared":
            raise ValueError("masking must not be 'shared' with max_patches: images of mixed sizes share no mask")

    def _by_modality(self, name: str, within: str) -> None:
        value = getattr(self, name)
        if isinstance(value, list | tuple):
            value = tuple(value)
            if len(value) != 2:
                raise ValueError(f"{name} must be a number or (image, text), got {value}")
            setattr(self, name, value)
        for each in value if isinstance(value, tuple) else [value]:
            _checks.real(name, each, within)

    @property
    def predict_ratios(self) -> tuple[float, float]:
        """(of images, of texts)."""
        ratio = self.predict_ratio
        return ratio if isinstance(ratio, tuple) else (ratio, ratio)

    @property
    def most_patches(self) -> int:
        """A side of an image in a batch of mixed sizes has at most."""
        return max(self.patches, self.max_patches or 0)


@dataclasses.dataclass
class EncoderForm:
    """How an encoder computes, where published ones differ. The default is that of every encoder here.

    Attributes:
        activation: of the MLPs, "gelu" (erf), "gelu_tanh" or "quick_gelu" (x sigmoid(1.702 x): OpenAI's CLIP).
        norm_eps: of the LayerNorms.
        norm_tokens: a LayerNorm of the tokens with their positions, before the first block (CLIP).
        post_norm: LayerNorms after the residual sums (BERT; see `nn.Block`).
    """

    activation: str = "gelu"
    norm_eps: float = 1e-6
    norm_tokens: bool = False
    post_norm: bool = False

    def __post_init__(self):
        _checks.choice("activation", self.activation, ("gelu", "gelu_tanh", "quick_gelu"))
        _checks.real("norm_eps", self.norm_eps, "(0, 1)")

    @staticmethod
    def of(value: EncoderForm | dict[str, Any] | None, name: str, activation: str) -> EncoderForm:
        """One that a configuration holds, where it is called `name`. ValueError: it has other fields."""
        if isinstance(value, EncoderForm):
            return value
        known = {field.name for field in dataclasses.fields(EncoderForm)}
        if not isinstance(value, dict | None) or not known.issuperset(value or ()):
            raise ValueError(f"{name} must have fields of {', '.join(sorted(known))}, got {value!r}")
        return EncoderForm(**{"activation": activation} | (value or {}))


@dataclasses.dataclass
class EncodersConfig(ModelConfig):
    """An image encoder and a text encoder that meet in an embedding: a CLIP-style model, and the first half of a MAMO.

    Attributes, beside ModelConfig's:
        image_form, text_form: how they compute, an `EncoderForm` or some of its fields; the fusion encoder of a MAMO
            has the text encoder's. Converted weights set them. Activations are those of `activation` by default.
        text_positions: of words, as `positions` of patches.
        text_depth: blocks of the text encoder.
        projection: width of the embedding that images and texts share.
        temperature: of the contrastive loss, at the start; it is learned, within [0.001, 0.5].
    """

    activation: str = "gelu"
    text_depth: int = 6
    projection: int = 256
    temperature: float = 0.07
    image_form: EncoderForm | dict | None = None
    text_form: EncoderForm | dict | None = None
    text_positions: str = "sincos"

    def __post_init__(self):
        super().__post_init__()
        self.image_form = EncoderForm.of(self.image_form, "image_form", self.activation)
        self.text_form = EncoderForm.of(self.text_form, "text_form", self.activation)
        _checks.choice("text_positions", self.text_positions, ("sincos", "given"))
        if self.text_form.norm_tokens:
            raise ValueError("text_form must not have norm_tokens, got true: with post_norm it is the first LayerNorm")
        self._integers(1, "vocab_size", "projection")
        self._integers(0, "text_depth")
        self._numbers("temperature")
        if not 0.001 <= self.temperature <= 0.5:
            raise ValueError(f"temperature must be in [0.001, 0.5], got {self.temperature}")

    def for_retrieval(self) -> Self:
        """The same sizes, trained for retrieval only."""
        return self


@dataclasses.dataclass
class MAMOConfig(EncodersConfig):
    """Sizes and losses of a MAMO (arXiv:2210.04183); `MAMOConfig.base()` is the paper's.

    Attributes, beside EncodersConfig's:
        fusion_depth: blocks of the fusion encoder.
        image_mask_ratio, text_mask_ratio: share of tokens masked, in [0, 1); at least one token of each kind is.
        masking: "two_pass": the image is masked beside the whole text, then the text beside the whole image (the
            paper's figure). "simultaneous": both at once, in one pass (its abstract, to the letter).
        random_words, kept_words: of the masked words, the shares that another word, any of the vocabulary, stands in
            for, and that are shown as they are, at most 1 together; the others become [MASK] (ALBEF: 0.1 each).
        momentum: of the target network, in [0, 1].
        mrm_weight, mim_weight, mlm_weight, itc_weight, itm_weight: of the losses; what has weight 0 is not computed.
        hard_negatives_steps: steps over which ITM's negatives become as similar as ITC finds them, from any being as
            likely as another; 0: they are from the start, as ALBEF's.
        queue_size: entries of the momentum queue that ITC compares with besides the batch; 0: none, and ITC compares
            within the batch alone.
        queue_start: "empty", or "random": full of random embeddings, as ALBEF's code has it.
        soft_targets: share of the momentum network's own similarities in ITC's targets, in [0, 1], once
            soft_targets_steps steps are taken; it grows to that from 0 (ALBEF: 0.4, over the first epoch).
        soft_words: likewise, share of the momentum network's guesses in MLM's targets (ALBEF: 0.4), by the word head as
            it is; the logits of all masked words are stored then.
    """

    MASKINGS: ClassVar[tuple[str, ...]] = ("two_pass", "simultaneous")

    fusion_depth: int = 6
    image_mask_ratio: float = 0.75
    text_mask_ratio: float = 0.25
    masking: str = "two_pass"
    random_words: float = 0.0
    kept_words: float = 0.0
    momentum: float = 0.995
    mrm_weight: float = 1.0
    mim_weight: float = 1.0
    mlm_weight: float = 1.0
    itc_weight: float = 1.0
    itm_weight: float = 1.0
    hard_negatives_steps: int = 0
    queue_size: int = 0
    queue_start: str = "empty"
    soft_targets: float = 0.0
    soft_targets_steps: int = 0
    soft_words: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self._integers(1, "fusion_depth")
        self._integers(0, "hard_negatives_steps", "queue_size", "soft_targets_steps")
        _checks.choice("queue_start", self.queue_start, ("empty", "random"))
        self._shares("image_mask_ratio", "text_mask_ratio")
        _checks.choice("masking", self.masking, self.MASKINGS)
        weights = [f"{name}_weight" for name in ("mrm", "mim", "mlm", "itc", "itm")]
        for name in ("momentum", "soft_targets", "soft_words", "random_words", "kept_words"):
            _checks.real(name, getattr(self, name), "[0, 1]")
        if self.random_words + self.kept_words > 1:
            raise ValueError(
                f"random_words and kept_words must be at most 1 together, got {self.random_words} and {self.kept_words}"
            )
        for name in weights:
            _checks.real(name, getattr(self, name), "[0, inf)")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"one of {', '.join(weights)} must be positive, got 0 for all")

    def for_retrieval(self) -> Self:
        """With ITC and ITM alone."""
        return dataclasses.replace(self, mrm_weight=0, mim_weight=0, mlm_weight=0, itc_weight=1, itm_weight=1)


@dataclasses.dataclass
class SupervisedConfig(ModelConfig):
    """Sizes of a supervised ViT. Attributes, beside ModelConfig's: classes: how many there are."""

    vocab_size: int = 0
    activation: str = "gelu"
    classes: int = 1000

    def __post_init__(self):
        super().__post_init__()
        self._integers(1, "classes")
