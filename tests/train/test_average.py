"""The moving average of the weights: its definition, exact resume, and what load_run makes of it."""

import pytest
import torch
from torch import nn

from m3ae_fast.train import checkpoint, load_run, trainer
from m3ae_fast.train.average import Average


def test_it_is_what_it_says():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average, expected = Average(model, 0.5), model.weight.detach().double()
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert average.weights.keys() == {"weight"} and not average.weights["weight"].requires_grad
    torch.testing.assert_close(average.weights["weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_stopped_and_resumed_it_is_the_same(train, tmp_path):
    train("whole", ema=0.9)
    train("stopped", ema=0.9, stop_after=5)
    train("stopped", ema=0.9, resume=True)
    paths = [checkpoint.latest(tmp_path / out / "checkpoints") for out in ("whole", "stopped")]
    whole, stopped = (checkpoint.load(path).average for path in paths)
    assert whole and whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_it_changes_no_number_of_the_run(train):
    assert train("with", ema=0.9, steps=4) == train("without", steps=4)


@pytest.mark.parametrize("objective", ["m3ae", "mamo"])
def test_it_is_what_a_run_is_used_with(train, rows, config, tmp_path, monkeypatch, objective):
    monkeypatch.setattr(trainer, "draw_pictures", lambda *_: None)
    trainer.pretrain(config(ema=0.9, steps=3, objective=objective), tmp_path / "run", progress=False)
    saved = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    averaged = load_run(tmp_path / "run").model.state_dict()
    as_it_is = load_run(tmp_path / "run", averaged=False).model.state_dict()
    assert all(torch.equal(as_it_is[name], value) for name, value in saved.model.items())
    assert all(torch.equal(averaged[name], value) for name, value in saved.average.items())
    assert not any(torch.equal(averaged[name], as_it_is[name]) for name in saved.average)
    assert {name for name in averaged if name not in saved.average} == {n for n in averaged if n.startswith("target.")}


def test_a_run_without_one_has_none(train, tmp_path):
    train(steps=2)
    saved = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert saved.average == {}
    found = load_run(tmp_path / "run").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in saved.model.items())
