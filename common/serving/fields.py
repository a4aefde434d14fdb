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
    "max_tokens": (int, -1, 10**6, 128),
    "temperature": (float, 0, 2, 0.7),
    "top_p": (float, 0, 1, 0.9),
    "seed": (int, -(2**63), 2**63 - 1, None),
}
PROMPTS = 32  # of a batch
GREEDY_TEMPERATURE, GREEDY_TOP_P = 0.01, 0.001  # below them the likeliest token is all that is left
STOPS, STOP_CHARACTERS, CHARACTERS = 16, 100, 10_000
# Fields of OpenAI's that this server has no answer to: taken with these values, which ask for nothing.
NEUTRAL = {
    **{name: [0] for name in ("presence_penalty", "frequency_penalty", "top_logprobs")},
    **{name: [False] for name in ("logprobs", "store")},
    **{name: [[]] for name in ("tools", "functions")},
    **{name: ["none", "auto"] for name in ("tool_choice", "function_call")},
    "n": [1],
    "logit_bias": [{}],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "service_tier": ["auto", "default"],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
}
LABELS = {"user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention"}  # change no answer
OWN = {"messages", "model", "stream", "stream_options", "stop", "max_completion_tokens"}
CHAT_FIELDS = {*NUMBERS, *NEUTRAL, *LABELS, *OWN}


def check_known(body, known):
    for key in body:
        if key not in known:
            raise Refused(400, f"unknown field {key[:60]!r}; known are {', '.join(sorted(known))}", key[:60])


def text_of(value, param):
    """`value` if it is a text with something in it that UTF-8 can hold."""
    if not isinstance(value, str) or not value.strip():
        raise Refused(400, f"{param} must be a text that is not empty", param)
    return utf8(value, param)


def prompts_of(body):
    """The list of prompts of a batch; what is in it is not checked."""
    prompts = body.get("prompts")
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= PROMPTS:
        many = f", not {len(prompts)}" if isinstance(prompts, list) else ""
        raise Refused(400, f"prompts must be a list of 1 to {PROMPTS} texts{many}", "prompts")
    return prompts


def rating_of(body):
    """A rating as the page sends it: one flat row, with its rater's name as rater_of has it."""
    check_flat(body)
    return body | {"rater_id": rater_of(body.get("rater_id"))}


def rater_of(name):
    """A rater's name as ratings.py writes names, with single blanks."""
    if not isinstance(name, str) or not 0 < len(name.strip()) <= 80 or not name.isprintable():
        raise Refused(400, "rater must be a name of 1 to 80 printable characters", "rater_id")
    return " ".join(name.split())


def utf8(value, param):
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(400, f"{param} holds half of a surrogate pair", param) from None
    return value


def check_flat(body):
    """Refuse what a line of a file should not hold: lists, objects, endless texts, and what is no UTF-8."""
    for name, value in body.items():
        if not isinstance(value, str | int | float) or len(str(value)) > CHARACTERS:
            wanted = f"a number or a text of at most {CHARACTERS} characters"
            raise Refused(400, f"{name[:60]} must be {wanted}", name[:60])
        utf8(str(value), name[:60])


def settings(body, models, **defaults):
    """The fields of NUMBERS and `model`, one of `models`, checked; max_tokens None is all that there is room for."""
    values = {}
    for name, (kind, least, most, default) in NUMBERS.items():
        value = body.get(name, defaults.get(name, default))
        fits = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
        if value is not None and not (fits and least <= value <= most):
            number = "a whole number" if kind is int else "a number"
            raise Refused(400, f"{name} must be {number} from {least} to {most}", name)
        values[name] = value
    if values["max_tokens"] == 0:
        raise Refused(400, "max_tokens must be at least 1, or -1 for what room is left", "max_tokens")
    values["max_tokens"] = None if values["max_tokens"] == -1 else values["max_tokens"]
    if values["temperature"] < GREEDY_TEMPERATURE or values["top_p"] < GREEDY_TOP_P:
        values |= {"temperature": 0, "top_p": 1}
    values["seed"] = secrets.randbits(63) if values["seed"] is None else values["seed"]
    values["model"] = body.get("model", next(iter(models)))
    if not isinstance(values["model"], str) or values["model"] not in models:
        raise no_model(models)
    return values


def chat_settings(body, models):
    """settings with OpenAI's defaults, and its newer name of max_tokens."""
    length = body.get("max_completion_tokens", body.get("max_tokens"))
    body = body if length is None else body | {"max_tokens": length}
    return settings(body, models, max_tokens=None, temperature=1, top_p=1)


def no_model(models):
    return Refused(404, f"no model of that name; there are {', '.join(models)}", "model", "model_not_found")


def turns_of(messages):
    """OpenAI's messages as turns of common/chat.py, without the empty ones; the last turn is the user's."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list that is not empty", "messages")
    turns = [turn_of(message, f"messages[{i}]") for i, message in enumerate(messages)]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last is None:
        raise Refused(400, "messages must hold a turn of the user", "messages")
    if not turns[last]["content"].strip():
        raise Refused(400, f"messages[{last}], the last turn of the user, is empty", f"messages[{last}]")
    if any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns[last + 1 :]):
        raise Refused(400, "the last message must be the user's", "messages")
    return [turn for turn in turns if turn["content"].strip()]


def turn_of(message, where):
    """One message as a turn, whose content may be empty."""
    role = str(message.get("role")) if isinstance(message, dict) else None
    role = "system" if role == "developer" else role  # OpenAI's newer name
    if role not in chat.ROLES:
        raise Refused(400, f"{where} must have a role ({', '.join(chat.ROLES)}) and a text as content", where)
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        known = isinstance(part, dict) and part.get("type") == "text"
        if not known or not isinstance(part.get("text"), str | None):
            raise Refused(400, f"{where}.content must be a text, or a list of parts of type text", f"{where}.content")
    return {"role": role, "content": utf8("".join(part.get("text") or "" for part in parts), f"{where}.content")}


def chat_options(body):
    """(stream, with usage after it, stop texts) of a chat request; Refused for what this server cannot do."""
    for name, neutral in NEUTRAL.items():
        if name in body and body[name] not in neutral:
            words = " or ".join(json.dumps(value) for value in neutral)
            raise Refused(400, f"{name} is not supported, but as {words}", name)
    stream, options, stops = body.get("stream", False), body.get("stream_options", {}), body.get("stop", [])
    if type(stream) is not bool:
        raise Refused(400, "stream must be true or false", "stream")
    if not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object", "stream_options")
    stops = [stops] if isinstance(stops, str) else stops
    short = isinstance(stops, list) and all(isinstance(text, str) and len(text) <= STOP_CHARACTERS for text in stops)
    if not short or len(stops) > STOPS:
        texts = f"{STOPS} texts of at most {STOP_CHARACTERS} characters"
        raise Refused(400, f"stop must be a text or a list of at most {texts}", "stop")
    return stream, options.get("include_usage") is True, [text for text in stops if text]
