"""M3AEConfig: the sizes of a model and how it masks."""

from __future__ import annotations

import dataclasses
from typing import Any

from m3ae_fast import _checks

CC12M_MEAN, CC12M_STD = (0.5762, 0.5503, 0.5213), (0.3207, 0.3169, 0.3307)


@dataclasses.dataclass
class M3AEConfig:
    """Sizes of an M3AE (arXiv:2205.14204). The defaults are the paper's ViT-S: width 384, depth 12, 6 heads.

    Attributes:
        image_size: pixels a side, or (height, width); a multiple of patch_size.
        vocab_size: 0 makes a model of images alone, without any text parameter.
        max_text_length: rows of the text position table; a longer text is refused.
        image_mask_ratio, text_mask_ratio: share of tokens removed, in [0, 1).
        masking: "sample": every sample has masks of its own, drawn over its real tokens, at least one kept and one
            masked (a text of one word is masked whole). "shared": as the paper's public code: one image mask and one
            text mask for the whole batch, the text mask drawn over max_text_length slots, padding included.
        norm_pix: normalise the target pixels of every patch (MAE's option; M3AE does not).
        image_mean, image_std: of uint8 pixels scaled to [0, 1]. Float images are taken as normalised already.
    """

    image_size: int | tuple[int, int] = 256
    patch_size: int = 16
    vocab_size: int = 30522
    max_text_length: int = 64
    width: int = 384
    depth: int = 12
    heads: int = 6
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    image_mask_ratio: float = 0.75
    text_mask_ratio: float = 0.75
    image_loss_weight: float = 1.0
    text_loss_weight: float = 0.5
    masking: str = "sample"
    norm_pix: bool = False
    activation: str = "gelu_tanh"
    image_mean: tuple[float, float, float] = CC12M_MEAN
    image_std: tuple[float, float, float] = CC12M_STD

    def __post_init__(self):
        if not isinstance(self.image_size, int):
            if not isinstance(self.image_size, list | tuple) or len(self.image_size) != 2:
                raise ValueError(f"image_size must be pixels a side or (height, width), got {self.image_size!r}")
            self.image_size = tuple(self.image_size)
        self.image_mean, self.image_std = tuple(self.image_mean), tuple(self.image_std)
        for name in ("patch_size", "width", "heads", "decoder_width", "decoder_heads"):
            _checks.integer(name, getattr(self, name), 1)
        for name in ("vocab_size", "max_text_length", "depth", "decoder_depth"):
            _checks.integer(name, getattr(self, name), 0)
        if any(side < 1 or side % self.patch_size for side in self.image_shape):
            raise ValueError(f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must have three values, one a channel, got {getattr(self, name)}")
        if not all(std > 0 for std in self.image_std):
            raise ValueError(f"image_std must be positive, got {self.image_std}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        for name in ("width", "decoder_width"):
            if getattr(self, name) % 4:
                raise ValueError(
                    f"{name} must be a multiple of 4 (2-D sine-cosine positions), got {getattr(self, name)}"
                )
        for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width} must be a multiple of {heads}, got {getattr(self, width)} and {getattr(self, heads)}"
                )
        for name in ("image_mask_ratio", "text_mask_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        _checks.choice("masking", self.masking, ("sample", "shared"))
        _checks.choice("activation", self.activation, ("gelu", "gelu_tanh"))

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

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
        return 3 * self.patch_size**2

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> M3AEConfig:
        """Raises ValueError for a field it does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"the configuration must have fields of {cls.__name__} only, got {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def tiny(cls, **changes: Any) -> M3AEConfig:
        """64-pixel images in 64 patches; learns within minutes on a laptop."""
        sizes = {
            "image_size": 64, "patch_size": 8, "max_text_length": 40, "width": 128, "depth": 2, "heads": 4,
            "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4,
        }  # fmt: skip
        return cls(**(sizes | changes))

    @classmethod
    def small(cls, **changes: Any) -> M3AEConfig:
        """ViT-S/16 at 256 pixels."""
        return cls(**changes)

    @classmethod
    def base(cls, **changes: Any) -> M3AEConfig:
        """ViT-B/16 at 256 pixels."""
        return cls(**({"width": 768, "depth": 12, "heads": 12} | changes))

    @classmethod
    def large(cls, **changes: Any) -> M3AEConfig:
        """ViT-L/16 at 256 pixels."""
        return cls(**({"width": 1024, "depth": 24, "heads": 16} | changes))

    @classmethod
    def huge(cls, **changes: Any) -> M3AEConfig:
        """ViT-H/16 at 256 pixels: head dimension 80."""
        return cls(**({"width": 1280, "depth": 32, "heads": 16} | changes))
