"""Supervised fine-tuning of Gemma 3: LoRA, QLoRA or full.

    loss = - sum over supervised tokens of log p(token | before) / number of supervised tokens of the whole step

Supervised are the assistant's tokens and the stop token behind each of its turns. The divisor counts the step's tokens
over all micro-batches and ranks, so cutting a step differently cannot change its gradient. Left out, compared with
TRL's SFTTrainer: NEFTune, label smoothing, DFT, gradient checkpointing (micro-batches of a few thousand tokens fit
without it), and every tensor of (tokens, vocabulary).

    python train_sft.py --config configs/sft_lora_270m.yml --debug                    two cores, nothing to download
    python train_sft.py --config configs/sft_lora_270m.yml --explain                  what would be trained
    python train_sft.py --config configs/sft_lora_270m.yml --device cpu               a laptop
    python train_sft.py --config configs/sft_lora_270m.yml --training.micro_batch_tokens 8192         one GPU
    torchrun --nproc-per-node 8 train_sft.py --config configs/sft_lora_270m.yml --training.batch_size 64
Run the same command again to resume: a run that was stopped or killed goes on bit for bit.
"""

import functools
import math
import os
import time
from pathlib import Path

import torch

from common import base, checkpoint, config, data, dist, explain, log, lora, model, resume, watch
from common.log import UserError, command, say, say_counts
from common.schedule import expected_steps, learning_rate

SECTIONS = ("model", "training", "logging")
JOBS = (("--explain", {"action": "store_true", "help": "show the first batch as it would be trained, then exit"}),)


@torch.no_grad()
def evaluate(net, examples, budget, device):
    """Held-out loss in nats a token, perplexity and token accuracy, over all ranks; each token weighs the same."""
    net.eval()
    lengths = [len(example["ids"]) for example in examples]
    nll = hits = count = 0.0
    for rows in data.micro_batches(range(dist.rank(), len(examples), dist.world_size()), lengths, budget):
        tokens, mask = data.collate([examples[i] for i in rows], device)
        logprobs, hit = model.sequence_logprobs_and_hits(net, tokens, mask)
        nll, hits, count = nll - logprobs.sum().item(), hits + hit.sum().item(), count + mask.sum().item()
    nll, hits, count = dist.sum_all(nll, hits, count)
    net.train()
    loss = nll / count
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700)), "eval/accuracy": hits / count}


@command
def main(argv=None):
    # --- config
    cfg, job = config.parse_args("train_sft.py", __doc__, SECTIONS, ("sft",), argv, JOBS)
    training = cfg.training

    # --- distributed, run folder
    device = model.pick_device(cfg.device)
    dtype = model.pick_dtype(cfg.model.dtype, device)
    resume.prepare(device)
    base_folder = base.resolve(cfg.model.base_checkpoint)  # may build or download: before the group's clock runs
    dist.init(device, training.timeout)
    run_dir = Path(cfg.logging.output_dir) / config.run_name(cfg, job.config, "sft")
    locked = dist.is_main() and run_dir.exists() and not job.explain
    if locked:
        log.on_exit(functools.partial(os.close, checkpoint.lock_run(run_dir)))

    # --- model, tokenizer, adapter
    full = cfg.model.peft_type == "none"
    adapter = None if full else "policy"
    base_name = base.public_name(cfg.model.base_checkpoint, base_folder)
    weights_dtype = torch.float32 if full else dtype  # full fine-tuning keeps fp32 masters, or small steps vanish
    net, tokenizer = model.load(base_folder, device, weights_dtype, quantize=cfg.model.peft_type == "qlora")
    torch.manual_seed(cfg.seed)
    if full and cfg.model.adapter:
        raise UserError(
            "model.adapter: full fine-tuning starts from a whole model; merge the adapter first (see README)"
        )
    if full:
        net.requires_grad_(True)
    elif cfg.model.adapter:
        rank, alpha, targets = model.load_adapter(net, adapter, cfg.model.adapter)
        say(f"adapter sizes are those of {cfg.model.adapter}: r {rank}, alpha {alpha:g}, {', '.join(targets)}")
    else:
        peft = cfg.model
        lora.inject(net, adapter, peft.peft_rank, peft.peft_alpha, peft.peft_target_modules, peft.peft_dropout)
    named = dict(net.named_parameters()) if full else lora.adapter_parameters(net, adapter)
    context = model.compute_context(device, dtype, full)
    trainable = sum(p.numel() for p in named.values())
    say(f"{cfg.model.base_checkpoint} on {device} in {dtype}, {cfg.model.peft_type}: {trainable:,} parameters to train")

    # --- examples: token ids with the mask of what is trained, then rows of a step (one example each, or packed)
    encoded = {}
    for split in ("train", "val"):
        length, last = training.max_seq_length, training.last_turn_only
        records = data.load(cfg.task, cfg.dataset_path, split, cfg.debug, cfg.seed)
        encoded[split], report = data.encode_records(records, tokenizer, length, last)
        say_counts(split, report)
        if not encoded[split]:
            raise UserError(f"{split}: training.max_seq_length {length} leaves no example a token to train on")
    train, val = encoded["train"], encoded["val"]
    lengths = [len(example["ids"]) for example in train]
    rows = data.pack(lengths, training.max_seq_length) if training.packing else [[i] for i in range(len(train))]
    row_lengths = [sum(lengths[i] for i in row) for row in rows]
    per_epoch = math.ceil(len(rows) / training.batch_size)
    steps = training.epochs * per_epoch if training.max_steps is None else training.max_steps
    budget, pace = training.budget_tokens, sum(row_lengths) / per_epoch
    if job.explain:
        first = data.epoch_batches(row_lengths, training.batch_size, cfg.seed, 0)[0]
        shown = [train[i] for row in first for i in rows[row]]
        with context:
            return explain.show(shown, tokenizer, net, named, training.micro_batch_tokens)

    # --- optimizer: no weight decay on norms
    groups = [{"params": [p for p in named.values() if p.ndim > 1], "weight_decay": training.weight_decay},
              {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    parameters = list(named.values())

    # --- resume: the newest folder that verifies, with the same config, data, tokenizer and number of ranks
    facts = config.flatten(cfg) | {
        "world_size": dist.world_size(),
        "tokenizer": checkpoint.sha256(base_folder / "tokenizer.json"),
        "model": model.base_fingerprint(net),
        "data": resume.fingerprint([[e["id"], e["ids"], e["mask"]] for e in train + val]),
    }
    state = {"step": 0, "best": math.inf, "since_best": 0, "tokens_seen": 0, "evaluation": None, "norms": {},
             "facts": facts}  # fmt: skip
    if dist.is_main() and not locked:  # a new folder appears only when everything above was in order
        log.on_exit(functools.partial(os.close, checkpoint.lock_run(run_dir)))
    dist.barrier()
    found, tensors = resume.go_on(run_dir, training, state, steps, (*resume.FREE_TO_CHANGE, "rl.", "reward."))
    if found:
        model.restore(net, adapter, found)
        resume.load_optimizer(optimizer, named, tensors["optimizer"])
    metrics_file = run_dir / "metrics.jsonl"
    resume.begin(run_dir, state, config.dump(cfg))
    send = log.open_wandb(cfg.logging.wandb, run_dir.name, config.flatten(cfg))

    def save(step):
        if dist.is_main():
            tensors = {"optimizer": resume.optimizer_tensors(optimizer, named)}
            write = functools.partial(model.save, net, tokenizer, adapter=adapter, base_name=base_name)
            checkpoint.save_step(run_dir, step, tensors, state, write)
            checkpoint.prune(run_dir, training.keep_last)
        dist.barrier()

    # --- loop: set lr -> evaluate / save -> make batch -> update -> log. Step 0 evaluates the base.
    stop = resume.stop_signals(grace=1.0)
    batches, epoch = [], None
    bar = log.progress(expected_steps(state["step"], steps, state["tokens_seen"], budget, pace), state["step"])
    net.train()
    for step in range(state["step"], steps + 1):
        end = expected_steps(step, steps, state["tokens_seen"], budget, pace)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, end, training.learning_rate, training.warmup_ratio, training.schedule)
        record = {"step": step}

        # --- evaluate, save
        stopped = dist.any_rank(stop())
        spent = budget is not None and state["tokens_seen"] >= budget
        due = step % training.eval_interval == 0 or step == steps or spent
        if due and not stopped and state["evaluation"] is None:
            with context:
                state["evaluation"] = evaluate(net, val, training.micro_batch_tokens, device)
            better = state["evaluation"]["eval/loss"] < state["best"]
            state["best"] = min(state["best"], state["evaluation"]["eval/loss"])
            state["since_best"] = 0 if better else state["since_best"] + 1
        improved = state["evaluation"] is not None and state["since_best"] == 0
        record |= state["evaluation"] or {}
        patience_over = training.patience is not None and state["since_best"] >= training.patience
        done = step == steps or patience_over or spent
        state["step"] = step
        if stopped or done or (step > 0 and (improved or step % training.save_interval == 0)):
            save(step)
        if improved and step > 0 and dist.is_main():
            checkpoint.publish(run_dir / f"step-{step:06d}", run_dir, "best")
        if stopped:
            raise SystemExit(f"stopped at step {step} of {end}, saved; run the same command again to go on")
        if done:
            break

        # --- make batch: every rank draws the same rows, takes its share, and counts the tokens of all
        started = time.perf_counter()
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            batches = data.epoch_batches(row_lengths, training.batch_size, cfg.seed, epoch)
        chosen = [i for row in batches[step % per_epoch] for i in rows[row]]
        num_tokens = sum(sum(train[i]["mask"]) for i in chosen)
        mine = sorted(chosen, key=lambda i: (-lengths[i], i))[dist.rank() :: dist.world_size()]
        resume.seed_step(cfg.seed, step, dist.rank())

        # --- update
        loss = torch.zeros((), device=device)
        optimizer.zero_grad()
        for micro in data.micro_batches(mine, lengths, training.micro_batch_tokens):
            tokens, mask = data.collate([train[i] for i in micro], device)
            with context:
                logprobs = model.sequence_logprobs(net, tokens, mask)  # (B, T-1)
            # >>> edit here: the objective, a loss for each supervised token
            token_loss = -logprobs
            micro_loss = (token_loss * mask).sum() / num_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        dist.sum_gradients(parameters)
        record["loss"] = dist.sum_all(loss)[0]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        record["grad_norm"] = norm.item()
        if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
            ids = ", ".join(train[i]["id"] for i in chosen)
            raise UserError(
                f"step {step}: loss {record['loss']} or gradient norm {norm} is not finite; not updated; rows {ids}"
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, training.max_grad_norm, norm)
        optimizer.step()
        if step % 16 == 0:
            model.trim_memory(device)
        state["evaluation"] = None

        # --- log
        seconds, seen = time.perf_counter() - started, sum(lengths[i] for i in chosen)
        state["tokens_seen"] += seen
        record |= {"lr": optimizer.param_groups[0]["lr"], "epoch": step / per_epoch, "supervised_tokens": num_tokens,
                   "tokens_seen": state["tokens_seen"], "tokens_per_second": seen / seconds, "seconds": seconds,
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

    # --- final save
    bar.close()
    record |= {"tokens_seen": state["tokens_seen"], "best_eval_loss": state["best"]}
    if dist.is_main():
        log.write_record(metrics_file, record)
        send(record)
        say(log.line(record))
        checkpoint.publish(run_dir / f"step-{step:06d}", run_dir, "final")
        panels = [
            ("loss (nats a token)", ("loss", "eval/loss")),
            ("token accuracy", ("eval/accuracy",)),
            ("gradient norm", ("grad_norm",)),
        ]
        log.plot_curves(log.read_records(metrics_file), panels, run_dir / "curves.png")
        say(f"wrote {run_dir}/final, curves.png and metrics.jsonl; peak memory {log.peak_memory_gb(device):.2f} GB")
    dist.barrier()
    return record


if __name__ == "__main__":
    main()
