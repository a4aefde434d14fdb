"""HTTP/1.1 for a demo server: one strictly framed request a connection, on asyncio's streams, nothing else installed.

Python's http.server guesses where RFC 9112 leaves no room for it (lengths such as +3 or 1_0, two of them, chunks that
it does not read), waits for ever and takes megabytes of head. Here a request that is not exactly one is refused, size
and time are bounded before anything is kept, and the connection ends with the answer.
"""

import asyncio
import contextlib
import hmac
import http
import ipaddress
import json
import re

HEAD_BYTES, BODY_BYTES, WRITE_SECONDS = 16 * 1024, 1024 * 1024, 30
ONCE = ("host", "content-length", "transfer-encoding", "authorization", "origin", "content-type", "expect")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """Ends a request with this status and {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status, message, param=None, **headers):
        super().__init__(message)
        self.status, self.headers = status, [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": None}}


async def read_head(reader, call):
    """Method, path, query and headers into `call`; Refused for whatever HTTP/1.1 (RFC 9112) leaves open to a guess."""
    size, lines = 0, []
    while not lines or lines[-1]:
        try:
            line = await reader.readline()
        except ValueError:  # the reader's limit
            line = b" " * (HEAD_BYTES + 1)
        size += len(line)
        if size > HEAD_BYTES:
            raise Refused(431 if lines else 414, f"the head of a request may have {HEAD_BYTES} bytes")
        if not line.endswith(b"\n"):
            raise ConnectionResetError
        if not line.endswith(b"\r\n"):
            raise Refused(400, "lines of the head end with CR LF")
        lines.append(line[:-2].decode("latin-1"))
    start = re.fullmatch(r"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/1\.[01]", lines[0])
    if not start:
        raise Refused(400, "expected METHOD /path HTTP/1.1")
    call.method, (call.path, _, call.query), call.headers = start[1], start[2].partition("?"), {}
    for line in lines[1:-1]:
        header = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*", line)
        if not header:
            raise Refused(400, "a header is not NAME: VALUE")
        name = header[1].lower()
        if name in call.headers and name in ONCE:
            raise Refused(400, f"header {name} stands twice")
        call.headers[name] = header[2]
    body = {"content-length": "0"} | call.headers
    if call.method in ("GET", "HEAD") and (body["content-length"] != "0" or "transfer-encoding" in body):
        raise Refused(400, f"{call.method} takes no body")


async def read_body(reader, writer, headers):
    """The bytes of JSON that Content-Length and Content-Type announce; none is read before both are accepted."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Content-Type must be application/json")
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        raise Refused(501 if length is None else 400, "Transfer-Encoding is not supported: send Content-Length")
    if length is None:
        raise Refused(411, "Content-Length is missing")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise Refused(400, "Content-Length is not a number")
    if int(length) > BODY_BYTES:
        raise Refused(413, f"a body may have {BODY_BYTES} bytes, this one has {int(length)}")
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        return await reader.readexactly(int(length))
    except asyncio.IncompleteReadError:
        raise ConnectionResetError from None


async def respond(call, status, content, kind="application/json", headers=()):
    """Send a whole answer; `content` is bytes, or what becomes JSON. None begins a stream that the close will end."""
    data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Content-Type: {kind}", "Connection: close",
             "Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Referrer-Policy: no-referrer",
             *([] if content is None else [f"Content-Length: {len(data)}"]), *headers]  # fmt: skip
    call.status = status
    await send(call, "\r\n".join([*lines, "", ""]).encode() + (b"" if call.method == "HEAD" else data))


def check_origin(headers, names):
    """Refuse a Host that is neither an address nor one of `names` (a rebound DNS entry), and pages of other origins."""
    host = headers.get("host", "")
    name = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:[0-9]+)?", host)
    if not name or not (is_address(name[1].strip("[]")) or name[1].lower() in names):
        raise Refused(403, "this Host is not served: use the address that the server listens on")
    if headers.get("origin", f"http://{host}").partition("://")[2] != host:
        raise Refused(403, "requests from pages of another origin are refused")


def check_token(headers, token):
    given = headers.get("authorization", "").encode("latin-1", "replace")
    if token and not hmac.compare_digest(given, b"Bearer " + token.encode()):
        raise Refused(401, "a valid token is needed: Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")


def is_address(name):
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


async def send(call, data):
    """Write, and wait until the system has taken it all; a client that does not read is given up."""
    call.writer.write(data)
    try:
        await asyncio.wait_for(call.writer.drain(), WRITE_SECONDS)
    except TimeoutError:
        raise ConnectionResetError("the client does not read") from None


async def hang_up(reader, writer, seconds=1):
    """Close, but read on for a moment: an unread body would reset the connection and take the answer with it."""
    with contextlib.suppress(Exception):
        writer.write_eof()
        async with asyncio.timeout(seconds):
            for _ in range(64):
                if not await reader.read(64 * 1024):
                    break
    writer.transport.abort()
