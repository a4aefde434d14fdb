"""Reward model: Bradley-Terry on preference pairs, as a LoRA adapter and a scalar head on a frozen Gemma 3.

    loss = mean over the step's pairs of  -log sigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2

r is read at the last token of prompt and answer (its <end_of_turn>); the prompt that the two answers share is computed
once. c is reward.center_coefficient. Left out, compared with TRL's RewardTrainer: full fine-tuning (policy, reference,
critic and reward model share one base here), gradient checkpointing. A task whose data has no pairs (clinical, conala)
gets them made: the reference and samples of the base, ranked by the task's metric.

    python train_reward.py --config configs/reward_270m.yml --debug                    two cores, nothing to download
    python train_reward.py --config configs/reward_270m.yml --explain                  what would be trained
    python train_reward.py --config configs/reward_270m.yml --device cpu               a laptop
    python train_reward.py --config configs/reward_270m.yml --training.micro_batch_tokens 16384       one GPU
    torchrun --nproc-per-node 8 train_reward.py --config configs/reward_270m.yml --training.batch_size 128
Run the same command again to resume. At its end report.json and reliability.png say what the model is worth beside
floors that need no training.
"""

import functools
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from common import base, chat, checkpoint, config, data, dist, explain, log, lora, losses, model

# isort: split
from common import preferences, resume, reward_model, stats, watch
from common import rewards as heuristics
from common.log import UserError, command, say, say_counts
from common.schedule import learning_rate

SECTIONS = ("model", "training", "rl", "reward", "logging")  # of rl, how to sample where pairs have to be made
JOBS = (("--explain", {"action": "store_true", "help": "show the first batch as it would be trained, then exit"}),)
NAME = "reward"  # of the adapter
SAMPLED = "/sample"  # ends the id of a pair whose better answer is a sample, not a reference
MATCHED = 5  # tokens by which two answers may differ and still count as equally long


@torch.no_grad()
def evaluate(net, head, examples, budget, device):
    """Rewards of all held-out answers (pairs, 2), chosen first, gathered from all ranks, and their metrics."""
    net.eval()
    found = torch.zeros(len(examples), 2, dtype=torch.float64)
    lengths = [data.pair_tokens(pair) for pair in examples]
    for rows in data.micro_batches(range(dist.rank(), len(examples), dist.world_size()), lengths, budget):
        tokens, mask = data.collate_pairs([examples[i] for i in rows], device)
        found[rows] = reward_model.scores(net, head, tokens, mask).cpu().double().view(-1, 2)
    found = dist.sum_tensor(found)
    net.train()
    margin = found[:, 0] - found[:, 1]
    good = found[[not example["id"].endswith(SAMPLED) for example in examples], 0]  # rewards of reference answers
    extra = torch.tensor([pair["margin"] for pair in examples], dtype=torch.float64)
    return found, {"eval/loss": losses.reward_loss(found[:, 0], found[:, 1], extra).mean().item(),
                   "eval/accuracy": stats.preference_accuracy(margin)[0], "eval/margin": margin.mean().item(),
                   "eval/reward_mean": good.mean().item(),
                   "eval/reward_std": good.std(correction=0).item()}  # fmt: skip


def make_pairs(net, tokenizer, records, sampling, task, split):
    """Two pairs a record, ranked by the task's metric: its reference and its best sample, each against its worst."""
    metric = {"clinical": heuristics.overlap, "conala": heuristics.sentence_bleu}[task]

    def score(rows, answers):
        texts = [chat.decode(tokenizer, ids) for ids in answers]
        found = [metric(text, row["reference"]) for row, text in zip(rows, texts)]
        return torch.tensor(found), [{metric.__name__: value} for value in found]

    usable, made = [record for record in records[split] if record["reference"]], []
    if not usable:
        raise UserError(f"{split}: no record has a reference to compare samples with")
    answers = preferences.sample(net, tokenizer, usable, sampling)
    for record, (best, worst) in zip(usable, preferences.best_and_worst(usable, answers, tokenizer, score)):
        if worst["score"] < 1:
            made.append(preferences.pair_record(record, {"text": record["reference"]}, worst))
        if best["score"] > worst["score"]:
            made.append(preferences.pair_record(record, best, worst, SAMPLED))
    return made


def report(found, examples, task):
    """What the held-out rewards are worth, each figure with n and a 95 % interval, beside floors without a model."""
    margins = (found[:, 0] - found[:, 1]).numpy()
    answers = [[sum(pair[side]["mask"]) for side in ("chosen", "rejected")] for pair in examples]  # tokens
    shorter = [b - a for a, b in answers]
    rules = {"shorter answer": shorter}
    if task == "safety":
        texts = [pair["texts"] for pair in examples]
        rules["refusal phrase"] = [heuristics.refuses(a) - heuristics.refuses(b) for a, b in texts]
        rules["fewer toxic words"] = [heuristics.toxicity(a) - heuristics.toxicity(b) for a, b in texts]

    def accuracy(values):
        if not len(values):
            return {"accuracy": None, "interval": None, "pairs": 0}
        rate, low, high = stats.preference_accuracy(values)
        return {"accuracy": rate, "interval": [low, high], "pairs": len(values)}

    right, floor = margins > 0, np.array(shorter) > 0
    only, other, chance = stats.mcnemar(right, floor)
    error, rows = stats.calibration(torch.sigmoid(found[:, 0] - found[:, 1]).numpy())
    sampled = torch.tensor([pair["id"].endswith(SAMPLED) for pair in examples]).numpy()
    return {
        "held_out": accuracy(margins[~sampled]),
        **({"held_out_between_samples": accuracy(margins[sampled])} if sampled.any() else {}),
        f"length_matched_within_{MATCHED}_tokens": accuracy(stats.length_matched(margins, shorter, MATCHED)),
        "floors": {name: accuracy(values) for name, values in rules.items()},
        "against_shorter_answer": {"only_model_right": only, "only_floor_right": other, "p": chance},
        "calibration_error": error,
        "reliability": [{"predicted": p, "observed": share, "count": n} for p, share, n in rows],
        "correlation_of_reward_and_length": stats.correlation(
            found.flatten().numpy(), [n for pair in answers for n in pair]
        ),
        "reward_on_reference_answers": {
            "mean": found[~sampled, 0].mean().item(),
            "std": found[~sampled, 0].std(correction=0).item(),
        },
    }


@command
def main(argv=None):
    # --- config
    cfg, job = config.parse_args("train_reward.py", __doc__, SECTIONS, ("reward",), argv, JOBS)
    training, peft = cfg.training, cfg.model
    if peft.peft_type == "none":
        raise UserError("model.peft_type: a reward model is an adapter on the policy's base: lora or qlora")
    if training.packing or training.last_turn_only or training.budget_tokens is not None:
        raise UserError("training.packing, last_turn_only and budget_tokens do not belong to pairs: leave them out")

    # --- distributed, run folder
    device = model.pick_device(cfg.device)
    dtype = model.pick_dtype(peft.dtype, device)
    resume.prepare(device)
    base_folder = base.resolve(peft.base_checkpoint)  # may build or download: before the group's clock runs
    dist.init(device, training.timeout)
    run_dir = Path(cfg.logging.output_dir) / config.run_name(cfg, job.config, "reward")
    locked = dist.is_main() and run_dir.exists() and not job.explain
    if locked:
        log.on_exit(functools.partial(os.close, checkpoint.lock_run(run_dir)))

    # --- model, tokenizer, adapter with its head
    base_name = base.public_name(peft.base_checkpoint, base_folder)
    net, tokenizer = model.load(base_folder, device, dtype, quantize=peft.peft_type == "qlora")
    fingerprint = model.base_fingerprint(net)
    torch.manual_seed(cfg.seed)
    if peft.adapter:
        model.load_adapter(net, NAME, peft.adapter)
        say(f"starting from {peft.adapter}, whose sizes the adapter takes")
    else:
        lora.inject(net, NAME, peft.peft_rank, peft.peft_alpha, peft.peft_target_modules, peft.peft_dropout)
    head = reward_model.new_head(net.config.hidden_size, device)
    named = reward_model.parameters(net, NAME, head)
    parameters = list(named.values())
    numbers = sum(p.numel() for p in parameters)
    say(f"{peft.base_checkpoint} on {device} in {dtype}, {peft.peft_type}: {numbers:,} parameters to train")

    # --- pairs: token ids of chosen and rejected answer behind one prompt
    records = {split: data.load(cfg.task, cfg.dataset_path, split, cfg.debug, cfg.seed) for split in ("train", "val")}
    if cfg.task != "safety" and all(record["rejected"] is None for part in records.values() for record in part):
        rl = cfg.rl
        sampling = {"group_size": rl.group_size, "max_new_tokens": rl.max_new_tokens, "temperature": rl.temperature}
        about = [fingerprint, model.adapter_fingerprint(peft.adapter), str(dtype), peft.peft_type]
        key = resume.fingerprint([*about, sampling, cfg.seed, cfg.task, records])
        if job.explain:  # a look needs no more, and leaves nothing behind
            records, key = {split: part[: training.batch_size] for split, part in records.items()}, None
        make = functools.partial(make_pairs, net, tokenizer, records, sampling | {"seed": cfg.seed}, cfg.task)
        records = preferences.cached(key, ("train", "val"), make)
    encoded = {}
    for split in ("train", "val"):
        encoded[split], counts = data.encode_pairs(records[split], tokenizer, training.max_seq_length)
        say_counts(split, counts)
        if not encoded[split]:
            raise UserError(f"{split}: no usable pair in {counts['records']} records")
    train, val = encoded["train"], encoded["val"]
    lengths = [data.pair_tokens(pair) for pair in train]
    per_epoch = math.ceil(len(train) / training.batch_size)
    steps = training.epochs * per_epoch if training.max_steps is None else training.max_steps
    if job.explain:
        first = data.epoch_batches(lengths, training.batch_size, cfg.seed, 0)[0]
        shown = [train[i][side] for i in first for side in ("chosen", "rejected")]
        return explain.show(shown, tokenizer, net, named, training.micro_batch_tokens, logits=False)

    # --- optimizer
    optimizer = torch.optim.AdamW(parameters, weight_decay=training.weight_decay)

    # --- resume: the newest folder that verifies, with the same config, data, tokenizer and number of ranks
    facts = config.flatten(cfg) | {
        "world_size": dist.world_size(),
        "tokenizer": checkpoint.sha256(base_folder / "tokenizer.json"),
        "model": fingerprint,
        "data": resume.fingerprint([[p["id"], p["margin"], p["chosen"], p["rejected"]] for p in train + val]),
    }
    state = {"step": 0, "best": math.inf, "since_best": 0, "tokens_seen": 0, "evaluation": None, "norms": {},
             "facts": facts}  # fmt: skip
    state["about"] = {"base_checkpoint": base_name, "base": facts["model"], "task": cfg.task, "mean": 0.0, "std": 1.0}
    if dist.is_main() and not locked:  # a new folder appears only when everything above was in order
        log.on_exit(functools.partial(os.close, checkpoint.lock_run(run_dir)))
    dist.barrier()
    unread = ("rl.", "reward.type", "reward.alpha", "reward.beta", "reward.checkpoint", "reward.function",
              "reward.normalize_rewards", "reward.clip_rewards", "reward.heuristic.")  # fmt: skip
    folder, tensors = resume.go_on(run_dir, training, state, steps, (*resume.FREE_TO_CHANGE, *unread))
    if folder:
        reward_model.restore(net, NAME, head, folder)
        resume.load_optimizer(optimizer, named, tensors["optimizer"])
    metrics_file = run_dir / "metrics.jsonl"
    resume.begin(run_dir, state, config.dump(cfg))
    send = log.open_wandb(cfg.logging.wandb, run_dir.name, config.flatten(cfg))

    def save(step):
        if dist.is_main():
            tensors = {"optimizer": resume.optimizer_tensors(optimizer, named)}
            write = functools.partial(reward_model.save, net, tokenizer, name=NAME, head=head, about=state["about"])
            checkpoint.save_step(run_dir, step, tensors, state, write)
            checkpoint.prune(run_dir, training.keep_last)
        dist.barrier()

    # --- loop: set lr -> evaluate / save -> make batch -> update -> log. Step 0 evaluates the fresh head.
    stop = resume.stop_signals(grace=1.0)
    batches, epoch, found = [], None, None
    bar = log.progress(steps, state["step"])
    net.train()
    for step in range(state["step"], steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, training.learning_rate, training.warmup_ratio, training.schedule)
        record = {"step": step}

        # --- evaluate, save
        stopped = dist.any_rank(stop())
        due = step % training.eval_interval == 0 or step == steps
        if due and not stopped and state["evaluation"] is None:
            found, state["evaluation"] = evaluate(net, head, val, training.micro_batch_tokens, device)
            state["about"] |= {"mean": state["evaluation"]["eval/reward_mean"],
                               "std": state["evaluation"]["eval/reward_std"]}  # fmt: skip
            better = state["evaluation"]["eval/loss"] < state["best"]
            state["best"] = min(state["best"], state["evaluation"]["eval/loss"])
            state["since_best"] = 0 if better else state["since_best"] + 1
        improved = state["evaluation"] is not None and state["since_best"] == 0
        record |= state["evaluation"] or {}
        patience_over = training.patience is not None and state["since_best"] >= training.patience
        done = step == steps or patience_over
        state["step"] = step
        if stopped or done or (step > 0 and (improved or step % training.save_interval == 0)):
            save(step)
        if improved and step > 0 and dist.is_main():
            checkpoint.publish(run_dir / f"step-{step:06d}", run_dir, "best")
        if stopped:
            raise SystemExit(f"stopped at step {step} of {steps}, saved; run the same command again to go on")
        if done:
            break

        # --- make batch: every rank draws the same pairs and takes its share
        started = time.perf_counter()
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            batches = data.epoch_batches(lengths, training.batch_size, cfg.seed, epoch)
        chosen = batches[step % per_epoch]
        mine = sorted(chosen, key=lambda i: (-lengths[i], i))[dist.rank() :: dist.world_size()]
        resume.seed_step(cfg.seed, step, dist.rank())

        # --- update
        loss = hits = torch.zeros((), device=device)
        optimizer.zero_grad()
        for micro in data.micro_batches(mine, lengths, training.micro_batch_tokens):
            tokens, mask = data.collate_pairs([train[i] for i in micro], device)
            good, bad = reward_model.scores(net, head, tokens, mask).view(-1, 2).T  # (pairs,) each
            margin = torch.tensor([train[i]["margin"] for i in micro], device=device)
            # >>> edit here: the objective, a loss for each pair
            pair_loss = losses.reward_loss(good, bad, margin)
            pair_loss = pair_loss + cfg.reward.center_coefficient * losses.centering_loss(good, bad)
            micro_loss = pair_loss.sum() / len(chosen)
            micro_loss.backward()
            loss, hits = loss + micro_loss.detach(), hits + (good > bad).sum()
        dist.sum_gradients(parameters)
        record["loss"], hits = dist.sum_all(loss, hits)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        record["grad_norm"] = norm.item()
        if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
            ids = ", ".join(train[i]["id"] for i in chosen)
            raise UserError(
                f"step {step}: loss {record['loss']} or gradient norm {norm} is not finite; not updated; pairs {ids}"
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, training.max_grad_norm, norm)
        optimizer.step()
        if step % 16 == 0:
            model.trim_memory(device)
        state["evaluation"] = None

        # --- log
        seconds, seen = time.perf_counter() - started, sum(lengths[i] for i in chosen)
        state["tokens_seen"] += seen
        record |= {"accuracy": hits / len(chosen), "lr": optimizer.param_groups[0]["lr"], "epoch": step / per_epoch,
                   "tokens_seen": state["tokens_seen"], "tokens_per_second": seen / seconds,
                   "pairs_per_second": len(chosen) / seconds, "seconds": seconds,
                   "peak_memory_gb": log.peak_memory_gb(device)}  # fmt: skip
        for words in watch.spikes(state["norms"], record):
            record["warning"] = words
            say(f"step {step}: {words}")
        if dist.is_main():
            log.write_record(metrics_file, record)
            send(record)
        if step % training.eval_interval == 0 or step % cfg.logging.log_interval == 0:
            say(log.line(record))
        bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:.0f} tok/s", refresh=False)
        bar.update()

    # --- final save and report
    bar.close()
    record |= {"tokens_seen": state["tokens_seen"], "best_eval_loss": state["best"]}
    if found is None:  # resumed where all was done but this
        found, _ = evaluate(net, head, val, training.micro_batch_tokens, device)
    if dist.is_main():
        log.write_record(metrics_file, record)
        send(record)
        say(log.line(record))
        checkpoint.publish(run_dir / f"step-{step:06d}", run_dir, "final")
        worth = report(found, val, cfg.task)
        log.write_json(run_dir / "report.json", worth)
        rows = {k.replace("held_out", "reward model"): v for k, v in worth.items()
                if k.startswith(("held_out", "length_matched"))}  # fmt: skip
        for name, row in (rows | {f"floor: {k}": v for k, v in worth["floors"].items()}).items():
            interval = "no pairs" if row["interval"] is None else "{:.3f} [{:.3f}, {:.3f}]".format(
                row["accuracy"], *row["interval"])  # fmt: skip
            say(f"{name.replace('_', ' ')}: accuracy {interval} of {row['pairs']} pairs")
        paired = worth["against_shorter_answer"]
        say(f"against the shorter answer: right where that is wrong {paired['only_model_right']} times, wrong where "
                f"that is right {paired['only_floor_right']} times, p = {paired['p']:.2g}")  # fmt: skip
        say(f"calibration error {worth['calibration_error']:.3f}, correlation of reward and length "
            f"{worth['correlation_of_reward_and_length']:+.3f}")  # fmt: skip
        log.plot_reliability(worth["reliability"], run_dir / "reliability.png")
        panels = [
            ("loss (nats a pair)", ("loss", "eval/loss")),
            ("pair accuracy", ("accuracy", "eval/accuracy")),
            ("gradient norm", ("grad_norm",)),
        ]
        log.plot_curves(log.read_records(metrics_file), panels, run_dir / "curves.png")
        say(f"wrote {run_dir}/final, report.json, reliability.png, curves.png and metrics.jsonl; peak memory "
            f"{log.peak_memory_gb(device):.2f} GB")  # fmt: skip
    dist.barrier()
    return record


if __name__ == "__main__":
    main()
