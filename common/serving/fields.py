"""The fields that clients of serve.py may send: each by name, type and range; whatever is wrong is refused by its name.

Python's json takes what JSON does not know (NaN, keys that stand twice, half of a surrogate pair), and Python's true is
a number: neither is here.
"""

import json
import math
import secrets

from common import chat
from common.serving.httpd import Refused

NUMBERS = {  # type, least, most, default
    "max_tokens": (int, 1, 10**6, 128),
    "temperature": (float, 0, 2, 0.7),
    "top_p": (float, 0.001, 1, 0.9),
    "seed": (int, -(2**63), 2**63 - 1, None),
}
NEUTRAL = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "top_logprobs": 0,
           "logit_bias": {}, "tools": [], "response_format": {"type": "text"}}  # fmt: skip
STOPS, LETTERS = 4, 10_000
CHAT_FIELDS = {*NUMBERS, *NEUTRAL, "messages", "model", "stream", "stream_options", "stop", "user",
               "max_completion_tokens"}  # fmt: skip


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


def check_known(body, known):
    for key in body:
        if key not in known:
            raise Refused(400, f"unknown field {key[:60]!r}; known are {', '.join(sorted(known))}", key[:60])


def text_of(value, param):
    """`value` if it is a text with something in it that UTF-8 can hold."""
    if not isinstance(value, str) or not value.strip():
        raise Refused(400, f"{param} must be a text that is not empty", param)
    return utf8(value, param)


def utf8(value, param):
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(400, f"{param} holds half of a surrogate pair", param) from None
    return value


def check_flat(body):
    """Refuse what a line of a file should not hold: lists, objects, endless texts, and what is no UTF-8."""
    for name, value in body.items():
        if not isinstance(value, str | int | float) or len(str(value)) > LETTERS:
            raise Refused(400, f"{name[:60]} must be a number or a text of at most {LETTERS} characters", name[:60])
        utf8(str(value), name[:60])


def settings(body, models, **defaults):
    """The fields of NUMBERS and `model`, one of `models`, checked; as engine.request takes them."""
    values = {}
    for name, (kind, least, most, default) in NUMBERS.items():
        value = body.get(name, defaults.get(name, default))
        fits = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
        if value is not None and not (fits and least <= value <= most):
            raise Refused(
                400, f"{name} must be {'a whole number' if kind is int else 'a number'} from {least} to {most}", name
            )
        values[name] = value
    if 0 < values["temperature"] < 0.01:
        raise Refused(400, "temperature must be 0 (the likeliest token) or at least 0.01", "temperature")
    values["seed"] = secrets.randbits(63) if values["seed"] is None else values["seed"]
    values["model"] = body.get("model", next(iter(models)))
    if values["model"] not in models if isinstance(values["model"], str) else True:
        raise Refused(404, f"no model of that name; there are {', '.join(models)}", "model")
    return values


def turns_of(messages):
    """OpenAI's messages as turns of common/chat.py; the last one is the user's."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list that is not empty", "messages")
    turns = []
    for i, message in enumerate(messages):
        where, content = f"messages[{i}]", message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(text_of(part.get("text"), f"{where}.content") for part in content)
        role = str(message.get("role")) if content else None
        role = "system" if role == "developer" else role  # OpenAI's newer name
        if role not in chat.ROLES:
            raise Refused(400, f"{where} must have a role ({', '.join(chat.ROLES)}) and a text as content", where)
        turns.append({"role": role, "content": text_of(content, f"{where}.content")})
    if turns[-1]["role"] != "user":
        raise Refused(400, "the last message must be the user's", "messages")
    return turns


def chat_options(body):
    """(stream, with usage after it, stop texts) of a chat request; Refused for what this server cannot do."""
    for name, neutral in NEUTRAL.items():
        if body.get(name, neutral) != neutral:
            raise Refused(400, f"{name} is not supported, but as {json.dumps(neutral)}", name)
    stream, options, stops = body.get("stream", False), body.get("stream_options", {}), body.get("stop", [])
    if type(stream) is not bool:
        raise Refused(400, "stream must be true or false", "stream")
    if not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object", "stream_options")
    stops = [stops] if isinstance(stops, str) else stops
    short = isinstance(stops, list) and all(isinstance(text, str) and 0 < len(text) <= 100 for text in stops)
    if not short or len(stops) > STOPS:
        raise Refused(400, f"stop must be a text or a list of at most {STOPS} short texts", "stop")
    return stream, options.get("include_usage") is True, stops
