"""Pickles as data: what plain pickles hold comes back, no name in them is called, no small file takes much."""

import collections
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import m3ae_fast
from m3ae_fast._pickle_data import Made, Name, read_pickle

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.text() | st.integers(-(2**59), 2**59) | st.binary() | st.tuples(st.text(), st.text())
DATA = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner, inner, inner, inner) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


def read(path, content, known=lambda _: True):
    path.write_bytes(content)
    return read_pickle(path, known, "of a test")


@settings(derandomize=True, database=None, max_examples=200, deadline=None)
@given(data=DATA, protocol=st.integers(3, 5))
def test_plain_data_comes_back(data, protocol, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "data.pkl"
    assert read(path, pickle.dumps(data, protocol)) == pickle.loads(pickle.dumps(data, protocol))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_shared_and_cyclic_data_stay_so(tmp_path, protocol):
    shared = [1]
    content = {"a": shared, "b": shared, "c": []}
    content["c"].append(content)
    found = read(tmp_path / "data.pkl", pickle.dumps(content, protocol))
    assert found["a"] is found["b"] and found["c"][0] is found


@pytest.mark.parametrize("protocol", range(2, 6))
def test_calls_are_remembered(tmp_path, protocol):
    content = [collections.OrderedDict(a=1), {2, 2.5}, struct.Struct, collections.Counter]
    ordered, made_set, *names = read(tmp_path / "data.pkl", pickle.dumps(content, protocol))
    assert (ordered.function, ordered.items) == (Name("collections", "OrderedDict"), [("a", 1)])
    assert made_set.function.name == "set" and set(made_set.items or made_set.args[0]) == {2, 2.5}
    assert names == [("_struct", "Struct"), ("collections", "Counter")]


class Call:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def test_nothing_is_called_whatever_its_name(tmp_path):
    left = tmp_path / "ran"
    content = Call(Path.touch, (left,), {"x": 1}, iter([1]), iter([("k", 2)]))
    made = read(tmp_path / "data.pkl", pickle.dumps(content))
    assert not left.exists()
    assert isinstance(made, Made) and made.state == {"x": 1} and made.items == [1, ("k", 2)]


TOO_DEEP_A_KEY = b"\x80\x04})" + b"\x85" * 300_000 + b"Ns."  # {((((...),),),): None}
TOO_LONG_A_KEY = b"\x80\x04})" + b"2\x86" * 100 + b"Ns."  # its hash is that of 2**100 tuples
REFUSED = {
    "a name": (b"\x80\x04cos\nsystem\n.", "it names os.system, which is nothing that such a file needs"),
    "a name of two lines": (b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", r"it names a\nb.c, which"),
    "a name of text and more": (b"\x80\x04K\x01K\x02\x93.", "it uses a int as what it is not"),
    "a call of no function": (b"\x80\x04](R.", "cut short or no pickle"),
    "a call of a list": (b"\x80\x04])R.", "it uses a list as what it is not"),
    "a call with a name": (b"\x80\x04ca\nb\nca\nb\nR.", "it uses a Name as what it is not"),
    "a state of a name": (b"\x80\x04ca\nb\n}b.", "it uses a Name as what it is not"),
    "a state of a dictionary": (b"\x80\x04}}b.", "it uses a dict as what it is not"),
    "items of text": (b"\x80\x04\x8c\x01aNa.", "it uses a str as what it is not"),
    "a number in letters": (b"F1\n.", "it has the opcode FLOAT, which no such file needs"),
    "a line that is long": (b"I" + b"9" * 1000 + b"\n.", "no newline found"),
    "an odd number of items": (b"\x80\x04}(Nu.", "argument 2 is shorter"),
    "a deep key": (TOO_DEEP_A_KEY, "a key that is neither text nor a number"),
    "a long key": (TOO_LONG_A_KEY, "a key that is neither text nor a number"),
    "a large key": (b"\x80\x04}\x8a\x08" + b"\xff" * 7 + b"\x7fNs.", "a key that is neither text nor a number"),
    "an object outside": (b"\x80\x04Pid\n.", "it refers to something outside the file"),
    "a buffer outside": (b"\x80\x05\x97.", "it refers to something outside the file"),
    "an extension": (b"\x80\x04\x82\x01.", "it has the opcode EXT1, which no such file needs"),
    "an old instance": (b"(ios\nsystem\n.", "it has the opcode INST, which no such file needs"),
    "a memory that is not there": (b"\x80\x04h\x07.", "cut short or no pickle"),
    "nothing": (b"", "exhausted before seeing STOP"),
    "only the end": (b".", "cut short or no pickle"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path, what):
    content, reason = REFUSED[what]
    with pytest.raises(ValueError, match="must be of a test: ") as error:
        read(tmp_path / "data.pkl", content, known=lambda name: name == ("a", "b"))
    assert str(tmp_path / "data.pkl") in str(error.value) and reason in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


# content, and whether it is a pickle
BOMBS = {
    "a place in the memo": (b"\x80\x04Nr\xff\xff\xff\xff.", True),
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", False),
    "a bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", False),
    "text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", False),
    "an integer": (b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", False),
    "a frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", True),
    "deep tuples": (b"\x80\x04)" + b"\x85" * 300_000 + b".", True),
    "deep lists": (b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".", True),
    "deep calls": (b"\x80\x04ca\nb\n" + b")R" * 300_000 + b".", True),
    "deep states": (b"\x80\x04ca\nb\n)R" + b"ca\nb\n)R" * 99_999 + b"b" * 99_999 + b".", True),
    "marks": (b"\x80\x04" + b"(" * 300_000 + b".", False),
    "digits": (b"I" + b"9" * 300_000 + b"\n.", False),
}
CODE = """
import resource, sys, time
from m3ae_fast._pickle_data import read_pickle
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        content = read_pickle(path, lambda _: True, "of a test")
        del content
        outcome = "read"
    except ValueError:
        outcome = "refused"
    print(path.rpartition("/")[2], outcome, time.process_time() - start < 20, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is told by /proc")
def test_a_small_file_takes_no_memory_and_no_time(tmp_path):
    for name, (content, _) in BOMBS.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", CODE, *(tmp_path / name for name in BOMBS)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(m3ae_fast.__file__).parents[1])},
    )  # fmt: skip
    expected = [f"{name} {'read' if is_pickle else 'refused'} True" for name, (_, is_pickle) in BOMBS.items()]
    assert (done.stdout.splitlines(), done.returncode) == (expected, 0), done.stderr
