"""RunConfig.init: a run that starts from the weights of another."""

import dataclasses

import pytest
import torch

from m3ae_fast import M3AEFastWarning
from m3ae_fast.nn.positions import resample_positions, sincos_2d
from m3ae_fast.train import Trainer, load_run, pretrain

TABLES = {
    "mae": ("image_position", "decoder_image_position"),
    "mamo": ("online.image.position", "target.image.position"),
}


@pytest.fixture
def first(config, tmp_path):
    """first(**settings): the folder of a run of two steps."""

    def make(**settings):
        pretrain(config(steps=2, **settings), tmp_path / "first", progress=False)
        return tmp_path / "first"

    return make


@pytest.mark.parametrize("objective", ["m3ae", "mae", "mamo"])
def test_it_starts_from_all_of_a_run(first, config, tmp_path, objective):
    folder = first(objective=objective, ema=0.9, options={"depth": 1})
    start = load_run(folder)
    with Trainer(config(objective=objective, init=str(folder), seed=5, image_mask_ratio=0.5), tmp_path / "next") as it:
        assert it.model.config == dataclasses.replace(start.model.config, image_mask_ratio=0.5)
        expected = start.model.state_dict()  # the averaged weights
        assert all(torch.equal(value, expected[name]) for name, value in it.model.state_dict().items())
        assert it.model.training and it.done == 0
        if start.tokenizer is not None:
            assert it.tokenizer.tokens(range(9)) == start.tokenizer.tokens(range(9))


def test_it_resumes_from_its_own_checkpoint(first, train, tmp_path):
    init = str(first(objective="mae"))
    whole = train("whole", objective="mae", init=init)
    train("cut", objective="mae", init=init, stop_after=5)
    for path in sorted((tmp_path / "first").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert train("cut", resume=True, objective="mae", init=init) == whole


@pytest.mark.parametrize("objective", ["mae", "mamo"])
def test_another_image_size_resamples_the_positions(first, config, tmp_path, objective):
    folder = first(objective=objective)  # 4 x 4 patches of 8
    with pytest.warns(M3AEFastWarning, match="positions of 4 x 4 patches are resampled to 6 x 6"):
        it = Trainer(config(objective=objective, init=str(folder), image_size=48), tmp_path / "next")
    assert it.model.config.positions == "given"
    for name in TABLES[objective]:
        table = it.model.get_buffer(name)
        assert torch.equal(table, resample_positions(sincos_2d(4, 4, table.shape[1]), (4, 4), (6, 6)))


def test_another_activation_is_that_of_both_encoders(first, config, tmp_path):
    changed = config(objective="mamo", init=str(first(objective="mamo")), options={"activation": "gelu_tanh"})
    with Trainer(changed, tmp_path / "next") as it:
        c = it.model.config
        assert c.activation == c.image_form.activation == c.text_form.activation == "gelu_tanh"
        assert c.text_form.norm_eps == load_run(tmp_path / "first").model.config.text_form.norm_eps


def test_what_does_not_start_a_run_is_named(first, train, tmp_path):
    folder = first(objective="mamo")
    for settings, named in (
        ({"objective": "mae"}, "must be a run of the objective mae, got mamo"),
        ({"objective": "mamo", "model": "small"}, "model must be tiny, as init has it, got small"),
        ({"objective": "mamo", "text_vocab": "vocab.txt"}, "text_vocab must be None, .* got vocab.txt"),
        ({"objective": "mamo", "options": {"channels": 9}}, "channels must be 3, as init has it, got 9"),
        ({"objective": "mamo", "options": {"width": 64}}, "init must be of a model of these sizes, got .*first: "),
        ({"objective": "mamo", "options": {"widht": 64}}, "has no such field; did you mean width"),
    ):
        with pytest.raises(ValueError, match=named):
            train("next", init=str(folder), **settings)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train("next", init=str(tmp_path / "nowhere"))
    assert not (tmp_path / "next/run.json").exists()
