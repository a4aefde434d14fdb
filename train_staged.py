"""SFT, reward model and RL from one config, by calling the scripts' mains; and the comparison of the paradigms.

    training.mode sft, reward    train_sft.py, train_reward.py
    training.mode rl             (train_reward.py ->) train_rl.py
    training.mode staged         train_sft.py -> (train_reward.py ->) train_rl.py, whose reference is the end of SFT
    --paradigms sft,rl,staged    these arms at equal cost: tokens trained + tokens sampled = training.budget_tokens, or
                                 by training.budget_flops

        base            nothing; it is in every comparison
        sft             SFT on the data's answers
        rft             SFT on the best of rl.group_size samples of the base, by the reward (rejection sampling; RAFT,
                        Dong et al. 2023, one round): half of the budget for samples, half for SFT
        dpo, grpo, ppo  RL from the base by this algorithm; rl: by rl.algorithm
        staged          half of the budget for SFT, half for RL by rl.algorithm
        half            nothing; in the comparison every adapter stands once more, at half its scale

    --seeds 0,1,2                all of this for each seed, in folders of their own, then one comparison over the seeds

After each stage one prompt of val is answered before and after it; at the end evaluate.py compares the base with what
was trained. A reward model is trained where the reward wants one and reward.checkpoint names none; its cost is shown
apart. In a comparison on preference data it learns from one half of the pairs, as dpo does, and from the other half a
second one, which no policy sees, to judge by; of several seeds that of the first judges all. Left out: a search over
settings; all stages share one config.

    python train_staged.py --config configs/staged_sft_then_ppo.yml --debug
    python train_staged.py --config configs/staged_sft_then_ppo.yml --training.budget_tokens 2000000 \\
        --paradigms sft,rl,staged --seeds 0,1,2
    torchrun --nproc-per-node 8 train_staged.py --config configs/staged_sft_then_ppo.yml
Run the same command again to resume: finished stages are skipped, an unfinished one goes on bit for bit.
"""

import contextlib
import copy
import difflib
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace as Config

from common import config

SECTIONS = ("model", "training", "rl", "reward", "evaluation", "logging")
ALGORITHMS = ("dpo", "grpo", "ppo")
PARADIGMS = ("base", "sft", "rft", *ALGORITHMS, "rl", "staged", "half")  # in the order in which they are trained
JOBS = (
    (
        "--paradigms",
        {"metavar": "A,B", "help": f"train these arms at equal cost and compare them: {', '.join(PARADIGMS)}"},
    ),
    config.SEEDS,
)
FLAGS = dict(script="train_staged.py", description=__doc__, sections=SECTIONS, modes=(), jobs=JOBS)
if __name__ == "__main__":
    config.check_flags(**FLAGS)  # before torch is imported, which takes seconds

import torch

import evaluate
import train_reward
import train_rl
import train_sft
from common import (
    advantages,
    chat,
    data,
    dist,
    experience,
    log,
    lora,
    model,
    prompts,
    rewards,
    roles,
    rollouts,
    tasks,
)
from common.evaluation import measure, metrics
from common.log import UserError, command, say
from common.runtime import base, checkpoint, explain, resume, sources

SCRIPTS = {"sft": train_sft, "reward": train_reward, "rl": train_rl}
PURPOSES = {  # of a stage, by its name
    "sft": "learns to answer as the data does",
    "rl": "raises the reward of the policy's own answers",
    "reward": "a reward model, which RL will maximise",
    "judge": "a second reward model that no policy is trained on",
    "staged-sft": "the first half of the staged arm: learns to answer as the data does",
    "staged-rl": "the second half of the staged arm: raises the reward of its own answers",
    "rft-samples": "the base answers the data's prompts several times, and the best answers are kept",
    "rft": "learns to answer as the best of the base's own samples",
    "dpo": "learns to prefer the better answer of each pair",
    "grpo": "raises the reward of the policy's own answers, compared within groups",
    "ppo": "raises the reward of the policy's own answers, compared with a critic",
}
EARLIER = {  # {flag: the file by which one sees that an earlier stage left what it names}
    "model.adapter": "adapter_config.json",
    "model.base_checkpoint": "config.json",
    "reward.checkpoint": "reward.json",
    "dataset_path": "train.jsonl",
}
ENDLESS = 10**6  # epochs: the budget ends the run
SHOWN_TOKENS, SHOWN_CHARACTERS = 48, 200  # of the answers before and after a stage


def scores_samples(cfg, arm):
    """Does this arm, or training.mode, score samples by the reward?"""
    algorithm = cfg.rl.algorithm if arm in ("rl", "staged") else arm
    return algorithm in ("rft", "grpo", "ppo") or (algorithm == "dpo" and cfg.rl.pairs == "sampled")


def stages(cfg, arms, out, judge=None):
    """The runs in order: [(name, mode, {flag: value})], in folders out/name; without `arms` those of training.mode.

    judge: folder of the second reward model, where another seed has trained it.
    """
    mode, full = cfg.training.mode, cfg.model.peft_type == "none"
    rewarded = any(scores_samples(cfg, arm) for arm in arms or [mode]) and rewards.wants_model(cfg.reward)
    rewarded = rewarded and cfg.reward.checkpoint is None
    judged = bool(arms) and tasks.load(cfg.task).has_pairs and cfg.evaluation.reward_checkpoint is None
    pairs = dict.fromkeys(("training.budget_tokens", "training.budget_flops"), "null")
    pairs |= {"model.peft_type": "lora"} if full else {}

    def halved(name):
        return {"dataset_path": out / f"pairs-{name}", "data_keys": "null"}  # records as write_halves makes them

    reward = [("reward", "reward", pairs | (halved("reward") if judged else {}))] * rewarded
    second = [("judge", "reward", pairs | halved("judge") | {"seed": cfg.seed + 1})] * (judged and judge is None)
    scorer = {"reward.checkpoint": out / "reward" / "final"} if rewarded else {}
    half = {}
    if cfg.training.budget_tokens is not None:
        half["training.budget_tokens"] = max(1, cfg.training.budget_tokens // 2)
    if cfg.training.budget_flops is not None:
        half["training.budget_flops"] = cfg.training.budget_flops / 2

    def after(name):
        return {"model.base_checkpoint" if full else "model.adapter": out / name / "final"}

    if arms:
        whole = dict.fromkeys(("training.max_steps", "rl.max_steps", "training.patience"), "null")
        whole["training.epochs"] = ENDLESS
        rl = whole | scorer
        samples = {"dataset_path": out / "rft-samples", "data_keys": "null"}
        runs = {
            "base": [],
            "sft": [("sft", "sft", whole)],
            "rft": [("rft-samples", "samples", rl | half), ("rft", "sft", whole | half | samples)],
            **{name: [(name, "rl", rl | {"rl.algorithm": name})] for name in ALGORITHMS},
            "rl": [("rl", "rl", rl)],
            "half": [],
            "staged": [("staged-sft", "sft", whole | half), ("staged-rl", "rl", rl | half | after("staged-sft"))],
        }
        if judged and cfg.rl.pairs == "data":
            runs["dpo"][0][2].update(halved("reward"))
        return [*reward, *second, *(stage for arm in PARADIGMS if arm in arms for stage in runs[arm])]
    if mode == "staged":
        started = [(name, stage, flags | (after("sft") if full else {})) for name, stage, flags in reward]
        return [("sft", "sft", half), *started, ("rl", "rl", half | scorer | after("sft"))]
    return [*reward, ("rl", "rl", scorer)] if mode == "rl" else [(mode, mode, {})]


def write_halves(cfg, out):
    """Cut the pairs of train and val in two by a hash of their first turn: out/pairs-reward and out/pairs-judge."""
    for split in ("train", "val"):
        halves = {"reward": [], "judge": []}
        for record in data.from_config(cfg, split):
            first = record["prompt"][0]["content"].strip().lower()
            odd = hashlib.sha256(f"half/{first}".encode()).digest()[0] % 2
            halves["judge" if odd else "reward"].append(record)
        for name, records in halves.items():
            if not records:
                raise UserError(f"{split}: no pair left for the half of the {name} model; more of them are needed")
            path = out / f"pairs-{name}" / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            log.replace(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def settings(cfg, flags, fingerprint):
    """What decides the outcome of a stage: its resolved config, the base, the hashes of its data."""
    outside = ("evaluation.", "logging.", "training.resume_changed")
    kept = {key: value for key, value in config.flatten(cfg).items() if not key.startswith(outside)}
    kept |= {key: str(value) for key, value in flags.items()}
    task = tasks.load(cfg.task)
    own = None if cfg.debug or not task.files else Path(__file__).parent / "data" / task.name
    folder = kept.get("dataset_path") or own
    by_split = sources.files(folder) if folder else {}
    hashes = [checkpoint.sha256(path) for split in ("train", "val") for path in by_split.get(split, ())]
    folders = [
        path for path in config.paths(kept["reward.checkpoint"]) if (Path(path) / "adapter_config.json").is_file()
    ]
    score = [model.adapter_fingerprint(folder) for folder in folders]
    return kept | {"base": fingerprint, "data": hashes, "score": score[0] if len(score) == 1 else score or None}


def check_arms(cfg, arms, text):
    """UserError for --paradigms that cannot be compared."""
    if arms is not None:
        unknown = [arm for arm in arms if arm not in PARADIGMS]
        if unknown or len(set(arms)) != len(arms):
            near = difflib.get_close_matches(unknown[0][:40], PARADIGMS, 1) if unknown else []
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--paradigms: expected some of {','.join(PARADIGMS)}, each once, got {text!r:.80}{hint}")
        if "rl" in arms and cfg.rl.algorithm in arms:
            raise UserError(f"--paradigms: rl is {cfg.rl.algorithm} here (rl.algorithm): name one of the two")
        if "half" in arms and cfg.model.peft_type == "none":
            raise UserError("--paradigms half: only adapters have a scale, and model.peft_type is none")
        if "rft" in arms and cfg.rl.group_size < 2:
            raise UserError("rl.group_size: rft takes the best of so many samples, 2 or more")
        if "dpo" in arms and cfg.rl.pairs == "data":  # before hours of other arms
            if all(record["rejected"] is None for record in data.from_config(cfg, "train")):
                raise UserError("--paradigms dpo: the data has no rejected answers: set --rl.pairs sampled")
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


class Answers:
    """What each checkpoint answers, greedily, to the first prompt of val that may be shown."""

    def __init__(self, cfg, base_folder):
        self.cfg, self.known, self.tokenizer = cfg, {}, base.load_tokenizer(base_folder)
        records = data.from_config(cfg, "val")
        encoded, _ = prompts.encode_prompts(records, self.tokenizer, cfg.training.max_seq_length)
        plain = tasks.load(cfg.task).plain
        self.prompts = [prompt for prompt in encoded if plain and plain(prompt.record["prompt"])] or encoded

    def by(self, source):
        """The answer of a base, or of the policy in the final/ of a run."""
        if source not in self.known:
            folder, adapter = base.locate(source)
            device = model.pick_device(self.cfg.device)
            dtype = model.pick_dtype(self.cfg.model.dtype, device)
            net, _ = model.load(folder, device, dtype, quantize=self.cfg.model.peft_type == "qlora")
            if adapter:
                model.load_adapter(net, "policy", adapter, trainable=False)
            draws = torch.zeros(1, SHOWN_TOKENS, dtype=torch.float64)
            answer = rollouts.sample(net, [self.prompts[0].ids], 1, SHOWN_TOKENS, uniforms=draws, greedy=True)
            self.known[source] = chat.decode(self.tokenizer, answer["completions"][0])
        return self.known[source]

    def show(self, before, after):
        if self.prompts:
            prompt = measure.dialogue(self.prompts[0].record["prompt"])
            answers = {"before": self.by(before), "after": self.by(after)}
            if answers["before"] == answers["after"]:
                answers = {"before, after": answers["after"]}
            for name, text in {"val prompt": prompt, **answers}.items():
                line = " ".join(text.split())
                cut = line[:SHOWN_CHARACTERS] + "..." * (len(line) > SHOWN_CHARACTERS)
                say(f"  {name + ':':16} {cut or '(nothing)'}")


def load_prompts(cfg, tokenizer):
    """(records by split, the prompts that rft samples answers to, by pass)"""
    records, longest = data.load_train_and_val(cfg), cfg.training.max_seq_length - cfg.rl.max_new_tokens
    return records, prompts.encode(records, tokenizer, longest, cfg.rl.rollout_size, None, cfg.seed)


def sample_passes(cfg, folder, key):
    """rft: rl.group_size samples of the base for rl.rollout_size prompts a pass, until the budget of tokens is spent.

    folder gets samples.jsonl, every sample with its reward, and metrics.jsonl, a record for each pass -> its records.
    Sampled as train_rl.py samples in a step: a pass is a function of (seed, number), so it resumes after the last whole
    one. key: of what decides the samples.
    """
    device = model.pick_device(cfg.device)
    resume.prepare(device)
    rl, base_folder = cfg.rl, base.resolve(cfg.model.base_checkpoint)
    dtype = model.pick_dtype(cfg.model.dtype, device)
    net, tokenizer = model.load(base_folder, device, dtype, quantize=cfg.model.peft_type == "qlora")
    lora.wrap(net)
    lora.use(net, None)
    models = roles.Roles(net.eval(), net, tokenizer, None, False)
    trained = rewards.needs_model(cfg.reward)
    score = roles.load_scorers(models, cfg, base.fingerprint(base_folder), trained, False)
    _, dataset = load_prompts(cfg, tokenizer)

    # --- resume after the last whole pass
    if dist.is_main():
        log.on_exit(checkpoint.lock_run(folder).release)
        known = folder / "run.json"
        if known.is_file() and json.loads(known.read_text())["key"] != key:
            raise UserError(f"{folder} was sampled with other settings or data: choose another --logging.run_name")
        log.write_json(known, log.provenance(key=key))
        log.replace(folder / "config.yml", config.dump(cfg))
        checkpoint.truncate_log(folder / "metrics.jsonl", 10**9)  # a torn line
    dist.barrier()
    metrics = folder / "metrics.jsonl"
    passes = log.read_records(metrics) if metrics.exists() else []
    if dist.is_main():
        checkpoint.truncate_log(folder / "samples.jsonl", len(passes) - 1)
    seen, cost = (passes[-1]["tokens_seen"], passes[-1]["flops_seen"]) if passes else (0, 0.0)

    # --- sample and score
    sizes = {"group_size": rl.group_size, "max_new_tokens": rl.max_new_tokens, "temperature": rl.temperature}
    budgets = cfg.training.budget_tokens or math.inf, cfg.training.budget_flops or math.inf
    bar = log.progress(None, len(passes), unit="pass")
    for step in itertools.count(len(passes)):
        if seen >= budgets[0] or cost >= budgets[1]:
            break
        started, mine = time.perf_counter(), experience.share(dataset.batch(step))
        rollout = experience.collect(net, mine, score, cfg.seed, f"rft/{step}", **sizes)
        rollout.rewards = advantages.missing_stop(rollout.rewards, rollout.stopped, rl.missing_stop_penalty)
        rollout.correct = tasks.load(cfg.task).correct
        log.write_records(folder / "samples.jsonl", experience.lines(rollout, tokenizer, step))
        seen, cost = seen + rollout.sampled_tokens, cost + experience.step_flops(models, rollout, [], [])
        record = {"step": step} | experience.summary(rollout) | experience.group_metrics(rollout)
        record |= {"tokens_seen": seen, "flops_seen": cost, "seconds": time.perf_counter() - started}
        passes.append(record)
        log.write_records(metrics, [record])
        bar.update()
    bar.close()
    return passes


def write_best_samples(cfg, folder, key):
    """Rejection sampling: sample_passes, then train.jsonl and val.jsonl in folder, whole or not at all, for SFT.

    Of each prompt the sample of the highest reward is kept, if it stops by itself and is not known to be wrong. val is
    that of the data, or a tenth of what is kept where the data has prompts alone. UserError on all ranks where none is.
    """
    sample_passes(cfg, folder, key)
    task, n, failure = tasks.load(cfg.task), cfg.rl.group_size, None
    records, dataset = load_prompts(cfg, base.load_tokenizer(base.resolve(cfg.model.base_checkpoint)))
    if dist.is_main():
        kept, groups = best_of_groups(log.read_records(folder / "samples.jsonl"), n, dataset, task.correct)
        answered = any(record["response"] for record in records["val"])
        val, train = (records["val"], kept) if answered else (kept[::10], [kept[i] for i in range(len(kept)) if i % 10])
        if train:
            for split, rows in (("val", val), ("train", train)):
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                log.replace(folder / f"{split}.jsonl", text)
            mean = sum(row["reward"] for row in kept) / len(kept)
            say(f"kept the best of {n} samples for {len(kept)} of {groups} prompts, their mean reward is {mean:.3f}")
        else:
            wanted = "stops by itself and is right" if task.correct else "stops by itself"
            failure = UserError(f"rft: of {groups} prompts, no best sample {wanted}: there is nothing to learn from")
    log.refuse_together(failure, "rft")


def best_of_groups(lines, group_size, dataset, correct):
    """([the record of each prompt with its best sample as the response], number of groups) of lines of samples.jsonl.

    correct: the part of the reward that is 1 for a right answer, or None.
    """
    groups: dict[tuple, list] = {}
    for line in lines:
        groups.setdefault((line["step"], line["row"] // group_size), []).append(line)
    kept = []
    for (step, number), group in groups.items():
        best = max(group, key=lambda line: -float("inf") if line["reward"] is None else line["reward"])
        right = best["parts"].get(correct, 1) == 1 and best["reward"] is not None
        if best["stopped"] and right and best["completion"].strip():
            record = dataset.batch(step)[number].record
            answer = {"id": f"{record['id']}/{step}", "response": best["completion"], "rejected": None}
            kept.append(record | answer | {"reward": best["reward"]})
    return kept, len(groups)


def compare(cfg, arms, plan, folders, out):
    """The base, floors and all policies that were trained, by evaluate.py on the same test prompts.

    folders: of each seed's stages; what judges is that of the first.
    """
    say("\ncomparison: the base and what was trained, on the same test prompts")
    trained, full, mode = [name for name, _, _ in plan], cfg.model.peft_type == "none", cfg.training.mode
    last = {"sft": "sft", "staged": "rl"} if mode == "staged" else {mode: mode}
    if arms:
        last = {arm: "staged-rl" if arm == "staged" else arm for arm in arms if arm not in ("base", "half")}
    systems = [f"base={cfg.model.base_checkpoint}"]
    systems += [f"{name}={folder / stage / 'final'}" for name, stage in last.items() for folder in folders]
    if arms and "half" in arms:
        systems += [f"{name}-half={folder / stage / 'final'}@0.5" for name, stage in last.items() for folder in folders]
    flags = {"logging.output_dir": out, "logging.run_name": "comparison"}
    if "reward" in trained and (arms or not full or mode == "rl"):  # after full SFT it belongs to another base
        flags["reward.checkpoint"] = folders[0] / "reward" / "final"
    if "judge" in trained:
        flags["evaluation.reward_checkpoint"] = folders[0] / "judge" / "final"
    return evaluate.main(["--config", str(out / "config.yml"), "--checkpoints", *systems, *arguments(flags)])


def arguments(flags):
    """{key: value} as a command line."""
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


@dataclass
class Study:
    """The stages of one seed: their config, plan and folder."""

    cfg: Config
    plan: list  # of stages
    folder: Path
    fingerprint: str  # of the base

    @property
    def draft(self):
        """The config that all stages read; config.yml stays until no stage refuses the new one."""
        return self.folder / ".tmp-config.yml"

    def flags(self, stage):
        """What a stage's script is given beside the config."""
        name, mode, changes = stage
        alone = {} if mode == "sft" else {"training.packing": "false", "training.last_turn_only": "false"}
        where = {"logging.output_dir": self.folder, "logging.run_name": name}
        return {"training.mode": "rl" if mode == "samples" else mode} | alone | changes | where

    def finished(self, stage):
        """Was this stage finished with these settings?"""
        name, mode, _ = stage
        try:
            done = json.loads((self.folder / "stages.json").read_text()).get(name)
        except (OSError, ValueError):  # none yet, or damaged: each script then sees for itself that it is done
            return False
        if done != settings(self.cfg, self.flags(stage), self.fingerprint):
            return False
        final = self.folder / name / "final"
        if mode == "samples":
            return (self.folder / name / "train.jsonl").is_file()
        return final.is_dir() and bool(checkpoint.verify(final))


def prepare(study):
    """Lock the study's folder, and write the config and the data that its stages read."""
    if dist.is_main():
        log.on_exit(checkpoint.lock_run(study.folder).release)
        if any("pairs-" in str(changes.get("dataset_path")) for _, _, changes in study.plan):
            write_halves(study.cfg, study.folder)
        log.on_exit(functools.partial(study.draft.unlink, missing_ok=True))
        log.replace(study.draft, config.dump(study.cfg))
        if not (study.folder / "config.yml").exists():
            log.replace(study.folder / "config.yml", config.dump(study.cfg))
    dist.barrier()


def run_stages(study):
    """Train all stages but those that are finished; returns the result of the last one, where it was not skipped."""
    cfg, out, result = study.cfg, study.folder, None
    answers = Answers(cfg, base.resolve(cfg.model.base_checkpoint))
    for number, stage in enumerate(study.plan, 1):
        name, mode, changes = stage
        if dist.any_rank(dist.is_main() and study.finished(stage)):
            say(f"stage {number} of {len(study.plan)}: {name}, finished before")
            continue
        say(f"\nstage {number} of {len(study.plan)}: {name}, {PURPOSES[name]}")
        log.reset_peak_memory()
        flags = study.flags(stage)
        decisive = json.loads(json.dumps(settings(cfg, flags, study.fingerprint), default=str))
        if mode == "samples":
            key = {name: value for name, value in decisive.items() if not name.startswith("training.budget_")}
            write_best_samples(config.load_config(study.draft, flags), out / name, resume.fingerprint(key))
        else:
            result = run_script(mode, study.draft, flags)
        gc.collect()
        model.trim_memory(model.pick_device(cfg.device))
        if dist.is_main():
            try:
                done = json.loads((out / "stages.json").read_text())
            except (OSError, ValueError):
                done = {}
            log.write_json(out / "stages.json", done | {name: decisive})
            if mode == "sft":  # the others end with a report of their own
                losses = [r["eval/loss"] for r in log.read_records(out / name / "metrics.jsonl") if "eval/loss" in r]
                say(f"{name}: its loss on val answers went from {losses[0]:.2f} to {losses[-1]:.2f} nats per token")
            if mode in ("sft", "rl"):
                start = changes.get("model.adapter") or changes.get("model.base_checkpoint") or cfg.model.adapter
                answers.show(str(start or cfg.model.base_checkpoint), str(out / name / "final"))
        dist.barrier()
    if dist.is_main():
        os.replace(study.draft, out / "config.yml")
    dist.barrier()
    return result


def run_script(mode, draft, flags, *words):
    """What the main of a mode's script returns, with the config in `draft` and those of the flags that it reads."""
    sections = ("", *SCRIPTS[mode].SECTIONS)
    read = {key: value for key, value in flags.items() if key.rpartition(".")[0].partition(".")[0] in sections}
    return SCRIPTS[mode].main(["--config", str(draft), *arguments(read), *words])


# ---------------------------------------------------------------- the plan of several seeds


def say_plan(studies):
    """What is left to do for all seeds, and about how long it takes: by a finished seed, else by a timed step."""
    left = [(study, stage) for study in studies for stage in study.plan if not study.finished(stage)]
    seeds = ", ".join(str(study.cfg.seed) for study in studies)
    say(f"\nplan: seeds {seeds} in {studies[0].folder.parent}/seedN, {len(left)} stages to train, then one comparison")
    total, timed = 0.0, {}
    for stage in studies[0].plan:
        name = stage[0]
        waiting = [study for study, each in left if each[0] == name]
        logs = {study.cfg.seed: study.folder / name / "metrics.jsonl" for study in studies if study not in waiting}
        logs = {seed: path for seed, path in logs.items() if path.is_file()}
        if not waiting:
            say(f"  {name + ':':16} finished")
            continue
        if logs:
            seed, path = next(iter(logs.items()))
            seconds, source = sum(row.get("seconds") or 0.0 for row in log.read_records(path)), f"as seed {seed} took"
        else:
            seconds, source = time_stage(waiting[0], stage, timed), "by a timed step"
        say(f"  {name + ':':16} {len(waiting)} times {explain.duration(seconds)}, {source}")
        total += len(waiting) * seconds
    say(f"about {explain.duration(total)}, evaluations and the comparison apart")


def time_stage(study, stage, timed):
    """Seconds that a stage will take: a step, as --explain runs it, times the steps until its budget is spent.

    What earlier stages would leave is not there yet: without it the step starts from the base, on the data, with the
    heuristic reward. timed: {what was timed: seconds for each token of the budget}, is added to.
    """
    _, mode, _ = stage
    flags = study.flags(stage)
    for key, file in EARLIER.items():
        if key in flags and not (Path(flags[key]) / file).is_file():
            del flags[key]
            flags |= {"reward.type": "heuristic"} if key == "reward.checkpoint" else {}
    cfg = config.load_config(study.draft, flags | {"training.mode": "rl" if mode == "samples" else mode})
    budget, kind = cfg.training.budget_tokens or cfg.training.budget_flops or 1, (mode, cfg.rl.algorithm)
    if kind not in timed:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            if mode == "samples":
                spent = "tokens_seen" if cfg.training.budget_tokens else "flops_seen"
                cfg.training.budget_tokens = 1
                record = sample_passes(cfg, Path(folder), "timed")[-1]
                timed[kind] = record["seconds"] / record[spent]
            else:
                timed[kind] = run_script(mode, study.draft, flags, "--explain")["expected_seconds"] / budget
    return timed[kind] * budget


@command
def main(argv=None):
    # --- config: training.mode names the stages
    cfg, job = config.parse_args(**FLAGS, argv=argv)
    arms = None if job.paradigms is None else [word.strip() for word in job.paradigms.split(",")]
    seeds = None if job.seeds is None else config.seeds(job.seeds)
    check_arms(cfg, arms, job.paradigms)
    out = Path(cfg.logging.output_dir) / config.run_name(cfg, job.config, "staged")
    plan = stages(cfg, arms, out)
    for algorithm in {changes.get("rl.algorithm", cfg.rl.algorithm) for _, mode, changes in plan if mode == "rl"}:
        train_rl.check(Config(**vars(cfg.rl) | {"algorithm": algorithm}), algorithm != "dpo")  # before hours of SFT
    if len(plan) == 1 and not arms and not seeds:  # a single stage is its script's own run
        return SCRIPTS[plan[0][1]].main(argv)
    if not arms and cfg.training.mode == "reward":
        raise UserError("--seeds: several reward models are trained by train_reward.py --seeds")

    # --- what the comparison will need, before anything is trained
    base_folder, comparable = base.resolve(cfg.model.base_checkpoint), True
    try:
        metrics.require(cfg.task)
        records = data.from_config(cfg, "test")
        longest = cfg.training.max_seq_length - cfg.evaluation.max_new_tokens
        measure.items(records, base.load_tokenizer(base_folder), longest, cfg.evaluation.max_items, cfg.seed)
    except UserError as error:
        if arms:
            raise
        comparable = False
        log.warn(f"there will be no comparison at the end: {error}")

    # --- distributed; each seed's folder and the config that its stages read
    fingerprint = base.fingerprint(base_folder)
    if cfg.model.peft_type != "none" and any(mode == "rl" for _, mode, _ in plan):  # before hours of SFT
        for given in config.paths(cfg.reward.checkpoint):
            base.check_record(given, "reward.checkpoint", base_folder, fingerprint, cfg.model.peft_type == "qlora")
    dist.init(model.pick_device(cfg.device), cfg.training.timeout)
    log.on_exit(dist.end)  # one group for all stages
    if seeds and dist.is_main():
        log.on_exit(checkpoint.lock_run(out).release)
    studies = []
    for seed in seeds or [cfg.seed]:
        own, folder = copy.deepcopy(cfg), out / f"seed{seed}" if seeds else out
        own.seed = seed
        judge = studies[0].folder / "judge" / "final" if studies else None
        studies.append(Study(own, stages(own, arms, folder, judge), folder, fingerprint))
        prepare(studies[-1])

    # --- stages: those that are finished with these settings are skipped
    result = None  # of the last stage, where it was not skipped
    for study in studies:
        if seeds:
            say_plan(studies)
            say(f"\nseed {study.cfg.seed}")
        result = run_stages(study)
    if seeds and dist.is_main():
        log.replace(out / "config.yml", config.dump(cfg))
    dist.barrier()
    return compare(cfg, arms, studies[0].plan, [study.folder for study in studies], out) if comparable else result


if __name__ == "__main__":
    main()
