"""Plans that are pinned and moved: all that a step reads on the device, in whole pieces, and nothing else."""

import dataclasses

import pytest
import torch

from m3ae_fast import SeqLens
from m3ae_fast.models import M3AE
from tests.models import plain_mamo
from tests.models.test_m3ae import CONFIG, MIXED, make_batch

MODELS = {
    "m3ae": lambda: (M3AE(CONFIG), make_batch(**MIXED)),
    "mamo": lambda: (plain_mamo.make_model(), plain_mamo.make_batch()),
    "mamo without itm": lambda: (plain_mamo.make_model(itm_weight=0), plain_mamo.make_batch()),
}


@pytest.fixture(params=MODELS)
def made(request):
    """(model, batch, plan)."""
    torch.manual_seed(0)
    model, batch = MODELS[request.param]()
    return model, batch, model.plan(batch, seed=5, step=11)


def tensors(value, path=""):
    """(path, tensor) of all tensors of a plan."""
    if isinstance(value, SeqLens):
        value = {"cu": value.cu}
    elif dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple):
        value = dict(enumerate(value))
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from tensors(each, f"{path}.{name}")


def test_a_plan_that_is_moved_lies_where_one_made_there_does(made):
    model, batch, plan = made
    there = [(path, x.device.type, x.shape, x.dtype) for path, x in tensors(model.plan(batch.to("meta"), seed=5))]
    moved = [(path, x.device.type, x.shape, x.dtype) for path, x in tensors(plan.to("meta"))]
    assert moved == there and {device for _, device, _, _ in moved} == {"cpu", "meta"}


def test_a_plan_is_pinned_and_moved_in_whole_pieces(made, pinned, monkeypatch):
    model, batch, plan = made
    ready, moved = plan.pin_memory(), []
    for (path, ours), (_, theirs), (_, meta) in zip(*map(tensors, (ready, plan, plan.to("meta"))), strict=True):
        assert torch.equal(ours, theirs), path
        assert not ours.numel() or pinned(ours) == meta.is_meta, path
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda x, *_, **options: moved.append((x, options)) or x.clone())
        there = ready.to("cuda")
    assert all(pinned(x) and options == {"non_blocking": True} for x, options in moved)
    pieces = [x.untyped_storage().data_ptr() for x, _ in moved if x.numel()]
    assert len(pieces) == len(set(pieces))
    ours, theirs = model(batch, plan=there), model(batch, seed=5, step=11)
    assert all(torch.equal(value, getattr(theirs, name)) for name, value in vars(ours).items())


def test_a_pinned_plan_takes_over_masks(pinned):
    """What was one piece is one piece still."""
    torch.manual_seed(0)
    model, batch = MODELS["m3ae"]()
    plan = model.plan(batch, seed=5).pin_memory()
    plan.copy_(model.plan(batch, seed=5, step=1))
    assert torch.equal(model(batch, plan=plan).loss, model(batch, seed=5, step=1).loss)
