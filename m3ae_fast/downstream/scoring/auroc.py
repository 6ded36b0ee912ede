"""AUROC: how well a score tells one kind of example from another."""

from __future__ import annotations

import torch
from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast.downstream.scoring.report import Result


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability that an image of the training kind has a higher score than one of another; ties count half.

    Args:
        inside, outside: scores [N] and [M] of the two, any real dtype.
    Raises:
        ValueError: one is empty, or holds a NaN.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        _checks.shape(name, scores, (None,))
        if not len(scores) or scores.isnan().any():
            raise ValueError(f"{name} must hold scores, none of them NaN, got {'NaN' if len(scores) else 'none'}")
    return _above(inside, outside).mean().item()


def score_ood(name: str, inside: Tensor, outside: Tensor) -> Result:
    """`auroc`, its chance level 0.5, and its standard error by DeLong (Biometrics 44 (1988) 837-845).

    Args:
        name: of the result. inside, outside: as of `auroc`.
    """
    value, count, error = auroc(inside, outside), len(inside) + len(outside), None
    if min(len(inside), len(outside)) > 1:
        parts = _above(inside, outside), _above(outside, inside)
        error = sum(part.var() / len(part) for part in parts).sqrt().item()
    return Result(name, value, 0.5, count, error)


def _above(ours: Tensor, theirs: Tensor) -> Tensor:
    """[N] float64: the share of theirs that each of ours is above; ties count half."""
    ours, theirs = ours.double(), theirs.double().sort().values
    below, up_to = (torch.searchsorted(theirs, ours, right=right) for right in (False, True))
    return (below + up_to).double() / (2 * len(theirs))
