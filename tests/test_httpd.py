"""HTTP framing: what is not exactly one request is refused, and nothing is kept before its size is known (H3, H4)."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from common.serving import httpd
from tests.servers import PROMPT, START, answers, framed, number, process, raw, serving

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), "--checkpoint", "tiny") as one:
        yield one


@pytest.mark.parametrize(
    "data, status",
    [
        (START + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 60000) for i in range(98)), 431),
        (START + b"X: y\r\n" * 5000, 431),
        (b"GET /" + b"a" * 64000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (framed("Content-Length: 1000000000000"), 413),
        (framed(f"Content-Length: {httpd.BODY_BYTES + 1}", body=b" " * (httpd.BODY_BYTES + 1)), 413),
    ],
    ids=["large headers", "many headers", "long path", "endless body", "one byte too many"],
)
def test_H3_sizes_are_bounded_before_anything_is_read(server, data, status):
    before = process(server.pid)[0]
    said = raw(server, data)
    assert said.startswith(b"HTTP/1.1 %d " % status) and b"Connection: close" in said and b'"error"' in said, said[:300]
    assert process(server.pid)[0] - before < 5e6


@pytest.mark.parametrize(
    "data, allowed",
    [
        (framed(), {411}),
        *((framed(f"Content-Length: {n}"), {400}) for n in ("-1", "+3", "1_0", "abc", "0x2", "2, 2", "", "٣")),
        (framed("Content-Length: 2", "Content-Length: 3"), {400}),
        (framed("Content-Length: 2", "content-length: 2"), {400}),
        (framed("Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n"), {501}),
        (framed("Transfer-Encoding: chunked", "Content-Length: 2"), {400}),
        (framed("Content-Length : 2"), {400}),
        (framed(" folded: 2"), {400}),
        (framed("X: a\rb"), {400}),
        (framed("X: a\x00b"), {400}),
        (b"GET /health HTTP/1.1\nHost: localhost\n\n", {400}),
        (b"GET /health HTTP/1.1\r\nHost: localhost\n\r\n", {400}),
        (b"GET /health\r\n\r\n", {400}),
        (b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
        (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", {400}),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),
        (framed("Host: localhost", "Content-Length: 2"), {400}),
        (b"GET /health HTTP/1.1\r\n\r\n", {403}),
        (START + b"Content-Length: abc\r\n\r\n", {400}),
        (START + b"Content-Length: 2\r\n\r\n{}", {400}),
        (START + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {400}),
    ],
)
def test_H4_framing_is_strict(server, data, allowed):
    """Each is one answer with a JSON body and a closed connection; what follows on it is never looked at."""
    before = number(server, "engine_finished_total")
    follow = json.dumps({"prompt": PROMPT, "max_tokens": 2}).encode()
    second = framed(f"Content-Length: {len(follow)}", body=follow)
    said = raw(server, data, second)
    head, _, body = said.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in allowed and json.loads(body)["error"]["message"], said
    assert len(answers(said)) == 1 and number(server, "engine_finished_total") == before


def test_H4_a_pipelined_second_request_is_never_executed(server):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 3, "temperature": 0}).encode()
    one = framed(f"Content-Length: {len(body)}", body=body)
    before = number(server, "engine_finished_total")
    said = raw(server, one + one)
    assert answers(said) == [b"200"]
    assert number(server, "engine_finished_total") == before + 1


# ---------------------------------------------------------------- without a server


def read(data):
    """The request whose head and body are these bytes."""

    async def reading():
        reader, call = asyncio.StreamReader(limit=httpd.HEAD_BYTES), SimpleNamespace()
        reader.feed_data(data)
        reader.feed_eof()
        await httpd.read_head(reader, call)
        call.body = await httpd.read_body(reader, None, call.headers) if call.method == "POST" else None
        return call

    return asyncio.run(reading())


def test_a_whole_request_is_read_to_its_last_byte():
    found = read(framed("Content-Length: 2", "X-Name:  a b ", body=b"{}more"))
    assert (found.method, found.path, found.query, found.body) == ("POST", "/generate", "", b"{}")
    assert found.headers["x-name"] == "a b" and found.headers["host"] == "localhost"
    assert read(b"GET /rate?a=1 HTTP/1.0\r\n\r\n").query == "a=1"


def test_a_request_that_breaks_off_has_no_answer():
    for data in (b"", b"GET /hea", b"GET / HTTP/1.1\r\nHost: a\r\n", framed("Content-Length: 3", body=b"{}")):
        with pytest.raises(ConnectionResetError):
            read(data)


def test_a_token_is_compared_whole():
    httpd.check_token({}, None)
    httpd.check_token({"authorization": "Bearer secret"}, "secret")
    for given in ("", "secret", "Bearer secre", "bearer secret"):
        with pytest.raises(httpd.Refused) as caught:
            httpd.check_token({"authorization": given}, "secret")
        assert caught.value.status == 401 and caught.value.headers == ["WWW-Authenticate: Bearer"]
        assert caught.value.body["error"]["type"] == "authentication_error"


def test_hosts_are_addresses_or_known_names():
    for host in ("127.0.0.1:8000", "[::1]:80", "localhost", "LOCALHOST:1"):
        httpd.check_origin({"host": host}, ("localhost",))
    for headers in ({}, {"host": "evil.com"}, {"host": "localhost", "origin": "http://evil"}):
        with pytest.raises(httpd.Refused) as caught:
            httpd.check_origin(headers, ("localhost",))
        assert caught.value.status == 403
    assert httpd.is_address("::1") and not httpd.is_address("localhost")
