"""A whole ViTMAE training step (forward, backward, AdamW) of Hugging Face's model before and after `accelerate`."""

import functools

import pytest
import torch

from benchmarks import measure, memory
from benchmarks.models import bench_m3ae

pytest.importorskip("transformers", reason="pip install transformers to measure what accelerate() gains")
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from m3ae_fast.integrations.transformers import accelerate

BATCH = 2 if measure.SETTINGS.smoke else 64 if measure.SETTINGS.gpu else 8


def config_of(size: str) -> ViTMAEConfig:
    if size == "base":  # ViT-B/16 at 224 pixels, the defaults
        return ViTMAEConfig()
    return ViTMAEConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=64,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
    )  # fmt: skip


def make_model(size: str, provider: str, inputs: list[tuple[torch.Tensor, torch.Tensor]]):
    """(model, loss_of): loss_of(i) is the loss of input i. All start from the same parameters."""
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config_of(size)).train().to(measure.SETTINGS.device)
    if provider == "m3ae_fast":
        accelerate(model)
    forward = torch.compile(model) if provider == "transformers, compiled" else model
    return model, lambda i: forward(inputs[i][0], noise=inputs[i][1]).loss


def make_inputs(size: str, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    config = config_of(size)
    patches = (config.image_size // config.patch_size) ** 2
    shape = (BATCH, 3, config.image_size, config.image_size)
    return [tuple(x.to(measure.SETTINGS.device) for x in (torch.randn(shape), torch.rand(BATCH, patches)))
            for _ in range(count)]  # fmt: skip


def owned(size: str, precision: str, provider: str):
    """For memory.peak_beyond: a step; its gradients come and go with it, so they count."""
    model, loss_of = make_model(size, provider, make_inputs(size, 1))
    run = bench_m3ae.make_step(model, loss_of, precision)
    return lambda: run(0), 0


@pytest.mark.parametrize("precision", bench_m3ae.PRECISIONS)
def bench_vit_mae_step(benchmark, precision):
    torch._dynamo.reset()
    size = "tiny" if measure.SETTINGS.smoke else "base"
    inputs = make_inputs(size, 2)
    providers = ["m3ae_fast", "transformers, eager"] + ["transformers, compiled"] * (not measure.SETTINGS.smoke)
    models = {name: make_model(size, name, inputs) for name in providers}
    with torch.no_grad():
        torch.testing.assert_close(models["m3ae_fast"][1](0), models["transformers, eager"][1](0), rtol=1e-5, atol=1e-5)
    steps = {name: bench_m3ae.make_step(*model, precision) for name, model in models.items()}
    case = f"{size} {precision}, batch {BATCH}"
    rows = measure.compare(benchmark, "ViTMAE step", case, steps, inputs=len(inputs), queued=False)
    for name, row in rows.items():
        extra = memory.peak(functools.partial(steps[name], 0), 0, owned, size, precision, name)
        row.extra = f"{extra / 2**20:.0f} MiB beyond weights and optimizer state"
