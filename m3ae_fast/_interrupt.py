"""Ctrl-C while the command line is being imported, a second or two that are mostly torch's."""

from __future__ import annotations

import contextlib
import os
import signal
import sys


@contextlib.contextmanager
def ends_the_command():
    """Ctrl-C ends the process without a traceback, as it ends any command, where the package is imported to be one."""
    handler = signal.getsignal(signal.SIGINT)
    if not _is_the_command() or handler is not signal.default_int_handler:  # who ignores it goes on to
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _is_the_command() -> bool:
    """Whether this process was started as m3ae-fast, or by python -m m3ae_fast: argv[0] is -m until that is found."""
    name = os.path.basename((sys.argv or [""])[0])
    return name == "m3ae-fast" or (name == "-m" and "m3ae_fast" in sys.orig_argv)
