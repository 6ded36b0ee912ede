"""A training step of timm's ViT and NaFlexViT, batch 8, before and after `integrations.timm.accelerate`."""

import functools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure, memory
from benchmarks.models import timm_alone
from benchmarks.models.bench_m3ae import make_step

try:
    timm = timm_alone.load()
    from m3ae_fast.integrations.timm import accelerate
except ImportError as error:
    pytest.skip(f"timm is not installed: {error}", allow_module_level=True)

BATCH, PATCHES = 8, 196
CASES = {  # timm's name, the share of patches dropped, or how full a ragged batch is
    "ViT-Ti/16 drop 0.75": ("vit_tiny_patch16_224", 0.75),
    "ViT-B/16": ("vit_base_patch16_224", 0.0),
    "ViT-B/16 drop 0.75": ("vit_base_patch16_224", 0.75),
    "NaFlexViT-B/16 fitted": ("naflexvit_base_patch16_gap", "fitted"),
    "NaFlexViT-B/16 native": ("naflexvit_base_patch16_gap", "native"),
}
PRECISIONS = ["bf16"] if measure.SETTINGS.gpu else ["fp32", "bf16"]


def grids(kind: str, seed: int) -> list[tuple[int, int]]:
    """(rows, columns) of patches. "fitted": resized to fill the room, as timm's loader does, 2:1 to 1:2; "native":
    sides between a quarter of a full square's and all of it."""
    draw = functools.partial(torch.rand, BATCH, generator=torch.Generator().manual_seed(seed))
    side = PATCHES**0.5
    if kind == "native":
        return [(max(1, int(side * (0.25 + 0.8 * a))), max(1, int(side * (0.25 + 0.8 * b)))) for a, b in
                zip(draw(), draw(), strict=True)]  # fmt: skip
    rows = [max(1, int(side * 2 ** (float(a) - 0.5))) for a in draw()]
    return [(r, PATCHES // r) for r in rows]


def make_inputs(case: str, seed: int):
    """What the model takes, and a label a sample."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 1000, (BATCH,), generator=generator)
    if case.startswith("ViT"):
        return torch.randn(BATCH, 3, 224, 224, generator=generator), labels
    valid, coord = torch.zeros(BATCH, PATCHES, dtype=torch.bool), torch.zeros(BATCH, PATCHES, 2, dtype=torch.int64)
    for b, (rows, columns) in enumerate(grids(CASES[case][1], seed)):
        valid[b, : rows * columns] = True
        coord[b, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    patches = torch.randn(BATCH, PATCHES, 768, generator=generator) * valid[..., None]
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}, labels


def make_model(case: str, provider: str):
    """(model, loss_of): loss_of(i) is the loss of batch i; all models start alike and drop the same patches."""
    device = measure.SETTINGS.device
    torch.manual_seed(0)
    name, variant = CASES[case]
    model = timm.create_model(name, **({"patch_drop_rate": variant} if case.startswith("ViT") else {}))
    model.to(device)
    if provider == "accelerated":
        accelerate(model)
    batches = torch.utils._pytree.tree_map(lambda x: x.to(device), [make_inputs(case, seed) for seed in range(2)])

    def loss_of(i):
        torch.manual_seed(i)
        images, labels = batches[i]
        return F.cross_entropy(model(images), labels)

    return model, loss_of


def owned(case: str, precision: str, provider: str):
    """For memory.peak_beyond: a step; its gradients come and go with it, so they count."""
    model, loss_of = make_model(case, provider)
    run = make_step(model, loss_of, precision)
    return lambda: run(0), 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def bench_timm_step(benchmark, case, precision):
    models = {name: make_model(case, name) for name in ("accelerated", "timm")}
    torch.testing.assert_close(models["timm"][1](0), models["accelerated"][1](0), rtol=1e-4, atol=1e-5)
    steps = {name: make_step(*model, precision) for name, model in models.items()}
    filled = ""
    if case.startswith("NaFlex"):
        filled = f", {make_inputs(case, 0)[0]['patch_valid'].float().mean():.0%} of the batch is no padding"
    rows = measure.compare(benchmark, "timm step", f"{case} {precision}", steps, inputs=2, queued=False)
    for name, row in rows.items():
        extra = memory.peak(functools.partial(steps[name], 0), 0, owned, case, precision, name)
        row.extra = f"{extra / 2**20:.0f} MiB beyond weights and optimizer state{filled}"
