"""Bodies that patch the product in a child, so that it fails, or tells, at a chosen point; see tests/processes.py."""

import contextlib
import itertools
import math
import os
from pathlib import Path

from safetensors.torch import load_file

from common import dist, losses
from common.runtime import checkpoint, resume
from tests import inputs, processes


def at_step(number, act):
    """A body that calls act() inside step `number`, before its update."""

    def body(main, argv):
        real = resume.seed_step

        def seed_step(seed, step, rank):
            if step == number:
                act()
            real(seed, step, rank)

        resume.seed_step = seed_step
        processes.call(main, argv)

    return body


def crash_behind_save(number):
    """A body that dies with status 9 as soon as the folder of step `number` is written."""

    def body(main, argv):
        real = checkpoint.commit

        @contextlib.contextmanager
        def commit(final, *more):
            with real(final, *more) as temp:
                yield temp
            if final.name == f"step-{number:06d}":
                os._exit(9)

        checkpoint.commit = commit
        processes.call(main, argv)

    return body


def dying(number):
    """A body that dies with status 9 at the number-th os.replace, os.rename or os.fsync; leaves their count behind."""

    def body(main, argv):
        calls, folder = [0], Path(dict(itertools.pairwise(argv))["--logging.output_dir"]).parent

        def counted(real):
            def call_or_die(*args, **more):
                calls[0] += 1
                if calls[0] == number:
                    os._exit(9)
                return real(*args, **more)

            return call_or_die

        for name in ("replace", "rename", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        processes.call(main, argv)
        (folder / "calls").write_text(str(calls[0]))

    return body


def poisoned(number, module, name):
    """A body in which module.name returns nan in step `number`; it checks that all that is trained stays as saved."""

    def body(main, argv):
        step, trained = [0], {}
        seed_step, real, sum_gradients = resume.seed_step, getattr(module, name), dist.sum_gradients

        def remember(seed, now, rank):
            step[0] = now
            seed_step(seed, now, rank)

        def keep(parameters):
            trained[id(parameters[0])] = parameters
            sum_gradients(parameters)

        def poison(*args):
            return real(*args) * (math.nan if step[0] == number else 1)

        resume.seed_step, dist.sum_gradients = remember, keep
        setattr(module, name, poison)
        try:
            processes.call(main, argv)
        finally:
            flags = dict(itertools.pairwise(argv))
            folder = flags["--logging.output_dir"] / "run" / f"step-{number:06d}"
            files = [folder / inputs.WEIGHTS[flags["--model.peft_type"]], folder / "critic.safetensors"]
            saved = [load_file(file).values() for file in files if file.exists()]
            bits = [
                sorted(sorted(t.detach().numpy().tobytes() for t in part) for part in found)
                for found in (saved, trained.values())
            ]
            assert bits[0] == bits[1], "the update was made"

    return body


def spying(keep):
    """A body that calls keep(step, name, arguments, result) at every call of a loss of the policy or critic."""

    def body(main, argv):
        step, real_seed = [0], resume.seed_step

        def seed_step(seed, now, rank):
            step[0] = now
            real_seed(seed, now, rank)

        def watched(name, real):
            def function(*args, **more):
                result = real(*args, **more)
                keep(step[0], name, args, result)
                return result

            return function

        resume.seed_step = seed_step
        for name in ("policy_loss", "value_loss", "kl_loss_unbiased"):
            setattr(losses, name, watched(name, getattr(losses, name)))
        processes.call(main, argv)

    return body
