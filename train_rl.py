"""Reinforcement learning from preferences: DPO on pairs, Gemma 3 with LoRA, QLoRA or all weights.

    h = log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected)        log-probs summed over an answer's tokens
    loss = mean over the step's pairs of -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)       [rl.dpo_loss]
           + s * mean over the chosen answers' tokens of -log pi(token)                              [rl.dpo_sft_coeff]

The reference is the policy at the start of this stage: the bare base, a frozen copy of `model.adapter`, or a second
model under full fine-tuning. Its log-probs of the pairs are computed once, in the very micro-batches of the first
epoch (so that every margin is exactly 0 at step 0), and kept by content hash for later runs. Both answers of a pair go
through one forward that computes their prompt once; dropout is off. Left out, compared with TRL's DPOTrainer: its other
losses (hinge, SimPO and ORPO are functions in common/losses.py to put at `edit here`), reference sync, weighting.

    python train_rl.py --config configs/dpo_270m.yml --debug                    two cores, nothing to download
    python train_rl.py --config configs/dpo_270m.yml --explain                  what would be trained
    python train_rl.py --config configs/dpo_270m.yml --model.adapter outputs/sft_lora_270m/final     after SFT
    python train_rl.py --config configs/dpo_270m.yml --training.micro_batch_tokens 16384            one GPU
    torchrun --nproc-per-node 8 train_rl.py --config configs/dpo_270m.yml --training.batch_size 128
Run the same command again to resume: a run that was stopped or killed goes on bit for bit.
"""

import copy
import functools
import json
import math
import os
import time
from pathlib import Path

import torch

from common import base, chat, checkpoint, config, data, dist, explain, log, lora, losses, model

# isort: split
from common import preferences, reference, resume, reward_model, rewards
from common.log import UserError, command, say

SECTIONS = ("model", "training", "rl", "reward", "logging")
JOBS = (("--explain", {"action": "store_true", "help": "show the first batch as it would be trained, then exit"}),)
DRIFT = 128  # held-out pairs whose exact entropy and KL are measured: two whole distributions a token cost their time
COLLAPSE = 0.5  # nats a token: chosen answers that became this much less likely are worth a warning
COLLAPSED = ("the chosen answers themselves became {:.2f} nats a token less likely than at the start: DPO pushes both "
             "answers down, the rejected one faster, and what it pushes up instead is unknown; lower rl.learning_rate, "
             "raise rl.dpo_beta, or hold on with rl.dpo_sft_coeff 1")  # fmt: skip
DPO_METRICS = ("margin", "accuracy", "chosen_logprob", "rejected_logprob", "chosen_change", "rejected_change")


def learning_rate(step, steps, peak, training):
    """Linear warm-up, then cosine or linear decay to zero (or constant); counts optimizer steps."""
    warmup = round(training.warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    shape = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}
    return peak * shape[training.schedule]


def dpo_weights(pairs):
    """The step's divisors, one for each term of the objective: pairs, and tokens of chosen answers."""
    return len(pairs), sum(sum(pair["chosen"]["mask"]) for pair in pairs)


def dpo_objective(outputs, batch, rl):
    """-> ([(unreduced loss, weight)], {metric: (pairs,)}); rows are chosen, rejected, chosen, ..."""
    mask, sizes = batch["mask"], batch["mask"].sum(1)
    totals, reference_totals = (outputs["logprobs"] * mask).sum(1), batch["ref_logprobs"]
    scale = 1 if rl.dpo_loss == "sigmoid" else 1 / sizes  # the other kinds want averages a token
    chosen, rejected = (totals * scale).view(-1, 2).T
    ref_chosen, ref_rejected = (reference_totals * scale).view(-1, 2).T
    # >>> edit here: the objective, a loss for each pair
    pair_loss = losses.dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, rl.dpo_beta, rl.dpo_label_smoothing, rl.dpo_loss
    )
    terms = [(pair_loss, torch.ones_like(pair_loss))]
    if rl.dpo_sft_coeff:
        terms.append((-rl.dpo_sft_coeff * outputs["logprobs"][0::2], mask[0::2]))
    margin = rl.dpo_beta * ((chosen - ref_chosen) - (rejected - ref_rejected)).detach()
    a_token = ((totals - reference_totals) / sizes).detach().view(-1, 2)  # nats a token against the reference
    per_token = (totals / sizes).detach().view(-1, 2)
    accuracy = (margin > 0) + 0.5 * (margin == 0)
    return terms, dict(zip(DPO_METRICS, (margin, accuracy, *per_token.T, *a_token.T)))


@torch.no_grad()
def evaluate(net, frozen, pairs, ref_logprobs, cuts, objective, names):
    """({metric: (pairs,)}, {eval/metric: mean}) over all held-out pairs and ranks; `cuts` are this rank's."""
    device, loss, divisors = net.device, 0.0, dpo_weights(pairs)
    found = {name: torch.zeros(len(pairs), dtype=torch.float64) for name in names}
    for rows in cuts:
        tokens, mask = data.collate_pairs([pairs[i] for i in rows], device)
        batch = {"mask": mask, "ref_logprobs": ref_logprobs[rows].flatten().float().to(device)}
        terms, metrics = objective({"logprobs": model.sequence_logprobs(net, tokens, mask)}, batch)
        loss += sum((term * weight).sum() / divisor for (term, weight), divisor in zip(terms, divisors)).item()
        for name, values in metrics.items():
            found[name][rows] = values.cpu().double()
    found = {name: dist.sum_tensor(values) for name, values in found.items()}
    means = {f"eval/{name}": values.mean().item() for name, values in found.items()}
    few = [[i for i in rows if i < DRIFT] for rows in cuts]
    moved = reference.drift(net, frozen, [pair["chosen"] for pair in pairs], [rows for rows in few if rows])
    return found, {"eval/loss": dist.sum_all(loss)[0]} | means | moved


# what each algorithm does, resolved before the loop: the step's divisors and the loss of a micro-batch
ALGORITHMS = {"dpo": {"weights": dpo_weights, "objective": dpo_objective, "metrics": DPO_METRICS}}


@command
def main(argv=None):
    # --- config
    cfg, job = config.parse_args("train_rl.py", __doc__, SECTIONS, ("rl",), argv, JOBS)
    training, rl, peft = cfg.training, cfg.rl, cfg.model
    if rl.algorithm not in ALGORITHMS:
        raise UserError(f"rl.algorithm: {rl.algorithm} is not here yet, only {', '.join(ALGORITHMS)}")
    if training.packing or training.last_turn_only or training.budget_tokens is not None:
        raise UserError("training.packing, last_turn_only and budget_tokens do not belong to pairs: leave them out")
    algorithm = ALGORITHMS[rl.algorithm]

    # --- distributed, run folder
    device = model.pick_device(cfg.device)
    dtype = model.pick_dtype(peft.dtype, device)
    resume.prepare(device)
    base_folder = base.resolve(peft.base_checkpoint)  # may build or download: before the group's clock runs
    dist.init(device, training.timeout)
    run_dir = Path(cfg.logging.output_dir) / config.run_name(cfg, job.config, "rl")
    locked = dist.is_main() and run_dir.exists() and not job.explain
    if locked:
        log.on_exit(functools.partial(os.close, checkpoint.lock_run(run_dir)))

    # --- model, tokenizer, adapter; the reference is what the policy is now
    full = peft.peft_type == "none"
    adapter = None if full else "policy"
    fingerprint = base.fingerprint(base_folder)
    base_name = base.public_name(peft.base_checkpoint, base_folder)
    weights_dtype = torch.float32 if full else dtype  # full fine-tuning keeps fp32 masters, or small steps vanish
    net, tokenizer = model.load(base_folder, device, weights_dtype, quantize=peft.peft_type == "qlora")
    frozen = net
    torch.manual_seed(cfg.seed)
    if full and peft.adapter:
        raise UserError(
            "model.adapter: full fine-tuning starts from a whole model; merge the adapter first (see README)"
        )
    if full:
        frozen = copy.deepcopy(net).requires_grad_(False)
        net.requires_grad_(True)
    elif peft.adapter:
        rank, alpha, targets = model.load_adapter(net, adapter, peft.adapter)
        lora.copy_adapter(net, adapter, "reference")
        say(f"adapter sizes are those of {peft.adapter}: r {rank}, alpha {alpha:g}, {', '.join(targets)}")
    else:
        lora.inject(net, adapter, peft.peft_rank, peft.peft_alpha, peft.peft_target_modules, peft.peft_dropout)
    net.eval()  # no dropout: policy and reference must agree before the first update
    named = dict(net.named_parameters()) if full else lora.adapter_parameters(net, adapter)
    parameters = list(named.values())
    context = model.compute_context(device, dtype, full)
    numbers = sum(p.numel() for p in parameters)
    say(f"{peft.base_checkpoint} on {device} in {dtype}, {peft.peft_type}: {numbers:,} parameters to train")

    # --- pairs, of the data or the best and worst of the policy's own samples: ids of both answers behind one prompt
    start = model.adapter_fingerprint(peft.adapter)
    records = {split: data.load(cfg.task, cfg.dataset_path, split, cfg.debug, cfg.seed) for split in ("train", "val")}
    if rl.pairs == "sampled":
        judge = None
        if rewards.needs_model(cfg.reward):
            judge = reward_model.judge(frozen, tokenizer, cfg.reward, fingerprint, training.micro_batch_tokens)
        score = rewards.make(cfg.task, cfg.reward, functools.partial(chat.decode, tokenizer), judge)
        sampling = {"group_size": rl.group_size, "max_new_tokens": rl.max_new_tokens, "temperature": rl.temperature}
        about = [
            fingerprint,
            start,
            str(dtype),
            peft.peft_type,
            sampling,
            cfg.seed,
            cfg.task,
            records,
        ]
        key = resume.fingerprint([*about, json.loads(json.dumps(cfg.reward, default=vars)), score.about])
        if job.explain:  # a look needs no more, and leaves nothing behind
            records, key = {split: part[: training.batch_size] for split, part in records.items()}, None
        with context:
            records = preferences.from_policy(frozen, tokenizer, records, score, sampling | {"seed": cfg.seed}, key)
    encoded = {}
    for split in ("train", "val"):
        encoded[split], counts = data.encode_pairs(records[split], tokenizer, training.max_seq_length)
        say(f"{split}: " + ", ".join(f"{value} {key}" for key, value in counts.items() if value or key == "kept"))
        if not encoded[split]:
            raise UserError(f"{split}: no usable pair in {counts['records']} records")
    train, val = encoded["train"], encoded["val"]
    lengths, val_lengths = ([data.pair_tokens(pair) for pair in part] for part in (train, val))
    per_epoch = math.ceil(len(train) / training.batch_size)
    wanted = training.max_steps if rl.max_steps is None else rl.max_steps
    steps = training.epochs * per_epoch if wanted is None else wanted
    peak = training.learning_rate if rl.learning_rate is None else rl.learning_rate

    def cut(rows):
        """This rank's share of a step's pairs, as micro-batches."""
        mine = sorted(rows, key=lambda i: (-lengths[i], i))[dist.rank() :: dist.world_size()]
        return data.micro_batches(mine, lengths, training.micro_batch_tokens)

    batches = data.epoch_batches(lengths, training.batch_size, cfg.seed, 0)
    if job.explain:
        shown = [train[i][side] for i in batches[0] for side in ("chosen", "rejected")]
        if full:
            say(f"beside the memory below, {model.memory_bytes(frozen) / 1e9:.2f} GB of the frozen reference")
        return explain.show(shown, tokenizer, net, named, training.micro_batch_tokens)

    # --- the reference's log-probs, in the layout that they will be compared in
    facts = config.flatten(cfg) | {
        "world_size": dist.world_size(),
        "tokenizer": checkpoint.sha256(base_folder / "tokenizer.json"),
        "model": fingerprint,
        "start": start,
        "data": resume.fingerprint([[p["id"], p["chosen"], p["rejected"]] for p in train + val]),
    }
    layouts = {"train": [rows for batch in batches[:steps] for rows in cut(batch)],
               "val": data.micro_batches(range(dist.rank(), len(val), dist.world_size()), val_lengths,
                                         training.micro_batch_tokens)}  # fmt: skip
    reference_logprobs, reference_seconds = {}, {}
    for split, part in (("train", train), ("val", val)):
        about = [facts["model"], start, facts["data"], split, str(dtype), peft.peft_type, device.type,
                 batches[:steps] if split == "train" else None, dist.world_size(), training.micro_batch_tokens,
                 torch.__version__]  # fmt: skip
        compute = functools.partial(reference.pair_logprobs, frozen, part, layouts[split])
        started = time.perf_counter()
        with context, lora.using(frozen, "reference"):
            reference_logprobs[split] = reference.cached(resume.fingerprint(about), (len(part), 2), compute)
        reference_seconds[split] = time.perf_counter() - started
        say(f"reference log-probs of {split}: {reference_seconds[split]:.1f} s")

    # --- optimizer: no weight decay on norms
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])

    # --- resume: the newest folder that verifies, with the same config, data, tokenizer and number of ranks
    state = {"step": 0, "best": math.inf, "since_best": 0, "tokens_seen": 0, "evaluation": None, "facts": facts}
    if dist.is_main() and not locked:  # a new folder appears only when everything above was in order
        log.on_exit(functools.partial(os.close, checkpoint.lock_run(run_dir)))
    dist.barrier()
    folder, tensors = resume.go_on(
        run_dir, training.resume, state, steps, (*resume.FREE_TO_CHANGE, "rl.max_steps", "rl.learning_rate", "reward.")
    )
    if folder:
        model.restore(net, adapter, folder)
        resume.load_optimizer(optimizer, named, tensors["optimizer"])
    metrics_file = run_dir / "metrics.jsonl"
    resume.begin(run_dir, state["step"], config.dump(cfg), facts)
    send = log.open_wandb(cfg.logging.wandb, run_dir.name, config.flatten(cfg))

    def save(step):
        if dist.is_main():
            tensors = {"optimizer": resume.optimizer_tensors(optimizer, named)}
            write = functools.partial(model.save, net, tokenizer, adapter=adapter, base_name=base_name)
            checkpoint.save_step(run_dir, step, tensors, state, write)
            checkpoint.prune(run_dir, training.keep_last)
        dist.barrier()

    # --- loop: set lr -> evaluate / save -> make batch -> update -> log. Step 0 evaluates the reference itself.
    objective = functools.partial(algorithm["objective"], rl=rl)
    evaluate_val = functools.partial(evaluate, net, frozen, val, reference_logprobs["val"], layouts["val"], objective,
                                     algorithm["metrics"])  # fmt: skip
    stop = resume.stop_signals(grace=1.0)
    epoch, found = 0, None
    bar = log.progress(steps, state["step"])
    for step in range(state["step"], steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, training)
        record = {"step": step}
        if step == state["step"]:  # the first of this process
            record["reference_seconds"] = reference_seconds["train"]

        # --- evaluate, save
        stopped = dist.any_rank(stop())
        due = step % training.eval_interval == 0 or step == steps
        if due and not stopped and state["evaluation"] is None:
            with context:
                found, state["evaluation"] = evaluate_val()
            better = state["evaluation"]["eval/loss"] < state["best"]
            state["best"] = min(state["best"], state["evaluation"]["eval/loss"])
            state["since_best"] = 0 if better else state["since_best"] + 1
        improved = state["evaluation"] is not None and state["since_best"] == 0
        record |= state["evaluation"] or {}
        if record.get("eval/chosen_change", 0) < -COLLAPSE:
            record["warning"] = COLLAPSED.format(-record["eval/chosen_change"])
            say(f"step {step}: {record['warning']}")
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

        # --- make batch: every rank draws the same pairs, takes its share, and counts those of all
        started = time.perf_counter()
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            batches = data.epoch_batches(lengths, training.batch_size, cfg.seed, epoch)
        chosen = batches[step % per_epoch]
        divisors = algorithm["weights"]([train[i] for i in chosen])
        resume.seed_step(cfg.seed, step, dist.rank())

        # --- update: each term over the whole step's divisor, so cutting a step differently cannot change its gradient
        optimizer.zero_grad()
        totals = dict.fromkeys(("loss", *algorithm["metrics"]), 0.0)
        for micro in cut(chosen):
            tokens, mask = data.collate_pairs([train[i] for i in micro], device)
            batch = {"mask": mask, "ref_logprobs": reference_logprobs["train"][micro].flatten().float().to(device)}
            with context:
                outputs = {"logprobs": model.sequence_logprobs(net, tokens, mask)}  # (B, T-1)
            terms, metrics = objective(outputs, batch)
            loss = sum((term * weight).sum() / divisor for (term, weight), divisor in zip(terms, divisors))
            loss.backward()
            totals["loss"] += loss.item()
            for name, values in metrics.items():
                totals[name] += values.sum().item() / len(chosen)
        dist.sum_gradients(parameters)
        record |= dict(zip(totals, dist.sum_all(*totals.values())))
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
        record |= {"lr": optimizer.param_groups[0]["lr"], "epoch": step / per_epoch,
                   "tokens_seen": state["tokens_seen"], "tokens_per_second": seen / seconds,
                   "pairs_per_second": len(chosen) / seconds, "seconds": seconds,
                   "peak_memory_gb": log.peak_memory_gb(device)}  # fmt: skip
        if dist.is_main():
            log.write_record(metrics_file, record)
            send(record)
        if step % training.eval_interval == 0 or step % cfg.logging.log_interval == 0:
            say(log.line(record))
        bar.set_postfix_str(f"loss {record['loss']:.3f}, margin {record['margin']:.3f}", refresh=False)
        bar.update()

    # --- final save and report
    bar.close()
    record |= {"tokens_seen": state["tokens_seen"], "best_eval_loss": state["best"]}
    if found is None:  # resumed where all was done but this
        with context:
            found, _ = evaluate_val()
    if dist.is_main():
        log.write_record(metrics_file, record)
        send(record)
        say(log.line(record))
        checkpoint.publish(run_dir / f"step-{step:06d}", run_dir, "final")
        worth = preferences.implicit_report(found, val)
        log.write_json(run_dir / "report.json", worth)
        for name, row in worth.items():
            if isinstance(row, dict):
                low, high = row["interval"]
                say(f"{name.replace('_', ' ')}: {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {row['pairs']} pairs")
        panels = [
            ("loss (nats a pair)", ("loss", "eval/loss")),
            ("pair accuracy", ("accuracy", "eval/accuracy")),
            ("change against the reference (nats a token)", ("eval/chosen_change", "eval/rejected_change")),
            ("KL to the reference (nats a token)", ("eval/kl",)),
        ]
        log.plot_curves(log.read_records(metrics_file), panels, run_dir / "curves.png")
        say(f"wrote {run_dir}/final, report.json, curves.png and metrics.jsonl; peak memory "
            f"{log.peak_memory_gb(device):.2f} GB")  # fmt: skip
    dist.barrier()
    return record


if __name__ == "__main__":
    main()
