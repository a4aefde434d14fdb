"""What a run needs to go on bit for bit: the folder to resume from, what must not change, random numbers, signals.

Random numbers are a function of (seed, step, rank), set anew before every step, so no generator's state is ever saved
and a fork that draws its own numbers inside a step resumes exactly too.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace as Config

import numpy as np
import torch

from common import dist, log
from common.config import PARTS_OF_OLD
from common.log import UserError, say
from common.runtime import checkpoint

# What may differ between a run and its continuation. A key ends with a dot where it stands for a section.
# These settings do not change an update, so they are free.
FREE_TO_CHANGE = (
    *(f"training.{key}" for key in "epochs max_steps eval_interval save_interval keep_last patience timeout".split()),
    *(
        f"training.{key}"
        for key in "budget_tokens budget_flops resume resume_changed micro_batch_tokens recompute".split()
    ),
    *("rl.max_steps", "logging.", "evaluation.reward_checkpoint"),
    *("evaluation.samples", "evaluation.metric", "evaluation.split", "evaluation.drift", "evaluation.other_tasks"),
    "reward.ensemble",
)
# These change the updates from there on: training.resume_changed allows it. All others would make it another run.
CHANGED_ON_REQUEST = (
    *(f"training.{key}" for key in "learning_rate schedule warmup_ratio weight_decay max_grad_norm".split()),
    *("rl.learning_rate", "rl.critic_learning_rate"),
)
# A path may differ where what it leads to does not: {setting: the fact that holds a hash of its content}.
CONTENTS = {
    **{"dataset_path": "data", "model.base_checkpoint": "model", "model.adapter": "start"},
    **{"reward.checkpoint": "score", "reward.ensemble": "score", "reward.function": "score"},
    "evaluation.reward_checkpoint": "judge",
    # The first of each pair hashes where the base lies, the second does not.
    **{"start": "adapter", "score": "score_effect", "judge": "judge_effect"},
}
UNTOLD = ("logging.", "training.resume", "training.resume_changed")  # what the history leaves out


def prepare(device: torch.device) -> None:
    """What has to be set before the first product of a run.

    On CUDA, kernels that repeat to the bit; an operation that has none ends the run (with warn_only, the backward of
    attention would take one that does not repeat). Those of the CPU do already. On CPU, oneDNN keeps a kernel for each
    of the last 1,024 shapes, and every batch brings new ones: 512 take 0.15 GB less on the 270M; 64, less than the
    shapes of one step of pairs, would cost 17 % of the time.
    """
    if device.type == "cpu":
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # it would fill each new tensor, the logits too
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def other_kernels(device: torch.device) -> Iterator[None]:
    """On CUDA, without the mode that `prepare` sets: for operations whose other kernel repeats as well and costs less.

    The mode sorts the places of every write by index, and holds (rows, n, n) for a cumulative sum over n.
    """
    strict = device.type == "cuda" and torch.are_deterministic_algorithms_enabled()
    if strict:
        torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        if strict:
            torch.use_deterministic_algorithms(True)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's, Python's and numpy's generators for one step of one rank."""
    text = f"{seed}/{step}/{rank}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    torch.manual_seed(number - 2**63)
    random.seed(number)
    np.random.seed(number % 2**32)


def find(run_dir: Path | str, choice: str) -> Path | None:
    """The step folder to resume from, or None to start: `choice` is auto, never or a path (`training.resume`).

    `auto` takes the newest folder that verifies. `never` refuses a folder that already holds a run, and a path refuses
    one that would be followed by later steps: nothing is overwritten. UserError names the folder.
    """
    steps = sorted(Path(run_dir).glob("step-*"))
    if choice == "never" and steps:
        raise UserError(
            f"training.resume is never, but {run_dir} holds {steps[-1].name}: choose another --logging.run_name"
        )
    if choice in ("auto", "never"):
        return checkpoint.newest(run_dir)
    folder = Path(choice)
    if not folder.is_dir():
        raise UserError(f"training.resume: no such folder: {folder}")
    checkpoint.verify(folder)
    if folder.name.startswith("step-") and any(step.name > folder.name for step in steps):
        raise UserError(
            f"training.resume: {run_dir} holds {steps[-1].name}, later than {folder}: choose another --logging.run_name"
        )
    return folder


def load_newest(
    run_dir: Path | str, training: Config, facts: dict, steps: int, free: Sequence[str] = FREE_TO_CHANGE
) -> tuple[Path | None, dict]:
    """(step folder to resume from or None, the state to begin with: {"facts", "history"} and what was saved).

    training: that section of the config. UserError where `facts` differ from those of another rank, or from the saved
    ones in what may not change, or the run is already past `steps`.
    """
    folder = find(run_dir, training.resume)
    check_ranks_agree(facts | {"training.resume": folder and folder.name})
    if not folder:
        return None, {"facts": facts, "history": history(None, {"facts": facts, "step": 0})}
    saved = checkpoint.load_state(folder)
    refuse_changes(run_dir, folder, saved, facts, steps, free, training.resume_changed)
    say(f"resuming {run_dir} at step {saved['step']} of {steps}")
    return folder, saved | {"facts": facts, "history": history(folder, saved, facts)}


def check_ranks_agree(facts: dict) -> None:
    """UserError on all ranks unless they have the same facts: a machine of its own may have other files."""
    first, *others = dist.gather_rows([{key: str(value) for key, value in facts.items()}])
    for number, other in enumerate(others if dist.world_size() > 1 else (), 1):
        odd = [key for key in first | other if first.get(key) != other.get(key) and not key.startswith("logging.")]
        if set(odd) - CONTENTS.keys():
            shown = [f"{key} is {first.get(key)} on rank 0, {other.get(key)} on rank {number}" for key in odd[:3]]
            raise UserError(
                f"the ranks would not train the same: {'; '.join(shown)}; every machine needs the same "
                "command, data and base, and to resume the same files in logging.output_dir"
            )


def copy_log(folder: Path | str | None, path: Path) -> None:
    """Copy a log of the run that `folder` belongs to, where this one goes on under another name and has none yet."""
    source = Path(folder).parent / Path(path).name if folder else path
    if source != path and source.exists() and not Path(path).exists():
        shutil.copyfile(source, path)


def write_run_info(run_dir: Path, state: dict, config_text: str) -> None:
    """Leave in the run folder, on the main rank, what a run starts with: config.yml, run.json, the log up to its step.

    run.json holds the history too. It is copied from the state, so a damaged or lost run.json loses nothing.
    """
    if dist.is_main():
        checkpoint.truncate_log(run_dir / "metrics.jsonl", state["step"] - 1)
        log.replace(run_dir / "config.yml", config_text)
        short = {key: value for key, value in state["facts"].items() if "." not in key}
        log.write_json(run_dir / "run.json", log.provenance(facts=short, history=state["history"]))


def history(folder: Path | None, saved: dict, now: dict | None = None) -> list[dict]:
    """The settings of a run by the step from which they hold: [{"step", "settings"}], all of them, then those changed.

    saved: the state of the step folder that is resumed, `now` this run's facts. Without a folder the run begins, and
    `saved` holds its facts. A run that was begun before there was a history has that of the settings that it saved.
    """
    before, after = (
        {key: value for key, value in facts.items() if not matches(key, UNTOLD)}
        for facts in (saved["facts"], now or saved["facts"])
    )
    if saved["step"] == 0:
        return [{"step": 0, "settings": after}]
    entries = [entry for entry in saved.get("history", ()) if entry["step"] < saved["step"]]  # others trained nothing
    entries = entries or [{"step": 0, "settings": before, "source": f"{folder.name}/state.json"}]
    last = {}
    for entry in entries:
        last |= entry["settings"]
    changed = {key: after.get(key) for key in last | after if last.get(key) != after.get(key)}
    return [*entries, {"step": saved["step"], "settings": changed}] if changed else entries


def matches(key: str, names: Sequence[str]) -> bool:
    """Is a setting one of `names`, or in a section of them, whose names end with a dot?"""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def refuse_changes(
    run_dir: Path | str, folder: Path, saved: dict, now: dict, steps: int, free: Sequence[str], allowed: bool
) -> None:
    """Compare the facts of the saved state with this run's: UserError where one differs that may not.

    What is in `free` may differ, and CHANGED_ON_REQUEST where that is `allowed` and a step is left to make. A run that
    was begun before a hash of CONTENTS was kept is held to its path.
    """
    then = {key: value for key, value in saved["facts"].items() if key in now or key not in PARTS_OF_OLD}
    hashed = {path for path, content in CONTENTS.items() if content in then}
    functions = {str(facts.get("reward.function")).rpartition(":")[2] for facts in (then, now)}  # of file.py:name
    if len(functions) > 1:
        hashed -= {"reward.function"}
    now = {key: value for key, value in now.items() if key in then or key not in CONTENTS.values()}
    changed = [key for key in then | now if then.get(key) != now.get(key) and key != "training.resume_changed"]
    changed = [key for key in changed if key in then or not matches(key, FREE_TO_CHANGE)]  # a key that came later
    kept = [key for key in changed if not matches(key, (*free, *hashed))]
    fixed = [key for key in kept if not matches(key, CHANGED_ON_REQUEST)]

    def show(keys, form="{} {} -> {}", between=", "):
        return between.join(form.format(key, then.get(key), now.get(key)) for key in keys)

    if fixed:
        told = [key for key in changed if key in fixed or key in hashed]
        raise UserError(
            f"{folder} cannot be resumed, this is another run: {show(told)}; choose another --logging.run_name"
        )
    if saved["step"] > steps:
        raise UserError(
            f"{folder} lies beyond the {steps} steps of training.max_steps (or rl.max_steps, or epochs): raise it"
        )
    if kept and finished(saved, now, steps):
        elsewhere = folder.parent.resolve() != Path(run_dir).resolve()
        way_out = "leave out --training.resume" if elsewhere else "choose another --logging.run_name"
        raise UserError(f"{folder.parent} finished with {show(kept, '{} {}, now {}', '; ')}: {way_out}")
    if kept and not allowed:
        raise UserError(
            f"{folder} was trained with other settings: {show(kept)}; add --training.resume_changed true to go on with "
            "the new ones, or choose another --logging.run_name"
        )
    told = [key for key in changed if key not in CONTENTS.values() and key != "start"]
    if told:
        say(f"resuming with changed settings: {show(told)}")


def finished(saved: dict, now: dict, steps: int) -> bool:
    """Has a saved run no step left to make, with the steps, budget and patience of now?"""
    patience = now.get("training.patience")
    budgets = [(saved.get(f"{name}_seen") or 0, now.get(f"training.budget_{name}")) for name in ("tokens", "flops")]
    spent = any(budget is not None and seen >= budget for seen, budget in budgets)
    evaluated = saved["evaluation"] is not None or saved["step"] % now["training.eval_interval"] != 0
    waited = patience is not None and evaluated and saved["since_best"] >= patience
    return saved["step"] == steps or spent or waited


def fingerprint(value: object) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def stop_signals(grace: float = 0.0) -> Callable[[], bool]:
    """Catch SIGTERM and SIGINT; the function returned tells whether one came. A second one exits at once.

    Under torchrun those within `grace` seconds of the first do not count: it repeats to its workers a Ctrl-C that the
    terminal sent them already. Outside the main thread nothing is caught and the function returned says False. When the
    running command (log.command) ends, the handlers before are put back.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: False
    asked, (reader, writer) = [], os.pipe()
    grace = grace if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def watch():
        # A Python handler waits for the running bytecode to end, and loss.backward() is one: two signals in it would
        # count as one. The wakeup byte is written by the C handler and reaches this thread while torch computes.
        first = float("inf")
        while number := os.read(reader, 1):
            if time.monotonic() - first >= grace:
                os._exit(128 + number[0])
            first = min(first, time.monotonic())
        os.close(reader)

    def forget():  # a forked child must not write into this pipe, and must die of SIGTERM as its parent expects
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if os.name != "nt":  # where a handler's byte never waits
        os.set_blocking(writer, False)
    threading.Thread(target=watch, daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, lambda number, frame: asked.append(number))

    def restore():
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)  # the watcher reads the end and leaves

    if hasattr(os, "register_at_fork"):  # Windows does not fork
        os.register_at_fork(after_in_child=forget)
    log.on_exit(restore)
    return lambda: bool(asked)
