"""HTTP framing: what is not exactly one request is refused, and nothing is kept before its size is known (H3, H4)."""

import asyncio
import http.client
import json

import pytest

from common.log import UserError
from common.serving import httpd
from tests.servers import JSON, PROMPT, START, WAIT, answers, framed, number, process, raw, serving

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
        *(
            (framed("Transfer-Encoding: chunked", body=body), {400})
            for body in (
                b"2\n{}\r\n0\r\n\r\n",
                b"2\r\n{}\n0\r\n\r\n",
                b"2\r\n{}0\r\n\r\n",
                b"3\r\n{}\r\n0\r\n\r\n",
                b"0x2\r\n{}\r\n0\r\n\r\n",
                b"-2\r\n{}\r\n0\r\n\r\n",
                b"+2\r\n{}\r\n0\r\n\r\n",
                b" 2\r\n{}\r\n0\r\n\r\n",
                b"\r\n{}\r\n0\r\n\r\n",
                b"2;a=\n\r\n{}\r\n0\r\n\r\n",
                b"2\r\n{}\r\n0\r\nX: y\n\r\n",
            )
        ),
        (framed("Transfer-Encoding: chunked", body=b"100001\r\n"), {413}),
        (framed("Transfer-Encoding: chunked", body=b"1\r\n \r\n" * 20_000), {413}),
        (framed("Transfer-Encoding: chunked", body=b"0\r\n" + b"X: y\r\n" * 20_000), {413}),
        (framed("Transfer-Encoding: chunked", body=b"2;" + b"a" * 20_000 + b"\r\n{}\r\n0\r\n\r\n"), {400}),
        *((framed(f"Transfer-Encoding: {name}"), {501}) for name in ("gzip", "gzip, chunked", "identity", "")),
        (framed("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), {400}),
        (framed("Transfer-Encoding: chunked", start="POST /generate HTTP/1.0"), {400}),
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
        (b"GET /health HTTP/1.1\r\n\r\n", {400}),
        (b"GET /v1/models HTTP/1.0\r\n\r\n", {403}),
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
    assert answers(said) == [b"200"] and b"Connection: close" in said
    assert number(server, "engine_finished_total") == before + 1


def test_H4_what_follows_too_early_is_not_executed(server):
    """Neither after a refusal nor after an answer that takes no time."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2}).encode()
    good, before = framed(f"Content-Length: {len(body)}", body=body), number(server, "engine_finished_total")
    for first in (framed("Content-Length: 2"), START + b"\r\n", b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        said = raw(server, first + good)
        assert len(answers(said)) == 1 and b"Connection: close" in said, said
    assert number(server, "engine_finished_total") == before


CHUNKS = (b"1\r\n{\r\n", b'1b ; note="x"\r\n"max_tokens": 2, "prompt": \r\n', b'6\r\n"\xc3\xa9 a"\r\n', b"001\r\n}\r\n")


def test_chunks_of_a_body_are_joined(server):
    """Cut anywhere, sizes in hexadecimal, an extension and a trailer; the connection stays."""
    whole = b"".join(CHUNKS) + b"0\r\nX-Sum: 1\r\n\r\n"
    said = raw(server, framed("Transfer-Encoding: Chunked", "Connection: close", body=whole))
    assert answers(said) == [b"200"] and json.loads(said.partition(b"\r\n\r\n")[2])["prompt"] == "é a"
    data = framed("Transfer-Encoding: chunked", body=whole)
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    line.connect()
    for byte in range(0, len(data), 7):
        line.sock.sendall(data[byte : byte + 7])
    reply = http.client.HTTPResponse(line.sock, method="POST")
    reply.begin()
    assert reply.status == 200 and json.loads(reply.read())["prompt"] == "é a"
    parts = iter([b'{"prompt": ', b'"a", "max_', b'tokens": 2}'])
    line.request("POST", "/generate", parts, JSON, encode_chunked=True)  # on the same connection
    assert json.loads(line.getresponse().read())["prompt"] == "a"
    line.request("POST", "/generate", iter([b"{}"]), JSON, encode_chunked=True)  # well framed, but without a prompt
    reply = line.getresponse()
    assert (reply.status, reply.headers["Connection"]) == (400, "keep-alive") and reply.read()
    line.close()


def test_a_connection_serves_one_request_after_the_other(server):
    """Answers, refusals, streams and HEAD each say that the connection stays; the last one asks to close it."""
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    line.connect()
    door, body = line.sock, json.dumps({"prompt": PROMPT, "max_tokens": 2})
    stream = json.dumps({"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 3})
    for method, path, data, status in (
        ("GET", "/health", None, 200),
        ("POST", "/generate", body, 200),
        ("POST", "/generate", "{}", 400),
        ("POST", "/generate", "{", 400),
        ("HEAD", "/metrics", None, 200),
        ("POST", "/v1/chat/completions", stream, 200),
        ("GET", "/nothing", None, 404),
        ("DELETE", "/generate", None, 405),
        ("GET", "/v1/models", None, 200),
    ):
        line.request(method, path, data, JSON if data else {})
        reply = line.getresponse()
        text = reply.read()
        assert (reply.status, reply.headers["Connection"]) == (status, "keep-alive"), (path, text)
        assert line.sock is door and bool(text) == (method != "HEAD")
    line.request("GET", "/health", None, {"Connection": "Close"})
    assert line.getresponse().headers["Connection"] == "close"
    line.close()
    assert raw(server, START + b"Connection: x, Close\r\n\r\n").count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("kind", [{"Content-Type": "text/plain"}, JSON | {"Expect": "100-continue"}])
def test_a_connection_ends_where_a_body_was_not_read(server, kind):
    """Whatever stands in it is no request."""
    lines = [f"{name}: {value}" for name, value in kind.items()]
    start = "POST /nothing HTTP/1.1" if "Expect" in kind else "POST /generate HTTP/1.1"
    data = "\r\n".join([start, "Host: localhost", "Content-Length: 90", *lines, "", ""]).encode()
    said = raw(server, data, START + b"\r\n" + b"x" * 50)
    assert answers(said) in ([b"415"], [b"404"]) and b"Connection: close" in said


def test_http_1_0_is_answered_and_closed(server):
    """As nginx asks by default: no chunks, and the end of a stream is that of the connection."""
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 3}).encode()
    start = "POST /v1/chat/completions HTTP/1.0"
    said = raw(server, framed("Connection: keep-alive", f"Content-Length: {len(body)}", body=body, start=start))
    head, _, text = said.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head and b"X-Accel-Buffering: no" in head and b"Connection: close" in head
    assert text.startswith(b"data: {") and text.endswith(b"data: [DONE]\n\n")
    assert raw(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


# ---------------------------------------------------------------- without a server


def read(data):
    """The request whose head and body are these bytes."""

    async def reading():
        reader = asyncio.StreamReader(limit=httpd.HEAD_BYTES)
        reader.feed_data(data)
        reader.feed_eof()
        call = httpd.Call(reader, None)
        await call.read_head()
        call.body = await call.read_body() if call.method == "POST" else None
        return call

    return asyncio.run(reading())


def test_a_whole_request_is_read_to_its_last_byte():
    found = read(framed("Content-Length: 2", "X-Name:  a b ", body=b"{}more"))
    assert (found.method, found.path, found.query, found.body) == ("POST", "/generate", "", b"{}")
    assert found.headers["x-name"] == "a b" and found.headers["host"] == "localhost"
    assert read(b"GET /rate?a=1 HTTP/1.0\r\n\r\n").query == "a=1"


def test_a_request_that_breaks_off_has_no_answer():
    for data in (b"", b"GET /hea", b"GET / HTTP/1.1\r\nHost: a\r\n", framed("Content-Length: 3", body=b"{}")):
        with pytest.raises(EOFError):
            read(data)


def test_a_token_is_compared_whole():
    httpd.check_token({}, None)
    for given in ("Bearer secret", "bearer secret", "BEARER  secret "):
        httpd.check_token({"authorization": given}, "secret")
    for given in ("", "secret", "Bearer secre", "Bearer Secret", "Bearersecret", "Basic secret", "Bearer secret x"):
        with pytest.raises(httpd.Refused) as caught:
            httpd.check_token({"authorization": given}, "secret")
        assert caught.value.status == 401 and caught.value.headers == {"WWW-Authenticate": "Bearer"}
        assert caught.value.body["error"]["type"] == "authentication_error"


def test_hosts_are_addresses_or_known_names():
    for host in ("127.0.0.1:8000", "[::1]:80", "localhost", "LOCALHOST:1"):
        httpd.check_origin({"host": host}, ("localhost",))
    for headers in ({}, {"host": "evil.com"}, {"host": "localhost", "origin": "http://evil"}):
        with pytest.raises(httpd.Refused) as caught:
            httpd.check_origin(headers, ("localhost",))
        assert caught.value.status == 403
        assert ("GEMMA_ALIGNMENT_TOKEN" in str(caught.value)) == ("origin" not in headers)
    assert httpd.is_address("::1") and not httpd.is_address("localhost")


def test_an_address_of_another_machine_is_one_line(monkeypatch):
    """Python 3.13 raises an OSError without a number there."""

    async def start_server(*arguments, **options):
        raise OSError("could not bind on any address out of [('10.1.2.3', 5000)]")

    monkeypatch.setattr(asyncio, "start_server", start_server)
    with pytest.raises(UserError, match=r"^--host 10\.1\.2\.3 --port 5000: could not bind on any address"):
        asyncio.run(httpd.listen(None, "10.1.2.3", 5000))
