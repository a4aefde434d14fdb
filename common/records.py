"""Rows in the shapes that people have -> our records (see data.py), and what is cut from train where there is no val.

All rows of a file have one of the SHAPES, by the keys of the first. Which files there are: runtime/sources.py.
"""

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from common import log
from common.log import UserError
from common.runtime import sources
from common.tasks import prompt_hash
from common.tasks.text import alternate, hh_turns

ANSWERS = ("response", "rejected")
HH = "\n\nHuman:"  # the beginning of a dialogue as HH-RLHF writes it
HELD_OUT = 20  # one prompt of so many is cut from train for val, another for test
ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant")


class Id(str):
    """The id of a record, which remembers the place where the record was read, as file:line."""

    place: str


def place(record: dict) -> str:
    """The file, line and id of a record for a message, as far as they are known."""
    return f"{getattr(record['id'], 'place', 'record')}: {record['id']}"


def _turn(turn, key):
    """A turn of any of the spellings that are known. ValueError for another, for calls of tools, for pictures."""
    if not isinstance(turn, dict):
        raise ValueError(f"{key}: expected turns, got {str(turn)[:40]!r}")
    role, content = turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"{key}: a turn calls tools, only turns of text are read")
    speaker = ROLES.get(str(role).lower())
    if speaker is None:
        raise ValueError(f"{key}: the role of a turn is {str(role)[:40]!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{key}: the content of a turn is {str(content)[:40]!r}, only text is read")
    return {"role": speaker, "content": content}


def _text(row, key):
    if not isinstance(row[key], str):
        raise ValueError(f"{key}: expected text, got {str(row[key])[:40]!r}")
    return row[key]


def _turns(value, key):
    """Turns of a list, or of a dialogue as HH-RLHF writes it; an empty last answer in that is left out."""
    if isinstance(value, str) and value.startswith(HH):
        turns = hh_turns(value)
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key}: expected a list of turns, got {str(value)[:40]!r}")
    return [_turn(turn, key) for turn in value]


def _ends_with_assistant(turns):
    spoken = [turn["role"] for turn in turns if turn["role"] != "system" and turn["content"].strip()]
    return bool(spoken) and spoken[-1] == "assistant"


def _asked(value, key):
    """Turns that an answer can follow; plain text is a turn of the user's."""
    is_text = isinstance(value, str) and not value.startswith(HH)
    turns = [{"role": "user", "content": value}] if is_text else _turns(value, key)
    if _ends_with_assistant(turns):
        raise ValueError(f"{key}: it ends with a turn of the assistant, and the answer would follow that")
    return turns


def _parted(turns):
    """Turns -> (those before the last answer, the answer's text, "" where the user has the last word)."""
    end = len(turns)
    while end and turns[end - 1]["role"] == "assistant":
        end -= 1
    return turns[:end], "\n".join(turn["content"] for turn in turns[end:])


def _ours(row):
    return row | {"prompt": _asked(row["prompt"], "prompt")}


def _dialogue(row):
    key = "messages" if "messages" in row else "conversations"
    prompt, response = _parted(_turns(row[key], key))
    if not prompt:
        raise ValueError(f"{key}: no turn of a user")
    return {"prompt": prompt, "response": response}


def _completion(row):
    prompt, completion = _asked(row["prompt"], "prompt"), row["completion"]
    if isinstance(completion, str):
        return {"prompt": prompt, "response": completion}
    between, response = _parted(_turns(completion, "completion"))
    if not response:
        raise ValueError("completion: its last turn is not the assistant's")
    return {"prompt": prompt + between, "response": response}


def _preference(row):
    """Two answers, or two dialogues that should differ in the last turn only; if not, why it is left out."""
    sides = []
    for key in ("chosen", "rejected"):
        value = row[key]
        answer_alone = isinstance(value, str) and not value.startswith(HH)
        sides.append([{"role": "assistant", "content": value}] if answer_alone else _turns(value, key))
    before = []
    if all(side[0]["role"] == "assistant" for side in sides):
        if "prompt" not in row:
            raise ValueError("chosen: an answer alone needs a prompt")
        before = _asked(row["prompt"], "prompt")
    if sides[0][:-1] != sides[1][:-1]:
        return "prompts differ"
    if isinstance(row["chosen"], str) and not before:  # HH-RLHF's text holds labels that nobody spoke
        if not all(map(alternate, sides)):
            return "roles do not alternate"
    prompt, (chosen, rejected) = before + sides[0][:-1], (side[-1] for side in sides)
    if {chosen["role"], rejected["role"]} != {"assistant"} or not prompt or _ends_with_assistant(prompt):
        return "no answer after a turn of the user"
    return {"prompt": prompt, "response": chosen["content"], "rejected": rejected["content"]}


def _instruction(row):
    text, more = _text(row, "instruction"), _text({"input": row.get("input") or ""}, "input")
    asked = f"{text}\n\n{more}" if more.strip() else text
    return {"prompt": [{"role": "user", "content": asked}], "response": _text(row, "output")}


def _question(row):
    answer = _text(row, "answer")
    return {"prompt": _asked(row["question"], "question"), "response": answer, "reference": answer}


def _prompt_alone(row):
    return {"prompt": _asked(row["prompt"], "prompt"), "response": ""}


SHAPES: dict[tuple, Any] = {  # {keys of a row: what makes a record of it}; the first that fits is taken
    ("prompt", "response"): _ours,
    ("chosen", "rejected"): _preference,  # a prompt may stand beside them
    ("messages",): _dialogue,
    ("prompt", "completion"): _completion,
    ("conversations",): _dialogue,
    ("instruction", "output"): _instruction,
    ("question", "answer"): _question,
    ("prompt",): _prompt_alone,
}
KEYS = {"id", "reference", "margin", "input", "rejected", *itertools.chain(*SHAPES)}  # what data_keys may name


def named_keys(text: str | None) -> dict[str, str]:
    """{our key: the row's} of data_keys, "prompt=question,response=answer". UserError names what is wrong."""
    pairs = [pair.strip().partition("=") for pair in text.split(",")] if text else []
    for ours, equals, theirs in pairs:
        if not equals or not theirs or ours not in KEYS:
            raise UserError(
                f"data_keys: expected KEY=KEY_OF_THE_ROWS, with commas between, KEY one of {', '.join(sorted(KEYS))}, "
                f"got {f'{ours}{equals}{theirs}'!r:.80}"
            )
    return {ours: theirs for ours, _, theirs in pairs}


def _renamed(row, names, where):
    missing = [theirs for theirs in names.values() if theirs not in row]
    if missing:
        raise UserError(f"{where}: data_keys: no key {missing[0]!r}; keys found: {_listed(row)}")
    kept = {key: value for key, value in row.items() if key not in names.values()}
    return kept | {ours: row[theirs] for ours, theirs in names.items()}


def _listed(row):
    return log.listed([str(key)[:24] for key in sorted(row)], 6) or "none"


def read(paths: list[Path], data_keys: str | None = None) -> tuple[list[dict], str, Counter]:
    """(records, their shape in words, {why a row was left out: how many}) of files.

    UserError names file and line of a row of no known shape, of another shape than the first, or with a used id.
    """
    names, shape, records, places, left_out = named_keys(data_keys), None, [], {}, Counter()
    repeats = Counter()
    bar = log.progress(None, unit="row", delay=1)
    for where, raw in itertools.chain.from_iterable(sources.rows(path) for path in paths):
        bar.update()
        row = _renamed(raw, names, where) if names else raw
        keys = next((keys for keys in SHAPES if all(key in row for key in keys)), None)
        shape = shape or keys
        if keys is None or keys != shape:
            why = f"the rows before have {'+'.join(shape)}" if keys else "no known shape"
            known = ", ".join("+".join(each) for each in SHAPES)
            raise UserError(f"{where}: {why}; keys found: {_listed(row)}; known: {known} (or --data_keys)")
        is_ours = keys == ("prompt", "response")
        try:
            record = SHAPES[keys](row)
            if isinstance(record, str):
                left_out[record] += 1
                continue
            if not is_ours:
                record = {key: value for key, value in row.items() if _is_column(key, value, keys)} | record
            record = _checked(record, row.get("id"), is_ours)
            if record["prompt"][0]["content"] == row.get("prompt"):
                record["text_prompt"] = True  # see functions.call_trl
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        record["id"] = _unique(record["id"], where, places, repeats, not is_ours or not row.get("id"))
        records.append(record)
    bar.close()
    if not records:
        reasons = "".join(f"; {count:,} left out: {why}" for why, count in left_out.items())
        raise UserError(f"{paths[0]}: no records in it{reasons}")
    return records, " + ".join(shape), left_out


def _is_column(key, value, shape):
    """Is it kept with the record, for reward functions of TRL's form? What the shape does not use, and an `answer`."""
    used = {*shape, "input", "answer_ids", "unfinished"} - {"answer"}
    return key not in used and isinstance(value, str | int | float | list | dict | None)


def generated(made: list[dict], where: str, split: str) -> list[dict]:
    """Records that a user's task made, checked as those of a file are."""
    if not isinstance(made, list) or not made:
        raise UserError(f"{where} returned {made!r:.40} for {split}, expected a list of records")
    records, places, repeats = [], {}, Counter()
    for i, row in enumerate(made):
        here = f"{where}: record {i} of {split}"
        try:
            if not isinstance(row, dict) or "prompt" not in row:
                raise ValueError(f"expected a dict with a prompt, got {row!r:.40}")
            record = _checked(_ours(row), row.get("id"), True)
        except ValueError as error:
            raise UserError(f"{here}: {error}") from error
        record["id"] = _unique(record["id"], here, places, repeats, not row.get("id"))
        records.append(record)
    return records


def _checked(record, name, strict):
    """The record with all keys that one has. ValueError names the key of a wrong value. strict: the id must be text."""
    for key, optional in (("response", False), ("rejected", True), ("reference", True)):
        value = record.setdefault(key, None)
        if not (isinstance(value, str) or (optional and value is None)):
            raise ValueError(f"{key}: expected text{' or null' * optional}, got {str(value)[:40]!r}")
    margin = record.get("margin", 0.0)
    if type(margin) not in (int, float) or not 0 <= margin < 1e6:
        raise ValueError(f"margin: expected a number from 0 up, got {str(margin)[:40]!r}")
    answer_ids = record.get("answer_ids", {})
    if not isinstance(answer_ids, dict) or not all(
        key in ANSWERS and isinstance(ids, list) and all(type(token) is int for token in ids)
        for key, ids in answer_ids.items()
    ):
        raise ValueError("answer_ids: expected lists of token ids by response and rejected")
    unfinished = record.get("unfinished", [])
    if not isinstance(unfinished, list) or not all(key in ANSWERS for key in unfinished):
        raise ValueError(f"unfinished: expected a list of response and rejected, got {str(unfinished)[:40]!r}")
    if name is not None and not isinstance(name, str) and (strict or type(name) is not int):
        raise ValueError(f"id: expected text, got {str(name)[:40]!r}")
    record["id"] = content_hash(record)[:16] if name in (None, "") else str(name)
    return record


def _unique(name, where, places, repeats, may_repeat):
    """The id with its place. Equal ids of our own shape are refused; hashes and the ids of others get a number.

    places: {id: where}; repeats: how many numbers an id has given.
    """
    if name in places and not may_repeat:
        path, _, line = places[name].rpartition(":")
        earlier = f"line {line}" if line.isdecimal() and where.startswith(f"{path}:") else places[name]
        raise UserError(f"{where}: id {name!r} was used in {earlier}")
    first = name
    while name in places:
        repeats[first] += 1
        name = f"{first}-{repeats[first] + 1}"
    places[name] = where
    made = Id(name)
    made.place = where
    return made


# ---------------------------------------------------------------- what is cut from train


def content_hash(record: dict) -> str:
    """SHA-256 of what is asked and answered: equal rows, whatever their ids and files."""
    text = json.dumps([record["prompt"], record["response"], record["rejected"]])
    return hashlib.sha256(text.encode()).hexdigest()


def cut(records: list[dict], splits: tuple, source: Path | str) -> dict[str, list[dict]]:
    """{split: records} for "train" and `splits`, by a hash of the prompt: rows of one prompt stay together.

    A twentieth of the prompts each, and at least one. UserError if there are too few prompts.
    """
    hashes = [prompt_hash(record) for record in records]
    prompts = sorted(set(hashes))
    if len(prompts) <= len(splits):
        raise UserError(f"{source}: {len(prompts)} prompts are too few to cut {' and '.join(splits)} from, add files")
    names = dict(enumerate(splits))
    part = {each: names.get(int(each[:8], 16) % HELD_OUT, "train") for each in prompts}
    if len(set(part.values())) <= len(splits):  # few prompts: one to each
        part = {each: names.get(rank, "train") for rank, each in enumerate(prompts)}
    made = {split: [] for split in ("train", *splits)}
    for record, each in zip(records, hashes, strict=True):
        made[part[each]].append(record)
    return made
