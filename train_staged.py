"""SFT, reward model and RL from one config, by calling the scripts' mains; and the comparison of the paradigms.

    training.mode sft, reward    train_sft.py, train_reward.py
    training.mode rl             (train_reward.py ->) train_rl.py
    training.mode staged         train_sft.py -> (train_reward.py ->) train_rl.py, whose reference is the end of SFT
    --paradigms sft,rl,staged    these arms at equal cost: tokens trained + tokens sampled = training.budget_tokens, or
                                 by training.budget_flops

        base            trains nothing; it is in every comparison
        sft             SFT on the data's answers
        rft             SFT on the best of rl.group_size samples of the base, by the reward (rejection sampling; RAFT,
                        Dong et al. 2023, one round): half of the budget for samples, half for SFT
        dpo, grpo, ppo  RL from the base by this algorithm; rl: by rl.algorithm
        staged          half of the budget for SFT, half for RL by rl.algorithm
        half            trains nothing; adds every adapter to the comparison a second time, at half its scale

    --seeds 0,1,2                all of this for each seed, in folders of their own, then one comparison over the seeds

After each stage of SFT or RL one prompt of val is answered before and after it; at the end evaluate.py compares the
base with what was trained. A reward model is trained where the reward wants one and reward.checkpoint names none; its
cost is reported separately. In a comparison on preference data it learns from one half of the pairs, as dpo does, and
from the other half a second one, the judge, which no policy is trained on: it scores the arms and picks their best/.
With several seeds, the first seed's judge serves all. Left out: a search over settings; all stages share one config.

    python train_staged.py --config configs/staged_sft_then_ppo.yml --debug
    python train_staged.py --config configs/staged_sft_then_ppo.yml --training.budget_tokens 2000000 \\
        --paradigms sft,rl,staged --seeds 0,1,2
    torchrun --nproc-per-node 8 train_staged.py --config configs/staged_sft_then_ppo.yml
Run the same command again to resume: finished stages are skipped, an unfinished one goes on bit for bit.
"""

import copy
import gc
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace as Config

from common import config

SECTIONS = ("model", "training", "rl", "reward", "evaluation", "logging")
ARMS = f"train these arms at equal cost and compare them: {', '.join(config.PARADIGMS)}"
JOBS = (("--paradigms", {"metavar": "A,B", "help": ARMS}), config.SEEDS)
FLAGS = dict(script="train_staged.py", description=__doc__, sections=SECTIONS, modes=(), jobs=JOBS)
if __name__ == "__main__":
    config.check_flags(**FLAGS)  # before torch is imported, which takes seconds

import evaluate
import train_reward
import train_rl
import train_sft
from common import data, dist, log, model, rewards, tasks
from common.evaluation import measure, metrics
from common.evaluation.answers import Answers
from common.log import UserError, command, say
from common.runtime import base, checkpoint, rejection
from common.runtime.stages import Stage, Study, check_arms, check_pairs, sampling_keys, say_plan

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
    "evaluation.reward_checkpoint": "reward.json",
    "dataset_path": "train.jsonl",
}
ENDLESS = 10**6  # epochs: the budget ends the run


def scores_samples(cfg, arm):
    """Does this arm, or training.mode, score samples by the reward?"""
    algorithm = cfg.rl.algorithm if arm in ("rl", "staged") else arm
    if algorithm in ("base", "half", "sft", "reward"):
        return False
    return algorithm != "dpo" or cfg.rl.pairs == "sampled"


def stages(cfg, arms, out, judge=None):
    """The stages in order, in folders out/name: those of `arms`, or without them of training.mode.

    judge: folder of the second reward model, where another seed has trained it.
    """
    mode, full = cfg.training.mode, cfg.model.peft_type == "none"

    def half_of_pairs(name):
        return {"dataset_path": out / f"pairs-{name}", "data_keys": "null"}  # records as stages.write_halves makes them

    def start_from(name):
        return {"model.base_checkpoint" if full else "model.adapter": out / name / "final"}

    # --- reward models: one that the policy is trained by, and in a comparison a second one to judge by
    rewarded = any(scores_samples(cfg, arm) for arm in arms or [mode]) and rewards.wants_model(cfg.reward)
    rewarded = rewarded and cfg.reward.checkpoint is None
    judged = bool(arms) and tasks.load(cfg.task).has_pairs and cfg.evaluation.reward_checkpoint is None
    reward_flags = dict.fromkeys(("training.budget_tokens", "training.budget_flops"), "null")
    if full:
        reward_flags["model.peft_type"] = "lora"
    reward_stages = []
    if rewarded:
        reward_stages.append(Stage("reward", "reward", reward_flags | (half_of_pairs("reward") if judged else {})))
    if judged and judge is None:
        reward_stages.append(Stage("judge", "reward", reward_flags | half_of_pairs("judge") | {"seed": cfg.seed + 1}))
    scorer = {"reward.checkpoint": out / "reward" / "final"} if rewarded else {}

    # --- half of the budget, for arms of two stages
    half_budget = {}
    if cfg.training.budget_tokens is not None:
        half_budget["training.budget_tokens"] = max(1, cfg.training.budget_tokens // 2)
    if cfg.training.budget_flops is not None:
        half_budget["training.budget_flops"] = cfg.training.budget_flops / 2

    # --- without arms: training.mode
    if not arms and mode == "rl":
        return [*reward_stages, Stage("rl", "rl", scorer)]
    if not arms and mode == "staged":
        for stage in reward_stages:
            stage.flags.update(start_from("sft") if full else {})
        return [
            Stage("sft", "sft", half_budget),
            *reward_stages,
            Stage("rl", "rl", half_budget | scorer | start_from("sft")),
        ]
    if not arms:
        return [Stage(mode, mode, {})]

    # --- arms: only the budget ends a run, and the judge picks best/ where the task has no truth of its own
    sft = dict.fromkeys(("training.max_steps", "rl.max_steps", "training.patience"), "null")
    sft["training.epochs"] = ENDLESS
    rl = sft | scorer
    if judged and not full:  # a whole model has its reference apart, and the judge may be of another base
        rl["evaluation.reward_checkpoint"] = judge or out / "judge" / "final"
    sampled_data = {"dataset_path": out / "rft-samples", "data_keys": "null"}
    dpo_data = half_of_pairs("reward") if judged and cfg.rl.pairs == "data" else {}
    runs = {
        "base": [],
        "sft": [Stage("sft", "sft", sft)],
        "rft": [
            Stage("rft-samples", "samples", rl | half_budget),
            Stage("rft", "sft", sft | half_budget | sampled_data),
        ],
        "dpo": [Stage("dpo", "rl", rl | dpo_data | {"rl.algorithm": "dpo"})],
        "grpo": [Stage("grpo", "rl", rl | {"rl.algorithm": "grpo"})],
        "ppo": [Stage("ppo", "rl", rl | {"rl.algorithm": "ppo"})],
        "rl": [Stage("rl", "rl", rl)],
        "staged": [
            Stage("staged-sft", "sft", sft | half_budget),
            Stage("staged-rl", "rl", rl | half_budget | start_from("staged-sft")),
        ],
        "half": [],
    }
    return [*reward_stages, *(stage for arm in config.PARADIGMS if arm in arms for stage in runs[arm])]


def run_stages(study):
    """Train all stages but those that are finished; returns the result of the last one, where it was not skipped."""
    cfg, result = study.cfg, None
    answers = Answers(cfg)
    for number, stage in enumerate(study.plan, 1):
        if dist.any_rank(dist.is_main() and study.finished(stage)):
            say(f"stage {number} of {len(study.plan)}: {stage.name}, finished before")
            continue
        say(f"\nstage {number} of {len(study.plan)}: {stage.name}, {PURPOSES[stage.name]}")
        log.reset_peak_memory()
        flags, settings, folder = study.flags(stage), study.settings(stage), study.folder / stage.name
        if stage.mode == "samples":
            rejection.write_best_samples(config.load_config(study.draft, flags), folder, sampling_keys(settings))
        else:
            result = run_script(stage.mode, study.draft, flags)
        gc.collect()
        model.trim_memory(model.pick_device(cfg.device))
        if dist.is_main():
            study.note(stage, settings)
            if stage.mode == "sft":  # the others end with a report of their own
                losses = [row["eval/loss"] for row in log.read_records(folder / "metrics.jsonl") if "eval/loss" in row]
                change = f"{losses[0]:.2f} to {losses[-1]:.2f} nats per token"
                say(f"{stage.name}: its loss on val answers went from {change}")
            if stage.mode in ("sft", "rl"):
                start = stage.flags.get("model.adapter") or stage.flags.get("model.base_checkpoint")
                start = start or cfg.model.adapter or cfg.model.base_checkpoint
                answers.show(str(start), str(folder / "final"))
        dist.barrier()
    if dist.is_main():
        os.replace(study.draft, study.folder / "config.yml")
    dist.barrier()
    return result


def run_script(mode, draft, flags, *words):
    """What the main of a mode's script returns, with the config in `draft` and those of the flags that it reads."""
    sections = ("", *SCRIPTS[mode].SECTIONS)
    read = {key: value for key, value in flags.items() if key.rpartition(".")[0].partition(".")[0] in sections}
    return SCRIPTS[mode].main(["--config", str(draft), *arguments(read), *words])


def arguments(flags):
    """{key: value} as a command line."""
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def time_stage(study, stage, timed):
    """Seconds that a stage will take: a step, as --explain runs it, times the steps until its budget is spent.

    What earlier stages would leave is not there yet: without it the step starts from the base, on the data, with the
    heuristic reward. None where it cannot, as SFT on samples of data that has prompts alone. timed: {what was timed:
    seconds for each token of the budget}, is added to.
    """
    flags, waits = study.flags(stage), False
    for key, file in EARLIER.items():
        if key in flags and not (Path(flags[key]) / file).is_file():
            del flags[key]
            flags |= {"reward.type": "heuristic"} if key == "reward.checkpoint" else {}
            if key == "dataset_path":
                waits = True
                del flags["data_keys"]  # which was for that data alone
    cfg = config.load_config(study.draft, flags)
    budget, kind = cfg.training.budget_tokens or cfg.training.budget_flops or 1, (stage.mode, cfg.rl.algorithm)
    if waits and not any(record["response"] for record in data.from_config(cfg, "train")):
        return None
    if kind not in timed:
        with log.silent(), tempfile.TemporaryDirectory() as folder:
            if stage.mode == "samples":
                spent = "tokens_seen" if cfg.training.budget_tokens else "flops_seen"
                cfg.training.budget_tokens = 1
                record = rejection.sample_passes(cfg, rejection.load_prompts(cfg)[1], Path(folder), ["timed"])[-1]
                timed[kind] = record["seconds"] / record[spent]
            else:
                timed[kind] = run_script(stage.mode, study.draft, flags, "--explain")["expected_seconds"] / budget
    return timed[kind] * budget


def compare(cfg, arms, plan, folders, out):
    """The base, floors and all policies that were trained, by evaluate.py on the same test prompts.

    folders: of each seed's stages; what judges is that of the first.
    """
    say("\ncomparison: the base and what was trained, on the same test prompts")
    trained, full, mode = [stage.name for stage in plan], cfg.model.peft_type == "none", cfg.training.mode
    last = {"sft": "sft", "staged": "rl"} if mode == "staged" else {mode: mode}
    if arms:
        last = {arm: "staged-rl" if arm == "staged" else arm for arm in arms if arm not in ("base", "half")}
    systems = [f"base={cfg.model.base_checkpoint}"]
    systems += [f"{name}={folder / stage / 'final'}" for name, stage in last.items() for folder in folders]
    if arms and "half" in arms:
        systems += [f"{name}-half={folder / stage / 'final'}@0.5" for name, stage in last.items() for folder in folders]
    flags = {"logging.output_dir": out, "logging.run_name": "comparison"}
    flags["model.base_checkpoint"] = cfg.model.base_checkpoint  # adapters may name the place where it lay before
    if "reward" in trained and (arms or not full or mode == "rl"):  # after full SFT it belongs to another base
        flags["reward.checkpoint"] = folders[0] / "reward" / "final"
    if "judge" in trained:
        flags["evaluation.reward_checkpoint"] = folders[0] / "judge" / "final"
    return evaluate.main(["--config", str(out / "config.yml"), "--checkpoints", *systems, *arguments(flags)])


@command
def main(argv=None):
    # --- config: training.mode names the stages
    cfg, job = config.parse_args(**FLAGS, argv=argv)
    arms = None if job.paradigms is None else [word.strip() for word in job.paradigms.split(",")]
    seeds = None if job.seeds is None else config.seeds(job.seeds)
    if arms is not None:
        check_arms(cfg, arms, job.paradigms)
    out = Path(cfg.logging.output_dir) / config.run_name(cfg, job.config, "staged")
    plan = stages(cfg, arms, out)
    for algorithm in {stage.flags.get("rl.algorithm", cfg.rl.algorithm) for stage in plan if stage.mode == "rl"}:
        train_rl.check(Config(**vars(cfg.rl) | {"algorithm": algorithm}), algorithm != "dpo")  # before hours of SFT
    if len(plan) == 1 and not arms and not seeds:  # a single stage is its script's own run
        return SCRIPTS[plan[0].mode].main(argv)
    if not arms and cfg.training.mode == "reward":
        raise UserError("--seeds: several reward models are trained by train_reward.py --seeds")

    # --- what the comparison will need, before anything is trained
    base_folder, comparable = base.resolve(cfg.model.base_checkpoint), True
    try:
        evaluate.check_metrics(cfg)
        metrics.require(cfg.task)
        records = data.from_config(cfg, cfg.evaluation.split)
        longest = cfg.training.max_seq_length - cfg.evaluation.max_new_tokens
        measure.items(records, base.load_tokenizer(base_folder), longest, cfg.evaluation.max_items, cfg.seed)
    except UserError as error:
        if arms:
            raise
        comparable = False
        log.warn(f"there will be no comparison at the end: {error}")
    if arms:
        check_pairs(cfg, arms)

    # --- distributed; each seed's folder and the config that its stages read
    fingerprint = base.fingerprint(base_folder)
    if cfg.model.peft_type != "none" and any(stage.mode == "rl" for stage in plan):  # before hours of SFT
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
        studies[-1].prepare()

    # --- stages: those that are finished with these settings are skipped
    result = None  # of the last stage, where it was not skipped
    for study in studies:
        if seeds:
            say_plan(studies, time_stage)
            say(f"\nseed {study.cfg.seed}")
        result = run_stages(study)
    if seeds and dist.is_main():
        log.replace(out / "config.yml", config.dump(cfg))
    dist.barrier()
    return compare(cfg, arms, studies[0].plan, [study.folder for study in studies], out) if comparable else result


if __name__ == "__main__":
    main()
