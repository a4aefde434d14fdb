"""Records of a task -> token examples -> steps of rows -> micro-batches under a token budget.

A record is one JSON line: `prompt` (turns, the last one the user's), `response`, `rejected` (or null), `reference`
(or null), `id`; optional `margin` (of a preference), `unfinished` (which of the two answers were cut off) and
`answer_ids` (of answers that a model sampled: {"response": ids, "rejected": ids}).

An example is {"id", "ids": T token ids, "mask": T of 0 / 1}, a pair two examples with one prompt; nothing is padded
until `collate`.
"""

import bisect
import heapq
import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast as Tokenizer

from common import chat, dist, log, tasks
from common.log import UserError

MAX_LINE = 4 * 2**20  # bytes
PAIR_SKIPS = ("no_rejected", "empty_answer", "equal_answers", "no_user_turn", "prompt_too_long")


def load(
    task: str, folder: Path | str | None, split: str, debug: bool, seed: int, options: SimpleNamespace | None = None
) -> list[dict]:
    """The records of a split: of `folder`, or without one those that the task generates, or its downloaded files.

    options: section `task_options` of the config.
    """
    chosen = tasks.load(task)
    if folder is None and (debug or not chosen.files):
        size = (tasks.DEBUG_SIZES if debug else chosen.sizes or tasks.DEBUG_SIZES).get(split, 128)
        return tasks.records(chosen, split, size, seed, **vars(options or SimpleNamespace()))
    return load_split(folder or Path(__file__).parents[1] / "data" / chosen.name, split)


def from_config(cfg: SimpleNamespace, split: str) -> list[dict]:
    """The records of a split of the task and data that a config names."""
    return load(cfg.task, cfg.dataset_path, split, cfg.debug, cfg.seed, cfg.task_options)


def load_split(folder: Path | str, split: str) -> list[dict]:
    """The records of folder/<split>.jsonl; every fault is a UserError naming file, line and key."""
    path = Path(folder) / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; run `python data/download_datasets.py`, name a folder of train/val/test JSONL "
            "with --dataset_path, or try --debug, which brings its own data"
        )
    records, lines = [], {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                record = _record(line, f"{path}:{number}")
                if record["id"] in lines:
                    raise UserError(f"{path}:{number}: id {record['id']!r} was used in line {lines[record['id']]}")
                lines[record["id"]] = number
                records.append(record)
    if not records:
        raise UserError(f"{path}: no records in it")
    return records


def _record(line, where):
    if len(line) > MAX_LINE:
        raise UserError(f"{where}: the line is longer than {MAX_LINE} bytes")
    try:
        record = json.loads(line.decode("utf-8"))
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON record in UTF-8 ({str(error)[:80]})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, got {type(record).__name__}")
    for key, optional in (("id", False), ("response", False), ("rejected", True), ("reference", True)):
        value = record.setdefault(key, None)
        if not (isinstance(value, str) or (optional and value is None)):
            raise UserError(f"{where}: {key}: expected text{' or null' * optional}, got {str(value)[:40]!r}")
    margin = record.get("margin", 0.0)
    if type(margin) not in (int, float) or not 0 <= margin < 1e6:
        raise UserError(f"{where}: margin: expected a number from 0 up, got {str(margin)[:40]!r}")
    answer_ids = record.get("answer_ids", {})
    if not isinstance(answer_ids, dict) or not all(
        key in ("response", "rejected") and isinstance(ids, list) and all(type(token) is int for token in ids)
        for key, ids in answer_ids.items()
    ):
        raise UserError(f"{where}: answer_ids: expected lists of token ids by response and rejected")
    prompt = record.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise UserError(f"{where}: prompt: expected a list of turns, got {str(prompt)[:40]!r}")
    try:
        chat.normalise(prompt)
    except ValueError as error:
        raise UserError(f"{where}: prompt: {error}") from error
    return record


def encode_records(
    records: list[dict], tokenizer: Tokenizer, max_length: int, last_turn_only: bool = False
) -> tuple[list[dict], dict[str, int]]:
    """Supervised examples of at most `max_length` tokens -> (examples, report).

    A longer dialogue keeps its start and is counted as `truncated`; one that has no supervised token left, no user
    turn or an empty answer is dropped and counted as `no_target`, `no_user_turn`, `empty_response`.
    """
    report = {"records": len(records), "empty_response": 0, "no_user_turn": 0, "no_target": 0, "truncated": 0}
    report |= dict.fromkeys(chat.REPAIRS, 0)
    examples = []
    for record in records:
        if not record["response"].strip():
            report["empty_response"] += 1
            continue
        turns, repairs = chat.normalise([*record["prompt"], {"role": "assistant", "content": record["response"]}])
        report |= {key: report[key] + count for key, count in repairs.items()}
        if not turns:
            report["no_user_turn"] += 1
            continue
        ids, mask = chat.encode(tokenizer, turns, last_turn_only=last_turn_only)
        end = max(i for i, m in enumerate(mask) if m) + 1  # the newline after the last stop token teaches nothing
        report["truncated"] += end > max_length
        ids, mask = ids[: min(end, max_length)], mask[: min(end, max_length)]
        if any(mask):
            examples.append({"id": record["id"], "ids": ids, "mask": mask})
        else:
            report["no_target"] += 1
    report["kept"] = len(examples)
    return examples, report


def encode_pairs(records: list[dict], tokenizer: Tokenizer, max_length: int) -> tuple[list[dict], dict[str, int]]:
    """Preference pairs of at most `max_length` tokens a side -> (pairs, report).

    A pair is {"id", "margin", "texts": (chosen, rejected), "chosen": example, "rejected": example}: both begin with the
    same prompt tokens, and the mask is 1 on the answer and its stop token. A longer answer is cut and counted; what
    teaches nothing is skipped and counted by PAIR_SKIPS.
    """
    report = {"records": len(records)} | dict.fromkeys((*PAIR_SKIPS, "truncated", *chat.REPAIRS), 0)
    pairs = []
    for record in records:
        pair = _pair(record, tokenizer, max_length, report)
        if isinstance(pair, str):
            report[pair] += 1
        else:
            pairs.append(pair)
    report["kept"] = len(pairs)
    return pairs, report


def _pair(record, tokenizer, max_length, report):
    """One pair, or the name of the reason why there is none."""
    texts = record["response"], record["rejected"]
    if texts[1] is None:
        return "no_rejected"
    if not all(text.strip() for text in texts):
        return "empty_answer"
    if texts[0] == texts[1]:
        return "equal_answers"
    pair = {"id": record["id"], "margin": record.get("margin", 0.0), "texts": texts}
    for side, key, text in zip(("chosen", "rejected"), ("response", "rejected"), texts):
        turns, repairs = chat.normalise([*record["prompt"], {"role": "assistant", "content": text}])
        if not turns:
            return "no_user_turn"
        sampled = record.get("answer_ids", {}).get(key)
        if sampled is None:
            ids, mask = chat.encode(tokenizer, turns, last_turn_only=True)
            end = max(i for i, m in enumerate(mask) if m) + 1  # the newline after the stop token is never generated
            end -= key in record.get("unfinished", ())  # an answer that was cut off has no stop token to learn
        else:
            ids, mask = _sampled_answer(record, sampled, text, tokenizer)
            end = len(ids)
        cut = min(end, max_length)
        pair[side] = {"id": f"{record['id']}/{side}", "ids": ids[:cut], "mask": mask[:cut]}
        if sampled is not None:
            pair[side]["sampled"] = True  # it may hold what no text encodes to
        pair["prompt_tokens"] = mask.index(1)
        if pair["prompt_tokens"] >= max_length:
            return "prompt_too_long"
        report["truncated"] += end > max_length
    report |= {key: report[key] + count for key, count in repairs.items()}
    return pair if pair["chosen"]["ids"] != pair["rejected"]["ids"] else "equal_answers"


def _sampled_answer(record, sampled, text, tokenizer):
    """(ids, mask) of the prompt and the very ids that were sampled. UserError if they are another tokenizer's."""
    if not all(0 <= token < tokenizer.vocab_size for token in sampled) or chat.decode(tokenizer, sampled) != text:
        raise UserError(f"{record['id']}: answer_ids do not decode to the answer: they are of another tokenizer")
    prompt = chat.encode_prompt(tokenizer, record["prompt"])
    return [*prompt, *sampled], [0] * len(prompt) + [1] * len(sampled)


def pair_tokens(pair: dict) -> int:
    """Tokens that a forward pass of the pair computes: the common prompt once."""
    return len(pair["chosen"]["ids"]) + len(pair["rejected"]["ids"]) - pair["prompt_tokens"]


def collate_pairs(pairs: list[dict], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """As collate, rows chosen, rejected, chosen, ...: neighbours, so that the prompt is computed once."""
    return collate([pair[side] for pair in pairs for side in ("chosen", "rejected")], device)


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: lists of indices whose lengths sum to at most `capacity` (a longer one stands alone)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # {room: heap of the packs that have just so much left}
    rooms: list[int] = []  # its keys, sorted
    bar = log.progress(len(order), unit="row", delay=1)
    for i in order:
        at = bisect.bisect_left(rooms, lengths[i])
        if at < len(rooms):
            space = rooms[at]
            number = heapq.heappop(open_packs[space])
            packs[number].append(i)
            if not open_packs[space]:
                del open_packs[space], rooms[at]
        else:
            space, number = capacity, len(packs)
            packs.append([i])
        space -= lengths[i]
        if space not in open_packs:
            open_packs[space] = []
            bisect.insort(rooms, space)
        heapq.heappush(open_packs[space], number)
        bar.update()
    bar.close()
    return packs


def epoch_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All indices once, in batches of rows of similar length: a pure function of (seed, epoch), so resume is exact.

    Shuffle, sort by length inside windows of 50 batches, cut, shuffle the batches. The first epoch begins with its
    largest batch: if memory is short, it shows at once.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches, window = [], 50 * batch_size
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    if epoch == 0:
        largest = max(range(len(batches)), key=lambda i: sum(lengths[j] for j in batches[i]))
        batches[0], batches[largest] = batches[largest], batches[0]
    return batches


def shuffled(count: int, key: str) -> list[int]:
    """0 .. count - 1 in an order that is a function of `key`, a text."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order


class EpochBatches:
    """batches[step] -> the rows of a step, of all ranks: epoch after epoch of epoch_batches, for any step.

    lengths: tokens of each row. A pure function of (seed, step), so resume is exact; the latest epoch is kept.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.per_epoch = math.ceil(len(lengths) / batch_size)
        self.tokens_per_step = sum(lengths) / self.per_epoch
        self.epoch, self.batches = None, []

    def __getitem__(self, step):
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, epoch_batches(self.lengths, self.batch_size, self.seed, epoch)
        return self.batches[number]


def shard(rows: list[int], lengths: list[int]) -> list[int]:
    """This rank's share of the rows of a step: every world-size-th by length, so that ranks work equally long."""
    return sorted(rows, key=lambda i: (-lengths[i], i))[dist.rank() :: dist.world_size()]


def micro_batches(
    rows: Iterable[int], lengths: list[int], budget: int, sort: bool = True, shared: Sequence[tuple] | None = None
) -> list[list[int]]:
    """Cut rows into lists whose lengths sum to at most `budget` tokens (one longer row stands alone), longest first.

    Without `sort` they stay in order, so that rows of one prompt stay neighbours; shared[row], (which prompt, its
    tokens), then says what a row that follows one of the same prompt does not cost.
    """
    cuts, used = [], 0
    for row in sorted(rows, key=lambda i: (-lengths[i], i)) if sort else rows:
        again = shared and cuts and shared[cuts[-1][-1]] == shared[row]
        if not cuts or used + lengths[row] - (shared[row][1] if again else 0) > budget:
            cuts.append([])
            used = again = 0
        cuts[-1].append(row)
        used += lengths[row] - (shared[row][1] if again else 0)
    return cuts


def collate(examples: list[dict], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """-> tokens (B, T) int64 right-padded, mask (B, T-1) float: 1 where tokens[:, 1:] is supervised."""
    width = max(len(example["ids"]) for example in examples)
    tokens = torch.full((len(examples), width), chat.PAD)
    mask = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        tokens[row, : len(example["ids"])] = torch.tensor(example["ids"])
        mask[row, : len(example["mask"])] = torch.tensor(example["mask"], dtype=torch.float)
    return tokens.to(device), mask[:, 1:].to(device)
