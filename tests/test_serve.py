"""serve.py against a live server on loopback: what it answers, and the table of what clients may do to it (H1-H12)."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import serve
from common import chat, log, lora, model, rollouts
from common.human import ratings, study
from common.serving import engine, httpd
from tests import inputs, processes
from tests.servers import (
    LONG,
    PROMPT,
    READ_SECONDS,
    SMALL_QUEUE,
    USER,
    ask,
    both,
    drip,
    dying,
    endless,
    framed,
    generate,
    number,
    process,
    raw,
    read,
    serving,
    stopped,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKEN = "a-token-for-the-tests"


# ---------------------------------------------------------------- a server with two models


@pytest.fixture(scope="module")
def net(tiny_folder):
    """The tiny base with the adapter that the server has as `x`."""
    found, tokenizer = model.load("tiny", torch.device("cpu"), torch.float32)
    inputs.random_adapter(found, "x", 0, std=0.02)
    return found, tokenizer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, net, tiny_folder):
    folder = tmp_path_factory.mktemp("adapter") / "run" / "final"
    folder.mkdir(parents=True)
    model.save_adapter(*net, folder, "x", tiny_folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, adapter):
    """One that no test harms, with the base and an adapter over it."""
    with serving(tmp_path_factory.mktemp("server"), "--checkpoint", "base=tiny", f"x={adapter}") as one:
        yield one


def right_text(net, prompt, name="base", max_tokens=128, temperature=0.7, top_p=0.9, seed=0):
    """What the sampler of training and evaluation answers."""
    found, tokenizer = net
    ids = chat.encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
    how = {"greedy": True} if temperature == 0 else {"temperature": temperature, "top_p": top_p}
    with lora.using(found, None if name == "base" else name):
        batch = rollouts.sample(
            found, [ids], 1, max_tokens, uniforms=rollouts.uniforms(seed, 0, [0], max_tokens), **how
        )
    return chat.decode(tokenizer, batch["completions"][0])


# ---------------------------------------------------------------- what it answers


def test_generate_answers_as_the_sampler_does(server, net):
    """The fields of DESIGN.md, their defaults, and both models."""
    for name in ("base", "x"):
        found = generate(server, seed=5, model=name)
        assert (found.status, found.headers["Content-Type"]) == (200, "application/json")
        assert found.json == {"generated_text": right_text(net, PROMPT, name, seed=5), "prompt": PROMPT}
    assert generate(server, seed=5).json == generate(server, seed=5, model="base").json, "the first is the default"
    asked = {"max_tokens": 7, "temperature": 1.5, "top_p": 0.5, "seed": -3}
    assert generate(server, **asked).json["generated_text"] == right_text(net, PROMPT, **asked)
    greedy = generate(server, temperature=0, max_tokens=40).json
    assert greedy["generated_text"] == right_text(net, PROMPT, temperature=0, max_tokens=40)
    assert len({generate(server, max_tokens=12, temperature=1).text for _ in range(5)}) > 1, "always the same seed"


def test_chat_completions_have_openai_s_shape(server, net):
    asked = {"messages": [{"role": "user", "content": PROMPT}], "model": "x", "seed": 5, "max_tokens": 20}
    found = ask(server, "POST", "/v1/chat/completions", asked).json
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-") and found["model"] == "x"
    choice, right = found["choices"][0], right_text(net, PROMPT, "x", 20, 1.0, 1.0, 5)
    assert choice["message"]["content"] == right and choice["finish_reason"] in ("stop", "length")
    usage = found["usage"]
    assert (
        usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        and usage["completion_tokens"] <= 20
    )
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": PROMPT},
    ]
    found = ask(server, "POST", "/v1/chat/completions", {"messages": turns, "temperature": 0, "max_tokens": 30}).json
    ids = chat.encode_prompt(net[1], [turns[0], {"role": "user", "content": "Hi"}, *turns[2:]])
    with lora.using(net[0], None):
        batch = rollouts.sample(net[0], [ids], 1, 30, greedy=True)
    assert found["choices"][0]["message"]["content"] == chat.decode(net[1], batch["completions"][0])
    assert found["usage"]["prompt_tokens"] == len(ids)
    names = ask(server, "GET", "/v1/models").json
    assert names["object"] == "list" and [entry["id"] for entry in names["data"]] == ["base", "x"]


def test_a_stream_brings_the_same_text_in_pieces(server, net):
    asked = {
        "messages": [{"role": "user", "content": PROMPT}],
        "seed": 5,
        "stream": True,
        "max_tokens": 30,
        "stream_options": {"include_usage": True},
    }
    found = ask(server, "POST", "/v1/chat/completions", asked)
    assert found.headers["Content-Type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    *chunks, last = map(json.loads, events)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 3
    assert all(chunk["usage"] is None for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant" and {chunk["object"] for chunk in chunks} == {
        "chat.completion.chunk"
    }
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1) and choices[-1]["finish_reason"]
    pieces = [c["delta"]["content"] for c in choices if c["delta"].get("content")]
    assert len(pieces) > 3 and "".join(pieces) == right_text(net, PROMPT, max_tokens=30, temperature=1, top_p=1, seed=5)


def test_C2_proxies_are_told_not_to_collect_a_stream(server):
    asked = {"messages": USER, "stream": True, "max_tokens": 3}
    found = ask(server, "POST", "/v1/chat/completions", asked)
    assert (found.headers["X-Accel-Buffering"], found.headers["Transfer-Encoding"]) == ("no", "chunked")
    assert "X-Accel-Buffering" not in ask(server, "GET", "/health").headers


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/x", "/", "/rate", "/chat.js"])
def test_C4_head_wherever_get_is(server, path):
    whole, found = ask(server, "GET", path), ask(server, "HEAD", path)
    assert (found.status, found.text, whole.status) == (200, "", 200) and whole.text
    names = [name for name in whole.headers if name != "Content-Length" or path != "/metrics"]
    assert [found.headers[name] for name in names] == [whole.headers[name] for name in names]


def test_C9_one_model_and_paths_that_are_almost_right(server):
    listed = ask(server, "GET", "/v1/models").json["data"]
    assert ask(server, "GET", "/v1/models/x").json == listed[1] and listed[1]["object"] == "model"
    assert ask(server, "GET", "/v1/models/%78").json == listed[1]
    missing = ask(server, "GET", "/v1/models/gpt-5")
    assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")
    assert "base, x" in missing.json["error"]["message"]
    for path, right in (
        ("/chat/completions", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/completions", "/v1/chat/completions"),
        ("/api/generate", "/generate"),
        ("/v1/generate", "/generate"),
        ("/healthz", "/health"),
    ):
        found = ask(server, "POST", path, {"prompt": "a"})
        assert found.status == 404 and f"did you mean {right}?" in found.json["error"]["message"], found.text
    assert "did you mean" not in ask(server, "GET", "/nothing-like-it").text


def test_stop_texts_end_an_answer(server, net):
    whole = right_text(net, PROMPT, temperature=0)
    stop = whole[len(whole) // 2 :][:4]
    asked = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "stop": ["never", stop]}
    found = ask(server, "POST", "/v1/chat/completions", asked).json["choices"][0]
    assert (found["message"]["content"], found["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    wait_for(lambda: number(server, "requests_running") == 0)


def test_usage_ends_with_the_stop_text_however_far_the_engine_is(tmp_path, net):
    def change():
        real = chat.streamer

        def late(*args):
            push = real(*args)
            return lambda *token: (time.sleep(0.05), push(*token))[1]

        chat.streamer = late

    whole = right_text(net, PROMPT, temperature=0)
    stop = whole[len(whole) // 2 :][:4]
    with serving(tmp_path, "--checkpoint", "tiny", change=change) as one:
        asked = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "stop": stop}
        used = ask(one, "POST", "/v1/chat/completions", asked).json["usage"]["completion_tokens"]
    texts = [right_text(net, PROMPT, temperature=0, max_tokens=used - less) for less in (1, 0)]
    assert [stop in text for text in texts] == [False, True], used


def test_the_openai_client(server, net):
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="unused", max_retries=0)
    asked = {"model": "x", "messages": [{"role": "user", "content": PROMPT}], "seed": 7, "max_tokens": 24}
    right = right_text(net, PROMPT, "x", 24, 1.0, 1.0, 7)
    assert [entry.id for entry in client.models.list()] == ["base", "x"]
    plain = client.chat.completions.create(**asked)
    assert plain.choices[0].message.content == right and plain.usage.total_tokens > 20
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == right
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
        client.chat.completions.create(**asked | {"model": "gpt-5"})
    with pytest.raises(openai.BadRequestError, match="temperature must be") as caught:
        client.chat.completions.create(**asked, temperature=3)
    assert caught.value.param == "temperature"


def test_metrics_are_prometheus_text_and_count(server):
    before = number(server, "engine_tokens_total")
    found = generate(server, max_tokens=9, temperature=0)
    assert found.status == 200 and number(server, "engine_tokens_total") - before == 9
    text = ask(server, "GET", "/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r'# TYPE \w+ (counter|gauge)|\w+({\w+="[^"]*"(,\w+="[^"]*")*})? [0-9.e+-]+', line), line
    assert re.search(r'gemma_requests_total\{path="/generate",status="200"\} \d+', text)


# ---------------------------------------------------------------- the table


def test_H1_health_while_loading_and_behind(tmp_path, adapter, micro_folder):
    """503 loading, then 200; 503 as soon as the worker has died, and what it held is answered."""

    def slow_to_load():
        real = serve.load
        serve.load = lambda *args: (time.sleep(0.5), real(*args))[1]

    change = both(slow_to_load, dying(tmp_path / "kill"))
    with (
        serving(tmp_path, "--checkpoint", micro_folder, change=change, ready=False) as one,
        ThreadPoolExecutor(4) as pool,
    ):
        found = ask(one, "GET", "/health")
        assert (found.status, found.json) == (503, {"status": "loading"})
        early = generate(one)
        assert early.status == 503 and early.headers["Retry-After"] and "loading" in early.json["error"]["message"]
        wait_for(lambda: ask(one, "GET", "/health").status == 200)
        assert ask(one, "GET", "/health").json == {"status": "ok"}
        held = [pool.submit(generate, one, max_tokens=2000, temperature=1.5, top_p=1) for _ in range(4)]
        wait_for(lambda: number(one, "requests_running") > 0)
        (tmp_path / "kill").touch()
        wait_for(lambda: ask(one, "GET", "/health").json == {"status": "failed"})
        assert ask(one, "GET", "/health").status == 503
        assert {reply.result().status for reply in held} <= {200, 503}
        assert 503 in {reply.result().status for reply in held}
        assert generate(one).status == 503 and number(one, "up") == 0


def test_H1_health_answers_while_others_generate(tmp_path, micro_folder):
    with (
        serving(tmp_path, "--checkpoint", micro_folder, *LONG, change=endless(0)) as one,
        ThreadPoolExecutor(4) as pool,
    ):
        held = [pool.submit(generate, one, max_tokens=10_000) for _ in range(4)]
        wait_for(lambda: number(one, "requests_running") == 4)
        before = number(one, "engine_tokens_total")
        for _ in range(200):
            assert ask(one, "GET", "/health").status == 200
            time.sleep(0.01)
        assert number(one, "engine_tokens_total") - before > 200 and not any(reply.done() for reply in held)
        os.kill(one.pid, signal.SIGTERM)
        time.sleep(0.2)
        os.kill(one.pid, signal.SIGTERM)  # what they ask for is of no interest
        one.killed, one.status = True, stopped(one)


@pytest.mark.parametrize("source, words", [("nowhere/here/x", "no such folder"), ("{empty}", "no config.json")])
def test_H1_a_broken_model_is_one_line(tmp_path, source, words):
    (tmp_path / "empty").mkdir()
    status, out, err = processes.run(
        serve.main, tmp_path, ["--port", 0, "--checkpoint", source.format(empty=tmp_path / "empty")]
    )
    assert status == 2 and words in err and err.count("\n") == 1 and err.startswith("error: "), (status, err)
    assert "ready" not in out


def test_H2_dripping_clients_are_cut_off(tmp_path, micro_folder):
    """100 of them and 2 s for a request."""
    with serving(tmp_path, "--checkpoint", micro_folder) as one:
        generate(one, max_tokens=4)
        rss, threads, files = process(one.pid)
        closed, _ = drip(one, 100, 0.2)
        assert len(closed) == 100 and max(closed) < READ_SECONDS + 3, sorted(closed)[-5:]
        now = process(one.pid)
        assert now[0] - rss < 50e6 and now[1] <= threads + 1 and now[2] <= files + 3, (rss, threads, files, now)


def test_H2_connections_beyond_the_limit_are_not_held(tmp_path, micro_folder):
    """400 come within a second where 40 may, and stay: each above 40 is told so and closed at once."""

    def change():
        httpd.CONNECTIONS = 40

    with serving(tmp_path, "--checkpoint", micro_folder, change=change) as one, contextlib.ExitStack() as held:
        most, lines = 0, []
        for _ in range(40):
            lines += [held.enter_context(socket.create_connection(("127.0.0.1", one.port))) for _ in range(10)]
            time.sleep(0.02)
            most = max(most, process(one.pid)[2])
        assert most < 40 + 120, most
        assert lines[-1].recv(100).startswith(b"HTTP/1.1 503")
        wait_for(lambda: ask(one, "GET", "/health").status == 200)


def test_H6_what_does_not_fit_is_refused_with_both_numbers(server):
    long = "word " * 5000
    message = generate(server, prompt=long).json["error"]["message"]
    assert re.search(r"prompt has \d+ tokens|prompt: \d+ characters", message) and "4096" in message
    found = generate(server, max_tokens=4096)
    assert found.status == 400 and "4096" in found.json["error"]["message"]
    assert re.search(r"has \d+ tokens and max_tokens is 4096", found.json["error"]["message"])
    body = {"messages": [{"role": "user", "content": long}]}
    assert ask(server, "POST", "/v1/chat/completions", body).json["error"]["param"] == "messages"
    body = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant") * 4000] + USER}
    error = ask(server, "POST", "/v1/chat/completions", body).json["error"]  # all turns are one call of the tokenizer
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert int(re.search(r"has (\d+) tokens .* more than the context of 4096", error["message"])[1]) > 8001


def test_H6_batches_are_all_or_nothing_and_equal_single_requests(server, net):
    prompts = [PROMPT, "hi", "Tell me how to steal a car. " * 4, "Say something nice", "😀 ünï"]
    found = ask(server, "POST", "/batch_generate", {"prompts": prompts, "temperature": 0, "max_tokens": 40})
    assert [row["prompt"] for row in found.json["results"]] == prompts
    singles = [generate(server, prompt=p, temperature=0, max_tokens=40).json["generated_text"] for p in prompts]
    assert [row["generated_text"] for row in found.json["results"]] == singles
    assert singles == [right_text(net, p, max_tokens=40, temperature=0) for p in prompts]
    before = number(server, "engine_prompt_tokens_total")
    for wrong, param in (
        (["a"] * 33, "prompts"),
        (["a", "", "b"], "prompts[1]"),
        (["a", 3], "prompts[1]"),
        ([], "prompts"),
        ("a", "prompts"),
        (["a", "b", "word " * 5000], "prompts[2]"),
    ):
        found = ask(server, "POST", "/batch_generate", {"prompts": wrong})
        assert (found.status, found.json["error"]["param"]) == (400, param)
    assert number(server, "engine_prompt_tokens_total") == before, "a part of a batch was generated"


def test_H7_beyond_the_queue_every_request_gets_one_answer(tmp_path, micro_folder):
    change = endless(0.01)
    with (
        serving(tmp_path, "--checkpoint", micro_folder, *SMALL_QUEUE, change=change) as one,
        ThreadPoolExecutor(64) as pool,
    ):
        found = list(pool.map(lambda i: generate(one, max_tokens=30, seed=i), range(64)))
        statuses = [reply.status for reply in found]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 12, statuses
        late = [reply for reply in found if reply.status == 429]
        assert all(int(reply.headers["Retry-After"]) >= 1 for reply in late)
        assert statistics.median(reply.seconds for reply in late) < statistics.median(
            reply.seconds for reply in found if reply.status == 200
        ), "refusals waited in line"
        assert number(one, "engine_finished_total") == statuses.count(200)
        text = ask(one, "GET", "/metrics").text
        assert f'path="/generate",status="429"}} {len(late)}\n' in text
        assert f'path="/generate",status="200"}} {statuses.count(200)}\n' in text
        assert number(one, "requests_running") == number(one, "requests_waiting") == 0
        held = [pool.submit(generate, one, max_tokens=60) for _ in range(12)]
        wait_for(lambda: number(one, "requests_waiting") == 8)
        late = [generate(one) for _ in range(11)]
        assert {reply.status for reply in late} == {429}
        assert {reply.result().status for reply in held} == {200}


def test_H8_generation_stops_when_the_client_leaves(tmp_path, micro_folder):
    """20 clients, plain and streaming, ask for 10,000 tokens and go; the next is served as if alone."""
    with serving(tmp_path, "--checkpoint", micro_folder, *LONG, change=endless(0.002)) as one:
        lines = []
        for i in range(20):
            asked = {"messages": USER, "max_tokens": 10_000, "stream": bool(i % 2)}
            body = json.dumps(asked).encode()
            lines.append(socket.create_connection(("127.0.0.1", one.port)))
            lines[-1].sendall(
                framed(f"Content-Length: {len(body)}", body=body, start="POST /v1/chat/completions HTTP/1.1")
            )
        wait_for(lambda: number(one, "requests_running") == 16 and number(one, "requests_waiting") == 4)
        time.sleep(0.5)
        for line in lines:
            line.close()
        wait_for(lambda: number(one, "requests_running") == number(one, "requests_waiting") == 0)
        assert generate(one, max_tokens=10).status == 200
        assert number(one, "engine_cancelled_total") == 20


def test_H9_an_idle_server_stops_at_once_and_its_port_is_free(tmp_path, micro_folder):
    with serving(tmp_path, "--checkpoint", micro_folder) as one:
        generate(one, max_tokens=3)
        idle = socket.create_connection(("127.0.0.1", one.port))  # says nothing
        os.kill(one.pid, signal.SIGTERM)
        one.status = stopped(one)
        assert one.status == 0
        idle.close()
    with serving(tmp_path, "--checkpoint", micro_folder, "--port", one.port) as again:
        assert again.port == one.port and generate(again, max_tokens=3).status == 200
        status, _, err = processes.run(serve.main, tmp_path, ["--checkpoint", micro_folder, "--port", one.port])
        assert status == 2 and f"--port {one.port}: Address already in use" in err
        assert "AirPlay" in err and "--port" in err and err.count("\n") == 1  # C11


def test_H9_what_is_in_flight_is_finished(tmp_path, micro_folder):
    with (
        serving(tmp_path, "--checkpoint", micro_folder, *LONG, change=endless(0.01)) as one,
        ThreadPoolExecutor(3) as pool,
    ):
        held = [pool.submit(generate, one, max_tokens=100, seed=i) for i in range(3)]
        wait_for(lambda: number(one, "requests_running") == 3)
        early = socket.create_connection(("127.0.0.1", one.port))  # connected before, asks behind the signal
        os.kill(one.pid, signal.SIGTERM)
        time.sleep(0.1)
        early.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert early.recv(100).startswith(b"HTTP/1.1 503")
        with pytest.raises(ConnectionError):
            generate(one)
        assert [reply.result().status for reply in held] == [200] * 3
        one.status = stopped(one, 5)
        assert one.status == 0


def test_H9_a_second_signal_ends_it_now(tmp_path, micro_folder):
    with (
        serving(tmp_path, "--checkpoint", micro_folder, *LONG, change=endless(0.01)) as one,
        ThreadPoolExecutor(1) as pool,
    ):
        held = pool.submit(generate, one, max_tokens=10_000)
        wait_for(lambda: number(one, "requests_running") == 1)
        os.kill(one.pid, signal.SIGTERM)
        time.sleep(0.2)
        os.kill(one.pid, signal.SIGTERM)
        one.killed, one.status = True, stopped(one)
        assert one.status == 128 + signal.SIGTERM
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            held.result()


def test_H10_a_token_guards_all_but_the_pages_and_health(tmp_path, micro_folder):
    with serving(
        tmp_path, "--checkpoint", micro_folder, "--host", "0.0.0.0", environment={"GEMMA_ALIGNMENT_TOKEN": TOKEN}
    ) as one:
        body = {"prompt": PROMPT, "max_tokens": 2}
        words = ("Bearer wrong", TOKEN, f"Bearer {TOKEN}x", "Bearer ü")
        for given in ({}, *({"Authorization": each} for each in words)):
            for method, path in (
                ("POST", "/generate"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("POST", "/rate"),
                ("GET", "/rate/items?rater=a"),
                ("GET", "/nothing"),
                ("DELETE", "/"),
            ):
                found = ask(one, method, path, body if method == "POST" else None, given)
                assert (found.status, found.headers["WWW-Authenticate"]) == (401, "Bearer"), (given, path)
                assert found.json["error"]["type"] == "authentication_error"
        good = {"Authorization": f"Bearer {TOKEN}"}
        assert (
            ask(one, "POST", "/generate", body, good).status == 200
            and ask(one, "GET", "/metrics", None, good).status == 200
        )
        assert ask(one, "GET", "/health", None, {"Host": "demo.example.org"}).status == 200, "as a proxy passes it on"
        for scheme in ("bearer", "BEARER", "bEaReR "):  # C6
            given = {"Authorization": f"{scheme} {TOKEN}"}
            assert ask(one, "POST", "/generate", body, given).status == 200, scheme
        assert TOKEN not in Path(f"/proc/{one.pid}/cmdline").read_text()
    assert TOKEN not in read(one.out) + read(one.err)


@pytest.mark.parametrize(
    "token, words", [(None, "set GEMMA_ALIGNMENT_TOKEN"), ("short", "16 or more"), ("a b" * 9, "16 or more")]
)
def test_H10_other_addresses_need_a_token(tmp_path, token, words, micro_folder):
    environment = {"GEMMA_ALIGNMENT_TOKEN": token} if token else ()
    argv = ["--checkpoint", micro_folder, "--port", 0, "--host", "0.0.0.0"]
    status, out, err = processes.run(serve.main, tmp_path, argv, environment=environment)
    assert status == 2 and words in err and err.count("\n") == 1 and "listening" not in out


def test_H10_other_hosts_and_origins_are_refused(server):
    for host in (
        "evil.com",
        f"evil.com:{server.port}",
        "localhost.evil.com",
        "127.0.0.1.evil.com",
        "[::1",
        "a@localhost",
        "",
    ):
        found = ask(server, "GET", "/v1/models", None, {"Host": host})
        assert found.status == 403 and "Access-Control-Allow-Origin" not in found.headers, host
        assert "GEMMA_ALIGNMENT_TOKEN" in found.json["error"]["message"]
        for method in ("GET", "HEAD"):  # C5: whoever watches a container asks by a name of its own
            assert ask(server, method, "/health", None, {"Host": host}).status == 200, host
    for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]:80", "LOCALHOST:1"):
        assert ask(server, "GET", "/v1/models", None, {"Host": host}).status == 200, host
    body, here = {"prompt": PROMPT, "max_tokens": 2}, f"127.0.0.1:{server.port}"
    for origin in ("http://evil", "null", "http://localhost.evil", f"http://127.0.0.1:{server.port + 1}"):
        found = ask(server, "POST", "/generate", body, {"Origin": origin, "Host": here})
        assert found.status == 403 and "Access-Control-Allow-Origin" not in found.headers
    assert ask(server, "POST", "/generate", body, {"Origin": f"http://{here}", "Host": here}).status == 200
    found = ask(server, "OPTIONS", "/generate", None, {"Host": here})
    assert (
        found.status == 405 and "Access-Control-Allow-Origin" not in found.headers and found.headers["Allow"] == "POST"
    )


def test_H11_nothing_leaks(tmp_path, micro_folder):
    """Paths, methods, an exception inside, a prompt with control characters; one line a request, without prompts."""
    secret = "my-secret-word\r\nInjected: yes\x1b[2J"

    def change():
        real = engine._draw

        def draw(logits, requests):
            if any(one.seed == 666 for one in requests):
                raise ZeroDivisionError("inside-of-the-server")
            return real(logits, requests)

        engine._draw = draw

    with serving(tmp_path, "--checkpoint", micro_folder, change=change) as one:
        for path in (
            "/nothing",
            "/../../etc/passwd",
            "/%2e%2e/etc/passwd",
            "/style.css/../serve.py",
            "//",
            "/web/chat.html",
        ):
            assert ask(one, "GET", path).status == 404, path
        for method, path, allow in (
            ("PUT", "/generate", "POST"),
            ("GET", "/generate", "POST"),
            ("DELETE", "/", "GET, HEAD"),
            ("POST", "/health", "GET, HEAD"),
            ("TRACE", "/metrics", "GET, HEAD"),
        ):
            found = ask(one, method, path)
            assert (found.status, found.headers["Allow"]) == (405, allow)
        found = ask(one, "HEAD", "/")
        assert (found.status, found.text) == (200, "") and int(found.headers["Content-Length"]) > 500
        assert "Server" not in found.headers
        found = generate(one, seed=666)
        assert found.status == 500 and "inside-of-the-server" not in found.text and "Traceback" not in found.text
        number_of = re.search(r"request ([0-9a-f]{8})", found.json["error"]["message"])[1]
        assert generate(one, prompt=secret, max_tokens=3).status == 200, "one failure ended the worker"
        raw(one, b"GET /a\x1b[2J HTTP/1.1\r\nHost: localhost\r\n\r\n")
        ask(one, "GET", "/b%0d%0a" + "x" * 3000)
    log = read(one.err)
    assert "secret" not in log and "\x1b" not in log and "Injected" not in log and PROMPT not in log
    assert f"request {number_of} failed" in log and "inside-of-the-server" in log, "the reason is for the operator"
    lines = [line for line in log.splitlines() if re.match("[0-9a-f]{8} ", line)]
    assert len(lines) >= 16 and all(len(line) < 200 for line in lines)


def test_H11_a_log_that_cannot_be_written_harms_nobody(tmp_path, micro_folder):
    def change():
        httpd.sys = SimpleNamespace(stderr=open("/dev/full", "w"))
        real = serve.health
        serve.GET["/health"] = lambda app, call: real(app if call.query != "fail" else None, call)

    with serving(tmp_path, "--checkpoint", micro_folder, change=change) as one:
        files = process(one.pid)[2]
        for _ in range(8):
            assert generate(one, max_tokens=2).status == 200
            assert ask(one, "GET", "/health?fail").status == 500
        wait_for(lambda: number(one, "connections") == 1)
        assert process(one.pid)[2] <= files + 1


def test_H12_same_seed_same_text_and_no_leaks(tmp_path, micro_folder):
    """Alone, four times, and among others; then 150 requests (500 in benchmarks/soak.py) leak nothing."""
    with serving(tmp_path, "--checkpoint", micro_folder) as one, ThreadPoolExecutor(8) as pool:
        kinds = [{"seed": 3, "temperature": 1, "top_p": 1.0}, {"temperature": 0}, {"seed": 4}]
        asked = [{**kind, "max_tokens": 24} for kind in kinds]
        alone = [[generate(one, **kind).json["generated_text"] for _ in range(4)] for kind in asked]
        assert all(len(set(texts)) == 1 for texts in alone)
        crowd = list(pool.map(lambda i: generate(one, **asked[i % 3]).json["generated_text"], range(60)))
        assert crowd == [alone[i % 3][0] for i in range(60)]
        before = process(one.pid)
        assert {reply.status for reply in pool.map(lambda i: generate(one, max_tokens=8, seed=i), range(150))} == {200}
        wait_for(lambda: number(one, "connections") == 1)
        after = process(one.pid)
        assert after[0] < 1.05 * before[0] and after[1] <= before[1] + 1 and after[2] <= before[2] + 2, (before, after)


# ---------------------------------------------------------------- ratings


@pytest.fixture
def blind(tmp_path):
    """A blind file of three systems over four items."""
    items = [{"prompt": f"question {i}", "reference": "good" * (i % 2)} for i in range(4)]
    texts = {
        name: [f"the {name} answer number {i} has words enough to shuffle" for i in range(4)]
        for name in ("sft", "rl", "staged")
    }
    study.write(items, texts, tmp_path / "human_eval.csv", num_samples=4, seed=1)
    return tmp_path / "human_eval.csv"


def test_ratings_are_blind_in_the_rater_s_own_order_and_on_disk(tmp_path, blind, micro_folder):
    file = tmp_path / "human_eval.ratings.jsonl"
    first, second, *_ = study.read_manifest(blind)
    with serving(tmp_path, "--checkpoint", micro_folder, "--human_eval", blind) as one:
        ann, bob = (ask(one, "GET", f"/rate/items?rater={name}") for name in ("ann", "bob"))
        assert ann.json["total"] == len(ann.json["items"]) == len(study.read_manifest(blind)) and not ann.json["rated"]
        assert [i["item_id"] for i in ann.json["items"]] == list(study.read_manifest(blind))
        orders = [
            ["/".join(a["slot"] for a in item["answers"]) for item in found.json["items"]] for found in (ann, bob)
        ]
        assert orders[0] != orders[1] and len(set(orders[0])) > 1
        assert ask(one, "GET", "/rate/items?rater=ann").text == ann.text
        for item in ann.json["items"]:
            texts = study.read_manifest(blind)[item["item_id"]]["answers"]
            assert {a["slot"]: a["text"] for a in item["answers"]} == texts
        assert not re.search(r"sft\b.*system|\.key|duplicate|trap", ann.text)
        rating = {
            "rater_id": " ann ",
            "item_id": first,
            "preferred": "B/A",
            "order": orders[0][0],
            "helpful_1_5": 4,
            "comment": "=1+1 \u2028 ü",
            "seconds": 3.5,
        }
        saved = ask(one, "POST", "/rate", rating)
        assert (saved.status, saved.json) == (200, {"saved": True, "rated": 1, "total": len(orders[0])})
        assert ask(one, "POST", "/rate", rating | {"item_id": second, "preferred": "none"}).json["rated"] == 2
        assert ask(one, "POST", "/rate", rating | {"preferred": "C"}).json["rated"] == 2, "rated again"
        found = ask(one, "GET", "/rate/items?rater=ann").json["rated"]
        assert found[first]["preferred"] == "C" and found[first]["helpful_1_5"] == 4
        assert found[second]["preferred"] == "none" and not ask(one, "GET", "/rate/items?rater=bob").json["rated"]
        rows = ratings.read_ratings(file, study.read_key(study.key_path(blind)))
        assert [row["preferred"] for row in rows] == [("A", "B"), (), ("C",)] and rows[0]["comment"] == "=1+1 \u2028 ü"
        size = file.stat().st_size
        for change, param in (
            ({"item_id": first + "9"}, "item_id"),
            ({"preferred": "D"}, "preferred"),
            ({"rater_id": ""}, "rater_id"),
            ({"preferred": None}, "preferred"),
            ({"order": "A"}, "order"),
            ({"helpful_1_5": 6}, "helpful_1_5"),
            ({"x": 1}, "unknown"),
            ({"rater_id": "a\x1b"}, "rater_id"),
            ({"rater_id": 3}, "rater_id"),
            ({"comment": "\ud800"}, "comment"),
            ({"comment": [[]]}, "comment"),
            ({"comment": "a" * 10_001}, "comment"),
        ):
            found = ask(one, "POST", "/rate", rating | change)
            assert found.status == 400 and found.json["error"]["param"] == param, (change, found.text)
        assert file.stat().st_size == size and ask(one, "GET", "/rate/items?rater=").status == 400
        assert ask(one, "GET", f"/rate/items?{'a=1&' * 20}rater=ann").status == 200
    with open(file, "ab") as torn:
        torn.write(b'{"rater_id": "ann", "item_')  # a crash in the middle of a line
    with serving(tmp_path, "--checkpoint", micro_folder, "--human_eval", blind) as one:
        assert "cut off and is dropped (26 bytes)" in read(one.out)
        assert len(ask(one, "GET", "/rate/items?rater=ann").json["rated"]) == 2
        assert ask(one, "POST", "/rate", rating | {"rater_id": "bob"}).json["rated"] == 1
    assert len(ratings.read_ratings(file, study.read_manifest(blind))) == 4


def test_a_rating_that_cannot_be_written_is_not_confirmed(tmp_path, blind, micro_folder):
    def change():
        def full(fd):
            raise OSError(28, "No space left on device")

        serve.ratings.log = SimpleNamespace(**{**vars(log), "fsync": full})

    with serving(tmp_path, "--checkpoint", micro_folder, "--human_eval", blind, change=change) as one:
        rating = {"rater_id": "ann", "item_id": next(iter(study.read_manifest(blind))), "preferred": "A"}
        found = ask(one, "POST", "/rate", rating)
        assert found.status == 507 and "No space left on device" in found.json["error"]["message"]
        assert not ask(one, "GET", "/rate/items?rater=ann").json["rated"]
    assert (tmp_path / "human_eval.ratings.jsonl").read_bytes() == b""


def test_a_rating_of_another_study_is_refused_the_next_kept(tmp_path, blind, micro_folder):
    """As a page sends it that was open before the server was started again with another blind file."""
    own = next(iter(study.read_manifest(blind)))
    with serving(tmp_path, "--checkpoint", micro_folder, "--human_eval", blind) as one:
        for foreign in ("000000-item-1", "item-1"):
            found = ask(one, "POST", "/rate", {"rater_id": "ann", "item_id": foreign, "preferred": "A"})
            error = found.json["error"]
            assert found.status == 409 and error["param"] == "item_id", found.text
            assert f"item_id '{foreign}' is of another study" in error["message"] and "reload" in error["message"]
        assert ask(one, "POST", "/rate", {"rater_id": "ann", "item_id": own, "preferred": "A"}).json["rated"] == 1
    file = tmp_path / "human_eval.ratings.jsonl"
    assert [row["item_id"] for row in ratings.read_ratings(file, study.read_manifest(blind))] == [own]


@pytest.mark.parametrize("flags", [("--rows", 0), ("--queue", -1), ("--context", 8), ("--rows", "many")])
def test_wrong_sizes_are_one_line(tmp_path, flags):
    processes.refused(serve.main, tmp_path, ["--port", 0, "--checkpoint", "tiny", *flags], flags[0])


def test_the_rate_tab_shows_where_a_study_is_loaded(server, tmp_path, blind, micro_folder):
    tab = '<a href="/rate" hidden>'
    assert tab in ask(server, "GET", "/").text
    with serving(tmp_path, "--checkpoint", micro_folder, "--human_eval", blind) as one:
        shown = ask(one, "GET", "/").text
    assert tab not in shown and '<a href="/rate">' in shown


def test_without_a_blind_file_there_is_nothing_to_rate(server, tmp_path, micro_folder):
    for found in (ask(server, "GET", "/rate/items?rater=a"), ask(server, "POST", "/rate", {"rater_id": "a"})):
        assert found.status == 404 and "--human_eval" in found.json["error"]["message"]
    key = ["--checkpoint", micro_folder, "--human_eval", tmp_path / "none.csv"]
    processes.refused(serve.main, tmp_path, key, "none.csv")


@pytest.mark.parametrize("words, wrong", [(["a=tiny", "a=other"], "stands twice"), (["a="], "names nothing")])
def test_wrong_names_of_checkpoints(tmp_path, words, wrong):
    processes.refused(serve.main, tmp_path, ["--port", 0, "--checkpoint", *words], wrong)


def test_an_adapter_beside_checkpoints_is_refused(tmp_path):
    argv = ["--port", 0, "--checkpoint", "base=tiny", "--model.adapter", tmp_path]
    processes.refused(serve.main, tmp_path, argv, "--model.adapter is not read beside --checkpoint")


def test_names_of_checkpoints(tmp_path):
    run = tmp_path / "outputs" / "sft_lora_270m" / "final"
    assert serve.parse_models([str(run), "gemma.gguf", "rl=a/b", "org/name"]) == {
        "sft_lora_270m": str(run),
        "gemma": "gemma.gguf",
        "rl": "a/b",
        "name": "org/name",
    }
    assert list(serve.parse_models(["outputs/kl0.05/final", "org/gemma-3.1b"])) == ["kl0.05", "gemma-3.1b"]
    scaled = [str(run), f"{run}@0.5", f"{run.parent}@2", "half=a/final@0.5"]
    assert list(serve.parse_models(scaled)) == ["sft_lora_270m", "sft_lora_270m@0.5", "sft_lora_270m@2", "half"]
    assert serve.parse_models(["sft-v1.2=a", "./lr=0.1/final"]) == {"sft-v1.2": "a", "lr=0.1": "./lr=0.1/final"}


def test_a_name_may_have_a_dot(adapter):
    found, _ = serve.load({"base": "tiny", "kl0.05": str(adapter)}, torch.device("cpu"), torch.float32)
    (net, none), (same, name) = found["base"], found["kl0.05"]
    assert net is same and none is None and name in next(iter(lora.lora_modules(net).values())).lora_A


def test_a_port_beyond_the_last_is_one_line(tmp_path, micro_folder):
    processes.refused(serve.main, tmp_path, ["--checkpoint", micro_folder, "--port", 70000], "--port 70000", "0-65535")


class Panic(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize(
    "error, status, words",
    [
        (OSError(28, "No space left on device", "a.bin"), 2, "error: No space left on device: a.bin\n"),
        (Panic("while reading"), 70, "Panic: while reading\n"),
    ],
)
def test_what_fails_while_loading_is_said_and_not_waited_for(tmp_path, error, status, words, micro_folder):
    def body(main, argv):
        def load(*args):
            raise error

        serve.load = load
        main([str(word) for word in argv])

    found = processes.run(serve.main, tmp_path, ["--checkpoint", micro_folder, "--port", 0], body)
    assert found[0] == status and found[2].endswith(words) and "--port" not in found[2], found


def test_a_reward_model_is_not_served(tmp_path, micro_folder):
    judge = inputs.random_reward_model(tmp_path / "judge", micro_folder)
    processes.refused(serve.main, tmp_path, ["--port", 0, "--checkpoint", judge], "is a reward model")
