"""What a run says and writes: console lines, a table of its steps, JSONL records, curves; and how a command refuses.

Imports the standard library alone, and others where they are used: the downloader works before they are installed.
"""

import contextlib
import difflib
import errno
import functools
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import torch
    from jinja2 import Environment
    from matplotlib.figure import Figure
    from tqdm import tqdm

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers", "numpy")
COLUMNS = (  # of the console's table, from left to right
    *("step", "reward", "eval/reward", "kl", "eval/kl", "length", "loss", "eval/loss", "accuracy", "eval/accuracy"),
    *("eval/margin", "eval/chosen_logprob", "lr", "grad_norm", "tokens_per_second"),
)
OF_EVERY_RUN = ("step", "loss", "lr", "grad_norm", "tokens_per_second")
COUNTS = {  # {what became of a record: the words after its count}; any other is "left out"
    "truncated": "cut at {longest} tokens",
    "empty": "empty turns dropped",
    "system_folded": "system prompts merged into the user's turn",
    "merged": "turns merged with the one before, of the same role",
    "leading_assistant": "assistant turns before the first user's dropped",
}
PICTURES: dict = {  # matplotlib's settings
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


class UserError(Exception):
    """Bad input: one line that names the file, line, key or flag and says what to do next."""


_closing = []  # what the running commands have to undo, the latest last
_warned: set[str] = set()


def on_exit(function: Callable[[], object]) -> None:
    """Call `function` when the running command ends, however it ends: its lock, its signal handlers."""
    _closing.append(function)


def command(main: Callable) -> Callable:
    """Decorate a script's `main`: bad input becomes one line on stderr and exit status 2, never a traceback."""

    @functools.wraps(main)
    def wrapped(argv=None):
        depth = len(_closing)
        if not depth:
            _warned.clear()
            os.environ["MPLBACKEND"] = "agg"  # matplotlib may refuse that of a notebook as soon as it is imported
            for stream in (sys.stdout, sys.stderr):
                if hasattr(stream, "reconfigure"):  # a notebook's has no encoding that could fail
                    stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except Exception as error:
            refusal, dist = _refusal(error), _dist()
            words, status = refusal or (f"another rank failed: {type(error).__name__}: {_one_line(error)[:300]}", 1)
            if refusal:
                print(f"error: {words}", file=sys.stderr)
            if dist:
                dist.fail(words, status)
            if not refusal:
                raise
            raise SystemExit(status) from error
        finally:
            while len(_closing) > depth:
                _closing.pop()()
            if not depth and _dist():
                _dist().end()

    return wrapped


def _refusal(error):
    """(one line, exit status) for an error that is no bug of this process, else None."""
    torch, dist = sys.modules.get("torch"), _dist()
    if isinstance(error, UserError):
        return _one_line(error), 2
    if isinstance(error, MemoryError) or (torch and _out_of_memory(error, torch)):
        return f"out of memory: lower --training.micro_batch_tokens ({_one_line(error)[:200] or 'MemoryError'})", 2
    if isinstance(error, OSError):  # a full disk, a folder that may not be written
        return _one_line(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")), 2
    if dist and isinstance(error, dist.RankError):
        return _one_line(error), error.status
    return None


def _out_of_memory(error, torch):
    """A GPU's allocator has a class of errors; those of the CPU and of mps are known by their words."""
    words = str(error).lower() if isinstance(error, RuntimeError) else ""
    return isinstance(error, torch.OutOfMemoryError) or "defaultcpuallocator" in words or "out of memory" in words


def _one_line(message):
    return " ".join(str(message).split())


def _dist():
    """common.dist, which needs torch, where a script has imported it; without it this is the only process."""
    return sys.modules.get("common.dist")


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return _dist() is None or _dist().is_main()


def refuse_together(error: UserError | None, words: str) -> None:
    """Raise on all ranks where one of them has an `error`, a UserError: a rank without raises `words` and the first."""
    from common import dist

    errors = dist.gather_rows([] if error is None else [str(error)])
    if errors:
        raise error or UserError(f"{words}: {errors[0]}")


def say(message: str, file: TextIO | None = None) -> None:
    """One line on the main rank's console, above the progress bar."""
    from tqdm import tqdm

    if is_main():
        tqdm.write(message, file=file or sys.stdout)
        (file or sys.stdout).flush()


def warn(message: str, file: TextIO | None = None) -> None:
    """Say "warning: ..." once for each message, until the command ends."""
    message = _one_line(message)
    if message not in _warned:
        _warned.add(message)
        say(f"warning: {message}", file)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Inside, nothing is shown on stdout; what was warned of there is warned of again outside."""
    before = set(_warned)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        _warned.intersection_update(before)


def say_counts(split: str, counts: dict[str, int], longest: int | None = None) -> None:
    """What became of a split's records, {reason: count}: those that occurred, and how many were kept of at most
    `longest` tokens."""
    shown = [f"{counts['kept']:,} kept"]
    for key, count in counts.items():
        if count and key not in ("kept", "records"):
            words = COUNTS.get(key, f"left out ({key.replace('_', ' ')})")
            shown.append(f"{count:,} {words.format(longest=longest)}")
    say(f"{split}: {', '.join(shown)}")


def listed(names: list[str], most: int = 8) -> str:
    """Names for a message, not too many of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def hint(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not known: which one may have been meant."""
    near = difflib.get_close_matches(word[:80], list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def progress(total: int | None, done: int = 0, unit: str = "step", delay: float = 0.0) -> "tqdm":
    """A bar with time left, shown after `delay` seconds; silent where stderr is no terminal and on other ranks."""
    from tqdm import tqdm

    hidden = not is_main() or not sys.stderr.isatty()
    return tqdm(total=total, initial=done, unit=unit, disable=hidden, dynamic_ncols=True, smoothing=0.1, delay=delay)


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
        with open(draft, "w", encoding="utf-8", newline="") as file:  # line ends as given: CSV has its own
            file.write(text)
            file.flush()
            fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise _unwritable(path, text, error) from error
    finally:
        with contextlib.suppress(OSError):  # there is none where all went well, or where the folder is a file
            draft.unlink()


def fsync(number: int) -> None:
    """Wait until an open file or folder is on the disk; some network disks have no such call, and answer EINVAL."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _unwritable(path, text, error):
    folder = next(folder for folder in Path(path).parents if os.path.exists(folder))
    needed, free = len(text.encode()), shutil.disk_usage(folder).free
    return UserError(f"cannot write {path}: {error.strerror} ({needed} bytes needed, {free} free)")


def write_record(path: Path | str, record: dict) -> None:
    """Append one JSON line; floats keep every bit. A value that is not finite becomes null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    write(path, json.dumps(clean) + "\n", "a")


def write_json(path: Path | str, value: object) -> None:
    """Write a JSON file, whole or not at all."""
    replace(path, json.dumps(value, indent=2) + "\n")


def replace_records(path: Path | str, records: Iterable[dict]) -> None:
    """Write JSON lines, whole or not at all."""
    replace(path, _json_lines(records))


def write_records(path: Path | str, records: list[dict]) -> None:
    """Append JSON lines, on the main rank; none leave no file."""
    if is_main() and records:
        write(path, _json_lines(records), "a")


def _json_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_records(path: Path | str) -> list[dict]:
    """The records of a .jsonl file. A last line that does not end, as a kill leaves it, is passed over."""
    *lines, _ = Path(path).read_bytes().split(b"\n")  # as text, U+2028 would end a line too
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: a line is no valid JSON: {error}") from error


class Table:
    """The steps of a run on the console: aligned columns, under a header that is said again where a column is new."""

    def __init__(self):
        self.columns: list[str] = []

    def say(self, record: dict) -> None:
        cells = {name: _cell(record[name]) for name in COLUMNS if record.get(name) is not None}
        rows = [cells]
        if not cells.keys() <= set(self.columns):
            self.columns = [name for name in COLUMNS if name in {*self.columns, *cells, *OF_EVERY_RUN}]
            rows = [{name: _title(name) for name in self.columns}, cells]
        for row in rows:
            widths = ((name, 5 if name == "step" else max(8, len(_title(name)))) for name in self.columns)
            say("  ".join(row.get(name, "").rjust(width) for name, width in widths).rstrip())


def _title(name):
    return name.replace("eval/", "val ").replace("_per_second", "/s").replace("_", " ")


def _cell(value):
    """A number in at most 8 characters, a sign apart."""
    text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text if len(text) <= 8 else f"{value:.2e}"


def peak_memory_gb(device: "torch.device") -> float | None:
    """Highest memory so far: of the GPU's allocator on CUDA, else of this process; None where nothing counts it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak_memory() -> None:
    """Forget the peak so far, so that the next stage of a process shows its own; only Linux can on CPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # not every kernel or sandbox has this file
            Path("/proc/self/clear_refs").write_text("5")


def versions() -> dict[str, str]:
    """{package: its version} of those that decide numbers and are installed."""
    from importlib.metadata import version
    from importlib.util import find_spec

    return {name: version(name) for name in PACKAGES if find_spec(name)}


def provenance(**facts: object) -> dict[str, object]:
    """What run.json holds: command, git commit, versions, machine, and what the script adds (hashes, counts)."""
    import torch

    from common import dist

    root = Path(__file__).resolve().parents[1]
    git = shutil.which("git")  # a container may have none
    words = [git, "describe", "--always", "--dirty"]
    commit = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False).stdout.strip() if git else ""
    return {
        "command": sys.argv,
        "commit": commit or None,
        "python": platform.python_version(),
        "versions": versions(),
        "machine": f"{platform.machine()} {platform.system()}",
        "threads": torch.get_num_threads(),
        "world_size": dist.world_size(),
        **facts,
    }


def plot_curves(records: list[dict], panels: Sequence, path: Path | str) -> None:
    """Draw a PNG: one panel for each (title, keys), each key over steps where it was recorded."""

    def draw():
        figure, axes = panels_of(len(panels), len(panels), (4.5, 3.4))
        for axis, (title, keys) in zip(axes, panels, strict=True):
            for key in keys:
                points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
                if points:
                    marker = "o" if len(points) < 40 else None
                    axis.plot(*zip(*points), marker=marker, markersize=3, linewidth=1.2, label=key)
            axis.set(title=title, xlabel="optimizer step")
            if axis.lines:
                axis.legend(fontsize=8)
        return figure

    save_picture(path, draw)


def reliability_diagram(rows: list[dict]) -> "Figure":
    """A preference model's calibration, rows of {"predicted", "observed", "count"}, for save_picture."""
    figure, (axis,) = panels_of(1, 1, (4.2, 4.2))
    axis.plot((0, 1), (0, 1), color="grey", linewidth=1, linestyle="--", label="calibrated")
    most = max(row["count"] for row in rows)
    sizes = [20 + 180 * row["count"] / most for row in rows]
    points = [row["predicted"] for row in rows], [row["observed"] for row in rows]
    axis.plot(*points, linewidth=1.2, label="reward model")
    axis.scatter(*points, s=sizes, alpha=0.6)
    axis.set(title="pairs, each shown both ways", xlabel="predicted P(first is better)")
    axis.set(ylabel="share that is better", xlim=(0, 1), ylim=(0, 1))
    axis.legend(fontsize=8)
    return figure


def templates(folder: Path, escape: Callable, **filters: Callable) -> "Environment":
    """Jinja2's templates in `folder`, every value of which goes through `escape` first."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(folder),
        finalize=escape,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= filters
    return pages


def panels_of(count: int, columns: int, size: tuple[float, float]) -> tuple["Figure", list]:
    """A figure and one pair of axes, of `size` in inches, for each panel, filled row by row.

    It belongs to no window and no notebook: pyplot, which may have any backend, stays out of it.
    """
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(size[0] * columns, 4.2), size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def save_picture(path: Path | str, draw: Callable[[], "Figure | None"]) -> bool:
    """Write the PNG of the figure that draw() returns, whole or not at all -> was it written?

    None: there is nothing to draw. What goes wrong is only a warning: the run, or the report, matters more.
    """
    path = Path(path)
    draft = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        import matplotlib

        with matplotlib.rc_context(PICTURES):
            figure = draw()
            if figure:
                figure.savefig(draft, dpi=120, format="png", metadata={"Software": None})
                os.replace(draft, path)
        return figure is not None
    except Exception as error:
        draft.unlink(missing_ok=True)
        warn(f"{path} was not drawn: {type(error).__name__}: {str(error)[:200]}")
        return False
