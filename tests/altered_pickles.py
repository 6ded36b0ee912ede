"""Pickles that were altered, for tests of what reads pickles, and the process that reads them."""

import os
import pickletools
import subprocess
import sys
from pathlib import Path

from hypothesis import strategies as st


def altered(sources: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of the pickles with a few opcodes exchanged, added, altered in their last byte, or left out."""
    split = [_pieces(source) for source in sources]
    pieces = sorted({piece for source in split for piece in source})
    edit = st.tuples(st.integers(0, 10_000), st.integers(0, 3), st.sampled_from(pieces), st.integers(0, 255))
    return st.builds(_edit, st.sampled_from(split), st.lists(edit, min_size=1, max_size=4))


def _pieces(data: bytes) -> list[bytes]:
    """The opcodes of a pickle, each with its argument."""
    at = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(at, [*at[1:], len(data)], strict=True)]


def _edit(source: list[bytes], edits: list[tuple[int, int, bytes, int]]) -> bytes:
    changed = list(source)
    for at, kind, piece, byte in edits:
        at %= len(changed)
        if kind == 0:
            changed[at] = piece
        elif kind == 1:
            changed.insert(at, piece)
        elif kind == 2:
            changed[at] = changed[at][:-1] + bytes([byte])
        else:
            changed[at] = b""
    return b"".join(changed)


def counts_apart(script: str, folder: Path) -> list[int]:
    """What a test file prints as a program that is given the folder: in a process of its own, which a crash ends."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-X", "faulthandler", script, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))
