"""Models where torch makes tensors elsewhere: on the meta device until there are weights, or under a default device."""

import pytest
import torch

from m3ae_fast import ImageTextBatch, SeqLens, sample_mask
from m3ae_fast.models import (
    CLIP,
    M3AE,
    MAE,
    MAMO,
    EncodersConfig,
    M3AEConfig,
    MAMOConfig,
    Supervised,
    SupervisedConfig,
)  # fmt: skip
from m3ae_fast.models.ground import ground
from m3ae_fast.models.reason import Reason
from m3ae_fast.models.vqa import VQA

SIZES = {"image_size": 16, "patch_size": 4, "vocab_size": 53, "max_text_length": 8, "width": 32, "heads": 4}
ENCODERS = SIZES | {"depth": 1, "text_depth": 1, "projection": 12}
DECODER = {"depth": 1, "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 3}


def mamo():
    return MAMO(MAMOConfig(**ENCODERS, fusion_depth=1, queue_size=6, soft_targets=0.4))


MODELS = {
    "m3ae": lambda: M3AE(M3AEConfig(**SIZES, **DECODER)),
    "mae": lambda: MAE(M3AEConfig(**SIZES, **DECODER)),
    "mamo": mamo,
    "clip": lambda: CLIP(EncodersConfig(**ENCODERS)),
    "supervised": lambda: Supervised(SupervisedConfig(**SIZES | {"vocab_size": 0}, depth=1, classes=5)),
    "vqa": lambda: VQA(mamo()),
    "reason": lambda: Reason(mamo()),
}


@pytest.fixture(params=MODELS)
def make(request):
    """make(seed, device): one of the models."""

    def made(seed=0, device="cpu"):
        torch.manual_seed(seed)
        with torch.device(device):
            return MODELS[request.param]()

    return made


def poisoned(model):
    """Memory as to_empty may find it."""
    with torch.no_grad():
        for each in (*model.parameters(), *model.buffers()):
            each.fill_(torch.nan if each.is_floating_point() else -1)
    return model


def everything(model):
    return {**model.state_dict(), **dict(model.named_buffers())}


def assert_same(model, other):
    for name, value in everything(other).items():
        assert torch.equal(everything(model)[name], value), name


# -- the meta device --------------------------------------------------------------------------------------------------


def test_positions_are_no_part_of_a_state_dict(make):
    model = make()
    hidden = [name for name, _ in model.named_buffers() if name not in model.state_dict()]
    assert hidden and all(name.endswith("position") for name in hidden)


def test_emptied_and_loaded(make):
    model = make(1, "meta").to_empty(device="cpu")
    assert all(x.device.type == "cpu" for x in everything(model).values())
    model.load_state_dict(make().state_dict())
    assert_same(model, make())
    model = poisoned(make(1))  # what was no meta tensor is emptied, too
    model.load_state_dict(make().state_dict())
    assert_same(model, make())


def test_emptied_and_initialized(make):
    model = poisoned(make(1))
    torch.manual_seed(3)
    model.reset_parameters()
    assert all(x.isfinite().all() for x in everything(model).values())
    for name, table in make().named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], table), name
    emptied = make(1, "meta").to_empty(device="cpu")
    torch.manual_seed(3)
    emptied.reset_parameters()
    assert_same(emptied, model)


def test_loaded_by_assignment(make):
    model = make(1, "meta")
    model.load_state_dict(make().state_dict(), assign=True)
    assert_same(model, make())


def test_emptied_alone_has_positions(make):
    """They are there before the weights: torch.distributed.checkpoint may load these in place."""
    tables = {name: x for name, x in make().named_buffers() if name.endswith("position")}
    half = make(1, "meta").bfloat16().to_empty(device="cpu")
    for model, dtype in ((make(1, "meta").to_empty(device="cpu"), torch.float32), (half, torch.bfloat16)):
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers[name], table.to(dtype)) for name, table in tables.items())


def test_initialized_again_the_momentum_network_is_a_copy():
    model = mamo()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.contrast.queued += 3
    model.reset_parameters()
    assert model.contrast.queued == 0 and model.contrast.temperature == torch.tensor(0.07)
    for ours, theirs in zip(model.online.parameters(), model.target.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours is not theirs and not theirs.requires_grad


# -- a default device that is not the CPU -----------------------------------------------------------------------------

LENGTHS = [5, 3, 8, 1]


@pytest.fixture
def elsewhere():
    """What is made without a device is a meta tensor: it has no numbers, and no operation takes it beside others."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def make_batch(**options):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8, device="cpu")
    text = torch.randint(0, 53, (sum(LENGTHS),), generator=generator, dtype=torch.int32, device="cpu")
    return ImageTextBatch(images, text, LENGTHS, **options)


def test_host_tensors_are_on_the_cpu(elsewhere):
    assert SeqLens(LENGTHS).device.type == "cpu"
    assert make_batch().sample_ids.tolist() == [0, 1, 2, 3]
    assert make_batch(sample_ids=[7, 3, 99, 2**40]).sample_ids.tolist() == [7, 3, 99, 2**40]
    ids = sample_mask(LENGTHS, 1, seed=0, sample_ids=[7, 3, 99, 2**40]).ids_keep
    assert ids.device.type == "cpu"


def results(model):
    """What each of a model's methods makes of a batch, and every gradient."""
    batch, keys = make_batch(sample_ids=[7, 3, 99, 2**40]), {"seed": 0, "step": 3}
    batch.labels = torch.eye(4, 5, dtype=torch.bool, device="cpu")
    found = []
    if isinstance(model, VQA):
        answers = [[1, 2], [3], [4], [5]]
        loss = model(batch, answers)
        found.append(model.rank(batch, answers))
    elif isinstance(model, Reason):
        loss = model(batch.images.flip(0), batch).mean()
    else:
        loss = model(batch, **keys).loss
        if hasattr(model, "plan"):
            found.append(model(batch, plan=model.plan(batch, **keys)).loss)
    if isinstance(model, M3AE):
        found += [model.reconstruct(batch, **keys).image, model.encode(batch).cls]
    elif isinstance(model, MAMO):
        found += [*model.fill_words(batch, **keys), ground(model, batch)]
    loss.backward()
    return [loss, *found, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_a_model_under_another_default_device(make, request):
    expected = results(make())
    request.getfixturevalue("elsewhere")
    found = results(make())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_model_is_made_on_the_default_device(make, elsewhere):
    model = make(device=torch.get_default_device())
    assert all(x.is_meta for x in everything(model).values())
