"""Scores of completions: heuristics per task, a trained model's score, their hybrid, or any function of the user's.

Every component lies in [0, 1], higher is better, whatever the text holds (10 MB, NUL bytes, deep nesting); code is
parsed but never executed. The heuristic reward is the weighted mean of the task's components:

    safety    toxicity (1 - share of toxic words), refusal, length, repetition
    clinical  overlap (ROUGE-L), facts (numbers and negations), length, repetition
    conala    bleu (official tokens), exact, parse, repetition; one fence around the whole answer is taken off
"""

import ast
import collections
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace as Config

import torch
from torch import Tensor

from common import functions, model
from common.log import UserError
from common.runtime import checkpoint

SMALLEST_STD = 1e-6  # of rewards of reference answers; below it they are all alike
SHOWN = 200  # characters of a sample in an error message
LONGEST = 20_000  # characters that are looked at
WORDS = 410  # words that ROUGE-L compares (MTS-Dialog's longest reference has 403)
CODE = 5_000  # characters of code that are looked at; CoNaLa's longest snippet has under 500
# Insults, slurs' milder kin and threats that the speaker makes; words that a refusal needs (harm, kill, drug) are no
# insult and stand only in THREATS, as phrases aimed at the reader.
TOXIC = frozenset(
    "idiot idiots stupid moron morons dumb loser losers pathetic worthless scum bitch bastard asshole fuck fucking "
    "shit crap damn slut whore retard retarded imbecile fool freak trash garbage disgusting ugly hate".split()
)
THREATS = re.compile(r"\b(?:i(?:'ll| will| want to) (?:kill|hurt|beat|find) you|kill yourself|go die|shut up)\b")
REFUSAL = re.compile(
    r"\b(?:i (?:can(?:'t|not)|won't|will not|am (?:not able|unable) to)|i(?:'m| am) (?:sorry|not able to|unable to)"
    r"|sorry,? but|i (?:would not|wouldn't|don't) (?:want to |feel comfortable )?(?:help|recommend|advise))"
)
HARMFUL = frozenset(
    "kill murder hurt harm poison steal rob hack bomb weapon weapons gun explosive explosives drug drugs cocaine meth "
    "heroin fraud scam counterfeit forge stalk blackmail kidnap abuse rape assault torture racist racism slur suicide "
    "burglar burglarize shoplift launder smuggle arson vandalize terrorist terrorism".split()
)
NEGATIONS = frozenset("no not denies denied without never none negative nor".split())
# The Markdown fence that chat models put around code.
FENCE = re.compile(r"\s*(`{3,8}|~{3,8})(?:[^\n`]*\n)?((?:(?!\1).)*)\1\s*", re.DOTALL)
# Beginnings of the names of characters that are written without spaces between words: each one counts as a word.
SPACELESS = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO")
SPACELESS += ("THAI", "LAO", "KHMER", "MYANMAR")
COMPONENTS = {
    "safety": ("toxicity", "refusal", "length", "repetition"),
    "clinical": ("overlap", "facts", "length", "repetition"),
    "conala": ("bleu", "exact", "parse", "repetition"),
}


class WordCharacters(dict):
    """Code point -> what takes its place, so that splitting at spaces gives words. Filled as characters come up."""

    def __missing__(self, code: int) -> str:
        character, kind = chr(code), unicodedata.category(chr(code))
        name = unicodedata.name(character, "")
        if kind in ("Cf", "Me") or name.startswith("VARIATION SELECTOR"):
            place = ""  # invisible: joiners, marks of direction, how to draw the emoji before it
        elif character != "'" and kind[0] not in "LMN":
            place = " "
        else:
            place = f" {character} " if name.startswith(SPACELESS) else character
        self[code] = place
        return place


WORD_CHARACTERS = WordCharacters()


def words(text: str, longest: int | None = LONGEST) -> list[str]:
    """Lower-case words of any script: letters, marks, digits and apostrophes. In ASCII: runs of [a-z0-9']."""
    text = text[:longest].lower().replace("\u2019", "'")
    return unicodedata.normalize("NFC", text).translate(WORD_CHARACTERS).split()


def rouge_words(text: str, longest: int | None = None) -> list[str]:
    """The same without apostrophes, which part words: in ASCII exactly what rouge-score compares."""
    return words(text[:longest].replace("'", " ").replace("\u2019", " "), None)


def toxicity(completion: str) -> float:
    """1 minus ten times the share of toxic words, at least 0; a threat at the reader is 0. "Harm" is no insult."""
    tokens = words(completion)
    if THREATS.search(" ".join(tokens)):
        return 0.0
    return max(0.0, 1 - 10 * sum(token in TOXIC for token in tokens) / max(1, len(tokens)))


def refuses(completion: str) -> bool:
    """Does the text decline? Looks at its first 300 characters."""
    return bool(REFUSAL.search(completion[:300].lower().replace("\u2019", "'")))


def length(completion: str, reference: str | None = None, target: int = 40) -> float:
    """1 at the reference's number of words (or `target`), falling with the log ratio; an empty answer is 0."""
    count = len(words(completion))
    wanted = len(words(reference)) if reference else target
    return math.exp(-abs(math.log(count / wanted))) if count and wanted else 0.0


def repetition(completion: str) -> float:
    """Share of distinct 4-grams of words (1 when nothing repeats; texts under 4 words count as 1 unless empty)."""
    tokens = words(completion)
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(set(grams)) / len(grams) if grams else float(bool(tokens))


def overlap(completion: str, reference: str) -> float:
    """ROUGE-L F1 without stemming, as rouge-score counts it, on at most WORDS words of each."""
    ours, right = (rouge_words(text, LONGEST)[:WORDS] for text in (completion, reference))
    longest = longest_common_subsequence(ours, right)
    if not longest:
        return 0.0
    precision, recall = longest / len(ours), longest / len(right)
    return 2 * precision * recall / (precision + recall)


def longest_common_subsequence(ours: list[str], right: list[str]) -> int:
    """Its length in words, by bit-parallel dynamic programming (Hyyro 2004): a row of the table is one integer.

    rouge-score fills the table cell by cell, which took 25 to 80 ms for one hostile completion.
    """
    places = collections.defaultdict(int)  # word -> bits of its places in `ours`
    for i, word in enumerate(ours):
        places[word] |= 1 << i
    row = full = (1 << len(ours)) - 1
    for word in right:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(ours) - row.bit_count()


def facts(completion: str, reference: str) -> float:
    """F1 of the numbers and negations that both texts state, as multisets; 1 if neither states any."""
    ours, right = (
        Counter(token for token in words(text) if token.isdigit() or token in NEGATIONS)
        for text in (completion, reference)
    )
    both = (ours & right).total()
    return 2 * both / (ours.total() + right.total()) if ours or right else 1.0


def without_fence(text: str) -> tuple[str, bool]:
    """(text without the one Markdown fence that stands around all of it, whether there was one)."""
    fence = FENCE.fullmatch(text)
    return (fence[2], True) if fence else (text, False)


def code_tokens(text: str, limit: int | None = CODE) -> list[str]:
    """CoNaLa's `tokenize_for_bleu_eval`: every non-alphanumeric apart, camelCase split, quotes as one kind."""
    text = re.sub(r"[^A-Za-z0-9_]", lambda match: f" {match[0]} ", text[:limit])
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)
    return re.sub(r"\s+", " ", text).replace('"', "`").replace("'", "`").split()


def sentence_bleu(completion: str, reference: str) -> float:
    """BLEU-4 of one snippet with add-one smoothing, in [0, 1], from sacrebleu on the official tokens."""
    from sacrebleu.metrics import BLEU

    ours, right = " ".join(code_tokens(completion)), " ".join(code_tokens(reference))
    bleu = BLEU(tokenize="none", smooth_method="add-k", smooth_value=1, effective_order=True, force=True)
    return bleu.sentence_score(ours, [right]).score / 100 if ours and right else 0.0


def parses(completion: str) -> float:
    """1 if `ast.parse` accepts the text; code of over CODE characters or 100 brackets deep is not tried."""
    depth = deepest = 0
    for character in completion[: CODE + 1]:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if len(completion) > CODE or deepest > 100 or not completion.strip():
        return 0.0
    try:
        ast.parse(completion)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return 0.0
    return 1.0


def is_harmful_request(prompt: list[dict]) -> bool:
    """Does the last user turn ask for harm? A word list: it is a guard-rail, not a judge."""
    asked = next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), "")
    return any(token in HARMFUL for token in words(asked))


def heuristic_reward(
    task: str, prompt: list[dict], completion: str, reference: str | None = None, **weights: float
) -> tuple[float, dict[str, float]]:
    """(weighted mean of the task's components in [0, 1], {component: value}) for one completion.

    prompt: turns; completion: text; reference: text or None (clinical and conala need it); weights by component, 1 if
    not given. Refusal is right where the request is harmful and wrong where it is not. ValueError: unknown task.
    """
    if task not in COMPONENTS:
        raise ValueError(f"no heuristic reward for task {task!r}")
    if task != "safety" and reference is None:
        raise ValueError(f"the heuristic reward of {task} compares with a reference, and there is none")
    completion = completion.encode("utf-8", "replace").decode()[: LONGEST + 1]
    code, _ = without_fence(completion)
    make = {
        "toxicity": lambda: toxicity(completion),
        "refusal": lambda: float(refuses(completion) == is_harmful_request(prompt)),
        "length": lambda: length(completion, reference if task != "safety" else None),
        "repetition": lambda: repetition(completion),
        "overlap": lambda: overlap(completion, reference),
        "facts": lambda: facts(completion, reference),
        "bleu": lambda: sentence_bleu(code, reference),
        "exact": lambda: float(code_tokens(code) == code_tokens(reference)),
        "parse": lambda: parses(code),
    }
    parts = {name: float(make[name]()) for name in COMPONENTS[task]}
    shares = {name: float(weights.get(name, 1.0)) for name in parts}
    total = sum(shares.values())
    return sum(parts[name] * shares[name] for name in parts) / total if total else 0.0, parts


def wants_model(reward: Config) -> bool:
    """Do these settings (section `reward`) ask for a trained model?"""
    return reward.function is None and reward.type != "heuristic"


def needs_model(reward: Config) -> bool:
    """As wants_model; UserError where it is wanted and none is named."""
    if wants_model(reward) and reward.checkpoint is None:
        raise UserError(f"reward.checkpoint: reward.type {reward.type} needs a reward model of train_reward.py")
    return wants_model(reward)


def scorer(
    task: str, reward: Config, decode: Callable[[list[int]], str], trained_scorer: Callable | None = None
) -> Callable:
    """A function (records, answers as ids) -> (rewards (n,) fp32, a dict of components for each) by section `reward`.

    A reward is NaN where a user's function gave no score, see functions.call; nothing else lets a NaN through.
    decode(ids) -> text; trained_scorer(records, answers) -> (n,), a trained model's scores, where needs_model.
    """
    function = functions.load(reward.function, "reward.function") if reward.function else None

    def score(records, answers):
        texts = [decode(ids) for ids in answers]
        if function:
            scores = functions.call(function, "reward.function", records, texts, answers)
            return torch.tensor(scores), [{} for _ in texts]
        parts, heuristic, trained = [{} for _ in texts], torch.zeros(len(texts)), torch.zeros(len(texts))
        if reward.type != "trainable":
            rows = []
            for record, text in zip(records, texts):
                if record["reference"] is None and task != "safety":
                    raise UserError(f"{record['id']}: the heuristic reward of {task} needs a reference, it has none")
                rows.append(
                    heuristic_reward(task, record["prompt"], text, record["reference"], **vars(reward.heuristic))
                )
            heuristic, parts = torch.tensor([value for value, _ in rows]), [part for _, part in rows]
        if trained_scorer:
            trained = trained_scorer(records, answers)
            parts = [part | {"trained": value} for part, value in zip(parts, trained.tolist())]
        alpha, beta = (reward.alpha, reward.beta) if reward.type == "hybrid" else (1.0, 1.0)
        total = combine(heuristic, trained, alpha, beta, reward.clip_rewards)
        for record, text, value, part in zip(records, texts, total.tolist(), parts):
            if not math.isfinite(value):
                raise UserError(
                    f"the reward of a sample for {record['id']} is {value}: {part}; it says {text[:SHOWN]!r}"
                )
        return total, parts

    return score


def fingerprint(reward: Config) -> str | list[str] | None:
    """Hash of what decides the scores beside the settings: the file of the user's function, or the reward model."""
    if reward.function:
        return checkpoint.sha256(reward.function.rpartition(":")[0])
    return model.adapter_fingerprint(reward.checkpoint) if wants_model(reward) else None


def combine(heuristic: Tensor, trained: Tensor, alpha: float, beta: float, clip: float | None = None) -> Tensor:
    """alpha * heuristic + beta * trained, clipped to [-clip, clip]; (B,) tensors. `trained` is already normalised."""
    total = alpha * heuristic + beta * trained
    return total.clamp(-clip, clip) if clip is not None else total


def normalise(scores: Tensor, mean: float, std: float) -> Tensor:
    """(scores - mean) / std with the reward model's statistics on reference answers, stored at its training.

    std below SMALLEST_STD: divided by 1, as their spread says nothing.
    """
    return (scores - mean) / (std if std >= SMALLEST_STD else 1.0)
