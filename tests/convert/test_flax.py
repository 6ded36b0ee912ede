"""Checkpoints of the public code: read as data, nothing of the file run."""

import collections
import dataclasses
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from m3ae_fast import M3AEFastWarning
from m3ae_fast.convert import config_from_flax, convert_flax_checkpoint, flax_to_torch, load_flax_checkpoint
from m3ae_fast.models import M3AE, M3AEConfig
from m3ae_fast.train import RunConfig, Trainer, load_run


@pytest.fixture
def parameters():
    """The public code's tree for a small model, nested, as its checkpoint holds it."""
    rng = np.random.default_rng(0)

    def dense(i, o):
        return {"kernel": rng.normal(size=(i, o)).astype("f"), "bias": rng.normal(size=o).astype("f")}

    def norm(d):
        return {"scale": rng.normal(size=d).astype("f"), "bias": rng.normal(size=d).astype("f")}

    def transformer(d, depth):
        blocks = {
            f"Block_{i}": {
                "LayerNorm_0": norm(d),
                "Attention_0": {"Dense_0": dense(d, 3 * d), "Dense_1": dense(d, d)},
                "LayerNorm_1": norm(d),
                "TransformerMLP_0": {"fc1": dense(d, 4 * d), "fc2": dense(4 * d, d)},
            }
            for i in range(depth)
        }
        return {**blocks, "LayerNorm_0": norm(d)}

    def token(d):
        return rng.normal(size=(1, 1, d)).astype("f")

    return {
        "image_embedding": dense(48, 24),
        "text_embedding": {"embedding": rng.normal(size=(31, 24)).astype("f")},
        "cls_token": token(24),
        "encoder_image_type_embedding": token(24),
        "encoder_text_type_embedding": token(24),
        "encoder": transformer(24, 11),  # Block_10 sorts before Block_2 as text
        "decoder_input_projection": dense(24, 16),
        "image_mask_embedding": token(16),
        "text_mask_embedding": token(16),
        "decoder_image_type_embedding": token(16),
        "decoder_text_type_embedding": token(16),
        "decoder": transformer(16, 1),
        "decoder_image_output": {"Dense_0": dense(16, 48)},
        "decoder_text_output": {"Dense_0": dense(16, 31)},
    }


@pytest.fixture
def library(monkeypatch):
    """Stand-ins of flax, optax and jax for writing: reading must not need them."""

    def module(name):
        for end in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:end])
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        return sys.modules[name]

    def place(cls, where):
        cls.__module__, cls.__qualname__ = where, cls.__name__
        setattr(module(where), cls.__name__, cls)
        return cls

    @dataclasses.dataclass(frozen=True)
    class TrainState:
        step: int
        params: object
        tx: object
        opt_state: object

    class FrozenDict(collections.UserDict):
        def __reduce__(self):
            return FrozenDict, (self.data,)

    class ScaleByAdamState(collections.namedtuple("ScaleByAdamState", "count mu nu")):
        pass

    def _reconstruct_array(fun, args, state, aval):
        raise AssertionError("jax ran")

    class Array:
        def __init__(self, value):
            self.value = value

        def __reduce__(self):
            fun, args, state = self.value.__reduce__()
            return _reconstruct_array, (fun, args, state, {"weak_type": False})

    classes = types.SimpleNamespace(
        TrainState=place(TrainState, "flax.training.train_state"),
        FrozenDict=place(FrozenDict, "flax.core.frozen_dict"),
        AdamState=place(ScaleByAdamState, "optax._src.transform"),
        Array=place(Array, "jax._src.array"),
    )
    place(_reconstruct_array, "jax._src.array")
    return classes


def test_checkpoint_of_the_public_code(tmp_path, parameters, library, monkeypatch):
    frozen = library.FrozenDict({"params": {**parameters, "cls_token": library.Array(parameters["cls_token"])}})
    adam = library.AdamState(np.int32(7), parameters, parameters)
    state = library.TrainState(7, frozen, None, (adam, collections.OrderedDict(a=1)))
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"step": 7, "epoch": 1, "variant": {"lr": 1e-3}, "state": state}))
    for name in [n for n in sys.modules if n.partition(".")[0] in ("flax", "optax", "jax")]:
        monkeypatch.delitem(sys.modules, name)

    tree = load_flax_checkpoint(path)
    np.testing.assert_array_equal(tree["cls_token"], parameters["cls_token"])
    np.testing.assert_array_equal(
        tree["encoder/Block_10/Attention_0/Dense_0/kernel"],
        parameters["encoder"]["Block_10"]["Attention_0"]["Dense_0"]["kernel"],
    )
    config = config_from_flax(tree, image_size=16, heads=3, decoder_heads=2, max_text_length=5)
    assert (config["depth"], config["decoder_depth"], config["vocab_size"], config["patch_size"]) == (11, 1, 31, 4)
    M3AE(M3AEConfig.from_dict(config)).load_state_dict(flax_to_torch(tree), strict=True)


@pytest.fixture
def converted(tmp_path, parameters):
    """converted(words, **known): model.pkl with a vocabulary of so many words, as the folder of a run."""

    def make(words=31, **known):
        (tmp_path / "model.pkl").write_bytes(pickle.dumps({"state": {"params": parameters}}))
        (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", *map(str, range(words - 1))]))
        known = {"text_vocab": tmp_path / "vocab.txt", "image_size": 16, "heads": 3, "decoder_heads": 2} | known
        return convert_flax_checkpoint(tmp_path / "model.pkl", tmp_path / "run", **known)

    return make


def test_a_converted_checkpoint_is_a_run_of_step_0(tmp_path, converted, parameters):
    config = converted(max_text_length=5)
    run = load_run(tmp_path / "run")
    assert run.step == 0 and run.config.objective == "m3ae" and run.model.config == config
    assert (config.width, config.heads, config.image_size, config.max_text_length) == (24, 3, 16, 5)
    written = run.model.state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in flax_to_torch(parameters).items())
    assert run.tokenizer.tokens([0, 3]) == ["[UNK]", "2"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "tokenizer.json"]


def test_a_run_starts_from_a_converted_checkpoint(tmp_path, converted):
    converted(image_size=32, max_text_length=40)
    settings = {"init": str(tmp_path / "run"), "model": "small", "batch_size": 2, "device": "cpu", "data": "cluttered"}
    with pytest.warns(M3AEFastWarning, match="are not in the vocabulary"):
        Trainer(RunConfig(steps=1, **settings), tmp_path / "mine")


def test_a_model_of_images_alone_needs_no_vocabulary(tmp_path, converted, parameters):
    for name in [name for name in parameters if "text" in name]:
        del parameters[name]
    assert converted(text_vocab="nowhere").vocab_size == 0
    assert load_run(tmp_path / "run").tokenizer is None


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"words": 30}, r"text_vocab must have the 31 entries of .*model.pkl, got 30 in .*vocab.txt"),
        ({"heads": None}, r"model.pkl does not fit: heads must be given \(--set heads=N\), got none"),
        ({"depth": 12}, r"model.pkl does not fit: Missing key"),
        ({"norm_pixs": True}, "fields of M3AEConfig only, got norm_pixs"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, converted, known, message):
    with pytest.raises(ValueError, match=message):
        converted(**known)
    assert not (tmp_path / "run").exists()


def test_blocks_that_are_missing_are_named(parameters):
    del parameters["encoder"]["Block_3"]
    with pytest.raises(ValueError, match="the encoder must have blocks 0 to 9, got 10"):
        config_from_flax(parameters)


def test_nested_and_flat_trees_agree(parameters):
    nested = flax_to_torch({"params": parameters})
    flat = flax_to_torch({"decoder/LayerNorm_0/bias": parameters["decoder"]["LayerNorm_0"]["bias"]})
    assert torch.equal(nested["decoder.norm.bias"], flat["decoder.norm.bias"])
    kernel = parameters["encoder"]["Block_3"]["TransformerMLP_0"]["fc1"]["kernel"]
    np.testing.assert_array_equal(nested["encoder.blocks.3.mlp.fc1.weight"].numpy(), kernel.T)


class Touch:
    """A pickle that, run, leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (self.path,)


class Call:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda p: Call(__import__("os").system, f"touch {p}"), "system"),
        (lambda p: Call(eval, f"open({str(p)!r}, 'w')"), "builtins.eval"),
        (lambda p: Call(getattr, p, "touch"), "builtins.getattr"),
        (lambda p: Touch(str(p)), "touch"),
        (lambda p: Call(__import__("subprocess").check_call, ["touch", str(p)]), "subprocess.check_call"),
        (lambda p: Call(np.load, str(p)), "numpy"),
    ],
)
def test_any_other_name_is_refused_and_nothing_runs(tmp_path, content, named):
    left = tmp_path / "ran"
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"state": {"params": {"a": np.ones(2), "b": content(left)}}}))
    with pytest.raises(ValueError, match=named) as error:
        load_flax_checkpoint(path)
    assert str(path) in str(error.value)
    assert not left.exists()


def test_files_that_are_no_checkpoint(tmp_path, parameters):
    whole = pickle.dumps({"state": {"params": parameters}})
    for content in (whole[: len(whole) // 2], b"", b"not a pickle", pickle.dumps([1, 2])):
        path = tmp_path / "model.pkl"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pkl"):
            load_flax_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_flax_checkpoint(tmp_path / "missing.pkl")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_regular_file_is_not_read(tmp_path, make):
    make(tmp_path / "model.pkl")
    with pytest.raises(ValueError, match=r"model\.pkl must be .*: it is no regular file"):
        load_flax_checkpoint(tmp_path / "model.pkl")


def test_unknown_parameters_are_named():
    with pytest.raises(ValueError, match="encoder/Block_0/Rotary_0/kernel"):
        flax_to_torch({"encoder/Block_0/Rotary_0/kernel": np.ones((2, 2))})
    with pytest.raises(TypeError, match=r"got str at 'a'"):
        flax_to_torch({"a": "b"})


def test_an_incomplete_tree_is_named(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"params": {"cls_token": np.zeros((1, 1, 8), "f")}}))
    with pytest.raises(ValueError, match=r"model\.pkl .*image_embedding/kernel"):
        convert_flax_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_pytorch_is_told_apart(tmp_path, zipped):
    torch.save({"model": {"a": torch.ones(3)}}, tmp_path / "mae.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"mae\.pth must be a pickle of the public JAX code, got .* PyTorch"):
        load_flax_checkpoint(tmp_path / "mae.pth")
