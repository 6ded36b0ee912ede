"""Which backend runs attention on a GPU: the one that a recorded measurement found fastest for calls of that shape.

A record is sm_<capability>.json beside this file, as `python -m benchmarks.choose` writes it: where and when it was
measured, and rows [channels of a head, tokens of the longest sequence, backend], narrow heads first, then short
sequences. The first row that covers a call has its backend. Where no row does, or its backend cannot run the call,
the choice is that of every op. M3AE_FAST_ATTENTION takes the place of all records: a file like these, or a backend.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from m3ae_fast import _backends

CHOICES = ("triton", "cuda")


def read(path: Path) -> dict:
    """A record.

    Raises:
        ValueError: the file is none.
    """
    try:
        record = json.loads(path.read_text())
        rows = [(int(width), int(length), impl) for width, length, impl in record["rows"]]
        if not isinstance(record["architecture"], str) or not {impl for *_, impl in rows} <= {*CHOICES}:
            raise ValueError(f"backends must be of {', '.join(CHOICES)}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no record of benchmarks.choose: {type(error).__name__}: {error}") from error
    return record | {"rows": tuple(sorted(rows))}


FORCED = os.environ.get("M3AE_FAST_ATTENTION") or None
_FILES = [] if FORCED in CHOICES else [Path(FORCED)] if FORCED else sorted(Path(__file__).parent.glob("sm_*.json"))
RECORDS = {record["architecture"]: record for record in map(read, _FILES)}
_CAPABILITIES: dict[torch.device, str] = {}


def pick(backends: _backends.Backends, impl: str | None, q: Tensor, *longest: int | None) -> str:
    """As `_backends.pick`, for q [T, H, D] (or packed) and the longest lengths of queries and keys."""
    if impl is None and _backends._FORCED is None and (FORCED or RECORDS):
        recorded = _recorded(q, *longest)
        if recorded is not None and backends.cannot_run(recorded, q) is None:
            impl = recorded
    return _backends.pick(backends, impl, q)


def _recorded(q: Tensor, *longest: int | None) -> str | None:
    if FORCED in CHOICES:
        return FORCED
    record = RECORDS.get(_architecture(q.device))
    if record is None or None in longest:
        return None
    for width, length, impl in record["rows"]:
        if q.shape[-1] <= width and max(longest) <= length:
            return impl
    return None


def _architecture(device: torch.device) -> str:
    if device not in _CAPABILITIES:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        _CAPABILITIES[device] = device.type if capability is None else "sm_{}{}".format(*capability)
    return _CAPABILITIES[device]


# What torch.compiler.assume_constant_result does; to call it would import torch._dynamo here.
_architecture._dynamo_marked_constant = True


def remarks() -> list[str]:
    """What decides on a GPU, for `m3ae_fast.explain()`."""
    if FORCED in CHOICES:
        return [f"M3AE_FAST_ATTENTION={FORCED}"]
    return [
        f"by shape on {architecture}, as measured on {record.get('GPU')}, {record.get('date')}"
        for architecture, record in sorted(RECORDS.items())
    ] or ["on a GPU Triton, for any shape: no measurement against CUDA is recorded"]
