"""A run goes on to the bit after kill -9, a full disk, a dead worker and any error.

M3AE_FAST_KILLS=50 kills the run of the first test fifty times instead of five (`-s` prints where it was hit).
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import m3ae_fast
from m3ae_fast import cli
from m3ae_fast.train import checkpoint, metrics, pretrain, run, trainer

KILLS = int(os.environ.get("M3AE_FAST_KILLS", 5))

# Starting Python and torch takes longer than the run: the process that is killed is forked from one that has done so.
SERVER = '''
import json, os, sys, traceback
import matplotlib.figure, safetensors.torch, tokenizers, torch.utils.tensorboard
from m3ae_fast import cli
from m3ae_fast.train import run

run.LEARN_WORDS_FROM = 300
print("ready", flush=True)


def die_before(change):
    """kill -9 as it is about to open a file of the run to write it, to rename or delete one, or to make a folder."""

    def hook(event, values):
        nonlocal change
        changes = event in ("os.mkdir", "os.rename", "os.remove") or (event == "open" and values[2] & os.O_ACCMODE)
        if changes and "killed" in str(values[0]):
            change -= 1
            if change == 0:
                os.kill(os.getpid(), 9)

    sys.addaudithook(hook)


for line in sys.stdin:
    process = os.fork()
    if process == 0:
        os.dup2(2, 1)
        arguments, change = json.loads(line)
        die_before(change)
        try:
            status = cli.main(arguments)
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
'''


class Server:
    """start(*arguments): the process of a new `m3ae-fast pretrain`; wait(): its exit status, -9 where it was killed."""

    def __init__(self, folder: Path):
        package = str(Path(m3ae_fast.__file__).parents[1])
        env = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = open(folder / "log", "w")  # noqa: SIM115  closed by stop
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], text=True, env=env, cwd=folder, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def start(self, *arguments, die_before: int = 0) -> int:
        self.process.stdin.write(json.dumps([["pretrain", *map(str, arguments)], die_before]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return int(self.process.stdout.readline())

    def stop(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.stop()


def numbers(folder):
    """What metrics.jsonl says, to the bit, without the rate; and the bytes of the newest checkpoint."""
    rows = metrics.read(folder / "metrics.jsonl")
    for row in rows:
        del row["tokens_per_second"]
    return rows, checkpoint.latest(folder / "checkpoints").read_bytes()


def newest_step(folder) -> int:
    """Of the newest checkpoint, by its name; 0 where there is none."""
    return max((int(path.stem.split("-")[1]) for path in checkpoint.all_in(folder / "checkpoints")), default=0)


def lines(path) -> int:
    """Whole ones."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition):
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_killed_at_random_moments_it_is_the_same_run(server, tmp_path):
    steps, rng, hits, taken = 10 * KILLS + 10, random.Random(0), Counter(), 0
    options = ["--steps", steps, "--batch-size", 2, "--image-size", 32, "--device", "cpu", "--checkpoint-every", 2]
    begin = time.perf_counter()
    server.start("--out", "whole", *options)
    wait_for((tmp_path / "whole" / "run.json").exists)
    started = time.perf_counter()
    assert server.wait() == 0
    to_start, a_step = started - begin, (time.perf_counter() - started) / steps

    folder, unfinished = tmp_path / "killed", set()
    for kill in range(KILLS):  # a third of them while the process starts, the others around some step
        process = server.start("--out", "killed", *options, "--resume", "auto")
        if kill == 0 or rng.random() < 1 / 3:
            time.sleep(rng.uniform(0, to_start))
        else:
            step = rng.randint(10 * kill, 10 * kill + 9)
            wait_for(lambda step=step: (folder / "run.json").exists() and lines(folder / "metrics.jsonl") >= step - 1)
            begin = time.perf_counter()
            wait_for(lambda step=step: lines(folder / "metrics.jsonl") >= step)
            time.sleep(rng.uniform(0, 2 * min(a_step, time.perf_counter() - begin)))  # another may be at work here
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
        before, taken = taken, lines(folder / "metrics.jsonl")
        unfinished, left = set(folder.glob("checkpoints/.*")), unfinished
        hits["in a checkpoint's write"] += bool(unfinished - left)
        hits["before there was a run"] += not (folder / "run.json").exists()
        hits["steps taken twice"] += taken - newest_step(folder)
        hits["while it started again"] += taken <= before
    print(f"{KILLS} kills, the last in step {taken + 1} of {steps}: {dict(hits)}")
    server.start("--out", "killed", *options, "--resume", "auto")
    assert server.wait() == 0
    assert numbers(folder) == numbers(tmp_path / "whole")
    assert len(numbers(folder)[0]) == steps
    assert not list(folder.rglob(".*")), "nothing half-written is left"


def test_killed_before_any_change_to_its_files_it_is_the_same_run(server, tmp_path):
    """Not left to chance: the k-th process dies before the k-th change, all but the last."""
    options = ["--steps", 4, "--batch-size", 2, "--image-size", 32, "--device", "cpu", "--checkpoint-every", 2]
    server.start("--out", "whole", *options)
    assert server.wait() == 0
    statuses = []
    while 0 not in statuses:
        server.start("--out", "killed", *options, "--resume", "auto", die_before=len(statuses) + 1)
        statuses.append(server.wait())
    assert set(statuses[:-1]) == {-signal.SIGKILL} and len(statuses) > 15
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


@pytest.fixture
def disk(tmp_path):
    """fill(bytes): a small disk at tmp_path / "disk" is full but for this many; None: has room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a disk of its own needs root; test_checkpoint.py and test_metrics.py fill files instead")

    def fill(free):
        ballast = folder / "ballast"
        ballast.unlink(missing_ok=True)
        if free is not None:
            room = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            with open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, room - free)

    yield fill
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard writes in a thread
def test_a_disk_full_at_any_write_names_the_file_and_costs_nothing(train, disk, tmp_path):
    whole = train("whole", checkpoint_every=2)
    size = checkpoint.latest(tmp_path / "whole" / "checkpoints").stat().st_size
    places = [0, 4096, 8192, 16384, 40960, size // 2, size + 65536, 2 * size + 65536]
    checkpoints, named = tmp_path / "disk" / "run" / "checkpoints", set()
    for free in places * 2:
        disk(free)
        before = newest_step(checkpoints.parent)
        try:
            train("disk/run", resume="auto", checkpoint_every=2, stop_after=before + 3 if before < 9 else None)
        except OSError as error:
            assert str(tmp_path / "disk" / "run") in str(error)
            named.update(part for part in ("metrics", "tensorboard", "step-") if part in str(error))
        assert newest_step(checkpoints.parent) >= before
        if before:
            checkpoint.load(checkpoint.latest(checkpoints))  # verified in full
        assert not list(checkpoints.glob(".*"))
    assert named >= {"metrics", "tensorboard", "step-"}, named
    disk(None)
    train("disk/run", resume="auto", checkpoint_every=2)
    assert numbers(tmp_path / "disk" / "run") == numbers(tmp_path / "whole") and len(whole) == 12


def test_a_disk_full_while_drawing_names_the_picture(config, disk, tmp_path, monkeypatch):
    drawing = trainer.draw_pictures

    def full(*arguments):
        disk(0)
        drawing(*arguments)

    monkeypatch.setattr(trainer, "draw_pictures", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*disk/run/pictures"):
        pretrain(config(steps=4, picture_every=2, checkpoint_every=1), tmp_path / "disk" / "run", progress=False)
    disk(None)
    monkeypatch.setattr(trainer, "draw_pictures", drawing)
    pretrain(config(steps=4, picture_every=2), tmp_path / "disk" / "run", resume=True, progress=False)
    assert {path.name for path in (tmp_path / "disk" / "run" / "pictures").iterdir()} == {
        "losses.png", "reconstruction-00000004.png",
    }  # fmt: skip


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, do): call do() in the midst of step n, counted from 1: gradients are there, moments are not moved."""
    step = torch.optim.AdamW.step
    counted = Counter()

    def hook(number, do):
        def hooked(self):
            counted["steps"] += 1
            if counted["steps"] == number:
                do()
            return step(self)

        monkeypatch.setattr(torch.optim.AdamW, "step", hooked)

    return hook


def test_a_killed_worker_costs_no_batch(config, rows, train, at_step, tmp_path, counted_warnings, monkeypatch):
    whole = train("whole")
    started = []
    loaded = run.Loader

    def started_loader(*arguments, **options):
        started.append(loaded(*arguments, **options))
        return started[0]

    def kill():
        for worker in started[0]._batches._workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()  # torch's own handler would raise here, in the midst of the step

    monkeypatch.setattr(run, "Loader", started_loader)
    at_step(3, kill)
    summary = pretrain(config(workers=2), tmp_path / "run", progress=False)
    assert rows() == whole and summary.workers_died == 1
    assert "started again at batch" in str(counted_warnings[-1].message)


@pytest.mark.parametrize(
    "error, shown",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory; --checkpoint-blocks needs less memory"),
        (ChildProcessError("workers died 3 times at batch 5"), "error: workers died 3 times at batch 5"),
        (RuntimeError("a kernel failed"), None),  # ours, or the machine's: with its traceback
    ],
)
def test_any_error_leaves_a_run_that_goes_on(train, rows, at_step, tmp_path, capsys, error, shown):
    whole = train("whole")

    def fail():
        raise error

    at_step(6, fail)
    options = ["--steps", "12", "--batch-size", "2", "--image-size", "32", "--device", "cpu", "--checkpoint-every", "2"]
    call = ["pretrain", *options, "--out", str(tmp_path / "run")]
    if shown is None:
        with pytest.raises(RuntimeError, match="a kernel failed"):
            cli.main(call)
    else:
        assert cli.main(call) == 2
    told = capsys.readouterr().err
    assert f"broken off by {type(error).__name__}; step-00000004.safetensors is there to go on from: --resume" in told
    assert shown is None or shown in told.splitlines()[-1]
    assert cli.main([*call, "--resume"]) == 0
    assert rows() == whole


def test_one_process_trains_in_a_folder_at_a_time(train, rows, at_step, config, tmp_path):
    whole, refused = train("whole"), []

    def meanwhile():
        for settings in ({}, {"resume": True}):
            with pytest.raises(OSError, match=f"{tmp_path / 'run'} .*: .*--out") as caught:
                pretrain(config(), tmp_path / "run", progress=False, **settings)
            refused.append(type(caught.value))

    at_step(6, meanwhile)
    assert train("run") == whole, "the first one goes on undisturbed"
    assert refused == [FileExistsError, BlockingIOError]


def test_of_two_that_begin_together_one_is_refused(config, rows, tmp_path):
    first, second = (trainer.Trainer(config(steps=2), tmp_path / "run") for _ in range(2))
    with first:
        with pytest.raises(BlockingIOError, match="run is in use"):
            second.run(progress=False)
        first.step()
    with pytest.raises(FileExistsError, match="run holds a run already"):
        second.run(progress=False)


def test_of_two_that_resume_together_one_is_refused(config, train, tmp_path):
    train("run", stop_after=3)
    first, second = (trainer.Trainer(config(), tmp_path / "run", resume=True) for _ in range(2))
    first.run(5, progress=False)
    with pytest.raises(BlockingIOError, match="run has gone on to step-00000005"):
        second.run(progress=False)
