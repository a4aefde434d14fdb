"""How a learning rate changes over a run."""

import math


def learning_rate(step, steps, peak, warmup_ratio, shape):
    """Linear warm-up over warmup_ratio * steps, then `shape`: cosine or linear decay to zero, or constant.

    Counts optimizer steps; all updates of one rollout are one.
    """
    warmup = round(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return peak * {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}[shape]


def expected_steps(step, steps, seen, budget, pace):
    """When a run of at most `steps` will have spent `budget` tokens (or None), judged at `step` by those `seen` so far.

    pace: tokens a step, expected before any was seen. A function of what a checkpoint holds, so resume is exact.
    """
    if budget is None:
        return steps
    return min(steps, math.ceil(budget / (seen / step if seen else pace)))
