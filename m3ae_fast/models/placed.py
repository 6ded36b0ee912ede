"""Where a plan's tensors lie: in page-locked memory, or on a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from m3ae_fast.seqlens import SeqLens

T = TypeVar("T")
ON_HOST = {"on_host": True}  # metadata of a dataclass's field that stays where it is


def placed(value: T, place: Callable[[Tensor], Tensor], pieces: dict[tuple, Tensor] | None = None) -> T:
    """A dataclass, with its tensors and offsets where `place` puts them.

    Parts of one piece of memory remain that, and `place` is given the whole piece, once.

    Args:
        value: also what such a dataclass holds: numbers and None are handed back.
        pieces: what has been placed already, by address and dtype.
    """
    pieces = {} if pieces is None else pieces
    if isinstance(value, Tensor):
        memory = value.untyped_storage()
        key = memory.data_ptr(), value.dtype
        if key not in pieces:
            pieces[key] = place(value.as_strided((memory.nbytes() // value.element_size(),), (1,), 0))
        return pieces[key].as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, SeqLens):
        return value.at(placed(value.cu, place, pieces))
    if not dataclasses.is_dataclass(value):
        return value
    moving = [field.name for field in dataclasses.fields(value) if field.metadata != ON_HOST]
    return dataclasses.replace(value, **{name: placed(getattr(value, name), place, pieces) for name in moving})
