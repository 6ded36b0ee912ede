"""What the processes of a run agree on before it begins."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from m3ae_fast.train import distributed


def starts(store, *waits, timeout=60):
    """The names that processes find which come after so many seconds each."""

    def come(number):
        time.sleep(waits[number])
        return distributed._agree_on_start(store, number, len(waits), timedelta(seconds=timeout))

    with ThreadPoolExecutor(len(waits)) as pool:
        return list(pool.map(come, range(len(waits))))


def test_all_processes_find_the_same_new_name_in_each_start():
    """In whatever order they come, and though the store remembers those of the start before."""
    store, names = dist.HashStore(), []
    for waits in ((0, 0, 0), (0, 0.2, 0.1), (0.2, 0, 0.1)):
        found = starts(store, *waits)
        assert len(set(found)) == 1
        names += found[:1]
    assert len(set(names)) == 3


def test_a_process_that_does_not_come_is_not_waited_for_for_ever():
    with pytest.raises(dist.DistStoreError, match="not all of 2 processes have come in 1 s"):
        distributed._agree_on_start(dist.HashStore(), 0, 2, timedelta(seconds=1))


@pytest.fixture
def third_of_three(monkeypatch):
    """gpus(count): this is process 2 on a machine with so many; the calls of set_device."""

    def gpus(count):
        chosen = []
        monkeypatch.setattr(distributed, "world_size", lambda: 3)
        monkeypatch.setenv("LOCAL_RANK", "2")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return gpus


@pytest.mark.parametrize("name", [None, "cuda"])
def test_each_process_has_its_gpu_before_one_is_touched(third_of_three, name):
    chosen = third_of_three(3)
    assert distributed.own_device(name) == "cuda:2" and chosen == [2]


@pytest.mark.parametrize(("name", "count"), [("cpu", 3), (None, 0), ("cuda", 0)])
def test_no_gpu_is_touched_for_another_device(third_of_three, name, count):
    chosen = third_of_three(count)
    assert distributed.own_device(name) == name and chosen == []


def test_a_gpu_is_not_shared(third_of_three):
    third_of_three(2)
    with pytest.raises(ValueError, match="there are 2 GPUs, and this is process 2 of this machine"):
        distributed.own_device(None)
    with pytest.raises(ValueError, match=r"device must be cuda, without a number, .* got cuda:0"):
        distributed.own_device("cuda:0")
