"""A run in several processes, which torchrun starts: who is who, what they agree on, how a model is spread over them.

In a process of its own all of this comes down to nothing.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # not later: its default arguments would hold the process group for ever
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from m3ae_fast.nn import Block

Result = TypeVar("Result")
# DDP's option for buffers to be broadcast, by its name since torch 2.13
_options = inspect.signature(DistributedDataParallel).parameters
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _options else "broadcast_buffers"
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


class FailedElsewhere(RuntimeError):
    """The first process failed, and has said why: this one only ends with it."""


def rank() -> int:
    """Of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0)) if launched() else 0


def world_size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


def launched() -> bool:
    """Whether torchrun, or a launcher that sets what it sets, started this process as one of several."""
    return all(name in os.environ for name in RENDEZVOUS) and int(os.environ["WORLD_SIZE"]) > 1


@contextlib.contextmanager
def process_group(timeout: int) -> Iterator[dist.Store]:
    """Join the other processes, where there are any and no process group is there already: by gloo, tensors on GPUs by
    NCCL. Yields a store: torchrun's, which `--max-restarts` keeps, where the group is ours; else one of this process.

    Args:
        timeout: seconds that a process waits for the others before it gives up.
    Raises:
        ConnectionError: another process is gone, or did not answer in time.
    """
    store, limit = dist.HashStore(), timedelta(seconds=timeout)
    owned = launched() and not dist.is_initialized()
    try:
        if owned or (dist.is_torchelastic_launched() and not dist.is_initialized()):  # the latter: one of one
            store, number, count = next(rendezvous("env://", timeout=limit))
        if owned:
            # addresses of processes that are gone must not be found there after a restart
            own_part = dist.PrefixStore(_agree_on_start(store, number, count, limit), store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=own_part, rank=number, world_size=count, timeout=limit)
        yield store
    except RuntimeError as error:
        # gloo's errors have no type of their own, but name the file in which they were raised, or a pair of processes
        if not isinstance(error, dist.DistError) and not re.search("gloo/transport|pair closure", str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"process {rank()} of {world_size()} has lost another one, which died, was stopped or took longer than the "
            f"timeout: see what that one said. Start again with --resume. ({reason})"
        ) from error
    if owned:  # not after an error: it would wait for processes that are gone
        # a hold on the group would keep gloo's threads running while Python ends, which can abort the process
        gc.collect()  # DDP is in a cycle
        for mesh in [each for each in gc.get_objects() if type(each) is DeviceMesh]:
            getattr(mesh, "_pg_registry", {}).clear()  # the caches of DTensor never let go of a mesh
        dist.destroy_process_group()


def _agree_on_start(store: dist.Store, number: int, count: int, timeout: timedelta) -> str:
    """A name for this start that no other has, the same in all processes. Not torchrun's count of restarts: each of
    several machines has a count of its own.

    The first process makes the name and hands it to whoever says hello, until all have thanked for it: a hello may be
    of an earlier start, of a process that is gone.
    """
    own = uuid.uuid4().hex
    if number > 0:
        store.set(f"hello {number}", own)
        name = store.get(f"name for {own}").decode()  # waits
        store.set(f"{name} thanks {number}", "")
        return name
    until = time.monotonic() + timeout.total_seconds()
    while not store.check([f"{own} thanks {each}" for each in range(1, count)]):
        for hello in (f"hello {each}" for each in range(1, count)):
            if store.check([hello]):
                store.set(f"name for {store.get(hello).decode()}", own)
        if time.monotonic() > until:
            raise dist.DistStoreError(f"not all of {count} processes have come in {timeout.total_seconds():.0f} s")
        time.sleep(0.02)
    return own


def own_device(name: str | None) -> str | None:
    """Of several processes on GPUs each has its own, the one numbered LOCAL_RANK. To be called before anything else
    touches a GPU: that would be GPU 0, where every process would take memory.

    Args:
        name: of the device that is asked for; None: cuda if there is one.
    Raises:
        ValueError: a GPU by its number, or more processes than GPUs.
    """
    if world_size() == 1 or not torch.cuda.is_available() or not (name or "cuda").startswith("cuda"):
        return name
    number = int(os.environ.get("LOCAL_RANK", 0))
    if name not in (None, "cuda"):
        raise ValueError(f"device must be cuda, without a number, where each process has its own, got {name}")
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one that each process has for itself: there are {torch.cuda.device_count()} GPUs, "
            f"and this is process {number} of this machine"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


# -- what the processes agree on -------------------------------------------------------------------------------------


def on_first(function: Callable[[], Result]) -> Result:
    """What `function()` returns in the first process, which alone calls it. Where it fails there, all fail.

    Raises:
        FailedElsewhere: in the other processes. In the first one, whatever was raised.
    """
    if world_size() == 1:
        return function()
    outcome, error = [None, None], None
    if is_first():
        try:
            outcome = [function(), None]
        except Exception as raised:
            error, outcome = raised, [None, f"{type(raised).__name__}: {raised}"]
    dist.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise FailedElsewhere(f"the first process failed: {outcome[1]}")
    return outcome[0]


def total(*numbers: float) -> list[float]:
    """Sums over the processes."""
    if world_size() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    dist.all_reduce(sums)
    return sums.tolist()


def gather(value: Result) -> list[Result]:
    """What each process has, in the order of their ranks, in all of them."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def mean(values: Tensor) -> Tensor:
    """Means over the processes, the same bits in each."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


# -- a model over several processes ----------------------------------------------------------------------------------


def spread(
    model: nn.Module, device: torch.device, *, shard: bool, dtype: torch.dtype | None, unused: bool = False
) -> nn.Module:
    """The model to be called in training, itself where there is one process.

    Args:
        model: on `device`, with the same weights in every process.
        shard: FSDP2: every process keeps a share of each weight, gradient and moment, and the model is changed in
            place; a block is gathered when it runs. False: DDP, every process keeps all.
        dtype: what is gathered is rounded to it first; gradients are summed in float32 all the same. None: it is not.
        unused: not every parameter has a gradient in every step.
    """
    if world_size() == 1:
        return model
    if not shard:
        return DistributedDataParallel(
            model,
            **{BUFFERS: False},  # positions, and queues that all processes fill alike
            gradient_as_bucket_view=True,
            find_unused_parameters=unused,
        )
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    # inputs are left to autocast, as without sharding
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for module in (*(m for m in model.modules() if isinstance(m, Block)), model):  # the model last: what is left
        fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "encode_cls")  # it gathers what it needs, as a forward pass does
    return model


def bare(model: nn.Module) -> nn.Module:
    """The model that `spread` was given."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def summing_gradients(model: nn.Module, now: bool) -> Iterator[None]:
    """A forward and a backward pass whose gradients are averaged over the processes, if `now`; else they stay where
    they are until a pass whose are."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    with contextlib.nullcontext() if now or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield


def end_of_passes(model: nn.Module) -> None:
    """After forward passes without a backward pass, which would do it: what was gathered is let go."""
    if isinstance(model, FSDPModule):
        model.reshard()


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """A copy of a tensor that every process has in full, on the device of `like` and, where that is sharded, as its
    share."""
    value = value.to(like.device, copy=True)
    if isinstance(like, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's state dict in full, on the CPU of the first process; {} in the others. Called by all, which
    have one tensor at a time in full."""
    weights = {}
    for name, value in model.state_dict().items():
        value = whole(value)
        if is_first():
            weights[name] = value.cpu()
    return weights


def whole(value: Tensor) -> Tensor:
    """A tensor in full, put together from its shards where it has any: to be called by all processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value
