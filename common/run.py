"""The record of a training run: its folder and lock, where it resumes, what is due at a step, metrics.jsonl, best/.

Run keeps the record and answers questions; the script acts, in the order in which its loop is written: train_sft.py is
the shortest example, docs/design.md explains it. run.log may be left out, or called rarely; run.count may not.
Questions may be asked more than once: a step has one answer to each. All ranks must ask the same ones.

Under --explain the loop runs too: its first steps, to say how long all of them will take, without an evaluation or a
checkpoint, in a folder that goes away.
"""

import math
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace as Config

from common import config, dist, log, model
from common.log import UserError, say
from common.optim import expected_steps
from common.runtime import base, card, checkpoint, explain, resume, tracker, watch

EXPLAIN_STEPS, EXPLAIN_SECONDS = 3, 20.0  # --explain runs 3 steps, or fewer if they take over 20 s


@dataclass
class State:
    """What a resumed run needs beside weights and optimizer. state.json holds it; a script may add attributes."""

    step: int = 0  # updates made
    best: float = math.inf  # of the metric; its negative where it is maximised
    best_metric: str | None = None  # its name, where the script chose it at `start`
    since_best: int = 0  # evaluations since the best one
    tokens_seen: float = 0  # of all ranks
    flops_seen: float | None = 0.0  # by formula; None: begun before they were counted
    evaluation: dict | None = None  # of the weights as they are; None after an update
    norms: dict = field(default_factory=dict)  # recent gradient norms, see watch.spikes
    facts: dict = field(default_factory=dict)  # what must be the same on resume
    history: list = field(default_factory=list)  # settings by step, see resume.history
    said: list = field(default_factory=list)  # warnings that the console has shown
    tracker_id: str | None = None  # of this run at logging.tracker


class Run:
    def __init__(
        self, cfg: Config, job: Config, name: str, panels: Sequence, metric: str = "eval/loss", maximise: bool = False
    ):
        """Join the process group and lock the run's folder if it exists.

        name: of the folder if no config file has one; panels: ((title, keys of the records), ...) of curves.png;
        metric: the evaluation's, picks best/.
        """
        self.cfg, self.training, self.panels, self.table = cfg, cfg.training, panels, log.Table()
        self.metric, self.sign = metric, -1 if maximise else 1
        self.device = model.pick_device(cfg.device)
        self.dtype = model.pick_dtype(cfg.model.dtype, self.device)
        self.autocast = model.compute_context(self.device, self.dtype, cfg.model.peft_type == "none")
        self.explained, self.timed = job.explain, []  # seconds of each step that --explain has run
        self.recent, self.said_slow = [], []  # seconds of recent steps, see watch.slow
        if job.explain:
            cfg.training.resume, cfg.logging.tracker = "auto", "none"
        resume.prepare(self.device)
        tracker.check(cfg.logging)
        self.base_folder = base.resolve(cfg.model.base_checkpoint)  # may download: before any rank waits
        self.base_name = base.public_name(cfg.model.base_checkpoint, self.base_folder)
        self.base_fingerprint = base.fingerprint(self.base_folder)
        dist.init(self.device, self.training.timeout)
        self.folder = Path(cfg.logging.output_dir) / config.run_name(cfg, job.config, name)
        self.state, self.locked = State(), False
        if job.explain:
            self.folder = Path(tempfile.mkdtemp())
            log.on_exit(lambda: shutil.rmtree(self.folder))
        else:
            if self.folder.exists():
                self._lock()
            if dist.is_main():
                checkpoint.try_writing(self.folder)  # before hours of training

    def _lock(self):
        """Create the run's folder and hold it until the command ends; UserError if another process does."""
        if dist.is_main() and not self.locked:
            log.on_exit(checkpoint.lock_run(self.folder).release)
            self.locked = True

    # ---------------------------------------------------------------- start, or resume

    def start(
        self,
        steps: int,
        tokens_per_step: float,
        facts: dict,
        not_read: tuple = (),
        best: tuple[str, int] | None = None,
        flops_per_token: float = 0.0,
    ) -> Path | None:
        """Begin a run of `steps` updates; returns the step folder to load weights and optimizer from, or None.

        tokens_per_step: what a step is expected to take before any was seen, for training.budget_tokens.
        facts: what decides the numbers beside the config, as hashes. not_read: keys or sections ("rl.") of the config
        that this script does not read. A run is resumed only with the same facts and config, but for these and
        resume.FREE_TO_CHANGE. UserError says what differs. best: (metric, 1 where more is better, else -1) in place of
        that of __init__; a run that was begun before there was a choice goes on by the one it had. flops_per_token: as
        tokens_per_step, for training.budget_flops.
        """
        self.steps, self.tokens_per_step = steps, tokens_per_step
        self.flops_per_step = tokens_per_step * flops_per_token
        settings = config.flatten(self.cfg)
        facts = settings | {
            "world_size": dist.world_size(),
            "tokenizer": base.tokenizer_fingerprint(self.base_folder),
            "model": self.base_fingerprint,
            "start": model.adapter_fingerprint(self.cfg.model.adapter),
            **facts,
        }
        if self.cfg.model.adapter:
            facts["adapter"] = model.adapter_effect(self.cfg.model.adapter)
        self._lock()  # a new folder appears only when everything before was in order
        dist.barrier()
        free = (*resume.FREE_TO_CHANGE, *not_read)
        folder, saved = resume.load_newest(self.folder, self.training, facts, steps, free)
        vars(self.state).update(saved)
        if best and (folder is None or self.state.best_metric):
            self.metric, self.sign = best[0], -best[1]
            self.state.best_metric = self.metric
        if folder and "flops_seen" not in saved:
            self.state.flops_seen = None
            if self.training.budget_flops is not None:
                raise UserError(f"training.budget_flops: {self.folder} was begun before FLOPs were counted")
        resume.write_run_info(self.folder, vars(self.state), config.dump(self.cfg))
        self._cut_logs(folder)
        logging = self.cfg.logging
        if logging.tracker != "none":
            self.state.tracker_id = logging.run_id or self.state.tracker_id or uuid.uuid4().hex[:12]
        self.tracker = tracker.Tracker(logging, self.folder, self.step, self.state.tracker_id, settings)
        self.signalled = resume.stop_signals(grace=1.0)
        self.bar = log.progress(self.expected_end(self.step), self.step)
        self.asked = None
        self.record: dict = {"step": self.step}
        self.clock, self.seconds, self.counts = time.perf_counter(), 0.0, Counter()  # of the updates since the last log
        return folder

    def _cut_logs(self, folder):
        """Cut samples.jsonl and held_out.jsonl back to the step that the run goes on from, as metrics.jsonl is."""
        if dist.is_main():
            resume.copy_log(folder, self.folder / "held_out.jsonl")
            checkpoint.truncate_log(self.folder / "samples.jsonl", self.step - 1)
            evaluated = self.state.evaluation is not None  # then the answers of this very step are kept
            checkpoint.truncate_log(self.folder / "held_out.jsonl", self.step if evaluated else self.step - 1)

    @property
    def step(self) -> int:
        """How many updates have been made."""
        return self.state.step

    @property
    def start_key(self) -> list:
        """What decides the model before the first update, and the last bits of what it says: hashes and names."""
        start = model.adapter_fingerprint(self.cfg.model.adapter)
        return [self.base_fingerprint, start, str(self.dtype), self.cfg.model.peft_type, self.device.type]

    def step_folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    # ---------------------------------------------------------------- questions about a step

    def _ask(self, step):
        """The first question about a step settles, for all ranks, whether a signal ends the run here."""
        if step == self.asked:
            return
        counted = self.asked is None or step == self.step
        assert counted, f"step {self.step} was not counted: call run.count(tokens) once in every step"
        self.asked = self.state.step = step
        self._open_record()
        self.record |= self.state.evaluation or {}
        self.stopped = dist.any_rank(self.signalled())

    def expected_end(self, step: int) -> int:
        """The step at which the run will end, by the tokens and FLOPs seen so far."""
        return min([self.steps, *(expected_steps(step, self.steps, *spending) for spending in self._budgets())])

    @property
    def planned_end(self) -> int:
        """The step at which the run was expected to end before any token was seen: the length of the schedule."""
        budgets = self._budgets()
        return min([self.steps, *(expected_steps(0, self.steps, 0, *budget) for _, *budget in budgets)])

    def _budgets(self):
        """[(spent so far, budget, what a step is expected to take)] of tokens and FLOPs, where there is a budget."""
        tokens = self.state.tokens_seen, self.training.budget_tokens, self.tokens_per_step
        flops = self.state.flops_seen, self.training.budget_flops, self.flops_per_step
        return [spending for spending in (tokens, flops) if spending[1] is not None]

    def position(self, step: int) -> float:
        """How far the schedule has come at this step, in steps of planned_end: by steps or by what is spent.

        It never goes back, however many tokens a step takes; so the learning rate never falls during the warm-up.
        """
        spent = [seen / budget for seen, budget, _ in self._budgets()]
        return self.planned_end * min(1.0, max(step / self.steps, *spent)) if spent else step

    def _last(self, step):
        return step >= self.steps or any(seen >= budget for seen, budget, _ in self._budgets())

    def _done(self, step):
        patience = self.training.patience
        return self._last(step) or (patience is not None and self.state.since_best >= patience)

    def _improved(self):
        return self.state.evaluation is not None and self.state.since_best == 0

    def evaluation_due(self, step: int) -> bool:
        """Every training.eval_interval steps and at the end; not twice, and not where a signal ends the run."""
        self._ask(step)
        due = step % self.training.eval_interval == 0 or self._last(step)
        return due and not self.stopped and not self.explained and self.state.evaluation is None

    def keep_evaluation(self, evaluation: dict) -> None:
        """Keep {"eval/...": float} for the step's record, best/ and patience."""
        if self.metric not in evaluation:
            raise UserError(f"evaluation.best_metric: {self.metric} has no value: no held-out record counts for it")
        value = self.sign * evaluation[self.metric]
        self.state.since_best = 0 if value < self.state.best else self.state.since_best + 1
        self.state.best = min(self.state.best, value)
        self.state.evaluation = evaluation
        self.record |= evaluation

    def save_due(self, step: int) -> bool:
        """Every training.save_interval steps, at a new best and at the end; at step 0 only if a signal ends the run."""
        self._ask(step)
        due = step > 0 and (self._improved() or step % self.training.save_interval == 0)
        return not self.explained and (due or self.stopped or self._done(step))

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """Yield a folder to write into. When the body ends well it becomes step-%06d, with state.json, and is copied to
        best/ if its evaluation is the best so far. For the main rank alone: the others wait in `finished`."""
        assert dist.is_main(), "only the main rank may write: if run.save_due(step) and dist.is_main()"
        self.state.step = step
        with checkpoint.new_step(self.folder, step, vars(self.state)) as folder:
            yield folder
        checkpoint.prune(self.folder, self.training.keep_last)
        if step > 0 and self._improved():
            checkpoint.publish(self.step_folder(step), self.folder, "best")

    def finished(self, step: int) -> bool:
        """After the last step, or when patience or budget is spent. SystemExit where a signal ends the run."""
        self._ask(step)
        if self.save_due(step):
            dist.barrier()
        if self.stopped:
            end = self.expected_end(step)
            saved = "" if self.explained else ", saved; run the same command again to go on"
            raise SystemExit(f"stopped at step {step} of {end}{saved}")
        self.clock = time.perf_counter()
        if self.explained and not self._done(step):
            return dist.any_rank(len(self.timed) == EXPLAIN_STEPS or sum(self.timed) > EXPLAIN_SECONDS)
        return self._done(step)

    # ---------------------------------------------------------------- the record

    def check_finite(self, values: dict, rows: list) -> None:
        """UserError before an update whose {"loss": float, ...} is not finite; values: the same on all ranks."""
        if not all(map(math.isfinite, values.values())):
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            raise UserError(f"step {self.step}: {shown}: not finite, not updated; rows {', '.join(rows)}")

    def count(self, tokens: float, flops: float = 0.0, **others: float) -> None:
        """An update was made from so many tokens of all ranks: the evaluation at hand is that of older weights.

        flops: of all ranks, by formula (flops.py); required where training.budget_flops ends the run.
        others: more that is logged per second, by its plural name: pairs=16 becomes pairs_per_second.
        """
        if self.step % 16 == 0:
            model.trim_memory(self.device)
        self.state.evaluation = None
        assert flops or self.training.budget_flops is None, "training.budget_flops: call run.count(tokens, flops)"
        self.state.tokens_seen += tokens
        if self.state.flops_seen is not None:
            self.state.flops_seen += flops
        self.state.step += 1
        now = time.perf_counter()
        self.seconds += now - self.clock
        for warning in watch.unseen(watch.slow(self.recent, now - self.clock), self.said_slow):
            log.warn(f"step {self.state.step}: {warning}")  # not in the record, which is the same on every machine
        if self.explained:
            self.timed.append(now - self.clock)
        self.counts.update({"tokens": tokens, **others})
        self.clock = now
        self.bar.update()

    def log(self, step: int, metrics: dict, warnings: Sequence[str] = ()) -> None:
        """Write the step's record, with its evaluation. `seconds` and what is per second are since the last record."""
        self.record |= {"step": step, **metrics}
        warnings = [*warnings, *watch.spikes(self.state.norms, self.record)]
        self.record |= self._seen() | {"peak_memory_gb": log.peak_memory_gb(self.device)}
        if self.seconds:
            self.record |= {f"{name}_per_second": value / self.seconds for name, value in self.counts.items()}
            self.record["seconds"] = self.seconds
        self._warn(warnings)
        shown = step % self.training.eval_interval == 0 or step % self.cfg.logging.log_interval == 0
        if shown and not self.explained:
            self.table.say(self.record)
        if "loss" in metrics and self.seconds:
            speed = self.record["tokens_per_second"]
            self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed:.0f} tok/s", refresh=False)
        self._write()
        self.record, self.seconds, self.counts = {"step": self.step}, 0.0, Counter()

    def _seen(self):
        """What was spent so far, for a record; a fork that counts no FLOPs logs none."""
        seen = {"tokens_seen": self.state.tokens_seen}
        return seen | ({"flops_seen": self.state.flops_seen} if self.state.flops_seen else {})

    def _open_record(self):
        """Begin this step's record; an earlier step's is written if it holds an evaluation that was never logged."""
        if self.record["step"] != self.step:
            if len(self.record) > 1:
                self._write()
            self.record = {"step": self.step}

    def _warn(self, warnings):
        """Put warnings into the step's record, and on the console those of a kind that it has not shown yet."""
        if warnings:
            self.record["warning"] = "; ".join(warnings)
        for warning in watch.unseen(warnings, self.state.said):
            log.warn(f"step {self.record['step']}: {warning}")

    def _write(self, draw=False):
        """Write and send the step's record; curves.png is drawn again where there is an evaluation in it."""
        if dist.is_main():
            path = self.folder / "metrics.jsonl"
            log.write_record(path, self.record)
            self.tracker.send(self.record)
            if draw or any(key.startswith("eval/") for key in self.record):
                log.plot_curves(log.read_records(path), self.panels, self.folder / "curves.png")

    def finish(self, warnings: Sequence[str] = ()) -> dict:
        """Write the last record, final/ and curves.png; returns the record.

        --explain only says the time; then the record has `expected_seconds`, of the whole run without its evaluations.
        """
        self.bar.close()
        if self.explained:
            return self.record | {"expected_seconds": self._say_time()}
        self._open_record()
        best = f"best_{self.metric.replace('/', '_')}"
        self.record |= self._seen() | {best: self.sign * self.state.best}
        self._warn(warnings)
        self._write(draw=True)
        self.table.say(self.record)
        written = "curves.png and metrics.jsonl"
        if dist.is_main():
            folder = self.step_folder(self.step)
            if not folder.is_dir():  # the script left its loop between two checkpoints
                folder = checkpoint.newest(self.folder)
                final = f"final/ is a copy of {folder.name}" if folder else "no final/ is written"
                say(f"step {self.step} was not saved; {final}")
            if folder:
                text = card.of_run(self.cfg, self.state.facts, self.base_name, self.state.evaluation or {})
                checkpoint.publish(folder, self.folder, "final", {card.NAME: text})
                written = f"final, {written}"
        peak = log.peak_memory_gb(self.device)
        say(f"wrote {self.folder}/{written}" + (f"; peak memory {peak:.2f} GB" if peak else ""))
        dist.barrier()
        return self.record

    def _say_time(self):
        """How long the run will take, by the last step that was timed, since the first one warms up."""
        seconds, steps = self.timed[-1], self.expected_end(len(self.timed))
        whole = f"{steps:,} steps {explain.duration(seconds * steps)}"
        say(f"one step takes about {explain.duration(seconds)} here, {whole}, evaluations apart")
        return seconds * steps
