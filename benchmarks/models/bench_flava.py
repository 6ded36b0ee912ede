"""A whole FLAVA pretraining step (forward, backward, AdamW) of Hugging Face's model before and after `accelerate`."""

import pytest
import torch

from benchmarks import measure, memory
from benchmarks.models import bench_m3ae

pytest.importorskip("transformers", reason="pip install transformers to measure what accelerate() gains")
from transformers import FlavaConfig, FlavaForPreTraining

from m3ae_fast.integrations.transformers import accelerate

BATCH = 2 if measure.SETTINGS.smoke else 64 if measure.SETTINGS.gpu else 8
WORDS = 77


def config_of(size: str) -> FlavaConfig:
    """The labels of masked patches are given: no codebook."""
    if size == "base":  # the defaults: three ViT-B of 12, 12 and 6 layers, vocabularies of 8192 and 30522
        return FlavaConfig(init_codebook=False)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    return FlavaConfig(
        image_config=shape | {"image_size": 64, "vocab_size": 256}, text_config=shape | {"vocab_size": 256},
        multimodal_config=shape, hidden_size=64, projection_dim=64, init_codebook=False,
    )  # fmt: skip


def make_model(size: str, provider: str, inputs: list[dict]):
    """(model, loss_of): loss_of(i) is the loss of input i. All start from the same parameters."""
    torch.manual_seed(0)
    model = FlavaForPreTraining(config_of(size)).train().to(measure.SETTINGS.device)
    if provider == "m3ae_fast":
        accelerate(model)
    # Transformers writes into mim_labels
    return model, lambda i: model(**inputs[i] | {"mim_labels": inputs[i]["mim_labels"].clone()}).loss


def make_inputs(size: str, count: int) -> list[dict]:
    """Image-text pairs; captions of 8 to 77 words, padded to 77; 40 % of the patches and 15 % of the words masked."""
    config = config_of(size)
    side, vocabulary = config.image_config.image_size, config.text_config.vocab_size
    patches = (side // config.image_config.patch_size) ** 2
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    def randint(high, *shape):
        return torch.randint(high, shape, generator=generator)

    def make():
        ids = randint(vocabulary, BATCH, WORDS)
        padding = (torch.arange(WORDS) < 8 + randint(WORDS - 7, BATCH, 1)).long()
        masked = (rand(BATCH, WORDS) < 0.15) & padding.bool()
        return {
            "pixel_values": rand(BATCH, 3, side, side),
            "bool_masked_pos": rand(BATCH, patches) < 0.4,
            "mim_labels": randint(config.image_config.vocab_size, BATCH, patches),
            "input_ids": ids,
            "input_ids_masked": ids.masked_fill(masked, 103),
            "attention_mask": padding,
            "mlm_labels": ids.masked_fill(~masked, -100),
            "itm_labels": torch.ones(BATCH, dtype=torch.int64),
        }

    return [{name: x.to(measure.SETTINGS.device) for name, x in make().items()} for _ in range(count)]


def owned(size: str, precision: str, provider: str):
    """For memory.peak_beyond: a step; its gradients come and go with it, so they count."""
    model, loss_of = make_model(size, provider, make_inputs(size, 1))
    run = bench_m3ae.make_step(model, loss_of, precision)
    return lambda: run(0), 0


@pytest.mark.parametrize("precision", bench_m3ae.PRECISIONS)
def bench_flava_step(benchmark, precision):
    size = "tiny" if measure.SETTINGS.smoke else "base"
    inputs = make_inputs(size, 2)
    names, extra = ("m3ae_fast", "transformers"), {}
    if not measure.SETTINGS.gpu:  # first: two models with their moments take 10 GB
        extra = {name: memory.peak_beyond(owned, size, precision, name) for name in names}
    models = {name: make_model(size, name, inputs) for name in names}
    with torch.no_grad():
        torch.testing.assert_close(models["m3ae_fast"][1](0), models["transformers"][1](0), rtol=1e-5, atol=1e-5)
    steps = {name: bench_m3ae.make_step(*model, precision) for name, model in models.items()}
    case = f"{size} {precision}, batch {BATCH}"
    rows = measure.compare(benchmark, "FLAVA step", case, steps, inputs=len(inputs), queued=False)
    for name, row in rows.items():
        if measure.SETTINGS.gpu:
            extra[name] = memory.peak_on_gpu(lambda step=steps[name]: step(0), 0)
        row.extra = f"{extra[name] / 2**20:.0f} MiB beyond weights and optimizer state"
