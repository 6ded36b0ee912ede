"""Read a pickle as data: its opcodes are followed here, and nothing that it names is imported, called or changed.

A pickle is a program that names functions and classes, and says what to call them with. What such a call would make is
remembered as a `Made`; the caller picks from it what it understands.
"""

from __future__ import annotations

import dataclasses
import os
import pickletools
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple


class Name(NamedTuple):
    """A function or class that a pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}")[1:-1]  # on one line


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class Made:
    """What a call would have made: what was called (a Name, or what another call would have made), with what, the state
    that it was given afterwards, and the items that were added, pairs where they have keys."""

    function: Name | Made
    args: tuple
    kwargs: dict | None = None
    state: Any = None
    items: Sequence = ()


def read_pickle(path: str | os.PathLike, known: Callable[[Name], bool], what: str) -> Any:
    """The content of a pickle file: numbers, text, bytes, lists, tuples, dictionaries, `Name` and `Made`.

    An object may be held in several places, and a list or dictionary in itself.

    Args:
        path: the file, in any protocol from 2 on.
        known: whether a name may occur.
        what: the file must be, for messages.
    Raises:
        FileNotFoundError. ValueError naming the file: it is cut short, is no pickle, or has a name that is not known.
    """
    with open(path, "rb") as file:
        try:
            return _Machine(known).run(_Bounded(file))
        except OSError:
            raise
        except Exception as error:  # what is hostile or cut short can fail in any way
            reason = "the file is cut short or no pickle" if isinstance(error, LookupError) else str(error)[:200]
            raise ValueError(f"{os.fspath(path)} must be {what}: {reason}") from error


class _Bounded:
    """A file of which no more is asked for than there is: no room is made for a length that the file only claims."""

    def __init__(self, file: BinaryIO):
        self._file, self._end = file, os.fstat(file.fileno()).st_size

    def readline(self) -> bytes:
        return self._file.readline(1000)  # names; also digits, which Python takes the square of their number to read

    def read(self, count: int) -> bytes:
        return self._file.read(count if count < 4096 else max(0, min(count, self._end - self._file.tell())))


_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
_VALUES += ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_VALUES += ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_MAKERS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_MAKERS |= {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
_MAKERS |= {"EMPTY_SET": lambda: Made(Name("builtins", "set"), ())}  # its items are not hashed


class _Machine:
    """The stack machine of the pickle protocol."""

    def __init__(self, known: Callable[[Name], bool]):
        self._known = known
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # what the stack was at each mark
        self._memo: dict[int, Any] = {}

    def run(self, file: _Bounded) -> Any:
        for opcode, arg, _ in pickletools.genops(file):  # ValueError where the file just ends
            name = opcode.name
            if name in _VALUES:
                self._stack.append(arg)
            elif name in _MAKERS:
                self._stack.append(_MAKERS[name]())
            elif name == "STOP":
                break
            elif name not in ("PROTO", "FRAME"):
                self._step(name, arg)
        return self._stack.pop()

    def _step(self, opcode: str, arg: Any) -> None:
        stack = self._stack
        match opcode:
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._from_mark()
            case "DUP":
                stack.append(stack[-1])
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[arg] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[arg])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(opcode[-1]))))
            case "TUPLE" | "LIST":
                items = self._from_mark()
                self._stack.append(tuple(items) if opcode == "TUPLE" else items)
            case "FROZENSET":
                items = self._from_mark()
                self._stack.append(Made(Name("builtins", "frozenset"), (), items=items))
            case "DICT":
                items = self._from_mark()
                self._stack.append({})
                self._set_items(items)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self._pop(1) if opcode == "APPEND" else self._from_mark()
                target = self._stack[-1]
                _add(target, items) if isinstance(target, Made) else _of(list, target).extend(items)
            case "SETITEM" | "SETITEMS":
                self._set_items(self._pop(2) if opcode == "SETITEM" else self._from_mark())
            case "GLOBAL" | "STACK_GLOBAL":
                name = Name(*(self._pop(2) if arg is None else arg.split(" ", 1)))
                if not self._known(Name(_of(str, name.module), _of(str, name.name))):
                    raise ValueError(f"it names {name}, which is nothing that such a file needs")
                stack.append(name)
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                function, args, *kwargs = self._pop(3 if opcode == "NEWOBJ_EX" else 2)
                stack.append(Made(_of((Name, Made), function), _of(tuple, args), *(_of(dict, each) for each in kwargs)))
            case "BUILD":
                (state,) = self._pop(1)
                _of(Made, stack[-1]).state = state
            case "PERSID" | "BINPERSID" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise ValueError("it refers to something outside the file")
            case _:
                raise ValueError(f"it has the opcode {opcode}, which no such file needs")

    def _pop(self, count: int) -> list[Any]:
        """The last objects of the stack, which loses them."""
        if len(self._stack) < count:
            raise IndexError
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _from_mark(self) -> list[Any]:
        """What was put on the stack since the last mark, which is taken away."""
        taken, self._stack = self._stack, self._below.pop()
        return taken

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        pairs = [(_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True)]
        if isinstance(target, Made):
            _add(target, pairs)
        else:
            _of(dict, target).update(pairs)


def _add(made: Made, items: list[Any]) -> None:
    if not made.items:
        made.items = []
    made.items.extend(items)


def _of(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind) or (kind is tuple and isinstance(value, Name)):
        raise ValueError(f"it uses a {type(value).__name__} as what it is not")
    return value


def _key(key: Any) -> Any:
    """A key of a dictionary: none whose hash takes long to compute, or that is easily made equal to others'."""
    parts = key if type(key) is tuple else (key,)
    if not all(part is None or type(part) in (str, bytes, bool, Made) for part in parts) and not (
        type(key) is int and abs(key) < 2**60
    ):
        raise ValueError("it has a dictionary with a key that is neither text nor a number")
    return key
