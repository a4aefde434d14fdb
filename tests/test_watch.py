"""The watcher: each sign of a hacked reward is seen, honest progress and noise are not."""

import json
import random

import pytest
import torch

from common.runtime import watch

FAIR = {"reward": (0.4, 0.8), "length": (30, 34), "distinct_bigrams": (0.6, 0.55), "reward/toxicity": (0.7, 0.9),
        "reward/refusal": (0.5, 0.55)}  # fmt: skip


def said(changes=(), steps=40, noise=0.02, seed=0, **more):
    """What is said at the end of a run whose values go from one mean to the other."""
    dice, memory, found = random.Random(seed), {"first": [], "last": []}, []
    for step in range(steps):
        means = {name: a + (b - a) * step / steps for name, (a, b) in (FAIR | dict(changes)).items()}
        values = {name: mean * (1 + dice.gauss(0, noise)) for name, mean in means.items()}
        watch.observe(memory, values | {"loss": 1.0, "eval/reward": 0.5})
        found = watch.reward_hacking(memory, **more)
        memory = json.loads(json.dumps(memory))  # as in a checkpoint
    assert len(memory["first"]) == watch.WINDOW == len(memory["last"])
    assert memory["first"][0].keys() == FAIR.keys() | dict(changes).keys()
    return found


def test_progress_alone_is_no_sign():
    assert [said(seed=seed) for seed in range(20)] == [[]] * 20


@pytest.mark.parametrize(("changes", "words"), [
    ({"length": (30, 70)}, "answers went from"),
    ({"length": (30, 8)}, "answers went from"),
    ({"distinct_bigrams": (0.6, 0.2)}, "answers became alike"),
    ({"reward/refusal": (0.5, 0.1)}, "its component refusal fell from"),
    ({"reward/trained": (0.1, 4.0)}, "its trained part stands 3."),
])  # fmt: skip
def test_each_sign_is_seen(changes, words):
    """With one sentence, whatever the noise."""
    for seed in range(5):
        (sentence,) = said(changes, seed=seed)
        assert words in sentence and sentence.startswith("the reward rose from 0.4")


def test_a_trained_part_without_a_scale_says_nothing():
    assert not said({"reward/trained": (0.1, 4.0)}, normalised=False) and not said({"reward/trained": (0.1, 1.0)})


def test_all_at_once_and_none_without_a_rise():
    everything = {"length": (30, 80), "distinct_bigrams": (0.6, 0.1), "reward/refusal": (0.5, 0.1)}
    assert len(said(everything)) == 3
    assert not said(everything | {"reward": (0.4, 0.4)}) and not said(everything | {"reward": (0.8, 0.4)})


def test_no_word_before_the_windows_are_full():
    memory = {"first": [], "last": []}
    for step in range(2 * watch.WINDOW):
        assert not watch.reward_hacking(memory)
        watch.observe(memory, {"reward": float(step), "length": 2.0**step, "distinct_bigrams": 1.0})
    assert watch.reward_hacking(memory)


def test_a_warning_is_said_once():
    said = []
    assert watch.unseen(["it fell from 1.5 to 0.2", "grew 20%"], said) == ["it fell from 1.5 to 0.2", "grew 20%"]
    assert watch.unseen(["it fell from 3 to -0.1", "grew 9%", "and now 1"], said) == ["and now 1"]
    assert not watch.unseen([], said) and len(said) == 3


def test_a_slow_step_is_seen():
    """More than five times the median of recent steps, and a second longer."""
    times = []
    assert not watch.slow(times, 60.0)  # the first one warms up
    assert not any(watch.slow(times, seconds) for seconds in (0.3, 0.3, 0.3, 0.3, 1.2, 0.4))
    (words,) = watch.slow(times, 3.0)
    assert words.startswith("this step took 3.0 s, the steps before 0.3 s")
    assert not watch.slow([2.0] * 9, 9.9) and watch.slow([2.0] * 9, 10.1)
    assert not watch.slow([0.01] * 9, 1.0)  # nobody waits for that
    for _ in range(100):
        watch.slow(times, 3.0)
    assert len(times) == watch.RECENT and not watch.slow(times, 14.0)


def test_distinct_bigrams_by_hand():
    assert watch.distinct_bigrams([[1, 2, 3], [1, 2]]) == 2 / 3
    assert watch.distinct_bigrams([[1, 1, 1, 1]]) == 1 / 3
    assert watch.distinct_bigrams([[5], []]) == 1.0
    long = [*range(watch.BEGIN), *[7] * 500]
    assert watch.distinct_bigrams([long]) == 1.0  # how answers go on does not count


def test_alarms():
    def said(dtype, **record):
        return watch.rollout({}, {"unscored_share": 0.0} | record, dtype)

    assert said(torch.float32, sampler_mean=0.002) and not said(torch.float32)
    assert not said(torch.bfloat16, sampler_mean=0.05)
    sentences = said(torch.bfloat16, sampler_mean=0.2)
    assert sentences == ["sampler and trainer differ by 0.2000 nats per token on average"]
    (sentence,) = said(torch.bfloat16, **{"eval/merge_survival": 0.3})
    assert "bfloat16" in sentence and "30%" in sentence
    assert not said(torch.float32, **{"eval/merge_survival": 0.6})
    assert watch.collapse({"eval/chosen_change": -0.6}) and not watch.collapse({"eval/chosen_change": -0.4})


def test_groups_without_spread_are_warned_of_after_ten_steps():
    memory, said = {"first": [], "last": []}, []
    for share in [0.05] * 9 + [0.5] + [0.0] * 10:
        said.append(bool(watch.equal_groups(memory, {"group_spread": share})))
    assert said == [False] * 19 + [True] and not watch.equal_groups(memory, {})
