"""Argument checks of every op: "<name> must ..., got ..."."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def _text(shape: Sequence[int | str | None]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def tensor(name: str, value: object) -> Tensor:
    """A tensor, handed back."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def shape(name: str, value: Tensor, expected: Sequence[int | None]) -> None:
    """expected: one entry a dimension, None for any size."""
    sizes = (value if isinstance(value, Tensor) else tensor(name, value)).shape
    if sizes == expected:
        return
    matches = len(sizes) == len(expected)
    if matches:
        for i, want in enumerate(expected):  # a plain loop: this runs for every argument of every call
            if want is not None and sizes[i] != want:
                matches = False
    if not matches:
        raise ValueError(f"{name} must have shape {_text(expected)}, got {_text(tuple(sizes))}")


def dtype(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """A tensor of one of the allowed dtypes."""
    if tensor(name, value).dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} must be of dtype {names}, got {str(value.dtype).removeprefix('torch.')}")


def device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """A tensor on the device that another one is on."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as {like_name} is, got {value.device}")


def floating(name: str, value: Tensor, expected: Sequence[int | None], like_name: str, like: Tensor) -> None:
    """A floating-point tensor of this shape on the device that another one is on: what most arguments are."""
    shape(name, value, expected)
    if value.dtype not in FLOATS:
        dtype(name, value, FLOATS)
    if value.device != like.device:
        device(name, value, like_name, like)


def numbers(name: str, value: Tensor) -> list:
    """The numbers in a tensor, which is read on the host: a sync where it is on a GPU."""
    if value.device.type == "meta" or value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor that holds numbers, got {value.layout} on {value.device}")
    return value.tolist()


def choice(name: str, value: object, allowed: Collection[object]) -> None:
    """One of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def number(name: str, value: object) -> None:
    """An int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def real(name: str, value: object, within: str) -> None:
    """A number in an interval such as "[0, 1)"."""
    number(name, value)
    low, high = map(float, within[1:-1].split(","))
    above = value >= low if within[0] == "[" else value > low  # false for a NaN
    if not above or not (value <= high if within[-1] == "]" else value < high):
        words = {"(0, inf)": "finite and positive", "[0, inf)": "finite and not negative"}
        raise ValueError(f"{name} must be {words.get(within, f'in {within}')}, got {value}")


def interval(name: str, value: object, within: str) -> None:
    """(low, high), a tuple or a list of two numbers in an interval such as "[0, 1)", low <= high."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, (low, high), got {value!r}")
    for each in value:
        real(name, each, within)
    if value[0] > value[1]:
        raise ValueError(f"{name} must be (low, high), low <= high, got {tuple(value)}")


def integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """An int in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < low or (high is not None and value >= high):
        bound = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"{name} must be {bound}, got {value}")


def sides(name: str, value: object, low: int = 1) -> tuple[int, int]:
    """(height, width) in pixels, each at least `low`: of these two, or of one number for both."""
    if isinstance(value, tuple | list) and len(value) == 2:
        for side in value:
            integer(name, side, low)
        return tuple(value)
    if isinstance(value, tuple | list):
        raise ValueError(f"{name} must be pixels a side or (height, width), got {value!r}")
    integer(name, value, low)
    return value, value


def as_integer(name: str, value: object, low: int) -> int:
    """An int of at least `low`, or what holds one on the host: numpy's, or a tensor without dimensions."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise TypeError(f"{name} must be an integer, or a tensor of one on the CPU, got one on {value.device.type}")
    if not isinstance(value, (bool, int, float, torch.SymInt)) and hasattr(value, "__index__"):
        value = operator.index(value)
    integer(name, value, low)
    return value


def indices(name: str, value: Tensor, length: int | None = None) -> Tensor:
    """An index vector, int32 or int64, of `length` entries; returned contiguous."""
    shape(name, value, (length,))
    if value.dtype not in INTEGERS:
        dtype(name, value, INTEGERS)
    return value.contiguous()


def ids(name: str, value: Tensor, length: int | None = None) -> Tensor:
    """An index vector, int32 or int64, of `length` entries; returned as contiguous int32."""
    value = indices(name, value, length)
    if value.dtype != torch.int32:  # saturate: what is out of range must stay out of range, on a GPU too
        value = value.clamp(-(2**31), 2**31 - 1).to(torch.int32)
    return value


def offsets(name: str, value: Tensor, rows: int) -> None:
    """Cumulative offsets: from 0, ascending, at most `rows` at the end. Looked at on the CPU; a GPU would sync."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if value[0] != 0 or (value[1:] < value[:-1]).any() or value[-1] > rows:
        raise ValueError(f"{name} must ascend from 0 to at most {rows} rows, got {_list(value)}")


def within(name: str, value: Tensor, low: int, high: int, count: Tensor | None = None) -> None:
    """Indices, the first `count` of them, in [low, high). Looked at on the CPU; a GPU would sync."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    value = value if count is None else value[:count]
    if not value.numel():
        return
    if value.min() < low or value.max() >= high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {_list(value[(value < low) | (value >= high)])}")


def _list(value: Tensor) -> str:
    shown = ", ".join(map(str, value[:8].tolist()))
    return f"[{shown}{', ...' if len(value) > 8 else ''}]"
