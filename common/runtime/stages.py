"""The stages of train_staged.py on the disk: their flags, which of them are finished, and how long the others take."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace as Config
from typing import NamedTuple

from common import config, data, dist, log, model, rewards, tasks
from common.log import UserError, say
from common.runtime import base, checkpoint, explain, resume, sources

# What may change without another outcome of a stage: paths, of which the content is hashed, ...
OUTSIDE = ("evaluation.", "logging.", "training.resume_changed", "training.recompute")
PATHS = ("model.base_checkpoint", "model.adapter", "dataset_path", "reward.checkpoint")
# ... and settings that the script of a mode does not read.
SCORE = ("score", "score_effect")
UNREAD = {"sft": ("rl.", "reward.", *SCORE), "reward": ("rl.max_steps", *SCORE), "samples": (), "rl": ()}


class Stage(NamedTuple):
    """A run of one script, or the sampling of rejection.py, in a folder of its name."""

    name: str
    mode: str  # sft, reward, rl or samples
    flags: dict  # {key: value} beside the config


@dataclass
class Study:
    """The stages of one seed: their config, plan and folder."""

    cfg: Config
    plan: list[Stage]
    folder: Path
    fingerprint: str  # of the base

    @property
    def draft(self) -> Path:
        """The config that all stages read. It replaces config.yml when all have run: a refused one changes nothing."""
        return self.folder / ".tmp-config.yml"

    def flags(self, stage: Stage) -> dict:
        """What a stage's script is given beside the config."""
        alone = {} if stage.mode == "sft" else {"training.packing": "false", "training.last_turn_only": "false"}
        where = {"logging.output_dir": self.folder, "logging.run_name": stage.name}
        return {"training.mode": "rl" if stage.mode == "samples" else stage.mode} | alone | stage.flags | where

    def settings(self, stage: Stage) -> dict:
        """What decides the outcome of a stage: its resolved config, hashes of base, start, data and reward models."""
        cfg, flags = self.cfg, {key: str(value) for key, value in self.flags(stage).items()}
        kept = {key: value for key, value in config.flatten(cfg).items() if not resume.matches(key, OUTSIDE)} | flags
        task = tasks.load(cfg.task)
        own = None if cfg.debug or not task.files else Path(__file__).parents[2] / "data" / task.name
        folder = kept["dataset_path"] or own
        by_split = sources.files(folder) if folder else {}
        whole, start = flags.get("model.base_checkpoint"), kept["model.adapter"]  # whole: of full fine-tuning
        scorers = [path for path in config.paths(kept["reward.checkpoint"]) if _is_adapter(path)]
        scores, effects = (
            [hashed(path) for path in scorers] for hashed in (model.adapter_fingerprint, model.adapter_effect)
        )
        kept |= {
            "base": base.fingerprint(Path(whole)) if whole and Path(whole).is_dir() else self.fingerprint,
            "start": model.adapter_effect(start) if start and _is_adapter(base.split_scale(start)[0]) else None,
            "data": [checkpoint.sha256(path) for split in ("train", "val") for path in by_split.get(split, ())],
            "score": scores[0] if len(scores) == 1 else scores or None,
            "score_effect": effects or None,
        }
        if cfg.reward.function:
            kept["reward.function_sha256"] = rewards.fingerprint(cfg.reward, cfg.task)
        if task.path is not None:  # a user's own
            kept["task_sha256"] = tasks.fingerprint(cfg.task)
        return json.loads(json.dumps(kept, default=str))

    def noted(self) -> dict:
        """{stage: the settings under which it was finished}.

        {} from a damaged file: each script then finds its own final/.
        """
        try:
            return json.loads((self.folder / "stages.json").read_text())
        except (OSError, ValueError):
            return {}

    def note(self, stage: Stage, settings: dict) -> None:
        """Keep that a stage is finished."""
        log.write_json(self.folder / "stages.json", self.noted() | {stage.name: settings})

    def finished(self, stage: Stage) -> bool:
        """Was this stage finished with settings that decide the same?"""
        done, now = self.noted().get(stage.name, {}), self.settings(stage)
        free = [*OUTSIDE, *PATHS, *UNREAD[stage.mode]]
        if done and "start" not in done:  # finished before the hash of its start was kept: held to its path
            free = [key for key in free if key != "model.adapter"] + ["start"]
        if done:  # the hash of its reward models was kept with or without the place of their base
            free.append("score" if "score_effect" in done else "score_effect")
        if any(done.get(key) != now.get(key) for key in done | now if not resume.matches(key, free)):
            return False
        if stage.mode == "samples":
            return (self.folder / stage.name / "train.jsonl").is_file()
        final = self.folder / stage.name / "final"
        return final.is_dir() and bool(checkpoint.verify(final))

    def prepare(self) -> None:
        """Lock the folder, and write the config and the data that the stages read."""
        if dist.is_main():
            log.on_exit(checkpoint.lock_run(self.folder).release)
            if any("pairs-" in str(stage.flags.get("dataset_path")) for stage in self.plan):
                write_halves(self.cfg, self.folder)
            log.on_exit(lambda: self.draft.unlink(missing_ok=True))
            log.replace(self.draft, config.dump(self.cfg))
            if not (self.folder / "config.yml").exists():
                log.replace(self.folder / "config.yml", config.dump(self.cfg))
        dist.barrier()


def _is_adapter(folder):
    return (Path(folder) / "adapter_config.json").is_file()


def sampling_keys(settings: dict) -> list[str]:
    """Hashes of what decides samples, the budget apart: as they are kept now, and as two versions before kept them."""
    ways = ((*OUTSIDE, *PATHS, "score"), (*OUTSIDE, *PATHS, "score_effect"), ("start", "score_effect"))
    kept = {key: value for key, value in settings.items() if not key.startswith("training.budget_")}
    return [
        resume.fingerprint({key: value for key, value in kept.items() if not resume.matches(key, left_out)})
        for left_out in ways
    ]


def write_halves(cfg: Config, out: Path) -> None:
    """Cut the pairs of train and val in two by a hash of their first turn: out/pairs-reward and out/pairs-judge."""
    for split in ("train", "val"):
        halves: dict[str, list] = {"reward": [], "judge": []}
        for record in data.from_config(cfg, split):
            first = record["prompt"][0]["content"].strip().lower()
            odd = hashlib.sha256(f"half/{first}".encode()).digest()[0] % 2
            halves["judge" if odd else "reward"].append(record)
        for name, records in halves.items():
            if not records:
                raise UserError(f"{split}: no pair left for the {name} model's half; more pairs are needed")
            path = out / f"pairs-{name}" / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            log.replace_records(path, records)


def check_arms(cfg: Config, arms: list[str], text: str) -> None:
    """UserError for --paradigms (`text`) that cannot be compared."""
    unknown = [arm for arm in arms if arm not in config.PARADIGMS]
    if unknown or len(set(arms)) != len(arms):
        hint = log.hint(unknown[0], config.PARADIGMS) if unknown else ""
        raise UserError(
            f"--paradigms: expected some of {','.join(config.PARADIGMS)}, each once, got {text!r:.80}{hint}"
        )
    if "rl" in arms and cfg.rl.algorithm in arms:
        raise UserError(f"--paradigms: rl is {cfg.rl.algorithm} here (rl.algorithm): name one of the two")
    if "half" in arms and cfg.model.peft_type == "none":
        raise UserError("--paradigms half: only adapters have a scale, and model.peft_type is none")
    if "rft" in arms and cfg.rl.group_size < 2:
        raise UserError("rl.group_size: rft takes the best of so many samples, 2 or more")
    if cfg.training.budget_tokens is None and cfg.training.budget_flops is None:
        raise UserError(
            "--paradigms compares at equal cost: set --training.budget_tokens, the tokens of each arm, or "
            "--training.budget_flops"
        )
    if cfg.model.adapter:
        raise UserError("model.adapter: all arms start from the base; leave it out, or merge it into a base first")
    if cfg.model.peft_type == "none" and "staged" in arms and rewards.wants_model(cfg.reward):
        raise UserError(
            "model.peft_type none: after full SFT the reward model's base is gone; compare with "
            "lora or qlora, or with --reward.type heuristic"
        )


def check_pairs(cfg: Config, arms: list[str]) -> None:
    """UserError where dpo or the judge would learn from pairs and the data has none."""
    learns_judge = tasks.load(cfg.task).has_pairs and cfg.evaluation.reward_checkpoint is None
    if not learns_judge and not ("dpo" in arms and cfg.rl.pairs == "data"):
        return
    if any(record["rejected"] is not None for record in data.from_config(cfg, "train")):
        return
    if not learns_judge:
        raise UserError("--paradigms dpo: the data has no rejected answers: set --rl.pairs sampled")
    raise UserError(
        "--paradigms: the judge learns from pairs, and the data has no rejected answers: compare with --task dialogue, "
        "or name a judge with --evaluation.reward_checkpoint"
    )


def say_plan(studies: list[Study], time_stage: Callable[[Study, Stage, dict], float | None]) -> None:
    """What is left to do for all seeds, and about how long it takes: as a finished seed, else by time_stage."""
    left = [(study, stage.name) for study in studies for stage in study.plan if not study.finished(stage)]
    seeds = ", ".join(str(study.cfg.seed) for study in studies)
    say(f"\nplan: seeds {seeds} in {studies[0].folder.parent}/seedN, {len(left)} stages to train, then one comparison")
    total, timed = 0.0, {}
    for stage in studies[0].plan:
        waiting = [study for study, name in left if name == stage.name]
        if not waiting:
            say(f"  {stage.name + ':':16} finished")
            continue
        logs = {
            study.cfg.seed: study.folder / stage.name / "metrics.jsonl" for study in studies if study not in waiting
        }
        trained = [seed for seed, path in logs.items() if path.is_file()]
        if trained:
            records = log.read_records(logs[trained[0]])
            seconds, source = sum(row.get("seconds") or 0.0 for row in records), f"as seed {trained[0]} took"
        else:
            seconds, source = time_stage(waiting[0], stage, timed), "by a timed step"
        if seconds is None:
            say(f"  {stage.name + ':':16} {len(waiting)} times, how long is not known before the stage that it needs")
            continue
        say(f"  {stage.name + ':':16} {len(waiting)} times {explain.duration(seconds)}, {source}")
        total += len(waiting) * seconds
    say(f"about {explain.duration(total)}, evaluations and the comparison apart")
