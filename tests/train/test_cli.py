"""m3ae-fast: what it prints, and with which status it ends."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import m3ae_fast
from m3ae_fast._files import read_json, write_json
from m3ae_fast.models import MAE, OBJECTIVES, M3AEConfig
from m3ae_fast.models.config import SIZES
from m3ae_fast.train import RunConfig, checkpoint, load_run, trainer, watch
from m3ae_fast.train.config import DEFAULTS, LR_PER_256

SMALL = ["--steps", "3", "--batch-size", "2", "--image-size", "32", "--device", "cpu"]


@pytest.fixture
def run(command_line, tmp_path, monkeypatch):
    """run(*arguments): (status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return command_line


def test_pretrain_resume_reconstruct(run, tmp_path):
    status, out, err = run("pretrain", *SMALL, "--stop-after", 2)
    assert status == 0
    assert "2 of 3 steps" in out and "seen 4, images skipped 0" in out
    assert "continue with: m3ae-fast pretrain --out runs/shapes-tiny --resume" in out
    assert "loss" in err and "tokens/s" in err and "left" in err, "the progress bar"

    status, out, err = run("pretrain", *SMALL)
    assert status == 2
    assert err.endswith(
        "m3ae-fast pretrain: error: runs/shapes-tiny holds a run already: --resume continues it, "
        "another --out starts a new one\n"
    )

    status, out, _ = run("pretrain", "--out", "runs/shapes-tiny", "--resume")  # the settings are in run.json
    assert status == 0 and "3 of 3 steps" in out and "continue" not in out
    status, out, _ = run("pretrain", "--resume")
    assert status == 0 and "nothing to do: runs/shapes-tiny has taken all of its 3 steps" in out

    status, out, _ = run("reconstruct", "runs/shapes-tiny", "--samples", 2)
    assert status == 0 and out == "reconstruction.png: 2 samples, the model after 3 steps\n"
    assert Image.open("reconstruction.png").size[0] > 500

    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save("photo.png")
    status, out, _ = run("reconstruct", "runs/shapes-tiny", "photo.png", "--caption", "a red ring", "--out", "p.png")
    assert status == 0 and out.startswith("p.png: 1 samples")


def test_ctrl_c_says_how_to_go_on(run, monkeypatch):
    step = trainer.train_step

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    status, out, _ = run("pretrain", *SMALL, "--out", "my run")
    assert status == 130
    assert "1 of 3 steps" in out and "continue with: m3ae-fast pretrain --out 'my run' --resume" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["pretrain", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["pretrain", "--step", "3"], "unrecognized arguments: --step 3"),
        (["pretrain", "--model", "giant"], "argument --model: invalid choice: 'giant'"),
        (["pretrain", "--masking", "blocks"], "argument --masking: invalid choice: 'blocks'"),
        (["pretrain", "--steps", "0"], "argument --steps: must be a whole number, at least 1, got '0'"),
        (["pretrain", "--workers", "x"], "argument --workers: must be a whole number, at least 0, got 'x'"),
        (["pretrain", "--steps", "3", "--epochs", "1"], "argument --epochs: not allowed with argument --steps"),
        (["pretrain", "--recipe", "m3ae-cc12m-base"], "epochs must be None (steps say how long) for data"),
        (["pretrain", "--lr", "-1"], "lr must be finite and positive, got -1.0"),
        (["pretrain", "--image-size", "30"], "image_size must be a multiple of patch_size 8, got 30"),
        (
            ["pretrain", "--data", "nowhere"],
            "data must name shapes, cluttered, a folder, an .h5 or .jsonl file",
        ),
        (["pretrain", "--data", "empty"], "path must hold"),
        (["pretrain", "--text-vocab", "none.txt"], "none.txt"),
        (["pretrain", "--device", "abacus"], "device must be one that torch can use, got 'abacus'"),
        (["pretrain", "--device", "vulkan"], "device must be one that torch can use, got 'vulkan': Could not run"),
        (["pretrain", "--device", "meta"], "device must be one that computes, got 'meta'"),
        (
            ["pretrain", "--set", "norm_pixs=1"],
            "norm_pixs: the configuration of m3ae has no such field; did you mean norm",
        ),
        (["pretrain", "--resume"], "runs/shapes-tiny holds no run to resume: there is no run.json in it"),
        (["pretrain", "--out", "file"], "file"),
        (["pretrain", "--out", ""], "argument --out: must name a file or a folder, got ''"),
        (["attend", "x", "--out", "a.jpg"], "argument --out: must name a .png file, got 'a.jpg'"),
        (["reconstruct", "empty"], "empty/checkpoints holds no checkpoint"),
        (["reconstruct", "nowhere"], "nowhere is not a checkpoint: no such file"),
        (["reconstruct", "file"], "file is not a whole checkpoint"),
        (["reconstruct", "x", "a.png", "--data", "shapes"], "give images or --data, not both"),
        (["reconstruct", "x", "a.png", "--caption", "a", "--caption", "b"], "--caption must be given once for each"),
        (["convert", "nowhere.pkl", "out.safetensors"], "nowhere.pkl"),
        (["convert", "nowhere.pth", "out"], "there is no file or folder nowhere.pth"),
        (["convert", "nowhere", "out", "--to", "timm"], "there is no file or folder nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*arguments)
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("m3ae-fast") and "error: " in line and message in line and len(line) < 500
    assert "Traceback" not in err and out == ""
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"


@pytest.mark.parametrize(
    "arguments, command, said",
    [
        (["pretrain", "--stepz", "3"], " pretrain", "unrecognized arguments: --stepz 3; did you mean --steps?"),
        (["pretrain", "--step=3"], " pretrain", "unrecognized arguments: --step=3; did you mean --steps?"),
        (["reconstruct", "x", "--captoin=a"], " reconstruct", "--captoin=a; did you mean --caption?"),
        (["attend", "x", "--laye", "1"], " attend", "--laye 1; did you mean --layer?"),
        (["pretran"], "", "; did you mean pretrain?"),
        (["pretrain", "--model", "bsae"], " pretrain", "; did you mean base?"),
        (["pretrain", "--objective=m3e"], " pretrain", "; did you mean m3ae?"),
        (["pretrain", "--objective", "M3AE"], " pretrain", "; did you mean m3ae?"),
        (["pretrain", "--stepz=3", "--stepz=4"], " pretrain", "--stepz=3 --stepz=4; did you mean --steps?"),
        (["pretrain", "--sed=1\n2"], " pretrain", "--sed=1 2; did you mean --seed?"),
        (["convert", "--zzzz", "a", "b"], " convert", "unrecognized arguments: --zzzz"),
        (["reconstruct"], " reconstruct", "the following arguments are required: RUN, IMAGE"),
    ],
)
def test_a_mistake_names_what_is_nearest(run, arguments, command, said):
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"m3ae-fast{command}: error: ") and err.endswith(f"{said} (m3ae-fast{command} --help)\n")


def test_too_little_memory_is_one_line(run, monkeypatch):
    monkeypatch.setattr(trainer, "train_step", lambda *_: torch.empty(2**50))
    status, _, err = run("pretrain", *SMALL)
    assert status == 2 and "Traceback" not in err
    line = err.splitlines()[-1]
    assert "can't allocate memory" in line and line.endswith(
        "--checkpoint-blocks needs less memory, for the same numbers"
    )


@pytest.mark.parametrize("spec", ["pipe:touch touched #.tar", "https://nowhere.invalid/a.tar", "gs://b/{0..3}.tar=2"])
def test_a_run_runs_no_command_that_its_folder_names(run, tmp_path, spec):
    """What is written there may be somebody else's."""
    assert run("pretrain", *SMALL, "--out", "run")[0] == 0
    forged = {"data": ["shapes", spec]}
    write_json(tmp_path / "run" / "run.json", read_json(tmp_path / "run" / "run.json") | forged)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        saved = load_run(path)
        checkpoint.save(path, saved.step, saved.config.to_dict() | forged, saved.model, None)
    for call in (["pretrain", "--out", "run", "--resume"], ["reconstruct", "run"], ["attend", "run"]):
        status, _, err = run(*call)
        assert status == 2 and f"names data that would run a command or ask a server, {spec}: " in err, err
    assert not (tmp_path / "touched").exists()


def test_our_own_mistakes_keep_their_traceback(run, monkeypatch):
    monkeypatch.setattr(trainer, "train_step", lambda *_: {}["gone"])
    with pytest.raises(KeyError):
        run("pretrain", *SMALL)


def test_a_missing_extra_is_named(run, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("m3ae_fast.train")]:
        monkeypatch.delitem(sys.modules, name)
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "tqdm" else find_spec(name, *rest)
    )
    status, _, err = run("pretrain", *SMALL)
    assert status == 2 and "m3ae_fast.train needs tqdm: pip install '.[train]'" in err
    for command in ("--help", "--version", "info"):  # which need no extra
        status, out, _ = run(command)
        assert status == 0 and "m3ae" in out


def test_a_converted_file_that_cannot_be_written_is_named(run, tmp_path, monkeypatch):
    """The library's own error for a full disk or a missing folder is no OSError."""
    model = MAE(M3AEConfig.tiny(vocab_size=0))
    monkeypatch.setattr("m3ae_fast.convert.vit.load_vit", lambda _: model)  # all but the writing
    (tmp_path / "weights.safetensors").touch()
    status, _, err = run("convert", "weights.safetensors", "no folder/out.safetensors")
    assert status == 2 and "error: no folder/out.safetensors cannot be written" in err


def test_info(run):
    status, out, _ = run("info")
    assert status == 0 and "instruction set" in out and "restore_tokens" in out


@pytest.mark.parametrize("command", ["pretrain", "reconstruct", "info", "convert"])
def test_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and "usage: m3ae-fast" in out


def test_the_help_of_pretrain_tells_the_true_defaults(run):
    _, out, _ = run("pretrain", "--help")
    for name in ("steps", "batch_size"):
        values = [DEFAULTS[model][name] for model in ("tiny", "small")]
        assert "default: tiny {:,}, others {:,}".format(*values) in " ".join(out.split())
    tiny = "tiny {:g} (M3AE, MAE) or {:g}".format(*(OBJECTIVES[name][0].TINY_LR for name in ("m3ae", "mamo")))
    assert f"default: {tiny}, others {LR_PER_256:g} for 256 samples" in " ".join(out.split())
    assert "{" + ",".join(OBJECTIVES) + "}" in out and "{" + ",".join(SIZES) + "}" in out
    defaults = RunConfig()
    for name in ("accumulate", "seed", "weight_decay", "grad_clip", "workers", "max_bad_steps"):
        assert f"({getattr(defaults, name)})" in out


def test_python_dash_m(python):
    done = python("import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('m3ae_fast', run_name='__main__')")
    assert done.returncode == 0 and done.stdout.startswith("m3ae_fast ")


@pytest.mark.parametrize("steps, said", [(1000, ["this run takes about 3 hours: 1,000 steps of 10.00 s"]), (300, [])])
def test_a_run_of_hours_says_so_once(monkeypatch, capsys, tmp_path, steps, said):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(watch, "time", types.SimpleNamespace(perf_counter=lambda: next(clock) * watch.ESTIMATE_STEPS))
    with watch.Progress(tmp_path, RunConfig(steps=steps).resolved(), 0, shown=True) as bar:
        for step in range(1, 15):
            bar.show({"step": step, "loss": 1.0, "tokens_per_second": 1.0})
    lines = [line.strip() for line in capsys.readouterr().err.replace("\r", "\n").splitlines()]
    assert [line for line in lines if line.startswith("this run")] == said


def test_a_reader_that_has_read_enough(tmp_path):
    """As of `m3ae-fast info | head -1`: no traceback, nothing on stderr."""
    read, write = os.pipe()
    os.close(read)
    package = str(Path(m3ae_fast.__file__).parents[1])
    command, env = [sys.executable, "-m", "m3ae_fast", "info"], {**os.environ, "PYTHONPATH": package}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
