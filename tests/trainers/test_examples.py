"""The examples under other people's trainers: the losses of our own loop, or of the model that was made faster."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import m3ae_fast
from m3ae_fast.train import RunConfig, metrics, pretrain

pytestmark = pytest.mark.exhaustive

EXAMPLES = Path(__file__).parents[2] / "examples"
LINE = "    accelerate(model)\n"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def needs(library):
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


@pytest.fixture
def launch(tmp_path):
    """launch(*command, **environment): what the command prints, run by this Python in a folder of its own."""

    def run(*command, **environment):
        package = str(Path(m3ae_fast.__file__).parents[1])
        env = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
        assert done.returncode == 0 and "M3AEFastWarning" not in done.stderr, done.stderr
        return done.stdout

    return run


@pytest.fixture
def ours(tmp_path, threads, monkeypatch):
    """ours(**settings): the losses of six steps of `pretrain`."""
    threads(1)
    monkeypatch.setattr("m3ae_fast.train.trainer.draw_pictures", lambda *_: None)

    def run(**settings):
        pretrain(RunConfig(steps=6, device="cpu", **settings), tmp_path / "ours", progress=False)
        return [row["loss"] for row in metrics.read(tmp_path / "ours" / "metrics.jsonl")]

    return run


def losses(printed: str) -> list[float]:
    """Of each step, the mean over the passes that printed one."""
    found = [(int(step), float(loss)) for step, loss in re.findall(r"^step (\d+) loss (\S+)", printed, re.M)]
    passes = {step: [loss for each, loss in found if each == step] for step, _ in found}
    assert list(passes) == sorted(passes)
    return [sum(each) / len(each) for each in passes.values()]


TRAINERS = [pytest.param(name, marks=needs(name)) for name in ("accelerate", "lightning")]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_bf16_is_our_own_loop(trainer, launch, ours):
    precision = {"accelerate": "bf16", "lightning": "bf16-mixed"}[trainer]
    theirs = losses(launch(EXAMPLES / f"{trainer}_m3ae.py", "--steps", 6, "--precision", precision))
    assert theirs == pytest.approx(ours(precision="bf16", batch_size=8), abs=1e-6)  # as printed
    assert theirs[-1] < 0.8 * theirs[0]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_accumulated_stopped_and_resumed_it_is_our_own_loop(trainer, launch, ours):
    script = (EXAMPLES / f"{trainer}_m3ae.py", "--steps", 6, "--batch-size", 4, "--accumulate", 2)
    first = losses(launch(*script, "--stop-after", 3))
    rest = losses(launch(*script, "--resume"))
    assert len(first) == len(rest) == 3
    assert first + rest == pytest.approx(ours(batch_size=4, accumulate=2), abs=1e-6)  # as printed


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_are_one_with_their_batches(trainer, launch, ours):
    script = (EXAMPLES / f"{trainer}_m3ae.py", "--steps", 6, "--batch-size", 4)
    if trainer == "accelerate":
        printed = launch(*TORCHRUN, *script, ACCELERATE_USE_CPU="true")
    else:
        printed = launch(*script, "--devices", 2)
    assert losses(printed) == pytest.approx(ours(batch_size=8), rel=1e-5)  # gradients are added in another order


@pytest.mark.parametrize("example", ["ddp", "fsdp"])
def test_two_processes_of_torchs_own(example, launch, ours):
    script = (EXAMPLES / f"{example}_m3ae.py", "--steps", 6)
    expected = pytest.approx(ours(batch_size=8), rel=1e-5)  # gradients are added in another order
    assert losses(launch(*TORCHRUN, *script, "--batch-size", 4)) == expected
    assert losses(launch(*script)) == expected


def test_fsdp_stopped_in_two_processes_and_resumed_in_one(launch, ours):
    script = (EXAMPLES / "fsdp_m3ae.py", "--steps", 6)
    first = losses(launch(*TORCHRUN, *script, "--batch-size", 4, "--stop-after", 3))
    rest = losses(launch(*script, "--resume"))
    assert len(first) == len(rest) == 3
    assert first + rest == pytest.approx(ours(batch_size=8), rel=1e-5)
    assert not losses(launch(*script, "--resume")), "there is nothing left to do"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_is_our_own_loop(precision, launch, ours):
    printed = launch(EXAMPLES / "compile_m3ae.py", "--steps", 6, "--precision", precision, "--backend", "aot_eager")
    assert losses(printed) == pytest.approx(ours(precision=precision, batch_size=8), abs=1e-6)  # as printed


def test_gradients_of_each_sample_train(launch, ours):
    found = losses(launch(EXAMPLES / "per_sample_gradients.py", "--steps", 6))
    assert found[0] == pytest.approx(ours(batch_size=8)[0], abs=1e-6)  # as printed
    assert found[-1] < 0.9 * found[0]


@needs("accelerate")
def test_accelerate_moves_a_batch_from_a_loader_of_its_own(launch):
    """A DataLoader that `accelerator.prepare` took, as most scripts have one."""
    code = """
from accelerate import Accelerator
from torch.utils.data import DataLoader
import torch
from m3ae_fast import ImageTextBatch

def collate(images):
    return ImageTextBatch(torch.stack(images), sample_ids=[int(image[0, 0, 0]) for image in images])

images = [torch.full((3, 8, 8), i, dtype=torch.uint8) for i in range(6)]
for batch in Accelerator(cpu=True).prepare(DataLoader(images, batch_size=4, collate_fn=collate)):
    print(type(batch).__name__, len(batch), batch.sample_ids.tolist())
"""
    assert launch("-c", code).splitlines() == ["ImageTextBatch 4 [0, 1, 2, 3]", "ImageTextBatch 2 [4, 5]"]


@pytest.fixture
def hf_trainer(launch, tmp_path):
    """hf_trainer(name, fast, *options): the losses of six steps of the example in the folder `name`, with or without
    its one line."""
    source = (EXAMPLES / "hf_trainer_mae.py").read_text()
    assert source.count(LINE) == 1
    (tmp_path / "fast.py").write_text(source)
    (tmp_path / "plain.py").write_text(source.replace(LINE, ""))

    def run(name, fast, *options):
        folder = tmp_path / name
        script = tmp_path / ("fast.py" if fast else "plain.py")
        launch(script, "--steps", 6, "--save-steps", 3, "--out", folder, *options)
        history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        return [row["loss"] for row in history if "loss" in row]

    return run


@needs("transformers")
@needs("accelerate")
def test_one_line_changes_no_loss_of_hf_trainer(hf_trainer):
    options = ("--data", Path(__file__).parents[1] / "data" / "photos", "--accumulate", 2)
    assert hf_trainer("fast", True, *options) == pytest.approx(hf_trainer("plain", False, *options), abs=1e-4)


@needs("transformers")
@needs("accelerate")
def test_checkpoints_of_hf_trainer_know_nothing_of_us(hf_trainer, tmp_path):
    """Begun with the line it goes on without, and the other way round; what it saves, Transformers reads."""
    from transformers import ViTMAEForPreTraining

    plain, fast = hf_trainer("plain", False), hf_trainer("fast", True)
    assert fast == pytest.approx(plain, abs=1e-4) and plain[-1] < 0.8 * plain[0]
    for begun in ("plain", "fast"):
        shutil.rmtree(tmp_path / begun / "checkpoint-6")
    from_plain, from_fast = hf_trainer("plain", True, "--resume"), hf_trainer("fast", False, "--resume")
    assert from_fast == pytest.approx(from_plain, abs=1e-4)
    assert from_plain[:3] == plain[:3], "it did not begin with step 4"

    for saved in ("plain", "fast"):
        model, report = ViTMAEForPreTraining.from_pretrained(tmp_path / saved, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert model.config.architectures == ["ViTMAEForPreTraining"]
