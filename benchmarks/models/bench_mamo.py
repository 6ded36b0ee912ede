"""A whole MAMO training step (EMA, forward, backward, AdamW) against the padded PyTorch model, pass by pass."""

import functools

import pytest
import torch

from benchmarks import measure, memory, padded_mamo
from benchmarks.models import bench_m3ae
from m3ae_fast import testing
from m3ae_fast.models import MAMO, MAMOConfig

SIZES = {
    "mamo_tiny": (MAMOConfig.tiny(vocab_size=1000), testing.SHAPES["m3ae_small"]),
    "mamo_small": (MAMOConfig.small(), testing.SHAPES["m3ae_small"]),
}
if measure.SETTINGS.gpu:
    shape = bench_m3ae.shape
    SIZES = {"mamo_small": (MAMOConfig.small(), shape), "mamo_base": (MAMOConfig.base(), shape)}


def make_model(size: str, provider: str, batches: list):
    """(model, loss_of): loss_of(i) is the loss of batch i. Models of one size start from the same parameters."""
    torch.manual_seed(0)
    ours = MAMO(SIZES[size][0]).to(measure.SETTINGS.device)
    if provider == "m3ae_fast":
        model, inputs = ours, None
    else:
        inputs = [padded_mamo.padded_inputs(ours, batch, 0, i) for i, batch in enumerate(batches)]
        model = padded_mamo.PaddedMAMO(ours).to(measure.SETTINGS.device)

    def loss_of(i):
        model.update_target()
        return model(*inputs[i]) if inputs else model(batches[i], seed=0, step=i).loss

    return model, loss_of


def make_batches(size: str, count: int) -> list:
    return [bench_m3ae.make_batch(*SIZES[size], seed) for seed in range(count)]


def owned(size: str, precision: str, provider: str):
    """For memory.peak_beyond: a step, and the bytes of its gradients."""
    model, loss_of = make_model(size, provider, make_batches(size, 1))
    run = bench_m3ae.make_step(model, loss_of, precision)
    return lambda: run(0), sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", bench_m3ae.PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def bench_mamo_step(benchmark, size, precision):
    batches = make_batches(size, 2)
    models = {name: make_model(size, name, batches) for name in ("m3ae_fast", "padded, pass by pass")}
    theirs, ours = (models[name][1](0) for name in ("padded, pass by pass", "m3ae_fast"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    steps = {name: bench_m3ae.make_step(*model, precision) for name, model in models.items()}
    case = f"{size} {precision}" + measure.SETTINGS.gpu * f", batch {len(batches[0])}"
    rows = measure.compare(benchmark, "MAMO step", case, steps, inputs=len(batches), queued=False)
    for name, row in rows.items():
        gradients = sum(p.nbytes for p in models[name][0].parameters() if p.requires_grad)
        run = functools.partial(steps[name], 0)
        extra = memory.peak(run, gradients, owned, size, precision, name)
        row.extra = f"{extra / 2**20:.0f} MiB beyond weights, gradients and optimizer state"
