"""Shards behind URLs and commands, as files that are read forwards; what is wrong with a transfer is said in words."""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import time
from typing import Protocol

PAUSES = (1, 4, 16)  # seconds between tries
PROGRESS = 1 << 20  # bytes after which a transfer has all its tries again
STALL = 60  # seconds of less than SLOW bytes each, after which a server has stopped sending
SLOW = 1000
GRACE = 60  # seconds that a command may take to end after its output
FINAL = re.compile(r"returned error: 4(?!08|29)\d\d")  # of curl: what is missing or forbidden stays so
NO_RANGES = 33  # curl's exit status where a server cannot go on in the middle


class Stream(Protocol):
    """What `open_url` returns."""

    def read(self, size: int) -> bytes:
        """The next bytes, fewer only at the end. OSError: the transfer has failed."""

    def close(self) -> None:
        """Ends the transfer."""


def opener():
    """webdataset's module that opens URLs. ModuleNotFoundError: it is not installed."""
    try:
        return importlib.import_module("webdataset.gopen")
    except ModuleNotFoundError as error:
        if error.name not in ("webdataset", "webdataset.gopen"):
            raise
        message = "shards behind URLs need webdataset: pip install '.[train]'"
        raise ModuleNotFoundError(message, name="webdataset") from error


def open_url(url: str) -> Stream:
    """What is behind a URL: fetched by curl where webdataset would call it, too, else opened by webdataset.

    Raises:
        OSError: it cannot be opened; most failures show when it is read.
    """
    gopen = opener()
    url = gopen.rewrite_url(url)
    if gopen.gopen_schemes.get(url.partition(":")[0]) is gopen.gopen_curl:
        return _Download(url)
    stream = gopen.gopen(url)
    return _Output(stream) if isinstance(stream, gopen.Pipe) else stream


class _Download:
    """A transfer by curl. One that breaks off, or stalls, is resumed after a pause, a few times."""

    def __init__(self, url: str):
        self._url, self._position, self._failed_at, self._failures = url, 0, 0, 0
        self._begin()

    def _begin(self) -> None:
        command = ["curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", "30"]
        command += ["--speed-time", str(STALL), "--speed-limit", str(SLOW)]
        command += ["--continue-at", str(self._position)] if self._position else []
        self._curl = subprocess.Popen([*command, self._url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._curl.stdout.read(size - len(data))
            self._position += len(part)
            data += part
            if len(data) < size:
                said = self._curl.stderr.read().decode(errors="replace").strip()
                status = self._curl.wait()
                if status == 0:
                    break
                self._try_again(status, said)
        return data

    def _try_again(self, status: int, said: str) -> None:
        if status != NO_RANGES:
            self._reason = f"curl ended with exit status {status}: {said}"
        if self._position - self._failed_at >= PROGRESS:
            self._failures = 0
        self._failed_at = self._position
        if self._failures == len(PAUSES) or status == NO_RANGES or FINAL.search(said):
            raise ConnectionError(self._reason)
        time.sleep(PAUSES[self._failures])
        self._failures += 1
        self.close()
        self._begin()

    def close(self) -> None:
        self._curl.kill()
        with self._curl:  # closes its pipes, waits for its end
            pass


class _Output:
    """What a command writes, through webdataset's Pipe, whose own read may raise away what it has read."""

    def __init__(self, pipe):
        self._pipe = pipe

    def read(self, size: int) -> bytes:
        data = self._pipe.stream.read(size)
        if len(data) < size:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._pipe.proc.wait(GRACE)
                if status not in self._pipe.ignore_status:
                    raise OSError(f"the command ended with exit status {status}")
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):  # one that is not read to its end has something to say about it
            self._pipe.close()
