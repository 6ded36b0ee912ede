"""Two processes that talk by gloo, kept for all tests of a module."""

import os
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120  # for one call, and for one process to wait for the other


def serve(rank, rendezvous, pipe):
    """Answer (function, args) with (True, result) or (False, traceback), until the pipe closes."""
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's own name may not resolve
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=limit)
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


class Pair:
    """Two processes; pair(function, *args) -> what function(*args) returned in each. A failure takes both down."""

    def __init__(self, folder):
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, folder / "rendezvous", theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function, *args):
        for pipe in self.pipes:
            pipe.send((function, args))
        results = {}
        while len(results) < 2:
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
                    self.close()  # the other one may be waiting for it
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
def _pair(tmp_path_factory):
    pairs = []

    def get():
        if not pairs or not all(process.is_alive() for process in pairs[-1].processes):
            pairs.append(Pair(tmp_path_factory.mktemp("pair")))
        return pairs[-1]

    yield get
    for pair in pairs:
        pair.close()


@pytest.fixture
def pair(_pair):
    """See Pair; another one is started after one that failed."""
    return _pair()
