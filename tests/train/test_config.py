"""RunConfig: what it refuses, what it fills in, and run.json."""

import argparse
import dataclasses
import json

import pytest

from m3ae_fast._settings import OPTIONS, add_options, check, documented, given, setting
from m3ae_fast.models import M3AEConfig
from m3ae_fast.train import RunConfig
from m3ae_fast.train.config import RUN

WHOLE = RunConfig(model_config={"image_size": 64, "vocab_size": 9}).resolved().to_dict()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got float"),
        ({"batch_size": -1}, ValueError, "batch_size must be at least 1, got -1"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1, got 0"),
        ({"seed": 2**31}, ValueError, r"seed must be in \[0, 2147483648\)"),
        ({"workers": -1}, ValueError, "workers must be at least 0, got -1"),
        ({"max_bad_steps": -1}, ValueError, "max_bad_steps must be at least 0, got -1"),
        ({"checkpoint_every": -1}, ValueError, "checkpoint_every must be at least 0"),
        ({"picture_every": -1}, ValueError, "picture_every must be at least 0"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1"),
        ({"model": "giant"}, ValueError, "model must be one of 'tiny', .* got 'giant'"),
        ({"precision": "fp8"}, ValueError, "precision must be one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
        ({"lr": 0.0}, ValueError, "lr must be finite and positive, got 0.0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite and positive, got nan"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got str"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and not negative, got -0.1"),
        ({"grad_clip": float("inf")}, ValueError, "grad_clip must be finite and not negative, got inf"),
        ({"ema": 1.0}, ValueError, r"ema must be in \[0, 1\), got 1.0"),
        ({"epochs": 0}, ValueError, "epochs must be finite and positive, got 0"),
        ({"rank_timeout": 0}, ValueError, "rank_timeout must be at least 1, got 0"),
        ({"image_mask_ratio": 1.0}, ValueError, r"image_mask_ratio must be in \[0, 1\), got 1.0"),
        ({"text_mask_ratio": -0.5}, ValueError, r"text_mask_ratio must be in \[0, 1\), got -0.5"),
        ({"steps": 5, "warmup": 5}, ValueError, r"warmup must be less than steps \(5\), got 5"),
    ],
)
def test_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        RunConfig(**changes)


def test_defaults_follow_the_model_and_the_batch():
    small = RunConfig(model="small", batch_size=128, accumulate=4).resolved()
    assert small.lr == pytest.approx(1.5e-4 * 2)
    assert small.warmup == small.steps // 10
    assert RunConfig(lr=0.5).resolved().lr == 0.5
    assert all(value is not None for name, value in RunConfig().resolved().to_dict().items()
               if name in ("steps", "batch_size", "lr", "warmup", "picture_every"))  # fmt: skip


def test_is_saved_and_read_back(tmp_path):
    config = RunConfig(model="base", steps=7, model_config=json.loads(json.dumps(M3AEConfig().to_dict()))).resolved()
    config.save(tmp_path)
    assert RunConfig.load(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "run.json is not valid JSON"),
        ("[]", "run.json must hold a JSON object, got list"),
        (json.dumps({"speed": 9}), "run.json has fields this version does not know: speed"),
        (json.dumps({"steps": -3}), "run.json: steps must be at least 1, got -3"),
        (json.dumps(WHOLE | {"steps": None}), "run.json must say steps$"),
        (json.dumps(WHOLE | {"model_config": None}), "run.json must say model_config$"),
        (json.dumps(WHOLE | {"model_config": 3}), "run.json: "),
        (json.dumps(WHOLE | {"model_config": {"depth": 2}}), "run.json must say image_size, vocab_size$"),
        (
            json.dumps(WHOLE | {"model_config": {"depht": 2}}),
            "run.json: the configuration must have fields of M3AEConf",
        ),
    ],
)
def test_a_damaged_run_json_is_named(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        RunConfig.load(tmp_path)


def test_a_setting_is_written_once():
    @documented
    @dataclasses.dataclass(frozen=True)
    class Toys(RunConfig):
        toys: int = setting(3, "how many toys", RUN, "N", "[1, 9)", free=True)

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_options(parser, Toys)
    assert "--toys N" in parser.format_help() and "how many toys (3)" in parser.format_help()
    assert "toys: how many toys; in [1, 9)" in Toys.__doc__
    arguments = ["--toys", "4", "--set", "a=1", "--set", "b=c", "--data", "A.h5"]
    assert given(Toys, parser.parse_args(arguments)) == {"toys": 4, "options": {"a": 1, "b": "c"}, "data": "A.h5"}
    assert Toys(toys=4).to_dict()["toys"] == 4 and "toys" not in Toys().identity()
    with pytest.raises(ValueError, match=r"toys must be in \[1, 9\), got 9"):
        Toys(toys=9)


def test_some_settings_among_the_options_of_a_parser_that_keeps_defaults():
    @dataclasses.dataclass(frozen=True)
    class Toys:
        toys: int = setting(3, "how many toys", OPTIONS, "N", "[1, 9)")
        price: float = setting(0.5, "of each", OPTIONS, within="(0, inf)")
        seed: int = setting(0, "of the toys", within="[0, 9)")

    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    add_options(parser, Toys, "price")
    assert given(Toys, parser.parse_args(["--seed", "2"])) == {"price": 0.5, "seed": 2}
    assert parser.format_help().count(f"{OPTIONS}:") == 1 and "--toys" not in parser.format_help()
    parser = argparse.ArgumentParser()
    add_options(parser, Toys)
    assert given(Toys, parser.parse_args(["--toys", "4"])) == {"toys": 4, "price": 0.5}, "seed has no option"


def test_a_setting_that_is_a_whole_number_is_in_its_interval_open_or_closed():
    @dataclasses.dataclass(frozen=True)
    class Toys:
        toys: int = setting(3, "how many toys", RUN, "N", "(1, 9]")
        __post_init__ = check

    assert Toys(2).toys == 2 and Toys(9).toys == 9
    for toys in (1, 10):
        with pytest.raises(ValueError, match=rf"toys must be in \[2, 10\), got {toys}"):
            Toys(toys)


def test_a_field_need_not_be_a_setting():
    @dataclasses.dataclass(frozen=True)
    class Toys(RunConfig):
        toys: int = 3

    assert Toys(steps=2).identity() == RunConfig(steps=2).identity() | {"toys": 3}
