"""What a client may send, field by field: whatever is wrong is refused by its name (H5)."""

import json
import random
import statistics

import pytest

from common import chat
from common.serving import fields
from common.serving.httpd import Refused
from tests.servers import USER, ask, generate, serving

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
    *(({"prompt": "a", "temperature": t}, "temperature") for t in (-1, 1e9, "1", True, 1e-300, [1])),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    *(({"prompt": "a", "top_p": p}, "top_p") for p in (0, 2, -0.1, "0.9", False)),
    *(({"prompt": "a", "max_tokens": n}, "max_tokens") for n in (0, -1, 10**9, True, 1.5, "9")),
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
    *(({"messages": USER, "stop": s}, "stop") for s in (["a"] * 1000, [""], [3], "", {"a": 1}, ["a" * 101])),
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
    assert fields.parse(b'{"prompt": "a", "seed": null}') == {"prompt": "a"}
    with pytest.raises(Refused, match="stands twice") as caught:
        fields.parse(b'{"a": 1, "a": 2}')
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
    for value in ([], {}, None, "a" * (fields.LETTERS + 1), "\ud800"):
        with pytest.raises(Refused, match="comment"):
            fields.check_flat({"comment": value})


def test_what_is_not_supported_may_be_sent_as_it_is_anyway():
    neutral = {"n": 1, "tools": [], "stop": "end", "stream": True, "stream_options": {"include_usage": True}}
    assert fields.chat_options(neutral) == (True, True, ["end"]) and fields.chat_options({}) == (False, False, [])
