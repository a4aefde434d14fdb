"""Records of a task -> token examples -> steps of rows -> micro-batches under a token budget.

A record has `prompt` (turns, the last one the user's), `response`, `rejected` (or None), `reference` (or None), `id`;
optional are `margin` (of a preference), `unfinished` (which of the two answers were cut off) and `answer_ids` (of
answers that a model sampled: {"response": ids, "rejected": ids}). records.py makes them of rows of any known shape.

An example is {"id", "ids": T token ids, "mask": T of 0 / 1}, a pair two examples with one prompt; nothing is padded
until `collate`.
"""

import bisect
import heapq
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace as Config

import torch
from torch import Tensor

from common import chat, dist, log, tasks
from common.log import UserError, say
from common.records import content_hash, cut, generated, place, read
from common.runtime import flops, sources
from common.runtime.types import Tokenizer

CHUNK = 1000  # dialogues that are encoded at a time
PAIR_SKIPS = ("no_rejected", "empty_answer", "equal_answers", "no_user_turn", "prompt_too_long")


def load(
    task: str,
    folder: Path | str | None,
    split: str,
    debug: bool,
    seed: int,
    options: Config | None = None,
    data_keys: str | None = None,
) -> list[dict]:
    """The records of a split: of `folder`, any source (sources.py); without one, those that the task generates, or its
    downloaded files.

    options: section `task_options` of the config.
    """
    return _load(task, folder, (split,), debug, seed, options, data_keys)[split]


def from_config(cfg: Config, split: str) -> list[dict]:
    """The records of a split of the task and data that a config names."""
    return load(cfg.task, cfg.dataset_path, split, cfg.debug, cfg.seed, cfg.task_options, cfg.data_keys)


def load_train_and_val(cfg: Config) -> dict[str, list[dict]]:
    """{"train": records, "val": records} of a run; warns of rows that are in both."""
    splits = ("train", "val")
    loaded = _load(cfg.task, cfg.dataset_path, splits, cfg.debug, cfg.seed, cfg.task_options, cfg.data_keys)
    held_out = {content_hash(record) for record in loaded["val"]}
    equal = sum(content_hash(record) in held_out for record in loaded["train"])
    if equal:
        log.warn(
            f"{equal:,} of {len(loaded['train']):,} rows of train are in val too: what is measured on val flatters"
        )
    return loaded


def load_split(source: Path | str, split: str, data_keys: str | None = None) -> list[dict]:
    """The records of a split of a source (sources.py); every fault is a UserError naming file, line and key.

    Where the source has no val, it is cut from train. Where it has train alone, val and test are. Says what was read.
    """
    return _read_splits(source, (split,), data_keys)[split]


def _load(task, folder, splits, debug, seed, options, data_keys):
    """{split: records} of several splits, see load."""
    chosen = tasks.load(task)
    if folder is not None or (chosen.files and not debug):
        return _read_splits(folder or Path(__file__).parents[1] / "data" / chosen.name, splits, data_keys)
    sizes, made = tasks.DEBUG_SIZES if debug else chosen.sizes or tasks.DEBUG_SIZES, {}
    for split in splits:
        made[split] = tasks.records(chosen, split, sizes.get(split, 128), seed, **vars(options or Config()))
        if chosen.path is not None:
            made[split] = generated(made[split], f"task: {chosen.path}: synthetic", split)
    return made


def _read_splits(source, splits, data_keys):
    """{split: records} of several splits, see load_split: train is read once, whatever is cut from it."""
    there = sources.files(source)
    parts = () if "train" not in there or "val" in there else ("val",) if "test" in there else ("val", "test")
    loaded, already_read = {}, {}
    for split in splits:
        name = "train" if split in parts else split
        if name not in there:
            others = [path.name for path in sorted(Path(source).glob("*")) if path.name.endswith(sources.EXTENSIONS)]
            seen = f" (the folder has {log.listed(others)})" if others else ""
            raise UserError(
                f"{source}/{split}.jsonl: no such file; run `python data/download_datasets.py`, name other data "
                f"with --dataset_path, or try --debug, which brings its own data{seen}"
            )
        if name not in already_read:
            rows, shape, left_out = read(there[name], data_keys)
            notes = [f"{count:,} left out: {why}" for why, count in left_out.items()]
            records = {name: rows}
            if parts and name == "train":
                notes.append(
                    f"of {len(rows):,} in train, from which {' and '.join(parts)} are cut by a hash of the prompt"
                )
                records = cut(rows, parts, source)
            already_read[name] = records, shape, notes
        records, shape, notes = already_read[name]
        loaded[split] = records[split]
        say("; ".join([f"read {len(loaded[split]):,} rows of {shape} for {split} from {source}", *notes]))
    return loaded


def encode_dialogues(
    dialogues: list[tuple[dict, list[dict]]], tokenizer: Tokenizer, **how: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """chat.encode of each of many (record, normalised turns). UserError names the record that cannot be encoded."""
    words = {}
    with log.progress(len(dialogues), unit="row", delay=1) as bar:  # closed too where a caller takes no more
        for start in range(0, len(dialogues), CHUNK):
            chunk = dialogues[start : start + CHUNK]
            bar.update(len(chunk))
            try:
                yield from chat.encode_all(tokenizer, [turns for _, turns in chunk], words=words, **how)
            except ValueError:
                for record, turns in chunk:
                    try:
                        chat.encode(tokenizer, turns, **how)
                    except ValueError as error:
                        raise UserError(f"{place(record)}: {error}") from error
                raise


def encode_records(
    records: list[dict], tokenizer: Tokenizer, max_length: int, last_turn_only: bool = False
) -> tuple[list[dict], dict[str, int]]:
    """Supervised examples of at most `max_length` tokens -> (examples, report).

    A longer dialogue keeps its start and is counted as `truncated`; one that has no supervised token left, no user
    turn or an empty answer is dropped and counted as `no_target`, `no_user_turn`, `empty_response`.
    """
    report = {"records": len(records), "empty_response": 0, "no_user_turn": 0, "no_target": 0, "truncated": 0}
    report |= dict.fromkeys(chat.REPAIRS, 0)
    dialogues, examples = [], []
    for record in records:
        if not record["response"].strip():
            report["empty_response"] += 1
            continue
        turns, repairs = chat.normalise([*record["prompt"], {"role": "assistant", "content": record["response"]}])
        report |= {key: report[key] + count for key, count in repairs.items()}
        if turns:
            dialogues.append((record, turns))
        else:
            report["no_user_turn"] += 1
    encoded = encode_dialogues(dialogues, tokenizer, last_turn_only=last_turn_only)
    for (record, _), (ids, mask) in zip(dialogues, encoded, strict=True):
        end = _last_trained(mask)
        end -= "response" in record.get("unfinished", ())  # an answer that was cut off has no stop token to learn
        report["truncated"] += end > max_length
        cut_at = min(end, max_length)
        if any(mask[:cut_at]):
            examples.append({"id": record["id"], "ids": ids[:cut_at], "mask": mask[:cut_at]})
        else:
            report["no_target"] += 1
    report["kept"] = len(examples)
    return examples, report


def _last_trained(mask):
    """Where to end a row: the newline after the last stop token teaches nothing, and is never generated."""
    return len(mask) - mask[::-1].index(1)


def encode_pairs(records: list[dict], tokenizer: Tokenizer, max_length: int) -> tuple[list[dict], dict[str, int]]:
    """Preference pairs of at most `max_length` tokens a side -> (pairs, report).

    A pair is {"id", "margin", "texts": (chosen, rejected), "chosen": example, "rejected": example}: both begin with the
    same prompt tokens, and the mask is 1 on the answer and its stop token. A longer answer is cut and counted; what
    teaches nothing is skipped and counted by PAIR_SKIPS.
    """
    report = {"records": len(records)} | dict.fromkeys((*PAIR_SKIPS, "truncated", *chat.REPAIRS), 0)
    usable, dialogues, pairs = [], [], []
    for record in records:
        sides = _sides(record)
        if isinstance(sides, str):
            report[sides] += 1
            continue
        usable.append((record, sides))
        sampled = record.get("answer_ids", {})
        dialogues += [(record, turns) for key, (turns, _) in sides.items() if key not in sampled]
    encoded = encode_dialogues(dialogues, tokenizer, last_turn_only=True)
    for record, sides in usable:
        pair = _pair(record, sides, encoded, tokenizer, max_length, report)
        if isinstance(pair, str):
            report[pair] += 1
        else:
            pairs.append(pair)
    report["kept"] = len(pairs)
    return pairs, report


def _sides(record):
    """{key of an answer: (the whole dialogue, its repairs)}, or the name of the reason why there is no pair."""
    texts = record["response"], record["rejected"]
    if texts[1] is None:
        return "no_rejected"
    if not all(text.strip() for text in texts):
        return "empty_answer"
    if texts[0] == texts[1]:
        return "equal_answers"
    sides = {
        key: chat.normalise([*record["prompt"], {"role": "assistant", "content": text}])
        for key, text in zip(("response", "rejected"), texts, strict=True)
    }
    return sides if all(turns for turns, _ in sides.values()) else "no_user_turn"


def _pair(record, sides, encoded, tokenizer, max_length, report):
    """One pair, or the name of the reason why there is none.

    encoded: an iterator over (ids, mask); this takes one for each answer without answer_ids.
    """
    pair = {"id": record["id"], "margin": record.get("margin", 0.0), "texts": (record["response"], record["rejected"])}
    answer_ids, ends = record.get("answer_ids", {}), {}
    for side, key in (("chosen", "response"), ("rejected", "rejected")):
        if key in answer_ids:
            ids, mask = _sampled_answer(record, answer_ids[key], record[key], tokenizer)
            end = len(ids)
        else:
            ids, mask = next(encoded)
            end = _last_trained(mask)
            end -= key in record.get("unfinished", ())  # an answer that was cut off has no stop token to learn
        ends[side], cut = end, min(end, max_length)
        pair[side] = {"id": f"{record['id']}/{side}", "ids": ids[:cut], "mask": mask[:cut]}
        if key in answer_ids:
            pair[side]["sampled"] = True  # it may hold what no text encodes to
        pair["prompt_tokens"] = mask.index(1)
    if pair["prompt_tokens"] >= max_length:
        return "prompt_too_long"
    report["truncated"] += sum(end > max_length for end in ends.values())
    repairs = sides["rejected"][1]
    report |= {key: report[key] + count for key, count in repairs.items()}
    return pair if pair["chosen"]["ids"] != pair["rejected"]["ids"] else "equal_answers"


def _sampled_answer(record, sampled, text, tokenizer):
    """(ids, mask) of the prompt and the very ids that were sampled. UserError if they are another tokenizer's."""
    if (
        not all(0 <= token < chat.known_tokens(tokenizer) for token in sampled)
        or chat.decode(tokenizer, sampled) != text
    ):
        raise UserError(f"{place(record)}: answer_ids do not decode to the answer: they are of another tokenizer")
    prompt = chat.encode_prompt(tokenizer, record["prompt"])
    return [*prompt, *sampled], [0] * len(prompt) + [1] * len(sampled)


def pair_tokens(pair: dict) -> int:
    """Tokens that a forward pass of the pair computes: the common prompt once."""
    return len(pair["chosen"]["ids"]) + len(pair["rejected"]["ids"]) - pair["prompt_tokens"]


def pair_spans(pair: dict) -> list[flops.Span]:
    """What a forward pass of the pair computes, for its FLOPs."""
    prompt = pair["prompt_tokens"]
    return flops.shared_prompt(prompt, [len(pair[side]["ids"]) - prompt for side in ("chosen", "rejected")])


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

    Without `sort` rows keep their order. shared[row]: (number of its prompt, tokens of that prompt); a row that follows
    one with the same prompt in the same list costs that many tokens less, since the prompt is computed once.
    """
    cuts, used = [], 0
    for row in sorted(rows, key=lambda i: (-lengths[i], i)) if sort else rows:
        same_prompt = shared and cuts and shared[cuts[-1][-1]] == shared[row]
        cost = lengths[row] - (shared[row][1] if same_prompt else 0)
        if not cuts or used + cost > budget:
            cuts.append([])
            used, cost = 0, lengths[row]
        cuts[-1].append(row)
        used += cost
    return cuts


def held_out_micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """This rank's share of rows of these lengths, every world-size-th, as lists of at most `budget` tokens."""
    return micro_batches(range(dist.rank(), len(lengths), dist.world_size()), lengths, budget)


def collate(examples: list[dict], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """-> tokens (B, T) int64 right-padded, mask (B, T-1) float: 1 where tokens[:, 1:] is supervised."""
    width = max(len(example["ids"]) for example in examples)
    tokens = torch.full((len(examples), width), chat.PAD)
    mask = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        tokens[row, : len(example["ids"])] = torch.tensor(example["ids"])
        mask[row, : len(example["mask"])] = torch.tensor(example["mask"], dtype=torch.float)
    return tokens.to(device), mask[:, 1:].to(device)
