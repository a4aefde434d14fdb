"""HTTP/1.1 for a demo server: strictly framed requests on asyncio's streams, nothing else installed.

Python's http.server guesses where RFC 9112 leaves no room for it (lengths such as +3 or 1_0, two of them), reads no
chunks, waits for ever and takes megabytes of head. Here a request that is not exactly one is refused, and size and time
are bounded before anything is kept. A connection stays only after a request that was read whole.
"""

import asyncio
import contextlib
import errno
import hmac
import http
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import time
import traceback

from common.log import UserError

# >>> edit here: what clients may take
CONNECTIONS, READ_SECONDS, WRITE_SECONDS = 256, 10, 30  # a process has 1,024 files by default
HEAD_BYTES, BODY_BYTES, CHUNKS = 16 * 1024, 1024 * 1024, 16 * 1024
ONCE = ("host", "content-length", "transfer-encoding", "authorization", "origin", "content-type", "expect")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(;[\t\x20-\x7e]*)?\r\n")
SAFE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Refused(Exception):
    """Ends a request with this status and {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status, message, param=None, code=None, **headers):
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): str(value) for name, value in headers.items()}
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Call:
    """One request and its answer. keep: another one may follow on the connection."""

    def __init__(self, reader, writer, may_stay=True):
        self.reader, self.writer, self.may_stay = reader, writer, may_stay
        self.id, self.began = secrets.token_hex(4), time.monotonic()
        self.method, self.path, self.query, self.version, self.headers, self.body = "-", "-", "", "0", {}, None
        self.status, self.tokens, self.first_byte = 0, 0, b""
        self.read_whole, self.keep, self.chunked = False, False, False

    # ---------------------------------------------------------------- the request

    async def begins(self, seconds):
        """Wait for the first byte of a request; False if none comes."""
        with contextlib.suppress(OSError):  # TimeoutError is one
            self.first_byte = await asyncio.wait_for(self.reader.read(1), seconds)
        self.began = time.monotonic()
        return bool(self.first_byte)

    async def read_head(self):
        """Method, path, query and headers; Refused for whatever HTTP/1.1 (RFC 9112) leaves open to a guess."""
        head = self.first_byte
        with contextlib.suppress(asyncio.LimitOverrunError):  # one line is longer than a head may be
            while not head.endswith(b"\r\n\r\n") and len(head) <= HEAD_BYTES:
                head += await self.reader.readuntil(b"\n")
                if not head.endswith(b"\r\n"):
                    raise Refused(400, "a line of a request's head ends with CR LF")
        if not head.endswith(b"\r\n\r\n") or len(head) > HEAD_BYTES:
            status = 431 if b"\r\n" in head else 414  # 414: the first line alone is too long
            raise Refused(status, f"the head of a request may have {HEAD_BYTES} bytes")
        start, *lines = head[:-4].decode("latin-1").split("\r\n")
        parts = re.fullmatch(r"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/1\.([01])", start)
        if not parts:
            raise Refused(400, "expected METHOD /path HTTP/1.1")
        self.method, (self.path, _, self.query), self.version = parts[1], parts[2].partition("?"), parts[3]
        for line in lines:
            header = HEADER.fullmatch(line)
            if not header:
                raise Refused(400, "a header is not NAME: VALUE")
            name = header[1].lower()
            if name in self.headers and name in ONCE:
                raise Refused(400, f"header {name} stands twice")
            self.headers[name] = header[2]
        if self.version == "1" and "host" not in self.headers:
            raise Refused(400, "header Host is missing")
        self.read_whole = self.headers.get("content-length", "0") == "0" and "transfer-encoding" not in self.headers
        if self.method in ("GET", "HEAD") and not self.read_whole:
            raise Refused(400, f"{self.method} takes no body")

    async def read_body(self):
        """The bytes of JSON that the head announces; none is read before type and length are accepted."""
        length, coding = self.headers.get("content-length"), self.headers.get("transfer-encoding")
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        if coding is not None and (length is not None or self.version == "0"):
            raise Refused(400, "Transfer-Encoding stands beside Content-Length or in HTTP/1.0")
        if coding is None and length is None:
            raise Refused(411, "Content-Length is missing")
        if coding is not None and coding.lower() != "chunked":
            raise Refused(501, "of the transfer encodings only chunked is supported")
        if coding is None and not re.fullmatch("[0-9]{1,18}", length):
            raise Refused(400, "Content-Length is not a number")
        if coding is None and int(length) > BODY_BYTES:
            raise Refused(413, f"a body may have {BODY_BYTES} bytes, this one has {int(length)}")
        if self.headers.get("expect", "").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = await (self._chunks() if length is None else self.reader.readexactly(int(length)))
        self.read_whole = True
        return data

    async def _chunks(self):
        data = bytearray()
        for _ in range(CHUNKS):
            line = CHUNK.fullmatch(await self.reader.readuntil(b"\r\n"))
            if not line:
                raise Refused(400, "a chunk begins with its size and CR LF")
            size = int(line[1], 16)
            if len(data) + size > BODY_BYTES:
                break
            if size == 0:
                for _ in range(CHUNKS):  # a trailer: headers, read and thrown away
                    if (line := await self.reader.readuntil(b"\r\n")) == b"\r\n":
                        return bytes(data)
                    if not HEADER.fullmatch(line[:-2].decode("latin-1")):
                        raise Refused(400, "after the last chunk there may be headers and an empty line")
                break
            data += await self.reader.readexactly(size)
            if await self.reader.readexactly(2) != b"\r\n":
                raise Refused(400, "a chunk is longer than its size")
        raise Refused(413, f"a body may have {BODY_BYTES} bytes in {CHUNKS} chunks, and {CHUNKS} headers behind")

    async def left(self):
        """Returns when the client has closed its end; one that sends more before its answer gets no answer to that."""
        with contextlib.suppress(OSError):
            while await self.reader.read(64 * 1024):
                self.may_stay = self.keep = False

    # ---------------------------------------------------------------- the answer

    async def respond(self, status, content, kind="application/json", headers=()):
        """Send a whole answer; `content` is bytes, or what becomes JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        looking = asyncio.create_task(self.left())
        await asyncio.sleep(0)  # it reads what has come, and would wait for more
        looking.cancel()
        await asyncio.wait({looking})
        head = self._head(status, {"Content-Type": kind, "Content-Length": len(data), **dict(headers)})
        await self._write(head if self.method == "HEAD" else head + data)

    async def begin_stream(self, kind):
        """The head of an answer in parts, each by send_part; b"" is the last. nginx would collect them."""
        self.chunked = self.version == "1"  # before that the close ends it
        coding = {"Transfer-Encoding": "chunked"} if self.chunked else {}
        await self._write(self._head(200, {"Content-Type": kind, "X-Accel-Buffering": "no", **coding}))

    async def send_part(self, data):
        await self._write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    async def send_event(self, content):
        """One of server-sent events."""
        await self.send_part(f"data: {json.dumps(content)}\n\n".encode())

    def _head(self, status, headers):
        """Also decides whether the connection stays."""
        closes = "close" in re.split("[ \t,]+", self.headers.get("connection", "").lower())
        self.keep = self.may_stay and self.read_whole and self.version == "1" and not closes
        named = {"Connection": "keep-alive" if self.keep else "close", **SAFE, **headers}
        lines = [f"{name}: {value}" for name, value in named.items()]
        self.status = status
        return "\r\n".join([f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", *lines, "", ""]).encode()

    async def _write(self, data):
        """Wait until the system has taken it all; a client that does not read is given up."""
        self.writer.write(data)
        try:
            await asyncio.wait_for(self.writer.drain(), WRITE_SECONDS)
        except TimeoutError:
            raise ConnectionResetError("the client does not read") from None

    async def hang_up(self, seconds=1):
        """Close, but read on for a moment: an unread body would reset the connection and take the answer with it."""
        with contextlib.suppress(Exception):
            self.writer.write_eof()
            async with asyncio.timeout(seconds):
                for _ in range(64):
                    if not await self.reader.read(64 * 1024):
                        break
        self.writer.transport.abort()


# ---------------------------------------------------------------- one connection, its requests


def parse(data):
    """A JSON object without duplicate keys, NaN or numbers beyond reason; Refused otherwise."""

    def once(pairs):
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def constant(name):
        raise ValueError(f"{name} is no JSON")

    try:
        body = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no valid JSON: {str(error)[:100]}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return {key: value for key, value in body.items() if value is not None}


async def listen(app, host, port):
    """A server that answers every connection by `connection`; UserError where the address cannot be had."""
    try:
        return await asyncio.start_server(
            lambda *ends: connection(app, *ends), host, port, limit=HEAD_BYTES, backlog=128
        )
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if (getattr(error, "errno", None) or 0) > 0 else error
        taken = "; on macOS AirPlay has port 5000: take another --port" if error.args[0] == errno.EADDRINUSE else ""
        raise UserError(f"--host {host} --port {port}: {reason}{taken}") from error


async def connection(app, reader, writer):
    """Answer one request after the other, until the client has no more or one was not clear.

    app: counts `connections`, `active` and `requests`; `stopping` is an event; app.handler_of(call) gives the
    function(app, call) that answers, or raises Refused.
    """
    writer.transport.set_write_buffer_limits(high=0)  # what is written has been taken by the system
    app.connections += 1
    full, stays = app.connections > CONNECTIONS, True
    try:
        while stays:
            call = Call(reader, writer, app.connections <= CONNECTIONS // 2)  # half full: close after the answer
            if not full and not await call.begins(READ_SECONDS):
                break
            await answer(app, call, full)
            stays = call.keep and not full and not app.stopping.is_set()
    finally:
        await call.hang_up(0 if full or app.stopping.is_set() else 1)
        app.connections -= 1


async def answer(app, call, full):
    """Read a request within READ_SECONDS, answer it, log one line."""
    try:
        if full:
            raise Refused(503, "too many connections", Retry_After=1)
        async with asyncio.timeout(READ_SECONDS):
            await call.read_head()
            handler = app.handler_of(call)
            if call.method == "POST":
                call.body = parse(await call.read_body())
        app.active += 1
        try:
            await handler(app, call)
        finally:
            app.active -= 1
    except (ConnectionError, EOFError, asyncio.CancelledError):
        call.status, call.keep = call.status or 499, False  # the client has left
    except Exception as error:
        with contextlib.suppress(OSError):
            await refuse(call, error)
    with contextlib.suppress(OSError):  # the log's disk may be full
        note(app, call)


async def refuse(call, error):
    """Tell the client what went wrong, without a traceback; into the stream if it has begun."""
    if isinstance(error, asyncio.LimitOverrunError):
        error = Refused(400, "a line is too long")
    elif isinstance(error, TimeoutError):
        error = Refused(408, "reading took too long") if call.body is None else Refused(504, "answering took too long")
    elif not isinstance(error, Refused):
        with contextlib.suppress(OSError):
            print(f"request {call.id} failed:", file=sys.stderr)
            traceback.print_exception(error)
        error = Refused(500, f"internal error, request {call.id}")
    if not call.status:
        await call.respond(error.status, error.body, headers=error.headers)
        return
    await call.send_event(error.body)
    await call.send_part(b"")
    call.status, call.keep = error.status, False


def note(app, call):
    """Count a request and write its line, in which nothing that a client sent can end a line or move a cursor."""
    app.requests[app.route_of(call.path), call.status] += 1
    line = f"{call.id} {call.method} {json.dumps(call.path[:100])} {call.status}"
    print(f"{line} {time.monotonic() - call.began:.3f} s {call.tokens} tokens", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- who may ask


def token_for(host):
    """The secret in GEMMA_ALIGNMENT_TOKEN, "" without one; an address that others can reach needs one."""
    token = os.environ.get("GEMMA_ALIGNMENT_TOKEN", "")
    local = host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
    if not local and not token:
        secret = "a secret of at least 16 characters"
        raise UserError(f"--host {host} is open to others: set GEMMA_ALIGNMENT_TOKEN to {secret}")
    if token and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise UserError("GEMMA_ALIGNMENT_TOKEN: 16 or more printable ASCII characters without spaces are needed")
    return token


def names_of(host):
    """The hosts by which this server may be called."""
    return {"localhost", host.lower(), socket.gethostname().lower()}


def check_origin(headers, names):
    """Refuse a Host that is neither an address nor one of `names` (a rebound DNS entry), and pages of other origins."""
    host = headers.get("host", "")
    name = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:[0-9]+)?", host)
    if not name or not (is_address(name[1].strip("[]")) or name[1].lower() in names):
        way = "use the address that the server listens on, or start it with a token in GEMMA_ALIGNMENT_TOKEN"
        raise Refused(403, f"this Host is not served: {way}")
    if headers.get("origin", f"http://{host}").partition("://")[2] != host:
        raise Refused(403, "requests from pages of another origin are refused")


def check_token(headers, token):
    scheme, _, given = headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), (token or "").encode())
    if token and not (right and scheme.lower() == "bearer"):
        raise Refused(401, "a valid token is needed: Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")


def is_address(name):
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False
