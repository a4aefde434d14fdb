"""Supervised fine-tuning of Gemma 3: LoRA, QLoRA or full.

    loss = - sum over supervised tokens of log p(token | before) / number of supervised tokens of the whole step

Supervised are the assistant's tokens and the stop token after each of its turns. The divisor counts the step's tokens
over all micro-batches and ranks, so cutting a step differently cannot change its gradient. Left out, compared with
TRL's SFTTrainer: NEFTune, label smoothing, DFT, and every tensor of (tokens, vocabulary).

    python train_sft.py --config configs/sft_lora_270m.yml --debug                    two cores, nothing to download
    python train_sft.py --config configs/sft_lora_270m.yml --explain                  what would be trained
    python train_sft.py --config configs/sft_lora_270m.yml --device cpu               a laptop
    python train_sft.py --config configs/sft_lora_270m.yml --training.micro_batch_tokens 8192         one GPU
    torchrun --nproc-per-node 8 train_sft.py --config configs/sft_lora_270m.yml --training.batch_size 64
Run the same command again to resume: a run that was stopped or killed goes on bit for bit.
"""

import math

from common import config

SECTIONS = ("model", "training", "logging")
FLAGS = dict(script="train_sft.py", description=__doc__, sections=SECTIONS, modes=("sft",), jobs=(config.EXPLAIN,))
if __name__ == "__main__":
    config.check_flags(**FLAGS)  # before torch is imported, which takes seconds

import torch

from common import data, dist, model, optim, roles
from common.log import UserError, command, say, say_counts
from common.run import Run
from common.runtime import explain, flops, recompute, resume

PANELS = (
    ("loss (nats per token)", ("loss", "eval/loss")),
    ("token accuracy", ("eval/accuracy",)),
    ("gradient norm", ("grad_norm",)),
)


@torch.no_grad()
def evaluate(net, examples, budget, device):
    """Held-out loss in nats per token, perplexity and token accuracy, over all ranks; each token weighs the same."""
    net.eval()
    lengths = [len(example["ids"]) for example in examples]
    nll = hits = count = 0.0
    for rows in data.held_out_micro_batches(lengths, budget):
        tokens, mask = data.collate([examples[i] for i in rows], device)
        logprobs, hit = model.sequence_logprobs_and_hits(net, tokens, mask)
        nll, hits, count = nll - logprobs.sum().item(), hits + hit.sum().item(), count + mask.sum().item()
    nll, hits, count = dist.sum_all(nll, hits, count)
    net.train()
    loss = nll / count
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700)), "eval/accuracy": hits / count}


@command
def main(argv=None):
    # --- config, device, process group, run folder
    cfg, job = config.parse_args(**FLAGS, argv=argv)
    training = cfg.training
    run = Run(cfg, job, "sft", PANELS)

    # --- model: an adapter on the frozen base, or (peft_type none) all weights
    net, tokenizer, adapter, named = roles.load_policy(run.base_folder, run.device, run.dtype, cfg.model, cfg.seed)
    parameters = list(named.values())
    count = sum(p.numel() for p in parameters)
    name = cfg.model.base_checkpoint
    say(f"{name} on {run.device} in {run.dtype}, {cfg.model.peft_type}: {count:,} parameters to train")

    # --- data: token ids with the mask of what is trained
    examples, length = {}, training.max_seq_length
    for split, records in data.load_train_and_val(cfg).items():
        examples[split], counts = data.encode_records(records, tokenizer, length, training.last_turn_only)
        say_counts(split, counts, length)
        if not examples[split] and not counts["no_target"]:
            why = "no record has a user's turn and a response to train on; prompts alone are for ppo and grpo"
            raise UserError(f"{split}: {why}")
        if not examples[split]:
            raise UserError(f"{split}: training.max_seq_length {length} leaves no example a token to train on")
    train, val = examples["train"], examples["val"]
    lengths = [len(example["ids"]) for example in train]

    # --- batches of rows: a row is one example, or several that share a sequence
    rows = data.pack(lengths, training.max_seq_length) if training.packing else [[i] for i in range(len(train))]
    row_lengths = [sum(lengths[i] for i in row) for row in rows]
    batches = data.EpochBatches(row_lengths, training.batch_size, cfg.seed)
    steps = training.epochs * batches.per_epoch if training.max_steps is None else training.max_steps
    recompute.choose(run, net, parameters, row_lengths, batches.tokens_per_step)
    if job.explain:
        first = [train[i] for row in batches[0] for i in rows[row]]
        with run.autocast:
            explain.show(first, tokenizer, net, named, training.micro_batch_tokens)

    # --- optimizer; resume from the newest whole checkpoint of the same config, data, base and number of ranks
    optimizer = torch.optim.AdamW(optim.adamw_groups(named, training.learning_rate, training.weight_decay))
    facts = {"data": resume.fingerprint([[e["id"], e["ids"], e["mask"]] for e in train + val])}
    size, full = (count, False) if adapter else (0, True)  # for the FLOPs
    expected = flops.per_token(net.config, length, size, full)
    free = ("rl.", "reward.", "evaluation.")
    step_folder = run.start(steps, batches.tokens_per_step, facts, not_read=free, flops_per_token=expected)
    if step_folder:
        model.restore(net, adapter, step_folder)
        optim.load(optimizer, named, step_folder)

    # --- loop: set lr -> evaluate -> save -> make batch -> update -> log. Step 0 evaluates what training starts from.
    net.train()
    for step in range(run.step, steps + 1):
        lr = optim.set_learning_rate(optimizer, run.position(step), run.planned_end, training)
        if run.evaluation_due(step):
            with run.autocast:
                run.keep_evaluation(evaluate(net, val, training.micro_batch_tokens, run.device))
        if run.save_due(step) and dist.is_main():
            with run.new_checkpoint(step) as step_folder:
                model.save(net, tokenizer, step_folder, adapter, run.base_name)
                optim.save(optimizer, named, step_folder)
        if run.finished(step):
            break
        resume.seed_step(cfg.seed, step, dist.rank())

        # batch: every rank draws the same rows, takes its share, and counts the tokens of all
        batch = [i for row in batches[step] for i in rows[row]]
        num_tokens = sum(sum(train[i]["mask"]) for i in batch)
        mine = data.shard(batch, lengths)

        # update
        optimizer.zero_grad()
        loss = torch.zeros((), device=run.device)
        for micro in data.micro_batches(mine, lengths, training.micro_batch_tokens):
            tokens, mask = data.collate([train[i] for i in micro], run.device)
            with run.autocast:
                logprobs = model.sequence_logprobs(net, tokens, mask)  # (B, T-1)
            # >>> edit here: the objective, a loss for each supervised token
            token_loss = -logprobs
            micro_loss = (token_loss * mask).sum() / num_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = optim.clip_gradients(parameters, training.max_grad_norm)
        loss = dist.sum_all(loss)[0]
        run.check_finite({"loss": loss, "grad_norm": grad_norm}, [train[i]["id"] for i in batch])
        optimizer.step()
        spans = [(0, lengths[i]) for i in batch]
        cost = flops.update(net.config, spans, num_tokens, size, full)
        run.count(tokens=sum(lengths[i] for i in batch), flops=cost)

        # log
        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "supervised_tokens": num_tokens}
        run.log(step, metrics | {"epoch": step / batches.per_epoch})

    return run.finish()


if __name__ == "__main__":
    main()
