"""torchrun -m m3ae_fast pretrain, as it is started: a process that dies ends the run, which goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import m3ae_fast
from m3ae_fast.train import RunConfig, checkpoint, metrics, pretrain

pytestmark = pytest.mark.exhaustive

SECONDS = 600  # for a run, on a machine that does other things too
RUN = ["--batch-size", "4", "--image-size", "32", "--device", "cpu", "--picture-every", "0", "--checkpoint-every", "2"]
# The last process sends itself a signal, once, as the sixth step of the run begins. Its count of restarts is that of
# another machine's torchrun, which has restarted nothing.
SIGNALLED = """
import os, runpy, signal, sys
from m3ae_fast.train import trainer
step = trainer.train_step
last, restarts = int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
if last:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
def hooked(model, optimizer, micro_batches, config, done, *rest):
    if last and (restarts, done) == ("0", 5):
        with open("signalled", "w") as file:
            file.write(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGNAL)
    return step(model, optimizer, micro_batches, config, done, *rest)
trainer.train_step = hooked
runpy.run_module("m3ae_fast", run_name="__main__")
"""


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(*options, script=None): the process, its stderr in a file; two processes of `pretrain`, in tmp_path."""
    started = []

    def start(*options, torchrun=(), script=None):
        program = ["-m", "m3ae_fast"]
        if script is not None:
            (tmp_path / "script.py").write_text(script)
            program = [str(tmp_path / "script.py")]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *torchrun]
        env = {**os.environ, "PYTHONPATH": str(Path(m3ae_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        if Path("/sys/class/net/lo").exists():
            env["GLOO_SOCKET_IFNAME"] = "lo"  # a host's own name may not resolve
        with open(tmp_path / "stderr", "w") as err:
            process = subprocess.Popen(
                [*command, *program, "pretrain", *RUN, *options],
                env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=err,
            )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()  # not kill: it is to end its processes, too
        process.wait(60)


KILLED, STOPPED = (SIGNALLED.replace("SIGNAL)", f"{name})") for name in ("SIGKILL", "SIGSTOP"))
LOST = "m3ae-fast pretrain: error: process 0 of 2 has lost another one, which died, was stopped or took longer"


def stderr(tmp_path):
    return (tmp_path / "stderr").read_text()


def wait_until(done, process, tmp_path):
    """While the process runs."""
    end = time.monotonic() + SECONDS
    while not done() and time.monotonic() < end:
        assert process.poll() is None, stderr(tmp_path)
        time.sleep(0.2)


def losses(folder):
    return torch.tensor([row["loss"] for row in metrics.read(folder / "metrics.jsonl")])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """losses of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    config = RunConfig(steps=9, batch_size=4, image_size=32, device="cpu", picture_every=0)
    pretrain(config, folder, progress=False)
    return losses(folder)


@pytest.mark.parametrize("way", [[], ["--shard"]], ids=["DDP", "FSDP2"])
def test_a_process_that_dies_ends_the_run_which_goes_on(torchrun, tmp_path, undisturbed, way):
    process = torchrun("--steps", "9", "--out", "run", *way, script=KILLED)
    assert process.wait(SECONDS) != 0
    assert LOST in stderr(tmp_path) and "Start again with --resume." in stderr(tmp_path)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").stem == "step-00000004"

    process = torchrun("--out", "run", "--resume", *way)
    assert process.wait(SECONDS) == 0, stderr(tmp_path)
    torch.testing.assert_close(losses(tmp_path / "run"), undisturbed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_torchrun_starts_it_again(torchrun, tmp_path, undisturbed, processes):
    restarting = ["--max-restarts", "1", "--nproc-per-node", processes]
    process = torchrun("--steps", "9", "--out", "run", torchrun=restarting, script=KILLED)
    assert process.wait(SECONDS) == 0, stderr(tmp_path)
    torch.testing.assert_close(losses(tmp_path / "run"), undisturbed, rtol=1e-5, atol=1e-6)


def test_a_restart_goes_on_with_nothing_older_than_its_launch(torchrun, tmp_path):
    config = RunConfig(steps=9, batch_size=4, image_size=32, device="cpu", picture_every=0)
    pretrain(config, tmp_path / "run", stop_after=1, progress=False)
    process = torchrun("--steps", "9", "--out", "run", torchrun=["--max-restarts", "1"])
    assert process.wait(SECONDS) != 0
    assert stderr(tmp_path).count("run holds a run already: --resume continues it") == 2
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").stem == "step-00000001"


def test_a_process_that_hangs_is_not_waited_for_for_ever(torchrun, tmp_path):
    options = ["--steps", "9", "--out", "run", "--rank-timeout", "30"]
    process = torchrun(*options, script=STOPPED)
    wait_until(lambda: LOST in stderr(tmp_path), process, tmp_path)
    os.kill(int((tmp_path / "signalled").read_text()), signal.SIGKILL)  # torchrun waits half a minute before it does
    assert process.wait(SECONDS) != 0
    assert LOST in stderr(tmp_path) and "Timed out" in stderr(tmp_path)


def test_sigterm_to_torchrun_saves_and_stops(torchrun, tmp_path):
    """Also with processes that load data, which torchrun signals as well."""
    process = torchrun("--steps", "100000", "--checkpoint-every", "0", "--workers", "1", "--out", "run")
    wait_until(lambda: len(metrics.read(tmp_path / "run" / "metrics.jsonl")) > 2, process, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) != 0
    steps = len(metrics.read(tmp_path / "run" / "metrics.jsonl"))
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == f"step-{steps:08d}.safetensors"
    assert stderr(tmp_path).count("Traceback") == 1, "more than torchrun's own"


THREADS = """
import gc, os, runpy, sys
from pathlib import Path
gc.disable()  # nothing is collected by chance
try:
    PROGRAM
except SystemExit as end:
    assert not end.code
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
Path(f"threads-{os.environ['RANK']}").write_text(str([name for name in names if "gloo" in name]))
"""
PROGRAM = "runpy.run_module('m3ae_fast', run_name='__main__')"
EXAMPLE = (
    "sys.argv[1:] = ['--steps', '1']; "
    f"runpy.run_path({str(Path(__file__).parents[2] / 'examples' / 'ddp_m3ae.py')!r}, run_name='__main__')"
)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are told by /proc")
@pytest.mark.parametrize(
    ("program", "options"), [(PROGRAM, []), (PROGRAM, ["--shard"]), (EXAMPLE, [])], ids=["ddp", "shard", "example"]
)
def test_no_thread_of_gloos_is_left(torchrun, tmp_path, program, options):
    """One that is may call into a Python that is ending, which aborts the process."""
    process = torchrun("--steps", "1", "--out", "run", *options, script=THREADS.replace("PROGRAM", program))
    assert process.wait(SECONDS) == 0, stderr(tmp_path)
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in range(2)] == ["[]", "[]"]


def test_a_mistake_is_told_once(torchrun, tmp_path):
    process = torchrun("--steps", "2", "--out", "run", "--data", "nowhere")
    assert process.wait(SECONDS) != 0
    assert stderr(tmp_path).count("error: data must name ") == 1
