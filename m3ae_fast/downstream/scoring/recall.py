"""Recall at k, from images to texts and back, where some texts or images are there twice and scores may tie."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast.downstream.scoring.report import Result


def recalls(
    scores: Tensor,
    truth: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    texts: Sequence[str] | None = None,
    images: Sequence[Hashable] | None = None,
) -> list[Result]:
    """How often a right candidate is among the k of the highest scores: "text R@k" (an image asks) and "image R@k".

    Equal scores count as if their order were drawn at random: scores that are all equal reach chance, no more. The
    chance level is the expected recall of a random order, exact however many right candidates a query has.

    Args:
        scores: [N, M] float, of image i and text j; -inf is allowed (not looked at), NaN is not.
        truth: [M] int, the image that each text belongs to; every image has at least one.
        ks: of the figures.
        texts: the M texts: those that are equal are right for every image that one of them belongs to; None: each
            counts alone.
        images: identifiers of the images, such as their bytes: equal ones share their texts; None: all differ.
    Raises:
        ValueError, TypeError: sizes or dtypes disagree, a NaN, an image without a text, k below 1.
    """
    _checks.shape("scores", scores, (None, None))
    _checks.dtype("scores", scores, _checks.FLOATS)
    for k in ks:
        _checks.integer("ks", k, 1)
    if not scores.numel():
        raise ValueError(f"scores must be of at least one image and one text, got shape {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"scores must be numbers, got {int(scores.isnan().sum())} NaN of {scores.numel()}")
    right = right_pairs(truth, *scores.shape, texts=texts, images=images).to(scores.device)
    results = []
    for name, s, r in (("text", scores, right), ("image", scores.T, right.T)):
        for k in ks:
            chance = found(torch.zeros_like(s), r, k).mean().item()
            results.append(Result.of(f"{name} R@{k}", found(s, r, k).tolist(), chance))
    return results


def right_pairs(
    truth: Tensor,
    num_images: int,
    num_texts: int,
    *,
    texts: Sequence[str] | None = None,
    images: Sequence[Hashable] | None = None,
) -> Tensor:
    """[N, M] bool: text j is a right one for image i. Arguments and errors as those of `recalls`."""
    _checks.shape("truth", truth, (num_texts,))
    _checks.dtype("truth", truth, _checks.INTEGERS)
    truth = truth.cpu().long()
    _checks.within("truth", truth, 0, num_images)
    alone = (torch.bincount(truth, minlength=num_images) == 0).nonzero().flatten().tolist()
    if alone:
        raise ValueError(f"truth must name each of {num_images} images, got no text of image {alone[0]}")
    image_group = _groups("images", images, num_images)
    text_group = _groups("texts", texts, num_texts)
    right = torch.zeros(num_images, num_texts, dtype=torch.bool, device="cpu")
    right[image_group[truth], text_group] = True
    return right[image_group][:, text_group]


def _groups(name: str, keys: Sequence[Hashable] | None, count: int) -> Tensor:
    """[count] int64: for each key, where the first one equal to it stands."""
    if keys is None:
        return torch.arange(count, device="cpu")
    if len(keys) != count:
        raise ValueError(f"{name} must have {count} entries, as scores has, got {len(keys)}")
    first: dict[Hashable, int] = {}
    return torch.tensor([first.setdefault(key, i) for i, key in enumerate(keys)], device="cpu")


def found(scores: Tensor, right: Tensor, k: int) -> Tensor:
    """Whether each query finds a right candidate among its first k: a probability, where ties straddle the k-th place.

        1 - C(t, m) / C(t + r, m): no right one among the m places left to t wrong and r right ones that tie

    Args:
        scores: [Q, C] float. right: [Q, C] bool, at least one true in each row.
    Returns:
        [Q] float64.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    tied = scores == best
    wrong_tied, right_tied = (tied & ~right).sum(1).double(), (tied & right).sum(1).double()
    places = k - (scores > best).sum(1)  # all that score higher are wrong
    missed = torch.ones_like(wrong_tied)
    for i in range(k):
        step = (wrong_tied - i).clamp(min=0) / (wrong_tied + right_tied - i).clamp(min=1)
        missed = torch.where(i < places, missed * step, missed)
    return 1 - missed
