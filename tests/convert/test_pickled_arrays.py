"""Arrays out of a pickle: those that numpy wrote, bit by bit, and none that a file made up."""

import pickle
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from m3ae_fast.convert import load_flax_checkpoint
from m3ae_fast.convert.pickled_arrays import load_content, resolve
from tests.altered_pickles import altered, counts_apart

DTYPES = ["?", "i1", "<i2", ">i4", "<i8", "u1", ">u2", "<u4", "u8", "<f2", ">f4", "f4", "<f8", "c8", ">c16"]
core = getattr(np, "_core", None) or np.core  # numpy 2 and 1
multiarray, numeric = core.multiarray, core.numeric


class Call:
    """Pickles as a call, with the state that what it makes is given."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_numpy_pickles_comes_back(tmp_path, dtype, protocol):
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 2, (3, 4, 5)).astype(dtype)
    for array in (whole, np.asfortranarray(whole), whole[::2, 1:], whole[:0], whole[0, 0, 0], np.array(whole[0, 0, 0])):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps([array], protocol))
        found = resolve(load_content(tmp_path / "a.pkl")[0])
        assert found.dtype == array.dtype and found.shape == array.shape
        np.testing.assert_array_equal(found, array)


def dtype(code="f4", order="<", state=None):
    return Call(np.dtype, code, False, True, state=state or (3, order, None, None, None, -1, -1, 0))


def array(shape=(2,), kind=None, data=b"\0" * 8, fortran=False, cls=np.ndarray):
    return Call(multiarray._reconstruct, cls, (0,), b"b", state=(1, shape, kind or dtype(), fortran, data))


POINTERS = struct.pack("QQ", 0x41, 0x42)
# an object dtype whose state denies that it holds references would turn bytes into pointers
OBJECTS = dtype("O8", "|", state=(3, "|", None, None, None, -1, -1, 0))
FORGED = {
    "an array of objects": array(kind=OBJECTS, data=POINTERS),
    "a buffer of objects": Call(numeric._frombuffer, bytearray(POINTERS), OBJECTS, (2,), "C"),
    "a scalar of objects": Call(multiarray.scalar, OBJECTS, POINTERS[:8]),
    "ndarray itself": Call(np.ndarray, (2,), dtype("f4"), POINTERS),
    "ndarray of objects": Call(np.ndarray, (2,), OBJECTS, POINTERS),
    "fields": array(kind=dtype("V8", state=(3, "|", None, ("a",), {"a": (dtype("O8"), 0)}, 8, 1, 27)), data=POINTERS),
    "a subarray": array(kind=dtype("V8", state=(3, "|", (dtype("O8"), (1,)), None, None, 8, 1, 27)), data=POINTERS),
    "text": array(kind=dtype("U2")),
    "times": array((1,), dtype("M8")),
    "a long double": array(kind=dtype("f16")),
    "no width": array(kind=dtype("f")),
    "no byte order": array(kind=dtype(order="=")),
    "a dtype of no state": array(kind=Call(np.dtype, "f4")),
    "a dtype that is text": array(kind="f4"),
    "a negative size": array((-2,)),
    "two negative sizes": array((-1, -2)),
    "more than there is": array((3,)),
    "less than there is": array((1,)),
    "a size beyond all memory": array((2**62, 4)),
    "a size that wraps around": array((2**32, 2**32)),
    "nothing times a lot": array((0, 2**39, 2**39, 2**39), data=b""),
    "sizes of another kind": array((2.0,)),
    "a shape that is none": array(2),
    "many dimensions": array((1,) * 33 + (2,)),
    "text instead of bytes": array(data="\0" * 8),
    "a list instead of bytes": array((1,), data=[0]),
    "another class of arrays": array(cls=np.dtype),
    "no state": Call(multiarray._reconstruct, np.ndarray, (0,), b"b"),
    "a state of less": Call(multiarray._reconstruct, np.ndarray, (0,), b"b", state=((2,), dtype(), False, b"\0" * 8)),
    "a dtype": dtype(),
    "a class": np.ndarray,
}


@pytest.mark.parametrize("what", FORGED)
def test_no_array_is_made_up(tmp_path, command_line, what):
    path = tmp_path / "forged.pkl"
    path.write_bytes(pickle.dumps({"params": {"image_embedding/kernel": FORGED[what]}}))
    status, out, err = command_line("convert", str(path), str(tmp_path / "out.safetensors"))
    assert (status, out) == (2, "") and not (tmp_path / "out.safetensors").exists()
    assert err.count("\n") == 1 and f"{path} must " in err and "Traceback" not in err


def test_a_branch_that_holds_itself_is_refused(tmp_path):
    tree = {"a": np.ones(1)}
    for content in ({"self": tree}, {f"a{i}": tree for i in range(2)}):
        tree |= content
        (tmp_path / "model.pkl").write_bytes(pickle.dumps({"params": tree}))
        with pytest.raises(ValueError, match=r"model\.pkl .*nested at most 32 deep"):
            load_flax_checkpoint(tmp_path / "model.pkl")


def test_branches_that_are_shared_do_not_multiply(tmp_path):
    tree = {"kernel": np.ones(1, "f")}
    for _ in range(30):
        tree = {"a": tree, "b": tree}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"params": tree}))
    with pytest.raises(ValueError, match="at most 100,000 names"):
        load_flax_checkpoint(tmp_path / "model.pkl")


def test_a_dictionary_in_many_places_is_made_once(tmp_path):
    """Of a hundred thousand items with one name, in ten thousand places."""
    call = b"ccollections\nOrderedDict\n)R(" + b"\x8c\x01aN" * 100_000 + b"u\x94"
    content = b"\x80\x04}\x8c\x06params}(\x8c\x01b" + call
    content += b"".join(b"\x8c\x04%04dh\x00" % number for number in range(10_000)) + b"us."
    (tmp_path / "model.pkl").write_bytes(content)
    start = time.process_time()
    with pytest.raises(ValueError, match="got NoneType at 'b/a'"):
        load_flax_checkpoint(tmp_path / "model.pkl")
    dictionary = load_content(tmp_path / "model.pkl")["params"]["b"]
    assert all(resolve(dictionary) == {"a": None} for _ in range(10_000))
    assert time.process_time() - start < 30


def test_one_array_under_many_names_is_refused(tmp_path):
    """A small file would become a large one."""
    shared = np.ones(10_000, "f")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"params": {f"encoder/Block_{i}/x": shared for i in range(100)}}))
    with pytest.raises(ValueError, match="the same array under many names"):
        load_flax_checkpoint(tmp_path / "model.pkl")


TREE = {"state": {"params": {"params": {"a": {"kernel": np.ones((2, 3), "f")}, "b": np.float32(1)}}}}
SOURCES = [pickle.dumps(TREE, protocol) for protocol in (2, 4, 5)] * 3
SOURCES += [pickle.dumps({"params": {"a": FORGED[what]}}, 4) for what in ("an array of objects", "ndarray of objects")]


def fuzz(folder):
    """Read pickles whose opcodes are exchanged, added, altered and left out, and print how many were trees, and not."""
    outcomes = {"tree": 0, "refused": 0}

    @settings(derandomize=True, database=None, max_examples=1000, deadline=None)
    @given(content=altered(SOURCES))
    def load(content):
        (folder / "model.pkl").write_bytes(content)
        try:
            tree = load_flax_checkpoint(folder / "model.pkl")
        except ValueError as error:
            assert "model.pkl must " in str(error)
            outcomes["refused"] += 1
        else:
            assert all(array.dtype.kind in "biufc" for array in tree.values())
            float(sum(array.astype("f8").sum() for array in tree.values() if array.dtype.kind != "c"))
            outcomes["tree"] += 1

    load()
    print(outcomes["tree"], outcomes["refused"])


def test_altered_pickles_are_trees_of_numbers_or_refused(tmp_path):
    trees, refused = counts_apart(__file__, tmp_path)
    assert trees > 10 and refused > 100


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]))
