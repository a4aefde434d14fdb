"""Where a run's records also go by logging.tracker: Weights & Biases or TensorBoard. Its failures never end a run."""

import importlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Config

from common import dist, log
from common.log import UserError

PACKAGES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}

OFFLINE = ("offline", "dryrun", "disabled")  # of WANDB_MODE: they need no key


def check(logging: Config) -> None:
    """UserError where the tracker is not installed or not logged in: asked before a model is loaded."""
    if logging.tracker == "none" or not dist.is_main():
        return
    try:
        library = importlib.import_module(PACKAGES[logging.tracker])
    except ImportError as error:
        name = logging.tracker
        raise UserError(f"logging.tracker: {name} is not installed: pip install {name}") from error
    if logging.tracker == "wandb" and os.environ.get("WANDB_MODE") not in OFFLINE:
        stdin, sys.stdin = sys.stdin, io.StringIO()  # on a terminal it would ask for a key, and wait for ever
        try:
            logged_in, reason = library.login(), ""
        except Exception as error:  # of a class that its versions do not share
            logged_in, reason = False, f" ({str(error)[:200]})"
        finally:
            sys.stdin = stdin
        if not logged_in:
            ways = "run wandb login, set WANDB_API_KEY, or keep the records here by WANDB_MODE=offline"
            raise UserError(f"logging.tracker: not logged in to wandb{reason}: {ways}")


class Tracker:
    """Sends records until the command ends. The first failure is a warning, and nothing more is sent."""

    def __init__(self, logging: Config, folder: Path, step: int, run_id: str, settings: dict):
        """Go on with the run of this id if there is one. step: the first to send; a resumed run may send it again."""
        self.write: Callable | None = None
        self.close: Callable | None = None
        if logging.tracker != "none" and dist.is_main():
            start = {"wandb": start_wandb, "tensorboard": start_tensorboard}[logging.tracker]
            started = self._attempt(start, logging.project, folder, step, run_id, settings)
            self.write, self.close = started or (None, None)
            log.on_exit(lambda: self._attempt(self.close) if self.close else None)

    def send(self, record: dict) -> None:
        """Send the numbers of a step's record."""
        if self.write:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
            self._attempt(self.write, numbers, record["step"])

    def _attempt(self, function, *arguments):
        try:
            return function(*arguments)
        except Exception as error:  # a network, a full disk, a service that changed: the run matters more
            self.write = None
            what = f"{type(error).__name__}: {str(error)[:200]}"
            log.warn(f"logging.tracker: {what}; from here on the records are kept in the run's folder only")


def start_wandb(project: str, folder: Path, step: int, run_id: str, settings: dict) -> tuple[Callable, Callable]:
    import wandb

    run = wandb.init(project=project, name=folder.name, id=run_id, resume="allow", config=settings)
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def start_tensorboard(project: str, folder: Path, step: int, run_id: str, settings: dict) -> tuple[Callable, Callable]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(numbers, step):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close
