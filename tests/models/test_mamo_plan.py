"""A MAMO's plan: the step it makes ahead is the step itself, and it takes over the masks of another plan."""

import pytest
import torch

from tests.models.plain_mamo import make_batch, make_model

WITHOUT_ITM = [
    {}, {"masking": "simultaneous"}, {"mrm_weight": 0, "itc_weight": 0}, {"mim_weight": 0, "mlm_weight": 0},
    {"mrm_weight": 0, "mim_weight": 0, "mlm_weight": 0, "soft_targets": 0.4},
]  # fmt: skip


def assert_same_step(ours, theirs, model):
    """All of two outputs, and every gradient, bitwise."""
    for name, value in vars(theirs).items():
        assert torch.equal(getattr(ours, name), value), name
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(out.loss, parameters, materialize_grads=True) for out in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("weights", [{"itm_weight": 1.0}, *({"itm_weight": 0, **each} for each in WITHOUT_ITM)])
def test_a_plan_made_ahead_gives_the_same_bits(weights):
    model, batch = make_model(**weights), make_batch(ids=[7, 3, 99, 2**40])
    plan = model.plan(batch, seed=5, step=11)
    assert_same_step(model(batch, plan=plan), model(batch, seed=5, step=11), model)


def test_a_plan_says_how_soft_the_targets_are():
    model, batch = make_model(itm_weight=0, soft_targets=0.4, soft_targets_steps=10), make_batch()
    plans = [model.plan(batch, seed=5, step=step) for step in (0, 4, 9, 20)]
    assert [plan.soft for plan in plans] == pytest.approx([0.04, 0.2, 0.4, 0.4])
    with pytest.raises(ValueError, match="same share of soft targets"):
        plans[0].copy_(plans[1])
    plans[2].copy_(plans[3])


@pytest.mark.parametrize("weights", WITHOUT_ITM)
def test_a_plan_takes_over_the_masks_of_another(weights):
    model, batch = make_model(itm_weight=0, **weights), make_batch()
    plan, other = (model.plan(batch, seed=5, step=step) for step in (0, 1))
    before = plan.hidden.data_ptr()
    plan.copy_(other)
    assert plan.hidden.data_ptr() == before
    assert_same_step(model(batch, plan=plan), model(batch, seed=5, step=1), model)
    with pytest.raises(ValueError, match="same numbers of kept and masked tokens"):
        plan.copy_(model.plan(make_batch((5, 3, 7, 1)), seed=5))


def test_a_plan_with_itm_takes_over_nothing():
    model = make_model()
    plan = model.plan(make_batch(), seed=5)
    with pytest.raises(ValueError, match="itm_weight 0: a step with ITM waits for similarities"):
        plan.copy_(model.plan(make_batch(), seed=5, step=1))


def test_a_plan_is_of_its_batch_and_stands_alone():
    model, batch = make_model(), make_batch()
    plan = model.plan(batch, seed=0)
    masks = {"image_mask": torch.zeros(4, 16).bool(), "text_mask": torch.zeros(4, 8).bool()}
    for name, value in {"seed": 0, **masks}.items():
        with pytest.raises(ValueError, match="plan must be given instead of seed"):
            model(batch, plan=plan, **{name: value})
    with pytest.raises(ValueError, match="plan must be of this batch"):
        model(make_batch((5, 3, 8, 2)), plan=plan)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        model.plan(make_batch((3,)), seed=0)
    with pytest.raises(ValueError, match="seed must be given to draw ITM's negatives"):
        model.plan(batch, **masks)
