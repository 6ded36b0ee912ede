"""A whole M3AE training step (forward, backward, AdamW) against the padded PyTorch model, eager and compiled."""

import dataclasses
import functools
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, memory, padded_m3ae
from m3ae_fast import ImageTextBatch, _backends, testing
from m3ae_fast.models import M3AE, GraphedStep, M3AEConfig

SHAPE = testing.SHAPES["m3ae_small"]
SIZES = {"m3ae_tiny": (M3AEConfig.tiny(vocab_size=1000), SHAPE), "m3ae_small": (M3AEConfig.small(), SHAPE)}
PRECISIONS = ["fp32", "bf16"]
COMPILED, GRAPHED = "m3ae_fast, compiled", "m3ae_fast, graphed"  # on a GPU alone
if measure.SETTINGS.gpu:
    shape = dataclasses.replace(SHAPE, batch=2 if measure.SETTINGS.smoke else 64)
    configs = {"small": M3AEConfig.small(), "large": M3AEConfig.large(), "base": M3AEConfig.base()}
    SIZES = {f"m3ae_{name}": (config, shape) for name, config in configs.items()}
    PRECISIONS = ["bf16"]


def make_batch(config: M3AEConfig, shape: testing.ModelShape, seed: int) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = shape.captions(seed)
    size = (shape.batch, *config.image_shape, 3)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    text = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator)
    return ImageTextBatch(images, text, lengths).to(measure.SETTINGS.device)


def make_model(config: M3AEConfig, provider: str, batches: list[ImageTextBatch]):
    """(model, loss_of): loss_of(i) is the loss of batch i. Models of one config start from the same parameters."""
    torch.manual_seed(0)
    ours = M3AE(config).to(measure.SETTINGS.device)
    if provider == "m3ae_fast":
        return ours, lambda i: ours(batches[i], seed=0, step=i).loss
    if provider == COMPILED:
        loss = torch.compile(lambda batch, plan: ours(batch, plan=plan).loss, fullgraph=True, dynamic=True)
        return ours, lambda i: loss(batches[i], ours.plan(batches[i], seed=0, step=i))
    with torch.no_grad():
        masks = [ours(batch, seed=0, step=i) for i, batch in enumerate(batches)]
    padded = [padded_m3ae.padded_inputs(b, m.image_mask, m.text_mask) for b, m in zip(batches, masks, strict=True)]
    theirs = padded_m3ae.PaddedM3AE(config).to(measure.SETTINGS.device)
    theirs.load_state_dict(ours.state_dict())
    forward = torch.compile(theirs) if provider == "padded, compiled" else theirs
    return theirs, lambda i: forward(*padded[i])


def make_step(model, loss_of, precision: str):
    """run(i): forward, backward and AdamW on batch i. The moments exist already."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def run(i):
        with torch.autocast(measure.SETTINGS.device, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(i)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def make_graphed_step(config: M3AEConfig, batches: list[ImageTextBatch], precision: str):
    """As `make_step`, forward and backward as CUDA graphs, with the plan made in the step."""
    model, _ = make_model(config, "m3ae_fast", batches)

    def passes(batch, plan):
        with torch.autocast(measure.SETTINGS.device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(batch, plan=plan).loss
        loss.backward()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    step = GraphedStep(passes, model)

    def run(i):
        step(batches[i], model.plan(batches[i], seed=0, step=i, bucket=True))
        optimizer.step()
        optimizer.zero_grad()

    return run


def owned(size: str, precision: str, provider: str):
    """For memory.peak_beyond: a step, and the bytes of its gradients."""
    config, shape = SIZES[size]
    model, loss_of = make_model(config, provider, [make_batch(config, shape, 0)])
    run = make_step(model, loss_of, precision)
    return lambda: run(0), sum(parameter.nbytes for parameter in model.parameters())


def flops_of(loss_of) -> int:
    """Of the products of a forward and a backward pass; ours are counted on the reference backend."""
    with mock.patch.object(_backends, "_FORCED", "reference"), FlopCounterMode(display=False) as counter:
        loss_of(0).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def bench_m3ae_step(benchmark, size, precision):
    torch._dynamo.reset()  # or, after eight sizes of one model, "compiled" would quietly mean eager
    config, shape = SIZES[size]
    batches = [make_batch(config, shape, seed) for seed in range(2)]
    providers = ["m3ae_fast", "padded, eager"] + ["padded, compiled"] * (not measure.SETTINGS.smoke)
    if measure.SETTINGS.gpu and not measure.SETTINGS.smoke:
        providers.append(COMPILED)
    models = {name: make_model(config, name, batches) for name in providers}
    torch.testing.assert_close(models["padded, eager"][1](0), models["m3ae_fast"][1](0), rtol=1e-4, atol=1e-5)
    steps = {name: make_step(*model, precision) for name, model in models.items()}
    if measure.SETTINGS.gpu:
        steps[GRAPHED] = make_graphed_step(config, batches, precision)
        for i in range(2 * len(batches)):  # every bucket is captured before the clock runs
            steps[GRAPHED](i % len(batches))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    case = f"{size} {precision}" + measure.SETTINGS.gpu * f", batch {shape.batch}"
    rows = measure.compare(benchmark, "M3AE step", case, steps, inputs=len(batches), queued=False)
    for name, row in rows.items():
        if name == GRAPHED:  # what it holds it holds already
            continue
        gradients = sum(parameter.nbytes for parameter in models[name][0].parameters())
        run = functools.partial(steps[name], 0)
        extra = memory.peak(run, gradients, owned, size, precision, name)
        row.extra = f"{extra / 2**20:.0f} MiB beyond weights, gradients and optimizer state"
        if name not in ("padded, compiled", COMPILED):
            rate = flops_of(models[name][1]) / row.median_ms
            row.roof, row.roof_share = "product", rate / measure.product_rate(dtype)
