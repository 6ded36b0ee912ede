"""Ahead: the items of an iterator, in order, each taken before it is asked for."""

import gc
import sys
import threading
import weakref

import pytest

from m3ae_fast.data.ahead import Ahead


class Items:
    """0, 1, 2, ...; event[n] is set when item n is being taken."""

    def __init__(self, fails_at=None):
        self.taken, self.threads, self.fails_at = [threading.Event() for _ in range(9)], [], fails_at
        self.count = 0

    def __iter__(self):
        return self

    def __next__(self):
        number, self.count = self.count, self.count + 1
        self.taken[number].set()
        self.threads.append(threading.current_thread())
        if number == self.fails_at:
            raise OSError(f"item {number}")
        return number


def test_one_item_ahead():
    items = Items()
    ahead = Ahead(items)
    for number in range(4):
        assert items.taken[number].wait(60), "before it is asked for"
        assert next(ahead) == number
    assert items.taken[4].wait(60)
    ahead.close()
    assert items.count == 5, "and no further"
    assert {*items.threads} == {ahead._thread} and ahead._thread is not threading.current_thread()


def test_an_error_comes_where_its_item_was_due():
    ahead = Ahead(Items(fails_at=2))
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="item 2"):
        next(ahead)
    assert list(ahead) == []
    assert list(Ahead(iter("abc"))) == ["a", "b", "c"]


def test_a_data_set_that_exits_ends_the_caller():
    ahead = Ahead(map(sys.exit, [3]))
    ahead._thread.join(60)
    assert not ahead._taken.empty(), "or the caller would wait for ever"
    with pytest.raises(SystemExit):
        next(ahead)


@pytest.mark.parametrize("closed", [True, False])
def test_no_thread_is_left(closed):
    items = Items()
    known, ahead = weakref.ref(items), Ahead(items)
    next(ahead)
    thread = ahead._thread
    if closed:
        ahead.close()
    del ahead, items
    gc.collect()
    thread.join(60)
    assert not thread.is_alive() and known() is None
