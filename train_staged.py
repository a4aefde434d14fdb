"""SFT, reward model and RL from one config, by calling the scripts' mains; and the comparison of the paradigms.

    training.mode sft, reward    train_sft.py, train_reward.py
    training.mode rl             (train_reward.py ->) train_rl.py
    training.mode staged         train_sft.py -> (train_reward.py ->) train_rl.py, whose reference is the end of SFT
    --paradigms sft,rl,staged    these arms at equal cost: tokens trained + tokens sampled = training.budget_tokens
                                 (staged spends half on SFT and half on RL); then evaluate.py compares them

A reward model is trained where the reward wants one and reward.checkpoint names none; its cost is shown apart. In a
comparison on preference data it learns from one half of the pairs, and from the other half a second one, which no
policy sees, to judge by. Left out: a search over settings; all stages share one config.

    python train_staged.py --config configs/staged_sft_then_ppo.yml --debug
    python train_staged.py --config configs/staged_sft_then_ppo.yml --training.budget_tokens 2000000 \\
        --paradigms sft,rl,staged
    torchrun --nproc-per-node 8 train_staged.py --config configs/staged_sft_then_ppo.yml
Run the same command again to resume: finished stages are skipped, an unfinished one goes on bit for bit.
"""

import functools
import gc
import hashlib
import json
import os
from pathlib import Path

import evaluate
import train_reward
import train_rl
import train_sft
from common import config, data, dist, log, model, rewards
from common.evaluation import measure, metrics
from common.log import UserError, command, say
from common.runtime import base, checkpoint

SECTIONS = ("model", "training", "rl", "reward", "evaluation", "logging")
PARADIGMS = ("sft", "rl", "staged")
JOBS = (
    ("--paradigms", {"metavar": "A,B", "help": "train these arms at equal cost and compare them: sft, rl, staged"}),
)
MAINS = {"sft": train_sft.main, "reward": train_reward.main, "rl": train_rl.main}
ENDLESS = 10**6  # epochs: the budget ends the run


def stages(cfg, arms, out):
    """The runs in order: [(name, mode, {flag: value})], in folders out/name; without `arms` those of training.mode."""
    mode, full, budget = cfg.training.mode, cfg.model.peft_type == "none", cfg.training.budget_tokens
    online = {"rl", "staged"} & {*(arms or [mode])} and (cfg.rl.algorithm, cfg.rl.pairs) != ("dpo", "data")
    rewarded = bool(online) and rewards.wants_model(cfg.reward) and cfg.reward.checkpoint is None
    judged = bool(arms) and cfg.task == "safety" and cfg.evaluation.reward_checkpoint is None
    pairs = {"training.budget_tokens": "null"} | ({"model.peft_type": "lora"} if full else {})
    reward = [("reward", "reward", pairs | ({"dataset_path": out / "pairs-reward"} if judged else {}))] * rewarded
    judge = [("judge", "reward", pairs | {"dataset_path": out / "pairs-judge", "seed": cfg.seed + 1})] * judged
    scorer = {"reward.checkpoint": out / "reward" / "final"} if rewarded else {}
    half = {} if budget is None else {"training.budget_tokens": max(1, budget // 2)}

    def after(name):
        return {"model.base_checkpoint" if full else "model.adapter": out / name / "final"}

    if arms:
        whole = {"training.max_steps": "null", "rl.max_steps": "null", "training.epochs": ENDLESS,
                 "training.patience": "null"}  # fmt: skip
        runs = {"sft": [("sft", "sft", whole)], "rl": [("rl", "rl", whole | scorer)],
                "staged": [("staged-sft", "sft", whole | half),
                           ("staged-rl", "rl", whole | half | scorer | after("staged-sft"))]}  # fmt: skip
        return [*reward, *judge, *(stage for arm in PARADIGMS if arm in arms for stage in runs[arm])]
    if mode == "staged":
        started = [(name, stage, flags | (after("sft") if full else {})) for name, stage, flags in reward]
        return [("sft", "sft", half), *started, ("rl", "rl", half | scorer | after("sft"))]
    return [*reward, ("rl", "rl", scorer)] if mode == "rl" else [(mode, mode, {})]


def write_halves(cfg, out):
    """Cut the pairs of train and val in two by a hash of their first turn: out/pairs-reward and out/pairs-judge."""
    for split in ("train", "val"):
        halves = {"reward": [], "judge": []}
        for record in data.load(cfg.task, cfg.dataset_path, split, cfg.debug, cfg.seed):
            first = record["prompt"][0]["content"].strip().lower()
            odd = hashlib.sha256(f"half/{first}".encode()).digest()[0] % 2
            halves["judge" if odd else "reward"].append(record)
        for name, records in halves.items():
            if not records:
                raise UserError(f"{split}: no pair left for the half of the {name} model; more of them are needed")
            path = out / f"pairs-{name}" / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            draft = path.with_suffix(".tmp")
            draft.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
            os.replace(draft, path)


def settings(cfg, flags, fingerprint):
    """What decides the outcome of a stage: its resolved config, the base, the hashes of its data."""
    outside = ("evaluation.", "logging.", "training.resume_changed")
    kept = {key: value for key, value in config.flatten(cfg).items() if not key.startswith(outside)}
    kept |= {key: str(value) for key, value in flags.items()}
    folder = kept.get("dataset_path") or (None if cfg.debug else Path(__file__).parent / "data" / cfg.task)
    files = [Path(folder) / f"{split}.jsonl" for split in ("train", "val")] if folder else []
    judge, hashes = kept["reward.checkpoint"], [checkpoint.sha256(path) for path in files if path.is_file()]
    trained = judge and (Path(judge) / "adapter_config.json").is_file()
    return kept | {"base": fingerprint, "data": hashes, "score": model.adapter_fingerprint(judge) if trained else None}


@command
def main(argv=None):
    # --- config: training.mode names the stages
    cfg, job = config.parse_args("train_staged.py", __doc__, SECTIONS, (), argv, JOBS)
    arms = None if job.paradigms is None else [word.strip() for word in job.paradigms.split(",")]
    if arms is not None:
        unknown = [arm for arm in arms if arm not in PARADIGMS]
        if unknown or len(set(arms)) != len(arms):
            raise UserError(
                f"--paradigms: expected some of {','.join(PARADIGMS)}, each once, got {job.paradigms!r:.80}"
            )
        if cfg.training.budget_tokens is None:
            raise UserError("--paradigms compares at equal cost: set --training.budget_tokens, the tokens of each arm")
        if cfg.model.adapter:
            raise UserError("model.adapter: all arms start from the base; leave it out, or merge it into a base first")
        if cfg.model.peft_type == "none" and "staged" in arms and rewards.wants_model(cfg.reward):
            raise UserError(
                "model.peft_type none: after full SFT the reward model's base is gone; compare with "
                "lora or qlora, or with --reward.type heuristic"
            )
    out = Path(cfg.logging.output_dir) / config.run_name(cfg, job.config, "staged")
    plan = stages(cfg, arms, out)
    if any(stage == "rl" for _, stage, _ in plan):  # before hours of SFT
        train_rl.check(cfg.rl, cfg.rl.algorithm != "dpo")
    if arms:
        metrics.require(cfg.task)
    if len(plan) == 1 and not arms:  # a single stage is its script's own run
        return MAINS[plan[0][1]](argv)

    base_folder = base.resolve(cfg.model.base_checkpoint)
    if arms:  # what the comparison will need, before anything is trained
        records = data.load(cfg.task, cfg.dataset_path, "test", cfg.debug, cfg.seed)
        longest = cfg.training.max_seq_length - cfg.evaluation.max_new_tokens
        measure.items(records, base.load_tokenizer(base_folder), longest, cfg.evaluation.max_items, cfg.seed)

    # --- distributed, run folder, the config that all stages read: config.yml stays until no stage refuses the new one
    config_file, draft, done_file = out / "config.yml", out / ".tmp-config.yml", out / "stages.json"
    fingerprint = base.fingerprint(base_folder)
    given = cfg.reward.checkpoint
    if given and cfg.model.peft_type != "none" and any(stage == "rl" for _, stage, _ in plan):  # before hours of SFT
        base.check_record(given, "reward.checkpoint", base_folder, fingerprint, cfg.model.peft_type == "qlora")
    dist.init(model.pick_device(cfg.device), cfg.training.timeout)
    log.on_exit(dist.end)  # one group for all stages
    if dist.is_main():
        log.on_exit(functools.partial(os.close, checkpoint.lock_run(out)))
        if any(name == "judge" for name, _, _ in plan):
            write_halves(cfg, out)
        log.on_exit(functools.partial(draft.unlink, missing_ok=True))
        log.replace(draft, config.dump(cfg))
        if not config_file.exists():
            log.replace(config_file, config.dump(cfg))
    dist.barrier()

    # --- stages: those that are finished with these settings are skipped
    result = None  # what the last stage returned, where it was not skipped
    for number, (name, mode, changes) in enumerate(plan, 1):
        alone = {} if mode == "sft" else {"training.packing": "false", "training.last_turn_only": "false"}
        flags = {"training.mode": mode} | alone | changes | {"logging.output_dir": out, "logging.run_name": name}
        decisive, final = settings(cfg, flags, fingerprint), out / name / "final"
        try:
            done = json.loads(done_file.read_text())
        except (OSError, ValueError):  # none yet, or damaged: each script then sees for itself that it is done
            done = {}
        if dist.any_rank(dist.is_main() and done.get(name) == decisive and final.is_dir() and checkpoint.verify(final)):
            say(f"stage {number} of {len(plan)}, {name}: finished before")
            continue
        say(f"stage {number} of {len(plan)}, {name}")
        log.reset_peak_memory()
        sections = ("", *{"sft": train_sft, "reward": train_reward, "rl": train_rl}[mode].SECTIONS)
        arguments = [word for key, value in flags.items() if key.rpartition(".")[0].partition(".")[0] in sections
                 for word in (f"--{key}", str(value))]  # fmt: skip
        result = MAINS[mode](["--config", str(draft), *arguments])
        gc.collect()
        model.trim_memory(model.pick_device(cfg.device))
        if dist.is_main():
            log.write_json(done_file, done | {name: json.loads(json.dumps(decisive, default=str))})
        dist.barrier()
    if dist.is_main():
        os.replace(draft, config_file)
    dist.barrier()
    if not arms:
        return result

    # --- comparison: the base, floors and all arms on the same held-out items
    names = {"sft": "sft", "rl": "rl", "staged": "staged-rl"}
    systems = [f"base={cfg.model.base_checkpoint}", *(f"{arm}={out / names[arm] / 'final'}" for arm in arms)]
    flags = {"reward.checkpoint": out / "reward" / "final"} if any(name == "reward" for name, _, _ in plan) else {}
    if any(name == "judge" for name, _, _ in plan):
        flags["evaluation.reward_checkpoint"] = out / "judge" / "final"
    flags |= {"logging.output_dir": out, "logging.run_name": "comparison"}
    arguments = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return evaluate.main(["--config", str(out / "config.yml"), "--checkpoints", *systems, *arguments])


if __name__ == "__main__":
    main()
