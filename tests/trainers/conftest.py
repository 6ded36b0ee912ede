"""Two processes that talk by gloo, or four, kept for all tests."""

import os
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120  # for one call, and for one process to wait for the others


def serve(rank, count, rendezvous, pipe):
    """Answer (function, args) with (True, result) or (False, traceback), until the pipe closes."""
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's own name may not resolve
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count, timeout=limit)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            dist.destroy_process_group()
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Processes:
    """processes(function, *args) -> what function(*args) returned in each of them. A failure takes all down."""

    def __init__(self, folder, count):
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, count, folder / "rendezvous", theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function, *args):
        for pipe in self.pipes:
            pipe.send((function, args))
        results = {}
        while len(results) < len(self.pipes):
            ready = wait([pipe for pipe in self.pipes if pipe not in results], SECONDS)
            if not ready:
                self.close()
                raise TimeoutError(f"{function.__name__} gave no answer in {SECONDS} s")
            for pipe in ready:
                try:
                    fine, results[pipe] = pipe.recv()
                except EOFError:
                    fine, results[pipe] = False, "it died"
                if not fine:
                    self.close()  # the others may be waiting for it
                    raise RuntimeError(f"in process {self.pipes.index(pipe)}:\n{results[pipe]}")
        return [results[pipe] for pipe in self.pipes]

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """processes(count): see Processes; others are started after some that failed."""
    started = {}

    def get(count):
        if count not in started or not all(process.is_alive() for process in started[count].processes):
            started[count] = Processes(tmp_path_factory.mktemp("processes"), count)
        return started[count]

    yield get
    for each in started.values():
        each.close()


@pytest.fixture
def pair(processes):
    """Two of them."""
    return processes(2)
