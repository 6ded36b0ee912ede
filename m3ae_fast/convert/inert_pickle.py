"""Read a pickle as data: arrays and inert containers, nothing of it run.

A pickle names functions and classes and says what to call them with. Here every name is looked up in a closed list:
numpy's array builders are real, a few containers are plain ones, names of the libraries that such checkpoints mention
(flax, optax, jax, ml_collections, cloudpickle) become `Inert` objects that only remember their arguments, and any
other name is refused.
"""

from __future__ import annotations

import collections
import os
import pickle
from typing import Any

import numpy as np

_INERT_PACKAGES = ("flax", "optax", "jax", "jaxlib", "ml_collections", "cloudpickle", "chex")


class Inert:
    """Stands for an object of a library that is not loaded: calling, building and setting its state only remember."""

    name = "?"

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        made = object.__new__(cls)
        made.args, made.kwargs, made.state = args, kwargs, None
        return made

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert(*args, **kwargs)

    def append(self, item: Any) -> None:  # list and dict subclasses are filled after they are made
        self.args += (item,)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.kwargs[key] = value

    def fields(self) -> dict[str, Any]:
        """What the object's attributes were."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:  # (dict, slots)
            state = {**(state[0] or {}), **(state[1] or {})}
        return dict(state or self.kwargs)

    def __repr__(self) -> str:
        return f"<inert {self.name}>"


def _inert_class(module: str, name: str) -> type[Inert]:
    return type("Inert", (Inert,), {"name": f"{module}.{name}"})


def _frozen_dict(mapping: Any = ()) -> dict:
    return dict(mapping)


def _array(builder: Any, args: tuple, state: tuple, _aval: Any = None) -> np.ndarray:
    """What jax.Array pickles as: numpy's builder, its arguments and the array's state."""
    if builder is not _reconstruct:
        raise pickle.UnpicklingError("a jax array that is not built by numpy")
    made = builder(*args)
    made.__setstate__(state)
    return made


_core = getattr(np, "_core", None) or np.core  # numpy 2 and 1
_reconstruct = _core.multiarray._reconstruct

_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "tuple"): tuple,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
    ("builtins", "bytearray"): bytearray,
    ("flax.core.frozen_dict", "FrozenDict"): _frozen_dict,
    ("jax._src.array", "_reconstruct_array"): _array,
}
for _package in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_package}.multiarray", "_reconstruct"] = _reconstruct
    _KNOWN[f"{_package}.multiarray", "scalar"] = _core.multiarray.scalar
    _KNOWN[f"{_package}.numeric", "_frombuffer"] = _core.numeric._frombuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module.partition(".")[0] in _INERT_PACKAGES:
            return _inert_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is neither an array nor an inert container")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to something outside the file ({pid!r})")


def load_inert(path: str | os.PathLike) -> Any:
    """The content of a pickle file.

    Raises:
        FileNotFoundError. ValueError naming the file: it is cut short, is no pickle, or names anything that is not
        on the list; nothing of it has run.
    """
    with open(path, "rb") as file:
        try:
            return _Unpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # a hostile or cut file can fail in any way
            raise ValueError(f"{os.fspath(path)} must be a checkpoint pickle of arrays only: {error}") from error
