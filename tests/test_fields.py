"""What a client may send, field by field: whatever is wrong is refused by its name (H5)."""

import json
import random
import statistics

import pytest

from common import chat
from common.serving import fields
from common.serving.httpd import Refused, parse
from tests.servers import USER, ask, endless, generate, serving

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), "--checkpoint", "tiny") as one:
        yield one


WRONG = [
    *((body, None) for body in (b"[]", b'""', b"null", b"{", b"\xff{}", b"", b'{"prompt": NaN}')),
    (b'{"prompt": "a", "prompt": "b"}', None),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", None),
    (b'{"a": ' + b"[" * 200_000, None),
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": " \n"}, "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": None}, "prompt"),
    (b'{"prompt": "\\ud800"}', "prompt"),
    ({"prompt": "a", "max_new_tokens": 3}, "max_new_tokens"),
    *(({"prompt": "a", "temperature": t}, "temperature") for t in (-1, 1e9, "1", True, -1e-300, [1])),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    *(({"prompt": "a", "top_p": p}, "top_p") for p in (2, -0.1, "0.9", False)),
    *(({"prompt": "a", "max_tokens": n}, "max_tokens") for n in (0, -2, 10**9, True, 1.5, "9")),
    *(({"prompt": "a", "seed": s}, "seed") for s in (1.5, 2**63, "1", True)),
    *(({"prompt": "a", "model": m}, "model") for m in ("none", 3, ["base"], {})),
]
WRONG_CHAT = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "a"}, "messages"),
    *(({"messages": [m]}, "messages[0]") for m in (1, {"role": "robot", "content": "a"}, {"role": "user"})),
    ({"messages": [*USER, {"role": "assistant", "content": "b"}]}, "messages"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    *(({"messages": USER, "stop": s}, "stop") for s in (["a"] * 1000, [3], {"a": 1}, ["a" * 101], [None], 3)),
    *(({"messages": USER, "stream": s}, "stream") for s in ("true", 1)),
    *(
        ({"messages": USER, name: value}, name)
        for name, value in (
            ("n", 2),
            ("logprobs", True),
            ("tools", [{}]),
            ("stream_options", 3),
            ("presence_penalty", 1),
            ("best_of", 2),
        )
    ),
    ({"messages": USER, "max_completion_tokens": 0}, "max_tokens"),
]


@pytest.mark.parametrize("path, cases", [("/generate", WRONG), ("/v1/chat/completions", WRONG_CHAT)])
def test_H5_every_wrong_field_is_named(server, path, cases):
    for body, param in cases:
        found = ask(server, "POST", path, body)
        assert found.status in (400, 404) and found.json["error"]["param"] == param, (
            body if len(str(body)) < 200 else "",
            found,
        )
        assert (found.status == 404) == (param == "model") and found.json["error"]["message"]
        assert found.json["error"]["type"] == "invalid_request_error"
    assert statistics.median(ask(server, "POST", path, {}).seconds for _ in range(20)) < 0.1


def chat_of(server, messages=USER, **more):
    return ask(
        server, "POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 4, "temperature": 0, **more}
    )


def test_C1_empty_turns_are_dropped_but_the_user_s_last(server):
    user, empty = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}
    right = chat_of(server, [user]).json["choices"]
    texts = ["", None, " \n", [], [{"type": "text", "text": ""}], [{"type": "text", "text": None}]]
    for text in texts:
        parts = [{"type": "text", "text": part} for part in ("", "Hi", "")]
        for turns in (
            [{"role": "system", "content": text}, user],
            [{"role": "developer", "content": text}, {"role": "user", "content": text}, user],
            [{"role": "assistant", "content": text}, {"role": "user", "content": parts}],
            [user, {"role": "assistant", "content": text}],
        ):
            found = chat_of(server, turns)
            assert (found.status, found.json["choices"]) == (200, right), (turns, found.text)
        for turns in ([{"role": "user", "content": text}], [user, empty, {"role": "user", "content": text}]):
            found = chat_of(server, turns)
            assert (found.status, found.json["error"]["param"]) == (400, f"messages[{len(turns) - 1}]")
            assert "the last turn of the user, is empty" in found.json["error"]["message"]
    merged = chat_of(server, [user, empty, {"role": "user", "content": "there"}])
    assert merged.json["choices"] == chat_of(server, [{"role": "user", "content": "Hi\nthere"}]).json["choices"]
    assert chat_of(server, [user, {"role": "assistant"}, {"role": "user", "content": "there"}]).status == 200
    assert "must hold a turn of the user" in chat_of(server, [empty]).json["error"]["message"]


@pytest.mark.parametrize(
    "neutral",
    [
        {"store": False, "metadata": {}, "tool_choice": "none", "parallel_tool_calls": True, "service_tier": "auto"},
        {"modalities": ["text"], "safety_identifier": "a", "user": "b", "prompt_cache_key": "c"},
        {"tools": [], "functions": [], "tool_choice": "auto", "function_call": "none", "parallel_tool_calls": False},
        {"logit_bias": {}, "logprobs": False, "top_logprobs": 0, "n": 1, "response_format": {"type": "text"}},
        {"store": None, "tools": None, "stop": None, "stream": None, "max_tokens": None, "audio": None},
    ],
)
def test_C7_fields_that_ask_for_nothing_are_taken(server, neutral):
    right = chat_of(server, max_completion_tokens=4).json["choices"]
    assert chat_of(server, max_completion_tokens=4, **neutral).json["choices"] == right


@pytest.mark.parametrize(
    "asking",
    [
        {"store": True},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"modalities": ["text", "audio"]},
        {"service_tier": "priority"},
        {"response_format": {"type": "json_object"}},
        {"parallel_tool_calls": "yes"},
        {"logit_bias": {"5": 1}},
    ],
)
def test_C7_fields_that_ask_for_something_are_refused(server, asking):
    found = chat_of(server, **asking)
    assert (found.status, found.json["error"]["param"]) == (400, next(iter(asking)))


def test_C8_beyond_the_context_there_is_a_code(server):
    long = [{"role": "user", "content": "word " * 5000}]
    for body in ({"messages": long}, {"messages": USER, "max_tokens": 5000}, {"messages": long, "max_tokens": -1}):
        found = ask(server, "POST", "/v1/chat/completions", body)
        assert (found.status, found.json["error"]["code"]) == (400, "context_length_exceeded")
    for body in ({"prompt": long[0]["content"]}, {"prompt": "a", "max_tokens": 4096}):
        assert ask(server, "POST", "/generate", body).json["error"]["code"] == "context_length_exceeded"
    many = ask(server, "POST", "/batch_generate", {"prompts": ["a", long[0]["content"]]})
    assert (many.json["error"]["code"], many.json["error"]["param"]) == ("context_length_exceeded", "prompts[1]")


@pytest.mark.parametrize("length", [{}, {"max_tokens": -1}, {"max_tokens": None}, {"max_completion_tokens": -1}])
def test_C8_without_a_length_an_answer_has_the_room_left(tmp_path, micro_folder, length):
    """The micro base, made never to stop, in a context of 100 tokens."""
    flags = ("--checkpoint", micro_folder, "--context", 100)
    with serving(tmp_path, *flags, change=endless(0)) as one:
        found = ask(one, "POST", "/v1/chat/completions", {"messages": USER, **length})
        assert found.json["usage"]["total_tokens"] == 100 and found.json["choices"][0]["finish_reason"] == "length"
        assert generate(one, max_tokens=-1).status == 200 and generate(one).status == 400


def test_C10_small_temperatures_empty_and_many_stops(server):
    kinds = [{"temperature": t} for t in (0, 1e-8, 1e-300, 0.0099)] + [{"top_p": p} for p in (0, 0.0, 1e-9)]
    texts = [generate(server, max_tokens=12, seed=seed, **kind).json for seed in (1, 2) for kind in kinds]
    assert texts == texts[:1] * len(texts)
    right = chat_of(server).json["choices"][0]["message"]["content"]
    stops = (["never 1", "never 2", "never 3", "never 4", "never 5"], [""], "", [], ["", "never"], ["never"] * 16)
    for stop in stops:
        assert chat_of(server, stop=stop).json["choices"][0]["message"]["content"] == right, stop
    assert chat_of(server, stop=["", right[1]]).json["choices"][0]["finish_reason"] == "stop"


def test_H5_other_content_types_are_refused(server):
    body = json.dumps({"prompt": "a"}).encode()
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "application/jsonp",
    ):
        assert ask(server, "POST", "/generate", body, {"Content-Type": kind}).status == 415
    assert ask(server, "POST", "/generate", body, {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200


def test_H5_the_server_survives_500_random_bodies(server):
    rng, valid = random.Random(0), json.dumps({"prompt": "a", "max_tokens": 1, "temperature": 0.5, "seed": 3}).encode()
    seen = set()
    for _ in range(500):
        data = bytearray(valid)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 3)] = rng.choice(
                [b"", b"\x00", b"\xff", b'"', b"{", b"[", b"9" * 30, b"null", b"-", b"\\u"]
            )
        seen.add(
            ask(
                server, "POST", rng.choice(["/generate", "/batch_generate", "/v1/chat/completions"]), bytes(data)
            ).status
        )
    assert seen <= {200, 400, 404} and 400 in seen, seen
    assert generate(server, max_tokens=2).status == 200


# ---------------------------------------------------------------- without a server


def test_parse_takes_a_whole_object_and_drops_nulls():
    assert parse(b'{"prompt": "a", "seed": null}') == {"prompt": "a"}
    with pytest.raises(Refused, match="stands twice") as caught:
        parse(b'{"a": 1, "a": 2}')
    assert caught.value.status == 400 and caught.value.body["error"]["param"] is None


def test_settings_have_defaults_and_a_seed_of_their_own():
    models = {"base": None, "x": None}
    first, second = fields.settings({}, models), fields.settings({}, models)
    assert first["seed"] != second["seed"] and first["model"] == "base"
    assert {name: first[name] for name in ("max_tokens", "temperature", "top_p")} == {
        "max_tokens": 128,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    assert fields.settings({"max_tokens": -1}, models)["max_tokens"] is None
    found = fields.settings({"seed": 5, "model": "x"}, models, temperature=1.0)
    assert (found["seed"], found["model"], found["temperature"]) == (5, "x", 1.0)


def test_turns_are_those_of_the_chat():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = fields.turns_of([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert found == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]
    assert {turn["role"] for turn in found} <= set(chat.ROLES)


def test_unknown_and_nested_fields_are_refused():
    with pytest.raises(Refused, match="unknown field 'best_of'; known are prompt"):
        fields.check_known({"best_of": 2}, {"prompt"})
    fields.check_flat({"comment": "a", "seconds": 3.5})
    for value in ([], {}, None, "a" * (fields.CHARACTERS + 1), "\ud800"):
        with pytest.raises(Refused, match="comment"):
            fields.check_flat({"comment": value})


def test_what_is_not_supported_may_be_sent_as_it_is_anyway():
    neutral = {"n": 1, "tools": [], "stop": "end", "stream": True, "stream_options": {"include_usage": True}}
    assert fields.chat_options(neutral) == (True, True, ["end"]) and fields.chat_options({}) == (False, False, [])
