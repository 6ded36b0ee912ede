"""What the processes of a run agree on before it begins."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
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
