"""Gemma's chat format, written as token ids: turns <-> ids and the mask of what is trained.

A dialogue is `[{"role": "user" | "assistant" | "system", "content": str}, ...]` and becomes

    <bos><start_of_turn>user\n...<end_of_turn>\n<start_of_turn>model\n...<end_of_turn>\n

The control tokens are written as numbers and contents are encoded with `split_special_tokens`, so no text that a
user, a data set or a model wrote can turn into a control token. On clean dialogues the ids are those of
`apply_chat_template` with the template that Gemma 3 was published with (`TEMPLATE` below).
"""

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerFast as Tokenizer

PAD, EOS, BOS, UNK = 0, 1, 2, 3
START_OF_TURN, END_OF_TURN = 105, 106
STOP_TOKENS = (EOS, END_OF_TURN)
# what a text must never encode to: the five specials, the turn marks, and the image marks of the larger Gemma 3
CONTROL_TOKENS = frozenset({0, 1, 2, 3, 4, 105, 106, 255999, 256000})
ROLES = ("system", "user", "assistant")
REPAIRS = ("empty", "system_folded", "merged", "leading_assistant")  # what normalise counts

# How `transformers` renders the same turns; saved with every checkpoint so that other programs see this format.
TEMPLATE = (
    "{{ bos_token }}"
    "{%- set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' -%}"
    "{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}"
    "{%- for turn in turns -%}"
    "{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\n' }}"
    "{{ (first if loop.first else '') + turn['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, with no specials added; `<end_of_turn>` and the like inside it stay plain characters.

    Raises ValueError if even so the tokenizer yields a control token or an id beyond its vocabulary, and for half of a
    surrogate pair, which is no text.
    """
    text.encode("utf-8")
    ids = _plain_ids(tokenizer, text)
    if CONTROL_TOKENS.intersection(ids):  # some tokenizers hold a mark as an ordinary token: cut it in two
        marks = [tokenizer.convert_ids_to_tokens(i) for i in sorted(CONTROL_TOKENS) if i < tokenizer.vocab_size]
        parts = re.split(
            "|".join(f"(?<={re.escape(mark[0])})(?={re.escape(mark[1:])})" for mark in marks if mark),  # type: ignore[type-var]  # of one id: one text
            text,
        )
        ids = [token for part in parts for token in _plain_ids(tokenizer, part)]
    bad = CONTROL_TOKENS.intersection(ids)
    if bad or max(ids, default=0) >= tokenizer.vocab_size:  # the hub's image token lies one beyond the embedding
        raise ValueError(f"text encodes to control or unknown token ids {sorted(bad) or [max(ids)]}: {text[:60]!r}")
    return ids


def _plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def normalise(turns: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Make any list of turns fit Gemma's format; returns (turns, counts of what had to be done).

    Empty turns are dropped, a system turn is put in front of the user turn that follows it, neighbours of one role
    are merged, and what the assistant said before the first user turn is dropped. The counts, by
    REPAIRS, are for the caller to report. Raises ValueError on a wrong shape.
    """
    counts = dict.fromkeys(REPAIRS, 0)
    clean, pending = [], []
    for turn in turns:
        role, content = _checked(turn)
        if not content.strip():
            counts["empty"] += 1
        elif role == "system":
            counts["system_folded"] += 1
            pending.append(content.strip())
        elif role == "assistant" and not clean:
            counts["leading_assistant"] += 1
        else:
            if role == "user" and pending:
                content, pending = "\n\n".join([*pending, content.strip()]), []
            if clean and clean[-1]["role"] == role:
                counts["merged"] += 1
                content = clean.pop()["content"] + "\n" + content
            clean.append({"role": role, "content": content})
    if pending and clean:  # no user turn followed: the last one there is takes it
        last = next(turn for turn in reversed(clean) if turn["role"] == "user")
        last["content"] = "\n\n".join([last["content"], *pending])
    return clean, counts


def _checked(turn):
    if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
        raise ValueError(f"a turn is {{'role': one of {', '.join(ROLES)}, 'content': text}}, not {str(turn)[:80]!r}")
    return turn["role"], turn["content"]


def encode(
    tokenizer: Tokenizer, turns: list[dict], add_generation_prompt: bool = False, last_turn_only: bool = False
) -> tuple[list[int], list[int]]:
    """Turns -> (ids, mask), two lists of T: mask is 1 on the assistant's tokens and on the stop token after them.

    With `last_turn_only` just the last assistant turn is marked; with `add_generation_prompt` the ids end where the
    model's answer begins. The newline after <end_of_turn> belongs to the format and is never trained: no model ever
    generates it. User text is stripped as Gemma's template does; assistant text is kept as it is, since the
    indentation of code is part of the answer. `turns` must be normalised (ValueError otherwise).
    """
    ids, mask = [BOS], [0]
    names = {"user": encode_text(tokenizer, "user\n"), "assistant": encode_text(tokenizer, "model\n")}
    newline = encode_text(tokenizer, "\n")
    for i, turn in enumerate(turns):
        role, content = _checked(turn)
        if role != ("user", "assistant")[i % 2]:
            raise ValueError(f"turn {i} is {role!r}: roles must alternate and start with 'user' (see normalise)")
        body = encode_text(tokenizer, content.strip() if role == "user" else content)
        trained = int(role == "assistant" and (not last_turn_only or i == len(turns) - 1))
        ids += [START_OF_TURN, *names[role], *body, END_OF_TURN, *newline]
        mask += [0] * (1 + len(names[role])) + [trained] * (len(body) + 1) + [0] * len(newline)
    if add_generation_prompt:
        ids += [START_OF_TURN, *names["assistant"]]
        mask += [0] * (1 + len(names["assistant"]))
    return ids, mask


def encode_prompt(tokenizer: Tokenizer, turns: list[dict]) -> list[int]:
    """Ids of any list of turns (normalised here) up to where the model's answer begins."""
    return encode(tokenizer, normalise(turns)[0], add_generation_prompt=True)[0]


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of a completion: cut at the first stop token, so no control token and no later turn is shown."""
    end = next((i for i, token in enumerate(ids) if token in STOP_TOKENS), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True)  # type: ignore[return-value]  # of one list: a text


def streamer(tokenizer: Tokenizer, stops: Sequence[str] = ()) -> Callable:
    """A function push(token, last=False) -> (text that is certain by now, has one of the texts `stops` come?).

    All it returned, joined, is `decode` of all tokens, cut before the first of `stops`: half a character and what may
    become a stop text are held back until the next token, or the last (None if there is no token with it), decides.
    """
    ids, start, known, held = [], 0, 0, ""

    def push(token, last=False):
        nonlocal start, known, held
        if token is not None and token not in STOP_TOKENS:
            ids.append(token)
        # the window begins at a token that was shown before, as a text may depend on its neighbour in front
        before, now = (tokenizer.decode(ids[start:end], skip_special_tokens=True) for end in (known, len(ids)))
        if last or not now.endswith("\ufffd") or len(ids) - known > 8:  # type: ignore[union-attr]  # texts, as above
            held += now[len(before) :]  # type: ignore[operator]
            start, known = known, len(ids)
        starts = [held.index(text) for text in stops if text in held]
        if starts:
            return held[: min(starts)], True
        keep = max((n for text in stops for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        out = held if last else held[: len(held) - keep]
        held = held[len(out) :]
        return out, False

    return push
