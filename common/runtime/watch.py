"""What a run warns about, in plain words: a hacked reward, a sampler off its trainer, a collapse under DPO.

A reward that rises is good news unless something that it stands for pays the price: a component of it falls, answers
become much longer or shorter, or they all become alike. The first steps are set against the last ones. Such signs audit
a run and prove nothing: read the samples.
"""

import itertools
import math
import re
from statistics import fmean, median, variance

import torch

WATCHED = ("reward", "length", "distinct_bigrams")  # and each component of the reward
BEYOND = 2.0  # deviations of single good answers that a mean of answers cannot honestly reach
BEGIN = 32  # tokens of an answer
WINDOW = 8  # steps in the first window and in the last; no warning before both are full
FALL = 0.1  # of a component: heuristics lie in [0, 1], a trained score has deviation 1
LONGER, SHORTER, ALIKE = 1.5, 1 / 1.5, 0.7  # ratios, last window to first, of length and of distinct bigrams that warn
FEW_GROUPS, FLAT_STEPS = 0.1, 10  # warn after 10 steps in a row in which rewards differed in under a tenth of groups
ALARM = {torch.bfloat16: 0.1, torch.float32: 1e-3}  # nats per token between sampler and trainer, on average
HALF = 0.5  # warn if less than this share of an adapter would survive merging
SPIKE, RECENT, FEWEST = 10.0, 32, 4  # warn at over 10 times the median norm of the last 32 steps, once there are 4
SLOW, SLOW_SECONDS = 5.0, 1.0  # warn if a step takes over 5 times the median, and over 1 s longer
COLLAPSE = 0.5  # nats per token: chosen answers that became this much less likely
COLLAPSED = (
    "the chosen answers themselves became {:.2f} nats per token less likely than at the start: DPO pushes both "
    "answers down, the rejected one faster, and what it pushes up instead is unknown; lower rl.learning_rate, "
    "raise rl.dpo_beta, or set rl.dpo_sft_coeff to 1, which also trains on the chosen answers"
)


def collapse(record: dict) -> list[str]:
    """DPO's: held-out chosen answers that lost more than COLLAPSE."""
    change = record.get("eval/chosen_change", 0.0)
    return [COLLAPSED.format(-change)] if change < -COLLAPSE else []


def spikes(norms: dict[str, list[float]], record: dict) -> list[str]:
    """Gradients whose norm, before clipping, is more than SPIKE times the median of the steps before.

    norms: {name: list of floats}, which is JSON; the record's are added. A step without a gradient does not count.
    """
    said = []
    for name in ("grad_norm", "critic_grad_norm"):
        before, norm = norms.get(name, []), record.get(name)
        if not norm:
            continue
        usual = _usual(before)
        if norm > SPIKE * usual:
            said.append(
                f"{name} was {norm:.4g} before clipping, over {SPIKE:g} times the usual {usual:.4g}: "
                "look at the rows of this step, or lower training.max_grad_norm"
            )
        norms[name] = [*before, norm][-RECENT:]
    return said


def _usual(before):
    """The median of recent values; infinite where they are too few for a word."""
    return median(before) if len(before) >= FEWEST else math.inf


def slow(before: list[float], seconds: float) -> list[str]:
    """A step that took more than SLOW times the median of those before. before: seconds; this step's are added."""
    usual = _usual(before)
    before[:] = [*before, seconds][-RECENT:]
    if seconds <= max(SLOW * usual, usual + SLOW_SECONDS):
        return []
    return [f"this step took {seconds:.1f} s, the steps before {usual:.1f} s: does another program use the processor?"]


def rollout(memory: dict, record: dict, dtype: torch.dtype) -> list[str]:
    """What is wrong with a step's samples. memory: JSON that the run keeps, for equal_groups.

    Log-probs of the sampler that are not the trainer's come from a wrong merge, a stale copy or too coarse a dtype.
    """
    apart = record.get("sampler_mean", 0.0)
    said = [f"sampler and trainer differ by {apart:.4f} nats per token on average"] if apart > ALARM[dtype] else []
    if record.get("eval/merge_survival", 1.0) < HALF:
        share, name = record["eval/merge_survival"], str(dtype).removeprefix("torch.")
        said.append(
            f"merged into {name} weights only {share:.0%} of the adapter would survive: sampling keeps it "
            "beside them; merge in float32"
        )
    if record["unscored_share"] == 1:
        said.append("reward.function gave no score (None) to any completion of a step: nothing was learned")
    return said + equal_groups(memory, record)


def distinct_bigrams(completions: list[list[int]]) -> float:
    """Share of different pairs of neighbouring tokens among all in the BEGIN first tokens of a batch; 1 if none.

    completions: lists of ids. Not in whole answers, since the share falls with the number of tokens that are counted.
    """
    pairs = [pair for ids in completions for pair in itertools.pairwise(ids[:BEGIN])]
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def unseen(warnings: list[str], said: list[str]) -> list[str]:
    """Those sentences that, but for their numbers, are not in `said` yet; it is extended."""
    kinds = {re.sub(r"[\d.%-]+", "", words): words for words in warnings}
    fresh = [kind for kind in kinds if kind not in said]
    said.extend(fresh)
    return [kinds[kind] for kind in fresh]


def equal_groups(memory: dict, metrics: dict) -> list[str]:
    """The warning after FLAT_STEPS steps in which hardly a group of samples had different rewards."""
    if "group_spread" not in metrics:
        return []
    memory["flat_steps"] = memory.get("flat_steps", 0) + 1 if metrics["group_spread"] < FEW_GROUPS else 0
    if memory["flat_steps"] < FLAT_STEPS:
        return []
    return [
        f"in under {FEW_GROUPS:.0%} of the groups did the rewards differ, for {FLAT_STEPS} steps: the answers to a "
        "prompt are equally good, and there is little to learn; --explain says what to do"
    ]


def observe(memory: dict[str, list], values: dict[str, float]) -> None:
    """Keep what is watched of a step's values ({name: float}) in memory {"first": [], "last": []}, which is JSON.

    A step without a reward, as nothing in it has a score, is none of the WINDOW.
    """
    if "reward" not in values:
        return
    values = {name: value for name, value in values.items() if name.startswith("reward/") or name in WATCHED}
    place = "first" if len(memory["first"]) < WINDOW else "last"
    memory[place] = [*memory[place], values][-WINDOW:]


def reward_hacking(memory: dict[str, list], normalised: bool = True) -> list[str]:
    """Signs that the reward is being hacked, as sentences.

    normalised: has the trained part mean 0 and deviation 1 on good answers?
    """
    if len(memory["last"]) < WINDOW:
        return []
    then, now = (
        {name: [step[name] for step in memory[part]] for name in memory[part][0]} for part in ("first", "last")
    )
    if _change(then["reward"], now["reward"]) <= 0:
        return []
    said, rise = [], f"the reward rose from {fmean(then['reward']):.2f} to {fmean(now['reward']):.2f} while "
    for name in then.keys() & now.keys():
        a, b = fmean(then[name]), fmean(now[name])
        if name.startswith("reward/") and b < a - FALL and _change(then[name], now[name]) < 0:
            said.append(f"{rise}its component {name.removeprefix('reward/')} fell from {a:.2f} to {b:.2f}")
        elif name == "length" and a and not SHORTER < b / a < LONGER:
            said.append(f"{rise}answers went from {a:.0f} to {b:.0f} tokens")
        elif name == "distinct_bigrams" and b < ALIKE * a:
            said.append(f"{rise}answers became alike: {a:.0%} of their token pairs were different, now {b:.0%}")
    trained = fmean(now.get("reward/trained", [0.0]))
    if normalised and trained > BEYOND:
        said.append(
            f"{rise}its trained part stands {trained:.1f} deviations above the good answers that it was scaled "
            "on, on average: it judges what it has never seen"
        )
    return sorted(said)


def _change(then, now):
    """-1, 0 or 1: do the means differ by more than two standard errors (Welch)?"""
    errors = [variance(part) / len(part) for part in (then, now)]
    difference = fmean(now) - fmean(then)
    return 0 if abs(difference) <= 2 * math.sqrt(sum(errors)) else int(math.copysign(1, difference))
