"""A whole M3AE training step (forward, backward, AdamW) against the padded PyTorch model, eager and compiled."""

import measure
import padded_m3ae
import pytest
import torch

from m3ae_fast import ImageTextBatch, testing
from m3ae_fast.models import M3AE, M3AEConfig

SIZES = {
    "m3ae_tiny": (M3AEConfig.tiny(vocab_size=1000), testing.SHAPES["m3ae_small"]),
    "m3ae_small": (M3AEConfig.small(), testing.SHAPES["m3ae_small"]),
}


def make_batch(config: M3AEConfig, shape: testing.ModelShape, seed: int) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = shape.captions(seed)
    size = (shape.batch, *config.image_shape, 3)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    text = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator)
    return ImageTextBatch(images, text, lengths)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", ["m3ae_tiny", "m3ae_small"])
def bench_m3ae_step(benchmark, size, precision):
    config, shape = SIZES[size]
    torch.manual_seed(0)
    ours = M3AE(config)
    theirs = padded_m3ae.PaddedM3AE(config)
    theirs.load_state_dict(ours.state_dict())
    batches = [make_batch(config, shape, seed) for seed in range(2)]
    masks = [ours(batch, seed=0, step=i) for i, batch in enumerate(batches)]
    padded = [padded_m3ae.padded_inputs(b, m.image_mask, m.text_mask) for b, m in zip(batches, masks, strict=True)]
    torch.testing.assert_close(theirs(*padded[0]), masks[0].loss, rtol=1e-4, atol=1e-5)

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def step(model, loss_of):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

        def run(i):
            with autocast:
                loss = loss_of(i)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return run

    providers = {
        "m3ae_fast": step(ours, lambda i: ours(batches[i], seed=0, step=i).loss),
        "padded eager": step(theirs, lambda i: theirs(*padded[i])),
    }
    if not measure.SETTINGS.smoke:
        compiled = padded_m3ae.PaddedM3AE(config)
        faster = torch.compile(compiled)
        providers["padded compiled"] = step(compiled, lambda i: faster(*padded[i]))
    measure.compare(benchmark, "M3AE step", f"{size} {precision}", providers, inputs=len(batches))
