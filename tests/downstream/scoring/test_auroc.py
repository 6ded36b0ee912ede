"""AUROC against every pair compared, and what it refuses."""

import pytest
import torch

from m3ae_fast.downstream.scoring.auroc import auroc


@pytest.mark.parametrize("values", [3, 1000])
def test_auroc(values):
    """Every pair compared; with three values most pairs are ties."""
    generator = torch.Generator().manual_seed(0)
    inside, outside = (torch.randint(values, (n,), generator=generator).float() for n in (37, 23))
    pairs = [(a > b) + 0.5 * (a == b) for a in inside.tolist() for b in outside.tolist()]
    assert auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auroc(inside, outside) + auroc(outside, inside) == pytest.approx(1)
    assert auroc(torch.ones(4), torch.ones(9)) == 0.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: auroc(torch.ones(0), torch.ones(1)), "inside must hold scores, none of them NaN, got none"),
        (
            lambda: auroc(torch.ones(1), torch.tensor([torch.nan])),
            "outside must hold scores, none of them NaN, got NaN",
        ),
        (lambda: auroc(torch.ones(1), torch.ones(1, 1)), r"outside must have shape \(any,\), got \(1, 1\)"),
    ],
)
def test_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
