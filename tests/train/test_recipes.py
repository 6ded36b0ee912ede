"""Recipes: the papers' settings, by name."""

import pytest

from m3ae_fast import cli
from m3ae_fast.models import M3AEConfig
from m3ae_fast.train import RECIPES, RunConfig
from m3ae_fast.train.run import create

CC12M = 12_423_374


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_papers_run(name):
    objective, _, size = name.split("-")
    config = RunConfig(**RECIPES[name]).resolved(CC12M)
    assert (config.objective, config.model) == (objective, size)
    assert (config.batch_size * config.accumulate, config.weight_decay, config.precision) == (4096, 0.05, "bf16")
    assert config.lr == pytest.approx(1.5e-4 * 4096 / 256)
    assert config.steps == 50 * CC12M // 4096 and config.warmup == config.steps // 10
    model = M3AEConfig.preset(size)
    assert (model.image_mask_ratio, model.text_mask_ratio, model.text_loss_weight) == (0.75, 0.75, 0.5)


def test_another_batch_is_another_learning_rate():
    config = RunConfig(**RECIPES["m3ae-cc12m-large"] | {"batch_size": 256, "accumulate": 8}).resolved(CC12M)
    assert config.lr == pytest.approx(1.5e-4 * 8) and config.steps == 50 * CC12M // 2048


def test_epochs_are_of_the_data(photos, tmp_path):
    config, *_ = create(tmp_path / "run", RunConfig(data=str(photos), epochs=5, batch_size=2))
    assert config.steps == 7 and config.warmup == 0, "five times three photos in twos"
    assert RunConfig(epochs=5, steps=3).resolved(100).steps == 3
    with pytest.raises(ValueError, match="for data without an end, such as shapes, or streamed, got 5"):
        create(tmp_path / "run", RunConfig(epochs=5))
    with pytest.raises(ValueError, match="or streamed, got 5"):
        create(tmp_path / "run", RunConfig(data="pipe:cat cc12m.tar", objective="mae", epochs=5))


def test_options_win_over_a_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("m3ae_fast.train.pretrain", lambda config, *_, **__: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["pretrain", "--recipe", "m3ae-cc12m-huge", "--model", "tiny", "--epochs", "100", "--grad-clip", "2"])
    assert seen == [RunConfig(**RECIPES["m3ae-cc12m-huge"] | {"model": "tiny", "epochs": 100.0, "grad_clip": 2.0})]


def test_the_list_is_of_options_that_make_the_recipe(capsys, monkeypatch):
    assert cli.main(["pretrain", "--recipe", "list"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(RECIPES)
    seen = []
    monkeypatch.setattr("m3ae_fast.train.pretrain", lambda config, *_, **__: seen.append(config) or 1 / 0)
    for row in rows:
        name, *options = row.split()
        with pytest.raises(ZeroDivisionError):
            cli.main(["pretrain", *options])
        assert seen[-1] == RunConfig(**RECIPES[name])


def test_no_such_recipe(capsys):
    assert cli.main(["pretrain", "--recipe", "m3ae-cc12m-giant"]) == 2
    assert "recipe must be list or one of m3ae-cc12m-small, " in capsys.readouterr().err
