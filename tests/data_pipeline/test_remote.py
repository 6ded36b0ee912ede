"""A data server that is down, answers 404, breaks off or stops sending: a few tries, and a reason in words."""

import contextlib
import http.server
import itertools
import socket
import threading
from collections import Counter

import pytest

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import Loader, StreamedDataset
from m3ae_fast.data.remote import open_url
from tests.data_pipeline.test_limits import GOOD, member, no_waiting  # noqa: F401  a fixture

SHARD = GOOD + b"".join(member(f"{i}.txt", b"words " * 500) for i in range(20)) + bytes(1024)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves SHARD under every name, but as the name says."""

    def do_GET(self):
        name = self.path.strip("/").split("-")[0]
        self.server.requests[self.path] += 1
        tries = self.server.requests[self.path]
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if name == "missing" or (name == "busy" and tries < 3) or name == "broken":
            self.send_error({"missing": 404, "busy": 503, "broken": 500}[name])
            return
        if name == "empty":
            begin = len(SHARD)
        if name == "whole" and begin:  # no ranges: all of it again
            begin = 0
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(SHARD) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(SHARD) - 1}/{len(SHARD)}")
        self.end_headers()
        end = len(SHARD) if name in ("good", "busy") else begin + (0 if name == "silent" else 20_000)
        self.wfile.write(SHARD[begin:end])
        if name in ("stalls", "silent"):
            self.server.over.wait(30)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The base of its URLs, and how often each was asked for; pauses and stalls are short."""
    monkeypatch.setattr("m3ae_fast.data.remote.PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setattr("m3ae_fast.data.remote.STALL", 1)
    monkeypatch.setattr("m3ae_fast.data.remote.SLOW", 10**9)  # which curl takes the mean of a few seconds for
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.requests, running.over, running.daemon_threads = Counter(), threading.Event(), True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", running.requests
        running.over.set()
        running.shutdown()


def read(url: str) -> bytes:
    with contextlib.closing(open_url(url)) as stream:
        return b"".join(iter(lambda: stream.read(7000), b""))


@pytest.mark.parametrize("name, requests", [("good", 1), ("busy", 3), ("breaks", 4), ("stalls", 4)])
def test_what_comes_in_the_end_is_whole(server, name, requests):
    """A transfer goes on where it broke off or stalled."""
    base, asked = server
    assert len(SHARD) in range(60_001, 80_001), "four parts of 20,000 bytes"
    assert read(f"{base}/{name}") == SHARD
    assert asked == {f"/{name}": requests}


@pytest.mark.parametrize(
    "name, requests, reason",
    [
        ("missing", 1, r"curl ended with exit status 22: curl: \(22\) The requested URL returned error: 404"),
        ("broken", 4, r"curl ended with exit status 22: curl: \(22\) The requested URL returned error: 500"),
        ("silent", 4, r"curl ended with exit status 28: curl: \(28\) Operation too slow"),
        ("whole", 2, r"curl ended with exit status 18: curl: \(18\) .*transfer closed"),
    ],
)
def test_what_does_not(server, name, requests, reason):
    base, asked = server
    with pytest.raises(ConnectionError, match=reason):
        read(f"{base}/{name}")
    assert asked == {f"/{name}": requests}


def test_no_server(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=r"curl ended with exit status 7: curl: \(7\) Failed to connect"):
        read(f"http://127.0.0.1:{port}/a.tar")


def test_tries_are_those_without_progress(server, monkeypatch):
    """Of a large shard a connection may be lost more often, if a good part came in between."""
    monkeypatch.setattr("m3ae_fast.data.remote.PAUSES", (0.01,))
    with pytest.raises(ConnectionError):
        read(f"{server[0]}/breaks-a")
    monkeypatch.setattr("m3ae_fast.data.remote.PROGRESS", 15_000)
    assert read(f"{server[0]}/breaks-b") == SHARD


def test_a_transfer_that_is_left_is_ended(server):
    stream = open_url(f"{server[0]}/stalls")
    stream.read(100)
    stream.close()
    assert stream._curl.returncode is not None


@pytest.mark.parametrize("output, status", [("cat x", 1), ("printf abc; exit 3", 3)])
def test_commands(output, status):
    with pytest.raises(OSError, match=f"the command ended with exit status {status}"):
        read(f"pipe:({output}) 2> /dev/null")
    assert read("pipe:printf abc") == b"abc"


def loader(url: str) -> Loader:
    class Tokenizer:
        def encode(self, text):
            return [1]

    return Loader(StreamedDataset(url), Tokenizer(), image_size=8, batch_size=4)


def test_a_server_that_is_gone_is_not_asked_a_thousand_times(server):
    base, asked = server
    with pytest.raises(ConnectionError, match=r"3 shards in a row could not be read, .*: http.*: curl ended .*404"):
        next(loader(f"{base}/missing-{{0..99}}.tar"))
    assert sum(asked.values()) == 3
    with pytest.raises(OSError, match=r"3 shards in a row could not be read, the last: pipe:.*: .* exit status 1"):
        next(loader("pipe:cat none.tar 2> /dev/null"))
    with pytest.raises(ConnectionError, match="3 shards in a row"):
        list(StreamedDataset(f"{base}/missing-{{0..99}}.tar").captions())


def test_some_shards_may_be_missing(server):
    """Nine in a row, where others came before."""
    base, _ = server
    stream = StreamedDataset(f"{base}/{{good-0,good-1}}.tar", buffer=1)
    stream.urls = [stream.urls[0], *(f"{base}/missing-{i}" for i in range(9)), stream.urls[1]]
    assert len(list(stream.captions())) == 44
    stream.urls.insert(1, f"{base}/missing-9")
    with pytest.raises(ConnectionError, match="10 shards in a row could not be read"):
        list(stream.captions())


def test_a_shard_that_breaks_off_for_good(server):
    """What came before is used, and the damage has curl's reason."""
    entries = StreamedDataset(f"{server[0]}/whole-a.tar", buffer=1).stream(0, 0, 1)
    first = list(itertools.islice(entries, 12))
    assert [entry.files["txt"][:3] for entry in first[:2]] == [b"one", b"two"]
    (damage,) = [entry.damage for entry in first if entry.damage]
    assert "curl ended with exit status 18" in damage
    with pytest.warns(M3AEFastWarning, match="exit status 18"):
        batches = loader(f"{server[0]}/whole-a.tar")
        assert sum(len(next(batches)[1]) for _ in range(3)) == 12
