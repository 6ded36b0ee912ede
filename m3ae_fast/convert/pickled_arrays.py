"""Arrays in the pickle of a JAX checkpoint: built here, from bytes of a checked size and a dtype out of a closed list.

Nothing of numpy is called as the file says: an array with the dtype, shape or buffer of the file's choice could read
and write any memory.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from m3ae_fast._pickle_data import Made, Name, read_pickle

# as numpy.dtype pickles them; none holds pointers
_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
_NDARRAY, _DTYPE = Name("numpy", "ndarray"), Name("numpy", "dtype")
_CORES = ("numpy.core", "numpy._core")  # of numpy 1 and 2
_RECONSTRUCT = frozenset(Name(f"{core}.multiarray", "_reconstruct") for core in _CORES)
_SCALAR = frozenset(Name(f"{core}.multiarray", "scalar") for core in _CORES)
_FROMBUFFER = frozenset(Name(f"{core}.numeric", "_frombuffer") for core in _CORES)
_JAX_ARRAY = Name("jax._src.array", "_reconstruct_array")
_MAPPINGS = frozenset(
    {Name("collections", "OrderedDict"), Name("builtins", "dict"), Name("flax.core.frozen_dict", "FrozenDict")}
)
_CONTAINERS = ("list", "tuple", "set", "frozenset", "complex", "slice", "bytearray")
_OTHERS = frozenset(Name("builtins", each) for each in _CONTAINERS)
_KNOWN = _RECONSTRUCT | _SCALAR | _FROMBUFFER | _MAPPINGS | _OTHERS | {_NDARRAY, _DTYPE}
_PACKAGES = ("flax", "optax", "jax", "jaxlib", "ml_collections", "cloudpickle", "chex")  # any name of theirs


def load_content(path: str | os.PathLike) -> Any:
    """The content of a pickle file, for `resolve`.

    Raises:
        FileNotFoundError. ValueError naming the file: it is cut short, is no pickle, or names anything that a
        checkpoint of arrays does not need.
    """
    return read_pickle(
        path,
        lambda name: name in _KNOWN or name.module.partition(".")[0] in _PACKAGES,
        "a checkpoint pickle of arrays only",
    )


def resolve(value: Any) -> Any:
    """The array or the dictionary that a `Made` stands for; anything else as it is.

    Raises:
        ValueError: an array that numpy would not have pickled so, or of another dtype than numbers.
    """
    if not isinstance(value, Made):
        return value
    function, args = value.function, value.args
    if function in _MAPPINGS:
        return _mapping(value)
    if function in _RECONSTRUCT:
        return _of_state(args, value.state)
    if function == _JAX_ARRAY and len(args) >= 3 and isinstance(args[0], Name) and args[0] in _RECONSTRUCT:
        return _of_state(args[1], args[2])
    if function in _SCALAR and len(args) == 2:
        return _array(args[1], args[0], (), "C")
    if function in _FROMBUFFER and len(args) == 4:
        return _array(*args)
    return value


def attributes(made: Made) -> dict[str, Any]:
    """What the attributes of an object were, from its state (of slots, too) or what its class was called with."""
    slots = type(made.state) is tuple and len(made.state) == 2
    states = made.state if slots else (made.state,)
    found = {}
    for part in states if any(states) else (made.kwargs,):
        if part is not None and type(part) is not dict:
            raise ValueError(f"the state of an object must be a dictionary, got {type(part).__name__}")
        found.update(part or {})
    return found


def _mapping(made: Made) -> dict:
    """Of a dictionary's class: what it was called with, and the items it was given."""
    items = [made.items]
    given = made.args[0] if made.args else {}
    while isinstance(given, Made) and given.function in _MAPPINGS and len(items) < 9:  # a FrozenDict of an OrderedDict
        items.append(given.items)
        given = given.args[0] if given.args else {}
    if type(given) is not dict:
        raise ValueError(f"a dictionary must be made of one, got {type(given).__name__}")
    found = dict(given)
    for pairs in reversed(items):
        found.update(pairs)
    made.args, made.items = (found,), ()  # the next time costs no more than what is found
    return found


def _of_state(args: Any, state: Any) -> np.ndarray:
    """As ndarray.__setstate__: (version, shape, dtype, in Fortran's order, bytes)."""
    if type(args) is not tuple or args[:1] != (_NDARRAY,) or type(state) is not tuple or len(state) != 5:
        raise ValueError("an array must have a shape, a dtype and bytes")
    _, shape, dtype, fortran, data = state
    return _array(data, dtype, shape, "F" if fortran is True else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """An array that reads `data`, which must be of its size."""
    dtype = _dtype(dtype)
    if type(shape) is not tuple or not all(type(n) is int and 0 <= n < 2**40 for n in shape) or len(shape) > 32:
        raise ValueError("the shape of an array must be at most 32 numbers of elements")
    needed = math.prod(shape) * dtype.itemsize
    if type(data) not in (bytes, bytearray) or len(data) != needed:
        raise ValueError(f"the bytes of an array of shape {shape} and dtype {dtype} must be {needed}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


def _dtype(made: Any) -> np.dtype:
    """One of numbers; of the state that the file gives it only the byte order is read."""
    code = made.args[0] if isinstance(made, Made) and made.function == _DTYPE and made.args else None
    state = made.state if code is not None else None
    order = state[1] if type(state) is tuple and len(state) > 1 else None
    if type(code) is not str or code not in _DTYPES or type(order) is not str or order not in ("<", ">", "|"):
        raise ValueError(f"the dtype of an array must be one of {', '.join(_DTYPES)}")
    return np.dtype(order + code)
