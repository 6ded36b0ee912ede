"""The oracle of all three, one sequence after the other, and how near to it they must come."""

import pytest
import torch

from m3ae_fast import testing


@pytest.fixture
def by_sequence():
    """by_sequence(q, k, v, q_lengths, k_lengths, scale=None) -> (out [Tq, H, D], lse [H, Tq]), differentiable."""

    def run(q, k, v, q_lengths, k_lengths, scale=None):
        scale = q.shape[2] ** -0.5 if scale is None else scale
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        parts = [x.split(list(n)) for x, n in ((q, q_lengths), (k, k_lengths), (v, k_lengths))]
        outs, lses = [], []
        for q_SHD, k_SHD, v_SHD in zip(*parts, strict=True):
            scores = torch.einsum("qhd,khd->hqk", q_SHD, k_SHD) * scale
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_SHD))  # no keys: an empty sum, 0
            lses.append(scores.logsumexp(-1))
        return torch.cat(outs), torch.cat(lses, 1)

    return run


@pytest.fixture
def assert_as_good():
    """Outputs and gradients of a function of the call, against an oracle's in fp64: off by no more than twice (three
    times) what the oracle itself is off by in the call's dtype, plus a rounding."""

    def check(call, function, oracle):
        ours, eager, truth = call.run(function), call.run(oracle), call.to(torch.float64).run(oracle)
        if call.leaves()[0].dtype == torch.float64:
            eager = call.to(torch.float32).run(oracle)
        testing.assert_error_rules(ours, eager, truth)

    return check
