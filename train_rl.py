"""Reinforcement learning: PPO, GRPO and DPO for Gemma 3 with LoRA, QLoRA or all weights.

    r = pi(token) / pi_old(token),  L(A) = max(-A r, -A clip(r, 1 - low, 1 + high))            [rl.ppo_clip, clip_high]
    ppo   L(A) - c H a token,  A = whitened GAE of -k log(pi_old / ref), plus the score on the last    [rl.gamma, lam]
          and for the critic max((V - R)^2, (clip(V) - R)^2) / 2                         [rl.value_clip, value_coeff]
    grpo  L(A) + k KL(pi || ref) - c H a token,  A = (score - mean of its group) / deviation    [rl.scale_rewards]
    dpo   -(1 - e) log sigmoid(b h) - e log sigmoid(-b h) a pair,  h = log pi / ref (chosen) - log pi / ref (rejected)
          + s * mean over the chosen answers' tokens of -log pi                        [rl.dpo_loss, rl.dpo_sft_coeff]

A step of ppo and grpo samples rl.group_size completions of rl.rollout_size prompts, scores them (reward.*), and makes
rl.num_ppo_epochs x rl.minibatches updates. Policy, reference (the policy at the start), critic and reward model are
adapters on one frozen base; full fine-tuning holds a second copy. Dropout is off. Left out, compared with TRL: samplers
on other machines and the corrections for them, reference sync, tools. What is a function to put at `edit here`: hinge,
SimPO, ORPO, GSPO, CISPO, dual clip, soft overlong penalty. rl.dynamic_sampling leaves groups of equals out of the loss;
DAPO samples again for them.

    python train_rl.py --config configs/grpo_rl_270m.yml --debug                two cores, nothing to download
    python train_rl.py --config configs/ppo_rl_270m.yml --explain               what would be sampled and trained
    python train_rl.py --config configs/dpo_270m.yml --model.adapter outputs/sft_lora_270m/final     after SFT
    python train_rl.py --config configs/grpo_rl_270m.yml --training.micro_batch_tokens 16384         one GPU
    torchrun --nproc-per-node 8 train_rl.py --config configs/ppo_rl_270m.yml --rl.rollout_size 256
Run the same command again to resume: a run that was stopped or killed goes on bit for bit.
"""

import functools
import itertools
import json
import math
import os
import time
from collections import Counter
from pathlib import Path

import torch

from common import advantages, base, chat, checkpoint, config, data, dist, experience, explain, log, losses, model

# isort: split
from common import pairs, resume, reward_model, rewards, roles, watch
from common.log import UserError, command, say
from common.schedule import expected_steps, learning_rate

SECTIONS = ("model", "training", "rl", "reward", "evaluation", "logging")
JOBS = (("--explain", {"action": "store_true", "help": "show the first batch as it would be trained, then exit"}),)
DPO_METRICS = ("margin", "accuracy", "chosen_logprob", "rejected_logprob", "chosen_change", "rejected_change")


def check(rl, online):
    """UserError for settings that do not go together."""
    name, kl = rl.algorithm, rl.kl_coef > 0
    wrong = {
        "rl.group_size: grpo compares a completion with others of its prompt, take 2 or more":
            name == "grpo" and rl.group_size < 2,
        "rl.kl_estimator: k1 as a loss has no gradient on average; grpo takes k2 or k3 (k3 times the ratio)":
            name == "grpo" and kl and rl.kl_estimator == "k1",
        "rl.kl_estimator: ppo has the KL in its reward, where only k1 gives its gradient":
            name == "ppo" and kl and rl.kl_estimator in ("k2", "k3"),
        f"rl.minibatches: {rl.minibatches} are more than the {rl.rollout_size} prompts of rl.rollout_size":
            online and rl.minibatches > rl.rollout_size,
    }  # fmt: skip
    for words in (words for words, found in wrong.items() if found):
        raise UserError(words)


def grpo_advantages(batch, rl):
    """GRPO, RLOO: a completion against the others of its prompt, the same for each of its tokens -> (B, T-1)."""
    if rl.baseline == "leave_one_out":
        found = advantages.leave_one_out(batch["rewards"], rl.group_size)
    else:
        found = advantages.group_advantages(batch["rewards"], rl.group_size, rl.scale_rewards)
    return {"advantages": found[:, None] * batch["mask"]}


def ppo_advantages(batch, rl):
    """PPO: whitened GAE of the score and the KL (k1) to the reference; the critic's targets -> (B, T-1) each."""
    mask, old = batch["mask"], batch["old_logprobs"]
    kl = losses.kl_estimate(old, batch["ref_logprobs"], "k1") if rl.kl_coef else torch.zeros_like(mask)
    found = advantages.token_rewards(batch["rewards"], kl, mask, rl.kl_coef)
    found, returns = advantages.gae(found, batch["values"], mask, rl.gamma, rl.lam)
    return {"advantages": advantages.whiten(found, mask), "returns": returns}


def ppo_objective(outputs, batch, rl):
    """PPO's -> ([(loss (B, T-1), its weight)], {metric: (tokens,)})."""
    logprobs, old, mask = outputs["logprobs"], batch["old_logprobs"], batch["mask"].bool()
    clip = rl.ppo_clip, rl.ppo_clip if rl.clip_high is None else rl.clip_high
    # >>> edit here: the objective, a loss for each token
    loss = losses.policy_loss(logprobs, old, batch["advantages"], *clip)
    if rl.entropy_coeff:
        loss = loss - rl.entropy_coeff * outputs["entropy"]
    clipped = losses.clipped(logprobs, old, batch["advantages"], *clip)
    moved = losses.kl_estimate(old, logprobs.detach())  # KL(old || pi) on samples of old
    return [(loss, batch["weight"])], {"clip_share": clipped[mask], "policy_kl": moved[mask]}


def grpo_objective(outputs, batch, rl):
    """GRPO's: PPO's and the KL as a loss, by an estimator whose gradient is that of KL(pi || ref)."""
    [(loss, weight)], metrics = ppo_objective(outputs, batch, rl)
    if rl.kl_coef:
        now, old, ref = outputs["logprobs"], batch["old_logprobs"], batch["ref_logprobs"]
        kl = losses.kl_estimate(now, ref, "k2") if rl.kl_estimator == "k2" else losses.kl_loss_unbiased(now, old, ref)
        loss = loss + rl.kl_coef * kl
    return [(loss, weight)], metrics


def critic_objective(outputs, batch, rl):
    """The critic's -> ([(loss (B, T-1), its weight)], {metric: (tokens,)})."""
    loss = losses.value_loss(outputs["values"], batch["values"], batch["returns"], rl.value_clip)
    return [(rl.value_coeff * loss, batch["weight"])], {"value_loss": loss.detach()[batch["mask"].bool()]}


def dpo_objective(outputs, batch, rl):
    """DPO's -> ([(unreduced loss, weight)], {metric: (pairs,)}); rows are chosen, rejected, chosen, ..."""
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


def pair_source(run, records):
    """DPO learns from pairs: of the data, or the best and worst of the policy's own samples."""
    cfg, rl = run.cfg, run.cfg.rl
    if rl.pairs == "sampled":
        sampling = {"group_size": rl.group_size, "max_new_tokens": rl.max_new_tokens, "temperature": rl.temperature}
        about = [cfg.task, json.loads(json.dumps(cfg.reward, default=vars))]
        records = pairs.from_policy(run, records, sampling | {"seed": cfg.seed}, about)
    return pairs.source(records, run.tokenizer, cfg.training.max_seq_length, cfg.training.batch_size, cfg.seed)


def prompt_source(run, records):
    """PPO and GRPO sample answers to prompts that leave room for them."""
    cfg, longest = run.cfg, run.cfg.training.max_seq_length - run.cfg.rl.max_new_tokens
    size, most = min(cfg.rl.rollout_size, run.look or math.inf), cfg.evaluation.max_items
    return experience.source(records, run.tokenizer, longest, size, most, cfg.seed)


def pair_batch(run, step):
    """DPO's step: every rank draws the same pairs, takes its share, and counts those of all."""
    cuts = pairs.cut(run.source.batch(step), run.source.lengths, run.cfg.training.micro_batch_tokens)
    return pairs.batch(run.source.train, run.ref_logprobs, cuts, run.net.device)


def rollout(run, step):
    """PPO's and GRPO's step: sample, score, and hear the frozen roles in the very micro-batches of the updates."""
    cfg, rl, grouped = run.cfg, run.cfg.rl, "critic" not in run.trained
    mine, prompts = experience.share(run.source.batch(step)), run.source.train
    sampling = {"seed": cfg.seed, "step": step, "group_size": rl.group_size, "max_new_tokens": rl.max_new_tokens,
                "temperature": rl.temperature}  # fmt: skip
    batch = experience.collect(run.net, [prompts[i] for i in mine.values()], mine, run.score, sampling)
    # >>> edit here: the reward of a completion
    batch["rewards"] = advantages.missing_stop(batch["rewards"], batch["stopped"], rl.missing_stop_penalty)
    equal = grouped & experience.equal_groups(batch["rewards"], rl.group_size)
    out = (equal & rl.dynamic_sampling) | (~batch["stopped"] & rl.mask_truncated)  # of the loss and of its divisor
    idle = equal & (not rl.kl_coef and not rl.entropy_coeff)  # no gradient: counted, but never computed
    if rl.mask_truncated and not dist.any_rank(batch["stopped"].any()):
        raise UserError(f"step {step}: no completion stopped by itself and rl.mask_truncated leaves all of them out; "
                        "raise rl.max_new_tokens, or start from a model that has learned to stop")  # fmt: skip
    batch |= {"equal": equal, "mask": batch["mask"] * ~out[:, None]}
    batch |= experience.aggregation(batch["mask"], rl.loss_aggregation, rl.max_new_tokens)
    batch |= experience.plan(batch, ~(out | idle), rl.rollout_size, (rl.num_ppo_epochs, rl.minibatches),
                             cfg.training.micro_batch_tokens, f"{cfg.seed}/{step}")  # fmt: skip
    batch["first"] = [rows for part in batch["plan"][: rl.minibatches] for rows in part]
    hear = functools.partial(experience.over, run.forward, batch)
    batch["single"] = grouped and len(batch["plan"]) == 1  # its own log-probs will be the old ones
    batch["old_logprobs"] = torch.zeros_like(batch["mask"]) if batch["single"] else hear("policy", "logprobs")
    if rl.kl_coef:
        batch["ref_logprobs"] = hear("reference", "logprobs")
    if not grouped:
        batch["values"] = hear("critic", "values")
    experience.check_finite(batch, step)
    return batch | ALGORITHMS[rl.algorithm]["advantages"](batch, rl)


def evaluate_pairs(run, step):
    """-> ({metric: (pairs,)}, {eval/metric: mean})"""
    objective = functools.partial(dpo_objective, rl=run.cfg.rl)
    return pairs.evaluate(run.net, run.frozen, run.source.val, run.held_out, objective, DPO_METRICS)


def evaluate_prompts(run, step):
    """-> (lines for held_out.jsonl, {eval/metric: mean}): one answer to each held-out prompt, scored as in training."""
    cfg = run.cfg
    heat = cfg.evaluation.temperature
    sampling = {"seed": cfg.seed, "max_new_tokens": cfg.evaluation.max_new_tokens, "top_p": cfg.evaluation.top_p,
                "temperature": heat or 1.0, "greedy": heat == 0}  # fmt: skip
    batch, means = experience.answer(run, sampling)
    batch["rewards"] = advantages.missing_stop(batch["rewards"], batch["stopped"], cfg.rl.missing_stop_penalty)
    return experience.lines(batch, run.tokenizer, step), means | experience.summary(batch, "eval/")


# what each algorithm does, resolved before the loop
PAIRS = {"source": pair_source, "batch": pair_batch, "evaluate": evaluate_pairs, "best": ("eval/loss", 1)}
PROMPTS = {"source": prompt_source, "batch": rollout, "evaluate": evaluate_prompts, "best": ("eval/reward", -1)}
PPO_OBJECTIVES = {"critic": critic_objective, "policy": ppo_objective}
ALGORITHMS = {
    "dpo": PAIRS | {"objectives": {"policy": dpo_objective}},
    "grpo": PROMPTS | {"advantages": grpo_advantages, "objectives": {"policy": grpo_objective}},
    "ppo": PROMPTS | {"advantages": ppo_advantages, "objectives": PPO_OBJECTIVES},
}


@command
def main(argv=None):
    # --- config
    cfg, job = config.parse_args("train_rl.py", __doc__, SECTIONS, ("rl",), argv, JOBS)
    training, rl, peft, algorithm = cfg.training, cfg.rl, cfg.model, ALGORITHMS[cfg.rl.algorithm]
    online, (best, sign) = "advantages" in algorithm, algorithm["best"]
    check(rl, online)
    if training.packing or training.last_turn_only:
        raise UserError("training.packing and last_turn_only belong to train_sft.py: leave them out")

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

    # --- model, tokenizer, roles: adapters on one base
    full, critic = peft.peft_type == "none", "critic" in algorithm["objectives"]
    judged = (online or rl.pairs == "sampled") and rewards.needs_model(cfg.reward)
    wanted = {"reference": not online or rl.kl_coef > 0, "critic": critic, "reward": judged}
    torch.manual_seed(cfg.seed)
    run = roles.build(base_folder, device, dtype, peft, [role for role, needed in wanted.items() if needed])
    net, frozen, tokenizer, trained, named = run.net, run.frozen, run.tokenizer, run.trained, roles.named(run.trained)
    parameters = {role: [*part.values()] for role, part in trained.items()}
    context = model.compute_context(device, dtype, full)
    fingerprint, start = model.base_fingerprint(net), model.adapter_fingerprint(peft.adapter)
    judge = judged and reward_model.judge(frozen, tokenizer, cfg.reward, fingerprint, training.micro_batch_tokens)
    run.score = rewards.make(cfg.task, cfg.reward, functools.partial(chat.decode, tokenizer), judge)
    run.forward = functools.partial(roles.forward, run, temperature=rl.temperature if online else 1.0,
                                    entropy=online and rl.entropy_coeff > 0)  # fmt: skip
    run.cfg, run.about = cfg, [fingerprint, start, str(dtype), peft.peft_type, device.type]
    run.look = job.explain and max(min(training.batch_size, 4), dist.world_size())  # prompts that --explain shows
    say(f"{peft.base_checkpoint} on {device} in {dtype}, {peft.peft_type}; parameters to train: "
        + ", ".join(f"{role} {sum(p.numel() for p in part):,}" for role, part in parameters.items()))  # fmt: skip

    # --- data: pairs, or prompts to sample answers to
    records = {split: data.load(cfg.task, cfg.dataset_path, split, cfg.debug, cfg.seed) for split in ("train", "val")}
    with context:
        run.source = source = algorithm["source"](run, records)
    wanted = training.max_steps if rl.max_steps is None else rl.max_steps
    steps = training.epochs * source.per_epoch if wanted is None else wanted
    budget, pace = training.budget_tokens, source.pace
    if online:  # rows are sampled once, then trained rl.num_ppo_epochs times
        answers = rl.rollout_size * rl.max_new_tokens
        pace = rl.group_size * (answers + rl.num_ppo_epochs * (source.pace + answers))
    about = expected_steps(0, steps, 0, budget, pace)
    if critic and rl.critic_warmup >= about:
        raise UserError(f"rl.critic_warmup: {rl.critic_warmup} leaves none of the {about} steps to the policy")
    peaks = {"policy": training.learning_rate if rl.learning_rate is None else rl.learning_rate,
             "critic": rl.critic_learning_rate}  # fmt: skip
    if job.explain:
        with context:
            shown = experience.look(rollout(run, 0), tokenizer) if online else pairs.look(source)
            if online:
                sizes = explain.rollout_sizes(source, rl, cfg.evaluation)
            else:
                sizes = {"total": sum(source.lengths[i] for i in source.batch(0))}
            held = frozen if full or run.referred else None
            return explain.show(shown, tokenizer, net, named, training.micro_batch_tokens, frozen=held, **sizes)
    if not online:  # the reference's log-probs, in the layouts that they will be compared in
        with context:
            pairs.hear_reference(run, steps, training.micro_batch_tokens)
    facts = config.flatten(cfg) | {
        "world_size": dist.world_size(),
        "tokenizer": checkpoint.sha256(base_folder / "tokenizer.json"),
        "model": fingerprint,
        "start": start,
        "data": source.fingerprint,
        "score": run.score.about if online else None,
    }

    # --- optimizer: no weight decay on norms; the critic has its own learning rate
    optimizer = torch.optim.AdamW([
        {"params": chosen, "weight_decay": decay, "role": role}
        for role, part in trained.items()
        for decay, matrices in ((training.weight_decay, True), (0.0, False))
        if (chosen := [p for p in part.values() if (p.ndim > 1) == matrices])
    ])  # fmt: skip

    # --- resume: the newest folder that verifies, with the same config, data, tokenizer and number of ranks
    state = {"step": 0, "best": math.inf, "since_best": 0, "tokens_seen": 0, "evaluation": None, "facts": facts,
             "memory": {"first": [], "last": []}, "said": [], "norms": {}}  # fmt: skip
    if dist.is_main() and not locked:  # a new folder appears only when everything above was in order
        log.on_exit(functools.partial(os.close, checkpoint.lock_run(run_dir)))
    dist.barrier()
    free = [*resume.FREE_TO_CHANGE, "evaluation.draws"]
    if online:
        free.remove("evaluation.")  # evaluations are compared with each other
    folder, tensors = resume.go_on(run_dir, training, state, steps, (*free, *([] if online else ["reward."])))
    if folder:
        model.restore(net, run.adapter, folder)
        resume.restore(trained.get("critic", {}), tensors.get("critic", {}))
        resume.load_optimizer(optimizer, named, tensors["optimizer"])
    metrics_file, samples_file, held_out_file = (run_dir / f"{n}.jsonl" for n in ("metrics", "samples", "held_out"))
    resume.begin(run_dir, state, config.dump(cfg))
    if dist.is_main():
        resume.bring(folder, held_out_file)
        checkpoint.truncate_log(samples_file, state["step"] - 1)
        checkpoint.truncate_log(held_out_file, state["step"] - (state["evaluation"] is None))
    send = log.open_wandb(cfg.logging.wandb, run_dir.name, config.flatten(cfg))

    def save(step):
        if dist.is_main():
            tensors = {"optimizer": resume.optimizer_tensors(optimizer, named)}
            tensors |= {role: part for role, part in trained.items() if role != "policy"}
            base_name = base.public_name(peft.base_checkpoint, base_folder)
            write = functools.partial(model.save, net, tokenizer, adapter=run.adapter, base_name=base_name)
            checkpoint.save_step(run_dir, step, tensors, state, write)
            checkpoint.prune(run_dir, training.keep_last)
        dist.barrier()

    # --- loop: set lr -> evaluate / save -> make batch -> update -> log. Step 0 evaluates the reference itself.
    objectives = {role: functools.partial(each, rl=rl) for role, each in algorithm["objectives"].items()}
    stop = resume.stop_signals(grace=1.0)
    found = None
    bar = log.progress(expected_steps(state["step"], steps, state["tokens_seen"], budget, pace), state["step"])
    for step in range(state["step"], steps + 1):
        end = expected_steps(step, steps, state["tokens_seen"], budget, pace)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, end, peaks[group["role"]], training.warmup_ratio, training.schedule)
        record, warnings = {"step": step}, []
        if step == state["step"] and not online:  # the first of this process
            record["reference_seconds"] = run.reference_seconds

        # --- evaluate, save
        stopped = dist.any_rank(stop())
        spent = budget is not None and state["tokens_seen"] >= budget
        due = step % training.eval_interval == 0 or step == steps or spent
        if due and not stopped and state["evaluation"] is None:
            with context:
                found, state["evaluation"] = algorithm["evaluate"](run, step)
            assert step or not state["evaluation"].get("eval/kl"), "policy and reference differ before the first update"
            log.write_records(held_out_file, found if online else [])
            worth = sign * state["evaluation"][best]
            state["since_best"] = 0 if worth < state["best"] else state["since_best"] + 1
            state["best"] = min(state["best"], worth)
        improved = state["evaluation"] is not None and state["since_best"] == 0
        record |= state["evaluation"] or {}
        warnings += watch.collapse(record)
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

        # --- make batch
        started = time.perf_counter()
        resume.seed_step(cfg.seed, step, dist.rank())
        with context:
            batch = algorithm["batch"](run, step)
        learning = ["critic"] if critic and step < rl.critic_warmup else list(objectives)
        log.write_records(samples_file, experience.lines(batch, tokenizer, step) if online else [])
        made = time.perf_counter()

        # --- update: each term over the whole minibatch's divisor, so no cut into micro-batches changes its gradient
        totals, updates, seen = Counter(), 0, batch.get("generated", 0)
        for minibatch, members in zip(batch["plan"], batch["members"]):
            everyone = [row for rows in minibatch for row in rows]  # of its members, those with a gradient
            *divisors, count = dist.sum_all(*batch["sizes"][members].sum(0), len(everyone))
            if not count:
                continue
            optimizer.zero_grad()
            sums, wrong = Counter(tokens=batch["costs"][everyone].sum().item()), []
            for role, rows in itertools.product(learning, minibatch):
                piece = data.piece(batch, rows)
                with context:
                    outputs = run.forward(role, piece["tokens"], piece["mask"])  # (B, T-1) each
                if batch.get("single"):  # this only update's log-probs are the old ones
                    piece["old_logprobs"] = outputs["logprobs"].detach()
                    batch["old_logprobs"][rows, : piece["mask"].shape[1]] = piece["old_logprobs"]
                terms, metrics = objectives[role](outputs, piece)
                loss = sum((term * weight).sum() / by for (term, weight), by in zip(terms, divisors))
                loss.backward()
                wrong += [] if loss.isfinite() else [batch["ids"][row] for row in rows]
                sums.update({"loss": loss.item()} | {name: x.double().sum().item() for name, x in metrics.items()})
                sums.update({f"{name}#": len(x) for name, x in metrics.items()})
            sums = dist.sum_named(sums)
            for role in learning:
                dist.sum_gradients(parameters[role])
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters[role]])
                name = f"{role}_grad_norm".removeprefix("policy_")
                sums |= {name: norm.item(), f"{name}#": 1}
                if not math.isfinite(sums["loss"]) or not norm.isfinite():
                    wrong = dist.gather_rows(wrong) or dist.gather_rows([batch["ids"][row] for row in everyone])
                    raise UserError(f"step {step}: loss {sums['loss']} or gradient norm {norm} is not finite; not "
                                    f"updated; of {experience.listed(sorted(set(wrong)))}")  # fmt: skip
                torch.nn.utils.clip_grads_with_norm_(parameters[role], training.max_grad_norm, norm)
            seen += sums.pop("tokens")
            totals.update(sums | {"loss#": 1})
            if rl.target_kl is not None and sums.get("policy_kl", 0) > rl.target_kl * sums.get("policy_kl#", 1):
                break  # far enough from the policy that sampled
            optimizer.step()
            updates += 1
        if step % 16 == 0:
            model.trim_memory(device)
        state["evaluation"] = None
        state["tokens_seen"] += seen

        # --- log
        record |= {n: v / totals[f"{n}#"] for n, v in totals.items() if "#" not in n and totals[f"{n}#"]}
        if online:
            record |= experience.record(batch) | {"updates": updates, "seconds_update": time.perf_counter() - made}
            watch.remember(state["memory"], record)
            warnings += watch.hacking(state["memory"], cfg.reward.normalize_rewards) + watch.sampler(record, dtype)
        warnings += watch.spikes(state["norms"], record)
        seconds = time.perf_counter() - started
        record |= {"lr": optimizer.param_groups[0]["lr"], "epoch": step / source.per_epoch,
                   "tokens_seen": state["tokens_seen"], "tokens_per_second": seen / seconds, "seconds": seconds,
                   "peak_memory_gb": log.peak_memory_gb(device)}  # fmt: skip
        if warnings:
            record["warning"] = "; ".join(warnings)
        for words in watch.news(warnings, state["said"]):
            say(f"step {step}: {words}")
        if dist.is_main():
            log.write_record(metrics_file, record)
            send(record)
        if step % training.eval_interval == 0 or step % cfg.logging.log_interval == 0:
            say(log.line(record))
        bar.update()

    # --- final save and report
    bar.close()
    record |= {"tokens_seen": state["tokens_seen"], f"best_{best.replace('/', '_')}": sign * state["best"]}
    warnings += watch.hacking(state["memory"], cfg.reward.normalize_rewards)
    if warnings:
        record["warning"] = "; ".join(warnings)
        say(f"step {step}: {record['warning']}")
    if found is None and not online:  # resumed where all was done but this
        with context:
            found, _ = algorithm["evaluate"](run, step)
    if dist.is_main():
        log.write_record(metrics_file, record)
        send(record)
        say(log.line(record))
        checkpoint.publish(run_dir / f"step-{step:06d}", run_dir, "final")
        if online:
            panels = experience.report(run_dir, cfg.evaluation.draws)
        else:
            panels = pairs.report(run_dir, found, source.val)
        log.plot_curves(log.read_records(metrics_file), panels, run_dir / "curves.png")
        say(f"wrote {run_dir}/final, report.json, curves.png and metrics.jsonl; peak memory "
            f"{log.peak_memory_gb(device):.2f} GB")  # fmt: skip
    dist.barrier()
    return record


if __name__ == "__main__":
    main()
