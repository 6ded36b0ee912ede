"""Training on examples: their order, and what is not finite."""

import pytest
import torch

from m3ae_fast.downstream.training import train


@pytest.fixture
def line():
    """A model, and line(examples, step): a loss that notes what it is given."""
    model, seen = torch.nn.Linear(1, 1), []

    def loss_of(examples, step):
        seen.append(examples)
        return (model(torch.tensor(examples)[:, None]) - 1).square().mean()

    return model, loss_of, seen


def test_an_epoch_shows_every_example_once(line):
    model, loss_of, seen = line
    examples = [float(i) for i in range(10)]
    train(model, examples, loss_of, steps=5, batch_size=4, progress=False)
    order = [x for batch in seen for x in batch]
    assert [len(batch) for batch in seen] == [4] * 5
    assert sorted(order[:10]) == sorted(order[10:]) == examples and order[:10] != order[10:]
    seen.clear()
    train(model, examples, loss_of, steps=2, batch_size=32, progress=False)
    assert [sorted(batch) for batch in seen] == [examples] * 2


@pytest.mark.parametrize("broken", [lambda w: w / 0, lambda w: (w * 0).abs().sqrt()])
def test_what_is_not_finite_is_not_taken(broken):
    """A loss; or a gradient alone, which would show a step later, or never."""
    model = torch.nn.Linear(1, 1)
    before = model.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="step 1 of fine-tuning is not finite"):
        train(model, [1.0], lambda *_: broken(model.weight).sum(), steps=1, progress=False)
    assert torch.equal(model.weight, before)
