"""The losses of masked multimodal autoencoders as modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from m3ae_fast.ops import feature_regression, linear_cross_entropy, masked_mse
from m3ae_fast.seqlens import SeqLens


class MaskedMSELoss(nn.Module):
    """`masked_mse` as a module that keeps its settings: squared error of masked patches against pixels read from the
    images."""

    def __init__(
        self,
        patch_size: int,
        *,
        norm_pix: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        reduction: str = "sample_mean",
    ):
        super().__init__()
        self.settings = {
            "patch_size": patch_size, "norm_pix": norm_pix, "mean": mean, "std": std, "reduction": reduction,
        }  # fmt: skip

    def forward(self, pred: Tensor, images: Tensor, ids_mask: Tensor, cu_mask: SeqLens | Tensor) -> Tensor:
        """pred [M, patch_dim] for the masked patches `ids_mask` [M] of images [N, C, H, W] -> loss."""
        return masked_mse(pred, images, ids_mask, cu_mask, **self.settings)


class FeatureRegressionLoss(nn.Module):
    """`feature_regression` as a module that keeps its settings: predicted features against those of another network."""

    def __init__(self, *, distance: str = "l2", normalize: bool = True, eps: float = 1e-6, reduction: str = "mean"):
        super().__init__()
        self.settings = {"distance": distance, "normalize": normalize, "eps": eps, "reduction": reduction}

    def forward(
        self, pred: Tensor, target: Tensor, rows: Tensor | None = None, cu_seqlens: SeqLens | Tensor | None = None
    ) -> Tensor:
        """pred [R, D] for the rows `rows` [R] of target [T, D] -> loss (reduction "sample_mean" needs cu_seqlens)."""
        return feature_regression(pred, target, rows, cu_seqlens=cu_seqlens, **self.settings)


class LinearCrossEntropyLoss(nn.Module):
    """A head Linear(width, vocab_size) with its cross-entropy: logits are never stored.

    Args:
        width: of the rows. vocab_size: classes. bias: whether the head has one.
        class_weight: [vocab_size] floating or None, kept as a buffer, as torch.nn.CrossEntropyLoss keeps its `weight`.
        reduction, settings: as `linear_cross_entropy`'s.
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        *,
        bias: bool = True,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        **settings,
    ):
        super().__init__()
        self.head = nn.Linear(width, vocab_size, bias=bias)
        self.register_buffer("class_weight", class_weight)
        self.settings = {"reduction": reduction, **settings}

    def forward(
        self, x: Tensor, target: Tensor, cu_seqlens: SeqLens | Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """x [..., width], target [...] -> loss, or the tuple that the settings ask for (reduction "sample_mean" needs
        cu_seqlens)."""
        options = self.settings | {"cu_seqlens": cu_seqlens, "class_weight": self.class_weight}
        return linear_cross_entropy(x, self.head.weight, target, self.head.bias, **options)
