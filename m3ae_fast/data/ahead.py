"""Ahead: what an iterator gives, a thread's work, one item before it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """An iterator over `items`. While the caller works on one, a thread takes the next.

    Args:
        items: used by the thread alone; what it raises ends the stream, and is raised where its item was due.
    """

    def __init__(self, items: Iterator[T]):
        self._asked, self._taken = SimpleQueue(), SimpleQueue()
        self._thread = threading.Thread(
            target=_take, args=(items, self._asked, self._taken), name="m3ae_fast ahead", daemon=True
        )
        self._thread.start()
        self._asked.put(True)

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        item, error = self._taken.get()
        if error is not None:
            self._taken.put((None, StopIteration()))
            raise error
        self._asked.put(True)
        return item

    def close(self) -> None:
        """End the thread, and with it `items`, after the item in hand."""
        self._asked.put(False)
        self._thread.join()

    def __del__(self):
        self._asked.put(False)


def _take(items: Iterator[T], asked: SimpleQueue, taken: SimpleQueue) -> None:
    while asked.get():
        try:
            taken.put((next(items), None))
        except BaseException as error:  # SystemExit, too, or the caller would wait for ever
            taken.put((None, error))
            return
