"""SFT, reward model and RL from one config, by calling the scripts' mains; and the comparison of the paradigms.

    training.mode sft, reward    train_sft.py, train_reward.py
    training.mode rl             (train_reward.py ->) train_rl.py
    training.mode staged         train_sft.py -> (train_reward.py ->) train_rl.py, whose reference is the end of SFT
    --paradigms sft,rl,staged    these arms at equal cost: tokens trained + tokens sampled = training.budget_tokens
                                 (staged spends half on SFT and half on RL)

After each stage one prompt of val is answered before and after it; at the end evaluate.py compares the base with what
was trained. A reward model is trained where the reward wants one and reward.checkpoint names none; its cost is shown
apart. In a comparison on preference data it learns from one half of the pairs, and from the other half a second one,
which no policy sees, to judge by. Left out: a search over settings; all stages share one config.

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

import torch

import evaluate
import train_reward
import train_rl
import train_sft
from common import chat, config, data, dist, log, model, prompts, rewards, rollouts, tasks
from common.evaluation import measure, metrics
from common.log import UserError, command, say
from common.runtime import base, checkpoint, sources

SECTIONS = ("model", "training", "rl", "reward", "evaluation", "logging")
PARADIGMS = ("sft", "rl", "staged")
JOBS = (
    ("--paradigms", {"metavar": "A,B", "help": "train these arms at equal cost and compare them: sft, rl, staged"}),
)
SCRIPTS = {"sft": train_sft, "reward": train_reward, "rl": train_rl}
PURPOSES = {  # of a stage, by its name
    "sft": "learns to answer as the data does",
    "rl": "raises the reward of the policy's own answers",
    "reward": "a reward model, which RL will maximise",
    "judge": "a second reward model that no policy is trained on",
    "staged-sft": "the first half of the staged arm: learns to answer as the data does",
    "staged-rl": "the second half of the staged arm: raises the reward of its own answers",
}
ENDLESS = 10**6  # epochs: the budget ends the run
SHOWN_TOKENS, SHOWN_CHARACTERS = 48, 200  # of the answers before and after a stage


def stages(cfg, arms, out):
    """The runs in order: [(name, mode, {flag: value})], in folders out/name; without `arms` those of training.mode."""
    mode, full, budget = cfg.training.mode, cfg.model.peft_type == "none", cfg.training.budget_tokens
    online = {"rl", "staged"} & {*(arms or [mode])} and (cfg.rl.algorithm, cfg.rl.pairs) != ("dpo", "data")
    rewarded = bool(online) and rewards.wants_model(cfg.reward) and cfg.reward.checkpoint is None
    judged = bool(arms) and tasks.load(cfg.task).has_pairs and cfg.evaluation.reward_checkpoint is None
    pairs = {"training.budget_tokens": "null"} | ({"model.peft_type": "lora"} if full else {})

    def halved(name):
        return {"dataset_path": out / f"pairs-{name}", "data_keys": "null"}  # records as write_halves makes them

    reward = [("reward", "reward", pairs | (halved("reward") if judged else {}))] * rewarded
    judge = [("judge", "reward", pairs | halved("judge") | {"seed": cfg.seed + 1})] * judged
    scorer = {"reward.checkpoint": out / "reward" / "final"} if rewarded else {}
    half = {} if budget is None else {"training.budget_tokens": max(1, budget // 2)}

    def after(name):
        return {"model.base_checkpoint" if full else "model.adapter": out / name / "final"}

    if arms:
        whole = dict.fromkeys(("training.max_steps", "rl.max_steps", "training.patience"), "null")
        whole["training.epochs"] = ENDLESS
        second = whole | half | scorer | after("staged-sft")
        runs = {
            "sft": [("sft", "sft", whole)],
            "rl": [("rl", "rl", whole | scorer)],
            "staged": [("staged-sft", "sft", whole | half), ("staged-rl", "rl", second)],
        }
        return [*reward, *judge, *(stage for arm in PARADIGMS if arm in arms for stage in runs[arm])]
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
    judge = kept["reward.checkpoint"]
    trained = judge and (Path(judge) / "adapter_config.json").is_file()
    return kept | {"base": fingerprint, "data": hashes, "score": model.adapter_fingerprint(judge) if trained else None}


def check_arms(cfg, arms, text):
    """UserError for --paradigms that cannot be compared."""
    if arms is not None:
        unknown = [arm for arm in arms if arm not in PARADIGMS]
        if unknown or len(set(arms)) != len(arms):
            raise UserError(f"--paradigms: expected some of {','.join(PARADIGMS)}, each once, got {text!r:.80}")
        if cfg.training.budget_tokens is None:
            raise UserError("--paradigms compares at equal cost: set --training.budget_tokens, the tokens of each arm")
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


def compare(cfg, arms, plan, out):
    """The base, floors and all policies that were trained, by evaluate.py on the same test prompts."""
    say("\ncomparison: the base and what was trained, on the same test prompts")
    trained, full, mode = [name for name, _, _ in plan], cfg.model.peft_type == "none", cfg.training.mode
    folders = {"sft": "sft", "rl": "rl", "staged": "staged-rl"}
    if not arms:
        folders = {"sft": "sft", "staged": "rl"} if mode == "staged" else {"rl": "rl"}
    systems = [f"base={cfg.model.base_checkpoint}"]
    systems += [f"{name}={out / folders[name] / 'final'}" for name in arms or folders]
    flags = {"logging.output_dir": out, "logging.run_name": "comparison"}
    if "reward" in trained and (arms or not full or mode == "rl"):  # after full SFT it belongs to another base
        flags["reward.checkpoint"] = out / "reward" / "final"
    if "judge" in trained:
        flags["evaluation.reward_checkpoint"] = out / "judge" / "final"
    return evaluate.main(["--config", str(out / "config.yml"), "--checkpoints", *systems, *arguments(flags)])


def arguments(flags):
    """{key: value} as a command line."""
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


@command
def main(argv=None):
    # --- config: training.mode names the stages
    cfg, job = config.parse_args("train_staged.py", __doc__, SECTIONS, (), argv, JOBS)
    arms = None if job.paradigms is None else [word.strip() for word in job.paradigms.split(",")]
    check_arms(cfg, arms, job.paradigms)
    out = Path(cfg.logging.output_dir) / config.run_name(cfg, job.config, "staged")
    plan = stages(cfg, arms, out)
    if any(stage == "rl" for _, stage, _ in plan):  # before hours of SFT
        train_rl.check(cfg.rl, cfg.rl.algorithm != "dpo")
    if len(plan) == 1 and not arms:  # a single stage is its script's own run
        return SCRIPTS[plan[0][1]].main(argv)

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

    # --- distributed, run folder, the config that all stages read: config.yml stays until no stage refuses the new one
    config_file, draft, done_file = out / "config.yml", out / ".tmp-config.yml", out / "stages.json"
    fingerprint = base.fingerprint(base_folder)
    given = cfg.reward.checkpoint
    if given and cfg.model.peft_type != "none" and any(stage == "rl" for _, stage, _ in plan):  # before hours of SFT
        base.check_record(given, "reward.checkpoint", base_folder, fingerprint, cfg.model.peft_type == "qlora")
    dist.init(model.pick_device(cfg.device), cfg.training.timeout)
    log.on_exit(dist.end)  # one group for all stages
    if dist.is_main():
        log.on_exit(checkpoint.lock_run(out).release)
        if any(name == "judge" for name, _, _ in plan):
            write_halves(cfg, out)
        log.on_exit(functools.partial(draft.unlink, missing_ok=True))
        log.replace(draft, config.dump(cfg))
        if not config_file.exists():
            log.replace(config_file, config.dump(cfg))
    dist.barrier()

    # --- stages: those that are finished with these settings are skipped
    result, answers = None, Answers(cfg, base_folder)  # result: of the last stage, where it was not skipped
    for number, (name, mode, changes) in enumerate(plan, 1):
        alone = {} if mode == "sft" else {"training.packing": "false", "training.last_turn_only": "false"}
        flags = {"training.mode": mode} | alone | changes | {"logging.output_dir": out, "logging.run_name": name}
        decisive, final = settings(cfg, flags, fingerprint), out / name / "final"
        try:
            done = json.loads(done_file.read_text())
        except (OSError, ValueError):  # none yet, or damaged: each script then sees for itself that it is done
            done = {}
        if dist.any_rank(dist.is_main() and done.get(name) == decisive and final.is_dir() and checkpoint.verify(final)):
            say(f"stage {number} of {len(plan)}: {name}, finished before")
            continue
        say(f"\nstage {number} of {len(plan)}: {name}, {PURPOSES[name]}")
        log.reset_peak_memory()
        sections = ("", *SCRIPTS[mode].SECTIONS)
        read = {key: value for key, value in flags.items() if key.rpartition(".")[0].partition(".")[0] in sections}
        result = SCRIPTS[mode].main(["--config", str(draft), *arguments(read)])
        gc.collect()
        model.trim_memory(model.pick_device(cfg.device))
        if dist.is_main():
            log.write_json(done_file, done | {name: json.loads(json.dumps(decisive, default=str))})
            if mode == "sft":  # the others end with a report of their own
                losses = [r["eval/loss"] for r in log.read_records(out / name / "metrics.jsonl") if "eval/loss" in r]
                say(f"{name}: its loss on val answers went from {losses[0]:.2f} to {losses[-1]:.2f} nats per token")
            if mode != "reward":
                start = changes.get("model.adapter") or changes.get("model.base_checkpoint") or cfg.model.adapter
                answers.show(str(start or cfg.model.base_checkpoint), str(final))
        dist.barrier()
    if dist.is_main():
        os.replace(draft, config_file)
    dist.barrier()
    return compare(cfg, arms, plan, out) if comparable else result


if __name__ == "__main__":
    main()
