"""One console line and one JSONL record a step, the progress bar, the plot, and how a command refuses."""

import functools
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from common import dist

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers", "numpy")


class UserError(Exception):
    """Bad input: one line that names the file, line, key or flag and says what to do next."""


_closing = []  # what the running commands have to undo, the latest last


def on_exit(function: Callable[[], object]) -> None:
    """Call `function` when the running command ends, however it ends: its lock, its signal handlers."""
    _closing.append(function)


def command(main: Callable) -> Callable:
    """Decorate a script's `main`: bad input becomes one line on stderr and exit status 2, never a traceback."""

    @functools.wraps(main)
    def wrapped(argv=None):
        depth = len(_closing)
        try:
            return main(argv)
        except UserError as error:
            _refuse(str(error), error)
        except torch.OutOfMemoryError as error:
            _refuse(f"out of memory: lower --training.micro_batch_tokens ({str(error)[:120]})", error)
        except OSError as error:  # a full disk, a folder that may not be written
            _refuse(f"{error.strerror or error}: {error.filename or ''}", error)
        except dist.RankError as error:  # no bad input, and no bug of this rank
            _refuse(str(error), error, error.status)
        except Exception as error:
            dist.fail(f"another rank failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", 1)
            raise
        finally:
            while len(_closing) > depth:
                _closing.pop()()
            if not depth:
                dist.end()

    return wrapped


def _refuse(message, error, status=2):
    words = " ".join(message.split())
    print(f"error: {words}", file=sys.stderr)
    dist.fail(words, status)
    raise SystemExit(status) from error


def refuse_together(error: UserError | None, words: str) -> None:
    """Raise on all ranks where one of them has an `error`, a UserError: a rank without raises `words` and the first."""
    errors = dist.gather_rows([] if error is None else [str(error)])
    if errors:
        raise error or UserError(f"{words}: {errors[0]}")


def say(message: str) -> None:
    """One line on the main rank's console, above the progress bar."""
    if dist.is_main():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def say_counts(split: str, counts: dict[str, int]) -> None:
    """What became of a split's records, {reason: count}: those that occurred, and always how many were kept."""
    say(f"{split}: " + ", ".join(f"{value} {key}" for key, value in counts.items() if value or key == "kept"))


def listed(names: list[str], most: int = 8) -> str:
    """Names for a message, not too many of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def progress(total: int, done: int) -> tqdm:
    """A bar over optimizer steps with time left; silent where stderr is no terminal and on other ranks."""
    hidden = not dist.is_main() or not sys.stderr.isatty()
    return tqdm(total=total, initial=done, unit="step", disable=hidden, dynamic_ncols=True, smoothing=0.1)


def write(path: Path | str, text: str, mode: str = "w") -> None:
    """Write a text file; UserError names it and the room on its disk, which an error of the system alone does not."""
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _unwritable(path, text, error) from error


def replace(path: Path | str, text: str) -> None:
    """As write, but whole or not at all: a kill at any moment leaves the old file or the new one."""
    path = Path(path)
    draft = path.with_name(f".tmp-{path.name}-{os.getpid()}")  # of a killed run, checkpoint.lock_run removes it
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise _unwritable(path, text, error) from error


def _unwritable(path, text, error):
    needed, free = len(text.encode()), shutil.disk_usage(Path(path).parent).free
    return UserError(f"cannot write {path}: {error.strerror} ({needed} bytes needed, {free} free)")


def write_record(path: Path | str, record: dict) -> None:
    """Append one JSON line; floats keep every bit. A value that is not finite becomes null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    write(path, json.dumps(clean) + "\n", "a")


def write_json(path: Path | str, value: object) -> None:
    """Write a JSON file, whole or not at all."""
    replace(path, json.dumps(value, indent=2) + "\n")


def write_records(path: Path | str, records: list[dict]) -> None:
    """Append JSON lines, on the main rank; none leave no file."""
    if dist.is_main() and records:
        write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "a")


def read_records(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]  # as text, U+2028 would end a line too


def line(record: dict) -> str:
    """A record as one readable console line: `step 20  loss 1.234  ...`."""
    shown = (
        *("step", "reward", "kl", "length", "eval/reward", "loss", "accuracy", "margin"),
        *("eval/loss", "eval/perplexity", "eval/accuracy", "eval/margin", "eval/chosen_logprob", "eval/kl"),
        *("lr", "grad_norm", "tokens_per_second"),
    )
    return "  ".join(f"{key} {record[key]:.4g}" for key in shown if record.get(key) is not None)


def peak_memory_gb(device: torch.device) -> float:
    """Highest memory so far: of the GPU's allocator on CUDA, else of this process, as the system counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak_memory() -> None:
    """Forget the peak so far, so that the next stage of a process shows its own; only Linux can on CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def provenance(**facts: object) -> dict[str, object]:
    """What run.json holds: command, git commit, versions, machine, and what the script adds (hashes, counts)."""
    root = Path(__file__).resolve().parents[1]
    git = shutil.which("git")  # a container may have none
    words = [git, "describe", "--always", "--dirty"]
    commit = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False).stdout.strip() if git else ""
    return {
        "command": sys.argv,
        "commit": commit or None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()} {platform.system()}",
        "threads": torch.get_num_threads(),
        "world_size": dist.world_size(),
        **facts,
    }


def open_wandb(enabled: bool, name: str, config: dict) -> Callable[[dict], None]:
    """A function that sends a record to Weights & Biases, or one that does nothing; the package is optional."""
    if not enabled or not dist.is_main():
        return lambda record: None
    try:
        import wandb
    except ImportError as error:
        raise UserError("logging.wandb is true but wandb is not installed: pip install wandb") from error
    run = wandb.init(project="gemma-alignment", name=name, config=config)
    return lambda record: run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])


def plot_curves(records: list[dict], panels: Sequence, path: Path | str) -> None:
    """Draw a PNG: one panel for each (title, keys), each key over steps where it was recorded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, (title, keys) in zip(axes[0], panels):
        for key in keys:
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                axis.plot(
                    *zip(*points), marker="o" if len(points) < 40 else None, markersize=3, linewidth=1.2, label=key
                )
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_reliability(rows: list[dict], path: Path | str) -> None:
    """Draw a PNG of a preference model's calibration, rows of {"predicted", "observed", "count"}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    axis.plot((0, 1), (0, 1), color="grey", linewidth=1, linestyle="--", label="calibrated")
    most = max(row["count"] for row in rows)
    sizes = [20 + 180 * row["count"] / most for row in rows]
    axis.plot([r["predicted"] for r in rows], [r["observed"] for r in rows], linewidth=1.2, label="reward model")
    axis.scatter([r["predicted"] for r in rows], [r["observed"] for r in rows], s=sizes, alpha=0.6)
    axis.set(title="pairs, each shown both ways", xlabel="predicted P(first is better)", ylabel="share that is better")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
