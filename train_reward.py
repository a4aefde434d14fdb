"""Reward model: Bradley-Terry on preference pairs, as a LoRA adapter and a scalar head on a frozen Gemma 3.

    loss = mean over the step's pairs of  -log sigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2

r is read at the last token of prompt and answer (its <end_of_turn>); the prompt that the two answers share is computed
once. c is reward.center_coefficient. Left out, compared with TRL's RewardTrainer: full fine-tuning, since policy,
reference, critic and reward model share one base here. If a task's data has no pairs, they are made from the reference
answers and from samples of the model before training, ranked by the task's metric.

    python train_reward.py --config configs/reward_270m.yml --debug                    two cores, nothing to download
    python train_reward.py --config configs/reward_270m.yml --explain                  what would be trained
    python train_reward.py --config configs/reward_270m.yml --device cpu               a laptop
    python train_reward.py --config configs/reward_270m.yml --training.micro_batch_tokens 16384       one GPU
    python train_reward.py --config configs/reward_270m.yml --seeds 0,1,2,3               the members of an ensemble
    torchrun --nproc-per-node 8 train_reward.py --config configs/reward_270m.yml --training.batch_size 128
Run the same command again to resume. At its end report.json compares the model with rules that need no training, and
reliability.png shows how far its probabilities can be trusted.
"""

import argparse
import gc

from common import config

SECTIONS = ("model", "training", "rl", "reward", "logging")  # of rl only how to sample, where pairs have to be made
JOBS = (config.EXPLAIN, config.SEEDS)
FLAGS = dict(script="train_reward.py", description=__doc__, sections=SECTIONS, modes=("reward",), jobs=JOBS)
if __name__ == "__main__":
    config.check_flags(**FLAGS)  # before torch is imported, which takes seconds

import numpy as np
import torch

from common import (
    chat,
    data,
    dist,
    functions,
    log,
    losses,
    model,
    optim,
    preferences,
    reward_model,
    roles,
    stats,
    tasks,
)
from common import pairs as preference_pairs
from common import rewards as heuristics
from common.log import UserError, command, say
from common.run import Run
from common.runtime import explain, flops, recompute, resume

ADAPTER = "reward"  # its name in the model
SAMPLED = "/sample"  # ends the id of a pair whose better answer is a sample, not a reference
NOT_READ = (  # settings of the policy's reward, which a resumed run may change
    *("rl.", "reward.type", "reward.alpha", "reward.beta", "reward.checkpoint", "reward.ensemble", "reward.function"),
    *("reward.normalize_rewards", "reward.clip_rewards", "reward.heuristic."),
)
PANELS = (
    ("loss (nats per pair)", ("loss", "eval/loss")),
    ("pair accuracy", ("accuracy", "eval/accuracy")),
    ("gradient norm", ("grad_norm",)),
)


@torch.no_grad()
def evaluate(net, head, pairs, budget, device):
    """Rewards of all held-out answers (pairs, 2), chosen first, gathered from all ranks, and their metrics."""
    net.eval()
    rewards = torch.zeros(len(pairs), 2, dtype=torch.float64)
    lengths = [data.pair_tokens(pair) for pair in pairs]
    for rows in data.held_out_micro_batches(lengths, budget):
        tokens, mask = data.collate_pairs([pairs[i] for i in rows], device)
        rewards[rows] = reward_model.scores(net, head, tokens, mask).cpu().double().view(-1, 2)
    rewards = dist.sum_tensor(rewards)
    net.train()
    chosen, rejected = rewards.T
    margins = torch.tensor([pair["margin"] for pair in pairs], dtype=torch.float64)
    on_references = rewards_of_references(rewards, pairs)
    return rewards, {
        "eval/loss": losses.reward_loss(chosen, rejected, margins).mean().item(),
        "eval/accuracy": stats.preference_accuracy(chosen - rejected)[0],
        "eval/margin": (chosen - rejected).mean().item(),
        "eval/reward_mean": on_references.mean().item(),
        "eval/reward_std": on_references.std(correction=0).item(),
    }


def rewards_of_references(rewards, pairs):
    """Of rewards (pairs, 2) those of the chosen answers that are references, not samples; where none is, of all."""
    of_references = [not pair["id"].endswith(SAMPLED) for pair in pairs]
    return rewards[of_references, 0] if any(of_references) else rewards[:, 0]


def alike(record):
    """The warning where an evaluation's reference answers all have the same reward."""
    return [reward_model.ALIKE] if record.get("eval/reward_std", 1.0) < heuristics.SMALLEST_STD else []


def make_pairs(net, tokenizer, records, sampling, task):
    """Up to two pairs per record by the task's metric: its reference and its best sample, each against its worst one.

    The first only where the worst sample scores below 1, the second only where best and worst score differently.
    """
    metric = tasks.load(task).rank
    if metric is None:
        raise UserError(
            f"task {task}: its data has no pairs, and it ranks no samples: bring data with rejected answers"
        )

    def score(rows, answers):
        texts = [chat.decode(tokenizer, ids) for ids in answers]
        values = [
            functions.number(metric(text, row["reference"]), f"task: {task}: rank", row["id"], text)
            for row, text in zip(rows, texts, strict=True)
        ]
        return torch.tensor(values), [{metric.__name__: value} for value in values]

    answers = preferences.sample(net, tokenizer, records, sampling)
    made = []
    sides = preferences.best_and_worst(records, answers, tokenizer, score)
    for record, (best, worst) in zip(records, sides, strict=True):
        if worst["score"] < 1:
            made.append(preferences.pair_record(record, {"text": record["reference"]}, worst))
        if best["score"] > worst["score"]:
            made.append(preferences.pair_record(record, best, worst, SAMPLED))
    return made


def load_pairs(run, net, tokenizer, explain_only):
    """{split: records} with pairs of the data, or of the base's own samples where the data has none."""
    cfg, rl = run.cfg, run.cfg.rl
    records = data.load_train_and_val(cfg)
    paired = any(record["rejected"] is not None for rows in records.values() for record in rows)
    if paired or tasks.load(cfg.task).has_pairs:
        return records
    records = preferences.answerable(records, tokenizer, cfg.training.max_seq_length - rl.max_new_tokens)
    sampling = {"group_size": rl.group_size, "max_new_tokens": rl.max_new_tokens, "temperature": rl.temperature}
    key = resume.fingerprint([run.start_key, sampling, cfg.seed, tasks.fingerprint(cfg.task), records])
    if explain_only:  # one batch is enough, and it leaves nothing in the cache
        records, key = {split: rows[: cfg.training.batch_size] for split, rows in records.items()}, None

    usable = {split: [record for record in rows if record["reference"]] for split, rows in records.items()}
    for split, rows in usable.items():
        if not rows:
            raise UserError(f"{split}: no record has a reference to compare samples with")

    def make(split):
        return make_pairs(net, tokenizer, usable[split], sampling | {"seed": cfg.seed}, cfg.task)

    return preferences.cached(key, ("train", "val"), make)


def report(rewards, pairs, task):
    """What held-out rewards (pairs, 2) say: figures with n and a 95 % interval, beside floors without a model."""
    margins = (rewards[:, 0] - rewards[:, 1]).numpy()
    lengths = [sum(pair[side]["mask"]) for pair in pairs for side in ("chosen", "rejected")]  # tokens
    rules = preferences.floor_margins(pairs, task)
    shorter, near, accuracy = rules["shorter answer"], preferences.MATCHED, preferences.accuracy
    only_model, only_floor, p = stats.mcnemar(margins > 0, np.array(shorter) > 0)
    calibration_error, bins = stats.calibration(torch.sigmoid(rewards[:, 0] - rewards[:, 1]).numpy())
    sampled = np.array([pair["id"].endswith(SAMPLED) for pair in pairs])
    on_references = rewards_of_references(rewards, pairs)
    return {
        "held_out": accuracy(margins[~sampled]),
        **({"held_out_between_samples": accuracy(margins[sampled])} if sampled.any() else {}),
        f"length_matched_within_{near}_tokens": accuracy(stats.length_matched(margins, shorter, near)),
        "floors": {name: accuracy(values) for name, values in rules.items()},
        "against_shorter_answer": {"only_model_right": only_model, "only_floor_right": only_floor, "p": p},
        "calibration_error": calibration_error,
        "reliability": [{"predicted": mean, "observed": share, "count": n} for mean, share, n in bins],
        "correlation_of_reward_and_length": stats.correlation(rewards.flatten().numpy(), lengths),
        "reward_on_reference_answers": {
            "mean": on_references.mean().item(),
            "std": on_references.std(correction=0).item(),
        },
    }


def write_report(run_dir, rows):
    """Write report.json and reliability.png, and say what the model is worth beside the best floor."""
    log.write_json(run_dir / "report.json", rows)
    log.save_picture(run_dir / "reliability.png", lambda: log.reliability_diagram(rows["reliability"]))
    name, floor = max(rows["floors"].items(), key=lambda item: item[1]["accuracy"])
    shown = {"reward model": rows["held_out"], "reward model between samples": rows.get("held_out_between_samples")}
    for title, row in (shown | {f"best rule without a model, {name}": floor}).items():
        if row and row["pairs"]:
            say(f"{title}: accuracy {preferences.in_words(row)}")
    say(f"wrote {run_dir}/report.json and reliability.png")


def train_seeds(cfg, job, argv):
    """A run for each of --seeds, in the folder NAME-seedN; those that are finished only say so. -> the last record"""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds")
    rest, name = parser.parse_known_args(argv)[1], config.run_name(cfg, job.config, "reward")
    device, folders, record = model.pick_device(cfg.device), [], None
    dist.init(device, cfg.training.timeout)
    log.on_exit(dist.end)  # one group for all runs
    for seed in config.seeds(job.seeds):
        folders.append(f"{cfg.logging.output_dir}/{name}-seed{seed}")
        say(f"\nseed {seed}: {folders[-1]}")
        log.reset_peak_memory()
        record = main([*rest, "--seed", str(seed), "--logging.run_name", f"{name}-seed{seed}"])
        gc.collect()
        model.trim_memory(device)
    if not job.explain:
        say("\nas an ensemble: --reward.checkpoint " + ",".join(f"{folder}/final" for folder in folders))
    return record


@command
def main(argv=None):
    # --- config, device, process group, run folder
    cfg, job = config.parse_args(**FLAGS, argv=argv)
    if job.seeds is not None:
        return train_seeds(cfg, job, argv)
    training, peft = cfg.training, cfg.model
    if peft.peft_type == "none":
        raise UserError("model.peft_type: a reward model is an adapter on the policy's base: lora or qlora")
    budgets = {training.budget_tokens, training.budget_flops}
    if training.packing or training.last_turn_only or budgets != {None}:
        raise UserError(
            "training.packing, last_turn_only, budget_tokens and budget_flops: not for pairs, leave them out"
        )
    run = Run(cfg, job, "reward", PANELS)

    # --- model: an adapter on the frozen base, and a scalar head
    net, tokenizer, *_ = roles.load_policy(run.base_folder, run.device, run.dtype, peft, cfg.seed, ADAPTER)
    head = reward_model.new_head(net.config.hidden_size, run.device)
    named = reward_model.parameters(net, ADAPTER, head)
    parameters = list(named.values())
    count = sum(p.numel() for p in parameters)
    say(f"{peft.base_checkpoint} on {run.device} in {run.dtype}, {peft.peft_type}: {count:,} parameters to train")

    # --- pairs: token ids of the chosen and the rejected answer after one prompt
    records = load_pairs(run, net, tokenizer, job.explain)
    dataset = preference_pairs.encode(records, tokenizer, training.max_seq_length, training.batch_size, cfg.seed)
    train, val, batches = dataset.train, dataset.val, dataset.batches
    steps = training.epochs * batches.per_epoch if training.max_steps is None else training.max_steps
    recompute.choose(run, net, parameters, batches.lengths, batches.tokens_per_step, logits=False)
    if job.explain:
        shown = preference_pairs.shown_by_explain(dataset)
        explain.show(shown, tokenizer, net, named, training.micro_batch_tokens, logits=False)

    # --- optimizer; resume from the newest whole checkpoint of the same config, data, base and number of ranks
    optimizer = torch.optim.AdamW(optim.adamw_groups(named, training.learning_rate, training.weight_decay))
    facts = {"data": resume.fingerprint([[p["id"], p["margin"], p["chosen"], p["rejected"]] for p in train + val])}
    reward_stats = {"base_checkpoint": run.base_name, "base": run.base_fingerprint, "task": cfg.task}
    reward_stats |= {"mean": 0.0, "std": 1.0}
    step_folder = run.start(steps, batches.tokens_per_step, facts, not_read=("evaluation.", *NOT_READ))
    if step_folder:
        # the base may have been moved since
        reward_stats = reward_model.restore(net, ADAPTER, head, step_folder) | {"base_checkpoint": run.base_name}
        optim.load(optimizer, named, step_folder)

    # --- loop: set lr -> evaluate -> save -> make batch -> update -> log. Step 0 evaluates the fresh head.
    net.train()
    rewards = None
    for step in range(run.step, steps + 1):
        lr = optim.set_learning_rate(optimizer, step, steps, training)
        if run.evaluation_due(step):
            rewards, metrics = evaluate(net, head, val, training.micro_batch_tokens, run.device)
            run.keep_evaluation(metrics)
            reward_stats |= {"mean": metrics["eval/reward_mean"], "std": metrics["eval/reward_std"]}
        if run.save_due(step) and dist.is_main():
            with run.new_checkpoint(step) as step_folder:
                reward_model.save(net, tokenizer, step_folder, ADAPTER, head, reward_stats)
                optim.save(optimizer, named, step_folder)
        if run.finished(step):
            break
        resume.seed_step(cfg.seed, step, dist.rank())

        # update: every rank draws the same pairs and takes its share
        batch = batches[step]
        optimizer.zero_grad()
        loss = hits = torch.zeros((), device=run.device)
        for micro in preference_pairs.training_micro_batches(dataset, step, training.micro_batch_tokens):
            tokens, mask = data.collate_pairs([train[i] for i in micro], run.device)
            chosen, rejected = reward_model.scores(net, head, tokens, mask).view(-1, 2).T  # (pairs,) each
            margin = torch.tensor([train[i]["margin"] for i in micro], device=run.device)
            # >>> edit here: the objective, a loss for each pair
            pair_loss = losses.reward_loss(chosen, rejected, margin)
            pair_loss = pair_loss + cfg.reward.center_coefficient * losses.centering_loss(chosen, rejected)
            micro_loss = pair_loss.sum() / len(batch)
            micro_loss.backward()
            loss, hits = loss + micro_loss.detach(), hits + (chosen > rejected).sum()
        grad_norm = optim.clip_gradients(parameters, training.max_grad_norm)
        loss, hits = dist.sum_all(loss, hits)
        run.check_finite({"loss": loss, "grad_norm": grad_norm}, [train[i]["id"] for i in batch])
        optimizer.step()
        spans = [span for i in batch for span in data.pair_spans(train[i])]
        cost = flops.update(net.config, spans, adapter=count)
        run.count(tokens=sum(batches.lengths[i] for i in batch), flops=cost, pairs=len(batch))

        # log
        metrics = {"loss": loss, "grad_norm": grad_norm, "accuracy": hits / len(batch), "lr": lr}
        run.log(step, metrics | {"epoch": step / batches.per_epoch}, alike(run.record))

    # --- report
    record = run.finish(alike(run.record))
    if job.explain:
        return record
    if rewards is None:  # resumed where all was done but this
        rewards, _ = evaluate(net, head, val, training.micro_batch_tokens, run.device)
    if dist.is_main():
        write_report(run.folder, report(rewards, val, cfg.task))
    return record


if __name__ == "__main__":
    main()
