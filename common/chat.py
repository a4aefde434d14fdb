"""Gemma's chat format, written as token ids: turns <-> ids and the mask of what is trained.

A dialogue is `[{"role": "user" | "assistant" | "system", "content": str}, ...]` and becomes

    <bos><start_of_turn>user\n...<end_of_turn>\n<start_of_turn>model\n...<end_of_turn>\n

The control tokens are written as numbers and contents are encoded with `split_special_tokens`, so no text that a
user, a data set or a model wrote can turn into a control token. A token that somebody added to a base, such as
`<think>`, is none of them and becomes its id. On clean dialogues the ids are those of
`apply_chat_template` with the template that Gemma 3 was published with (`TEMPLATE` below).
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence

from tokenizers.decoders import DecodeStream

from common.runtime.types import Tokenizer

PAD, EOS, BOS, UNK = 0, 1, 2, 3
START_OF_TURN, END_OF_TURN = 105, 106
STOP_TOKENS = (EOS, END_OF_TURN)
# what a text must never encode to: the five specials, the turn marks, and the image marks of the larger Gemma 3
CONTROL_TOKENS = frozenset({0, 1, 2, 3, 4, 105, 106, 255999, 256000})
IMAGE_TOKEN = "<image_soft_token>"  # added to the published tokenizer, one beyond the text models' embedding
# what Gemma's tokenizer does to a text before it merges: the second step finds no space that the first has left
GEMMAS_STEPS = (
    'Replace(pattern=String(" "), content="▁")',
    'Split(pattern=String(" "), behavior=MergedWithPrevious, invert=False)',
)
MAX_WORDS = 300_000  # whose ids are kept
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

    A token that was added to the tokenizer, such as `<think>`, becomes its id. Raises ValueError if the tokenizer
    yields a control token or an id that the model has no embedding for, and for half of a surrogate pair, which is no
    text.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: Tokenizer, texts: list[str], words: dict | None = None) -> list[list[int]]:
    """As encode_text, of many texts at once. words: a dict that keeps ids of words from call to call: the same ids in
    a fraction of the time, see _word_starts."""
    for text in texts:
        text.encode("utf-8")
    encoded = _ids(tokenizer, texts, words)
    return [_checked_ids(tokenizer, text, ids) for text, ids in zip(texts, encoded, strict=True)]


def _ids(tokenizer, texts, words=None):
    """Ids of texts, with those of added special tokens, which the tokenizer itself would spell like the others."""
    added, _, _ = _added_tokens(tokenizer)
    if not added:
        return _plain_ids(tokenizer, texts, words)
    tokens = re.compile("(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")")
    parts = [tokens.split(text) for text in texts]  # of each: text, token, text, ..., token, text
    plain = iter(_plain_ids(tokenizer, [text for split in parts for text in split[::2]], words))
    encoded = []
    for split in parts:
        ids = [*next(plain)]
        for token in split[1::2]:
            ids += [added[token], *next(plain)]
        encoded.append(ids)
    return encoded


def _checked_ids(tokenizer, text, ids):
    if CONTROL_TOKENS.intersection(ids):  # some tokenizers hold a mark as an ordinary token: cut it in two
        marks = [tokenizer.convert_ids_to_tokens(i) for i in sorted(CONTROL_TOKENS) if i < tokenizer.vocab_size]
        parts = re.split(
            "|".join(f"(?<={re.escape(mark[0])})(?={re.escape(mark[1:])})" for mark in marks if mark),
            text,
        )
        ids = [token for part in _ids(tokenizer, parts) for token in part]
    bad = CONTROL_TOKENS.intersection(ids)
    if bad:
        raise ValueError(f"text encodes to control token ids {sorted(bad)}: {text[:60]!r}")
    if (last := max(ids, default=0)) >= known_tokens(tokenizer):
        name, known = tokenizer.convert_ids_to_tokens(last), known_tokens(tokenizer)
        raise ValueError(f"{name!r} is token {last}, and the model has embeddings of {known} alone: {text[:60]!r}")
    return ids


def known_tokens(tokenizer: Tokenizer) -> int:
    """How many tokens the model has embeddings of (model.load notes it); of a tokenizer alone, all but IMAGE_TOKEN."""
    return getattr(tokenizer, "num_embeddings", None) or _added_tokens(tokenizer)[2]


def _plain_ids(tokenizer, texts, words=None):
    starts = None if words is None else _word_starts(tokenizer)
    if starts:
        if len(words) > MAX_WORDS:
            words.clear()
        parts = [starts.split(text) for text in texts]
        new = [*{word for split in parts for word in split if word not in words}]
        words |= zip(new, _plain_ids(tokenizer, new), strict=True)
        return [[*itertools.chain.from_iterable(map(words.__getitem__, split))] for split in parts]
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


@functools.lru_cache(maxsize=2)
def _word_starts(tokenizer):
    """The places where a text can be cut into words whose tokens, joined, are those of the text; None: not known.

    Gemma's tokenizer writes a space as "▁" and merges pairs in the whole text. A merge across the start of a word, a
    space after another character, makes a token that holds both: without such a token none happens. Gemma has one,
    ">▁</", so there is no cut after ">".
    """
    backend = tokenizer.backend_tokenizer
    bpe, known = backend.model, (str(backend.normalizer), str(backend.pre_tokenizer))
    plain = getattr(bpe, "dropout", 1) is None and not (bpe.continuing_subword_prefix or bpe.end_of_word_suffix)
    added = tokenizer.added_tokens_decoder.values()
    if known != GEMMAS_STEPS or not plain or any(t.lstrip or t.rstrip or t.single_word for t in added):
        return None
    tokens = "\n".join([*backend.get_vocab(with_added_tokens=False), *(token.content for token in added)])
    before = {" ", "▁", *re.findall(r"([^▁ ])(?=[▁ ])", tokens)}
    return re.compile(f"(?<=[^\\s{re.escape(''.join(sorted(before)))}])(?= )")


@functools.lru_cache(maxsize=2)
def _added_tokens(tokenizer):
    """({text: id} of special tokens that somebody added after Gemma's own, ids of the other special ones, how many
    tokens there are but IMAGE_TOKEN)."""
    tokens = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content != IMAGE_TOKEN}
    added = {token.content: i for i, token in tokens.items() if token.special and i >= tokenizer.vocab_size}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added, special - {*added.values()}, max(tokenizer.vocab_size, 1 + max(tokens, default=0))


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
    return encode_all(tokenizer, [turns], add_generation_prompt, last_turn_only)[0]


def encode_all(
    tokenizer: Tokenizer,
    dialogues: list[list[dict]],
    add_generation_prompt: bool = False,
    last_turn_only: bool = False,
    words: dict | None = None,
) -> list[tuple[list[int], list[int]]]:
    """As encode, of many dialogues, in one call of the tokenizer. words: see encode_texts."""
    names = {"user": "user\n", "assistant": "model\n"}
    texts = dict.fromkeys([*names.values(), "\n"])
    for turns in dialogues:
        for i, turn in enumerate(turns):
            role, _ = _checked(turn)
            if role != ("user", "assistant")[i % 2]:
                raise ValueError(f"turn {i} is {role!r}: roles must alternate and start with 'user' (see normalise)")
        texts |= dict.fromkeys(_body(turn) for turn in turns)
    ids_of = dict(zip(texts, encode_texts(tokenizer, [*texts], words), strict=True))
    heads = {role: [START_OF_TURN, *ids_of[name]] for role, name in names.items()}
    newline, encoded = ids_of["\n"], []
    for turns in dialogues:
        ids, mask = [BOS], [0]
        for i, turn in enumerate(turns):
            role, body = turn["role"], ids_of[_body(turn)]
            trained = int(role == "assistant" and (not last_turn_only or i == len(turns) - 1))
            ids += [*heads[role], *body, END_OF_TURN, *newline]
            mask += [0] * len(heads[role]) + [trained] * (len(body) + 1) + [0] * len(newline)
        if add_generation_prompt:
            ids += heads["assistant"]
            mask += [0] * len(heads["assistant"])
        encoded.append((ids, mask))
    return encoded


def _body(turn):
    return turn["content"].strip() if turn["role"] == "user" else turn["content"]


def encode_prompt(tokenizer: Tokenizer, turns: list[dict]) -> list[int]:
    """Ids of any list of turns (normalised here) up to where the model's answer begins."""
    return encode(tokenizer, normalise(turns)[0], add_generation_prompt=True)[0]


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of a completion: cut at the first stop token, so no control token and no later turn is shown."""
    end = next((i for i, token in enumerate(ids) if token in STOP_TOKENS), len(ids))
    text = _text(tokenizer, ids[:end])
    if "\ufffd" not in text:
        return text
    push = streamer(tokenizer)  # keeps the whole characters before a cut one, where the tokenizer would give none
    return "".join([push(token)[0] for token in ids[:end]] + [push(None, last=True)[0]])


def _text(tokenizer, ids):
    """The text of ids without the special tokens, but with those that somebody added: they belong to the answer."""
    _, hidden, _ = _added_tokens(tokenizer)
    shown = [token for token in ids if token not in hidden]
    return tokenizer.backend_tokenizer.decode(shown, skip_special_tokens=False)


def streamer(tokenizer: Tokenizer, stops: Sequence[str] = ()) -> Callable:
    """A function push(token, last=False) -> (text that is certain by now, has one of the texts `stops` come?).

    All it returned, joined, is `decode` of all tokens, cut before the first of `stops`: half a character and what may
    become a stop text are held back until the next token, or the last (None if there is no token with it), decides.
    Half a character that is the end of the answer is shown as one U+FFFD.
    """
    stream, pending, held = DecodeStream(skip_special_tokens=False), [], ""  # pending: tokens that are not yet shown
    _, hidden, _ = _added_tokens(tokenizer)

    def push(token, last=False):
        nonlocal stream, held
        if token is not None and token not in STOP_TOKENS and token not in hidden:
            pending.append(token)
            try:
                text = stream.step(tokenizer.backend_tokenizer, token)
            except Exception:  # of its own: it had taken bytes for a character that this token did not complete
                text, stream = _text(tokenizer, pending), DecodeStream(skip_special_tokens=False)
            if text is not None:
                held += text
                pending.clear()
        if last and pending:
            held += re.sub("\ufffd+$", "\ufffd", _text(tokenizer, pending))
            pending.clear()
        starts = [held.index(text) for text in stops if text in held]
        if starts:
            return held[: min(starts)], True
        keep = max((n for text in stops for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        out = held if last else held[: len(held) - keep]
        held = held[len(out) :]
        return out, False

    return push
