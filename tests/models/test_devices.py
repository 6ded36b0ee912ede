"""Models where torch makes tensors elsewhere: on the meta device until there are weights, or under a default device."""

import pytest
import torch

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
