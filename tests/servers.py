"""A live server on loopback, in a child of the test, and clients that ask it: politely, in bytes, or not at all."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import serve
from common import chat
from common.decoder import Decoder
from common.serving import engine, httpd
from tests import processes

WAIT = 60
READ_SECONDS = 2  # of the servers under test, to be quick
JSON = {"Content-Type": "application/json"}
PROMPT = "How do I bake bread?"
USER = [{"role": "user", "content": "a"}]
START = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@contextlib.contextmanager
def serving(folder, *flags, change=None, environment=(), ready=True):
    """A server in a forked child, with what change() patches there; yields where it is, stops it with SIGTERM."""

    def body(main, argv):
        httpd.READ_SECONDS = READ_SECONDS
        if change:
            change()
        main([str(word) for word in argv])

    argv = ["--port", 0, "--model.dtype", "float32", *flags]
    pid = processes.start(serve.main, folder, argv, body, environment=environment)
    one = SimpleNamespace(pid=pid, folder=folder, out=folder / f"out-{pid}", err=folder / f"err-{pid}", status=None)
    try:
        one.port = int(wait_for(lambda: re.search(r"listening on \S+:(\d+)", read(one.out)) or ended(one))[1])
        if ready:
            wait_for(lambda: ask(one, "GET", "/health").status == 200 or ended(one))
        yield one
    finally:
        if one.status is None:
            os.kill(pid, signal.SIGTERM)
            one.status = stopped(one)
    if "killed" not in vars(one):
        assert one.status == 0, (one.status, read(one.err)[-2000:])


def read(path):
    return path.read_text() if path.exists() else ""


def ended(one):
    """False while the child runs; else an error with what it said."""
    pid, status = os.waitpid(one.pid, os.WNOHANG)
    if pid:
        one.status = os.waitstatus_to_exitcode(status)
        raise AssertionError((one.status, read(one.out), read(one.err)))
    return False


def stopped(one, seconds=WAIT):
    """The exit status of the child, which must end by itself in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(one.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(one.pid, signal.SIGKILL)
    os.waitpid(one.pid, 0)
    raise AssertionError(f"still there after {seconds} s: {read(one.err)[-2000:]}")


def wait_for(probe, seconds=WAIT):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(ConnectionError):
            if found := probe():
                return found
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def ask(one, method, path, body=None, headers=()):
    """One request by the standard client -> status, headers, text, json (None if it is none), seconds."""
    began = time.monotonic()
    line = http.client.HTTPConnection("127.0.0.1", one.port, timeout=WAIT)
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    line.request(method, path, data, {**(JSON if data is not None else {}), **dict(headers)})
    reply = line.getresponse()
    text = reply.read().decode()
    line.close()
    with contextlib.suppress(ValueError):
        return SimpleNamespace(
            status=reply.status,
            headers=reply.headers,
            text=text,
            json=json.loads(text),
            seconds=time.monotonic() - began,
        )
    return SimpleNamespace(
        status=reply.status, headers=reply.headers, text=text, json=None, seconds=time.monotonic() - began
    )


def raw(one, *pieces, wait=WAIT):
    """All that the server says to these bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", one.port), timeout=wait) as line:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                line.sendall(piece)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(65536):
                said += part
    return said


def generate(one, **more):
    return ask(one, "POST", "/generate", {"prompt": PROMPT, **more})


def number(one, name):
    return float(re.search(rf"^gemma_{name} (\S+)$", ask(one, "GET", "/metrics").text, re.M)[1])


def framed(*lines, body=b"{}", start="POST /generate HTTP/1.1", host="Host: localhost"):
    return "\r\n".join([start, host, "Content-Type: application/json", *lines, "", ""]).encode() + body


def answers(said):
    return re.findall(rb"HTTP/1\.1 (\d{3}) ", said)


def process(pid):
    """Resident bytes, threads and open files of a process."""
    facts = Path(f"/proc/{pid}/status").read_text()
    rss, threads = (int(re.search(rf"^{name}:\s+(\d+)", facts, re.M)[1]) for name in ("VmRSS", "Threads"))
    return rss * 1024, threads, len(os.listdir(f"/proc/{pid}/fd"))


def endless(seconds=0.005, stop=False):
    """A change after which every token takes some time and, unless `stop`, no answer ends by itself."""

    def change():
        real = engine._draw

        def draw(logits, requests):
            time.sleep(seconds)
            tokens = real(logits, requests)
            return tokens if stop else torch.where(tokens == chat.END_OF_TURN, 300, tokens).clamp_min(2)

        engine._draw = draw

    return change


def dying(sign):
    """A change after which the worker dies at its next token once the file `sign` exists."""

    def change():
        real = Decoder.step

        def step(self, tokens):
            if sign.exists():
                raise SystemExit("killed")
            time.sleep(0.01)
            return real(self, tokens)

        Decoder.step = step

    return change


def both(*changes):
    return lambda: [change() for change in changes]


LONG = ("--context", 12000)
SMALL_QUEUE = ("--rows", 4, "--queue", 8)


def drip(one, count, pause):
    """Hold `count` connections that send a byte now and then, half of them in the head, half in the body, until the
    server has closed all -> (seconds after which each was closed, the longest that a normal client waited)."""
    lines = [socket.create_connection(("127.0.0.1", one.port)) for _ in range(count)]
    began, closed, slowest = time.monotonic(), {}, 0
    for i, line in enumerate(lines):
        line.setblocking(False)
        line.send(b"GET /hea" if i % 2 else framed("Content-Length: 900", body=b""))
    while len(closed) < count and time.monotonic() - began < 40:
        slowest = max(slowest, generate(one, max_tokens=4).seconds)
        for i in set(range(count)) - set(closed):
            try:
                lines[i].send(b"x")
                gone = bool(lines[i].recv(4096))
            except BlockingIOError:
                gone = False
            except ConnectionError:
                gone = True
            if gone:
                closed[i] = time.monotonic() - began
        time.sleep(pause)
    for line in lines:
        line.close()
    wait_for(lambda: number(one, "connections") == 1)
    return list(closed.values()), slowest
