"""Reinforcement learning: PPO, GRPO and DPO for Gemma 3 with LoRA, QLoRA or all weights.

    r     pi(token) / pi_old(token);  L(A) = max(-A r, -A clip(r, 1 - rl.ppo_clip, 1 + rl.clip_high)) for each token
    ppo   L(A) - c H;  A = whitened GAE of -k log(pi_old / ref) on each token, plus the score on the last one
          critic: v max((V - R)^2, (clip(V) - R)^2) / 2,  R = GAE + V
    grpo  L(A) + k KL(pi || ref) - c H;  A = (score - mean of its group [rl.baseline]) / deviation [rl.scale_rewards]
    dpo   -(1 - e) log sigmoid(b h) - e log sigmoid(-b h) for each pair, h = log pi / ref (chosen) - the same (rejected)
          + s times the mean of -log pi over the tokens of chosen answers
    H entropy; of rl: k kl_coef, c entropy_coeff, v value_coeff, b dpo_beta, e dpo_label_smoothing, s dpo_sft_coeff

Read grpo_step, ppo_step or dpo_step: each is its algorithm from top to bottom, its objective right above it. For
another one copy the nearest, change it, and add its name to ONLINE and to the choices of rl.algorithm in
configs/defaults.yml. Ready in common/ for `edit here`: hinge, SimPO, ORPO for pairs; GSPO, CISPO, dual clip for tokens;
the soft overlong penalty for rewards. Policy, reference (the policy at the start), critic and reward model are adapters
on one frozen base; full fine-tuning holds a second copy. Dropout is off. Left out, compared with TRL: samplers on other
machines, updates of the reference, tools; rl.dynamic_sampling leaves groups of equal rewards out, DAPO samples anew.

    python train_rl.py --config configs/grpo_rl_270m.yml --debug                two cores, nothing to download
    python train_rl.py --config configs/ppo_rl_270m.yml --explain               what would be sampled and trained
    python train_rl.py --config configs/dpo_270m.yml --model.adapter outputs/sft_lora_270m/final     after SFT
    python train_rl.py --config configs/grpo_rl_270m.yml --training.micro_batch_tokens 16384         one GPU
    torchrun --nproc-per-node 8 train_rl.py --config configs/ppo_rl_270m.yml --rl.rollout_size 256
Run the same command again to resume: a run that was stopped or killed goes on bit for bit.
"""

import dataclasses
import time

from common import config

SECTIONS = ("model", "training", "rl", "reward", "evaluation", "logging")
FLAGS = dict(script="train_rl.py", description=__doc__, sections=SECTIONS, modes=("rl",), jobs=(config.EXPLAIN,))
if __name__ == "__main__":
    config.check_flags(**FLAGS)  # before torch is imported, which takes seconds

import torch

from common import (
    advantages,
    data,
    dist,
    experience,
    log,
    lora,
    losses,
    model,
    optim,
    pairs,
    preferences,
    prompts,
    reward_model,
    rewards,
    roles,
    tasks,
)
from common.evaluation.metrics import task_values
from common.log import UserError, command, say
from common.optim import Update, optimizer_step
from common.run import Run
from common.runtime import explain, recompute, resume, watch

DPO_METRICS = ("margin", "accuracy", "chosen_logprob", "rejected_logprob", "chosen_change", "rejected_change")


def check(rl, online):
    """UserError for settings that do not go together."""
    kl_estimator = rl.kl_estimator if rl.kl_coef > 0 else None
    if rl.algorithm == "grpo" and rl.group_size < 2:
        raise UserError("rl.group_size: grpo compares a completion with others of its prompt, take 2 or more")
    if rl.algorithm == "grpo" and kl_estimator == "k1":
        raise UserError("rl.kl_estimator: k1 as a loss has no gradient on average; grpo takes k2 or k3")
    if rl.algorithm == "ppo" and kl_estimator in ("k2", "k3"):
        raise UserError("rl.kl_estimator: ppo has the KL in its reward, where only k1 gives its gradient")
    if rl.algorithm == "dpo" and rl.dpo_loss == "ipo" and rl.dpo_label_smoothing > 0:
        raise UserError("rl.dpo_label_smoothing: the loss ipo has none, leave it out")
    if online and rl.minibatches > rl.rollout_size:
        raise UserError(f"rl.minibatches: {rl.minibatches} are more than rl.rollout_size, {rl.rollout_size} prompts")


# ---------------------------------------------------------------- GRPO and PPO: sample, score, update


def sample_and_score(run, models, dataset, score, step):
    """rl.group_size completions of each of this rank's prompts, scored and kept in samples.jsonl -> Rollout."""
    rl = run.cfg.rl
    mine = experience.share(dataset.batch(step))
    sizes = {"group_size": rl.group_size, "max_new_tokens": rl.max_new_tokens, "temperature": rl.temperature}
    with run.autocast:
        rollout = experience.collect(models.net, mine, score, run.cfg.seed, step, **sizes)
    rollout.correct = tasks.load(run.cfg.task).correct
    # >>> edit here: the reward of each completion (B,), for GRPO and PPO
    rollout.rewards = advantages.missing_stop(rollout.rewards, rollout.stopped, rl.missing_stop_penalty)
    log.write_records(run.folder / "samples.jsonl", experience.lines(rollout, models.tokenizer, step))
    return rollout


def make_minibatches(run, rollout, has_gradient, step):
    """Set rollout.weight, each token's weight in the loss; return the minibatches of all updates.

    An update's loss is sum(weight * token_loss) / minibatch.divisor. Over all ranks the divisor counts the minibatch's
    tokens (rl.loss_aggregation token) or its rows (sequence, and constant, whose weight is 1 / max_new_tokens).
    Excluded rows do not count in it. Rows that are skipped only because their gradient is zero do count.
    """
    cfg, rl = run.cfg, run.cfg.rl
    rollout.weight, row_divisor = experience.loss_weights(rollout.mask, rl.loss_aggregation, rl.max_new_tokens)
    passes, count, budget = rl.num_ppo_epochs, rl.minibatches, cfg.training.micro_batch_tokens
    key = f"{cfg.seed}/{step}"
    return experience.minibatches(rollout, has_gradient, row_divisor, rl.rollout_size, passes, count, budget, key)


def policy_logprobs(net, micro, rl):
    """(log-probs, entropy or None) of a micro-batch under the policy, (B, T-1) each, with gradient."""
    if rl.entropy_coeff:
        return model.sequence_logprobs_and_entropy(net, micro.tokens, micro.mask, rl.temperature)
    return model.sequence_logprobs(net, micro.tokens, micro.mask, rl.temperature), None


def clip_range(rl):
    """How far the ratio may fall below 1 and rise above it."""
    return rl.ppo_clip, rl.ppo_clip if rl.clip_high is None else rl.clip_high


def policy_shift(logprobs, micro, rl):
    """How far the policy has moved from the one that sampled: {metric: (tokens,)}. rl.target_kl bounds policy_kl."""
    logprobs, mask = logprobs.detach(), micro.mask.bool()
    clipped = losses.clipped(logprobs, micro.old_logprobs, micro.advantages, *clip_range(rl))
    kl = losses.kl_estimate(micro.old_logprobs, logprobs)  # KL(old || pi) on samples of old
    return {"clip_share": clipped[mask], "policy_kl": kl[mask]}


def grpo_objective(logprobs, entropy, micro, rl):
    """GRPO's loss for each token (B, T-1): the clipped surrogate, minus entropy, plus the KL to the reference.

    The KL is a loss, by an estimator whose gradient is that of KL(pi || ref).
    """
    # >>> edit here: GRPO's objective, a loss for each token
    loss = losses.policy_loss(logprobs, micro.old_logprobs, micro.advantages, *clip_range(rl))
    if rl.entropy_coeff:
        loss = loss - rl.entropy_coeff * entropy
    if rl.kl_coef and rl.kl_estimator == "k2":
        loss = loss + rl.kl_coef * losses.kl_estimate(logprobs, micro.ref_logprobs, "k2")
    elif rl.kl_coef:  # k3
        loss = loss + rl.kl_coef * losses.kl_loss_unbiased(logprobs, micro.old_logprobs, micro.ref_logprobs)
    return loss


def grpo_step(run, models, dataset, score, optimizer, step):
    """GRPO, Shao et al. 2024, algorithm 1: no critic, a group is its own baseline -> (metrics, tokens, FLOPs)."""
    rl, training, net = run.cfg.rl, run.cfg.training, models.net

    # --- sample a group of completions for each prompt, and score them
    rollout = sample_and_score(run, models, dataset, score, step)

    # --- advantages: the same for each token of a completion
    if rl.baseline == "leave_one_out":
        advantage = advantages.leave_one_out(rollout.rewards, rl.group_size)
    else:
        advantage = advantages.group_advantages(rollout.rewards, rl.group_size, rl.scale_rewards)
    rollout.advantages = advantage[:, None] * rollout.mask

    # --- rows: excluded ones are out of loss and divisor; a zero gradient (equal rewards) is only not computed
    rollout.zero_advantage = experience.zero_advantage_groups(rollout.advantages, rl.group_size)
    excluded = rollout.unscored | (rollout.zero_advantage & rl.dynamic_sampling)
    if rl.mask_truncated:
        excluded = excluded | experience.truncated(rollout, step)
    rollout.exclude(excluded)
    has_gradient = ~excluded if rl.kl_coef or rl.entropy_coeff else ~excluded & ~rollout.zero_advantage
    minibatches = make_minibatches(run, rollout, has_gradient, step)

    # --- old and reference log-probs, in the micro-batches of the first pass: the first ratio is 1 to the bit
    first_pass = experience.first_pass(minibatches)
    with run.autocast:
        if len(minibatches) > 1:  # a single update's own log-probs are the old ones: no forward is spent on them
            rollout.old_logprobs = experience.logprobs(net, "policy", rollout, first_pass, rl.temperature)
        if rl.kl_coef:
            rollout.ref_logprobs = experience.logprobs(models.frozen, "reference", rollout, first_pass, rl.temperature)
    experience.check_finite(rollout, step)
    experience.cut_micro_batches(minibatches, rollout)

    # --- updates: rl.num_ppo_epochs passes over rl.minibatches minibatches
    parameters = {"policy": models.parameters["policy"]}
    started, updates = time.perf_counter(), []
    for minibatch in minibatches:
        update = Update(minibatch.forward_tokens)
        updates.append(update)
        optimizer.zero_grad()
        for micro in minibatch.micro_batches:
            with run.autocast:
                logprobs, entropy = policy_logprobs(net, micro, rl)
            if micro.old_logprobs is None:  # the only update
                micro.old_logprobs = logprobs.detach()
            token_loss = grpo_objective(logprobs, entropy, micro, rl)
            loss = (token_loss * micro.weight).sum() / minibatch.divisor
            loss.backward()
            update.add(micro.ids, loss, **policy_shift(logprobs, micro, rl))
        if not optimizer_step(optimizer, parameters, update, step, training.max_grad_norm, rl.target_kl):
            break  # target_kl: far enough from the policy that sampled
    return step_metrics(models, rollout, minibatches, updates, started)


def ppo_objective(logprobs, entropy, micro, rl):
    """PPO's loss for each token (B, T-1): the clipped surrogate, minus entropy."""
    # >>> edit here: PPO's objective, a loss for each token
    loss = losses.policy_loss(logprobs, micro.old_logprobs, micro.advantages, *clip_range(rl))
    return loss - rl.entropy_coeff * entropy if rl.entropy_coeff else loss


def ppo_step(run, models, dataset, score, optimizer, step):
    """PPO, Schulman et al. 2017; KL in the reward, Ouyang et al. 2022, eq. 2 -> (metrics, tokens, FLOPs)."""
    rl, training, net, frozen = run.cfg.rl, run.cfg.training, models.net, models.frozen

    # --- sample completions, and score them
    rollout = sample_and_score(run, models, dataset, score, step)

    # --- rows: all are trained on but those without a score and, with rl.mask_truncated, those that did not stop
    excluded = rollout.unscored | experience.truncated(rollout, step) if rl.mask_truncated else rollout.unscored
    rollout.exclude(excluded)
    minibatches = make_minibatches(run, rollout, ~excluded, step)

    # --- old and reference log-probs and values, in the micro-batches of the first pass: the first ratio is 1
    first_pass = experience.first_pass(minibatches)
    with run.autocast:
        rollout.old_logprobs = experience.logprobs(net, "policy", rollout, first_pass, rl.temperature)
        if rl.kl_coef:
            rollout.ref_logprobs = experience.logprobs(frozen, "reference", rollout, first_pass, rl.temperature)
        rollout.values = experience.values(frozen, models.head, rollout, first_pass)
    experience.check_finite(rollout, step)

    # --- advantages: GAE of -kl_coef * KL on each token, plus the score on the last; whitened over all ranks
    kl = torch.zeros_like(rollout.mask)
    if rl.kl_coef:
        kl = losses.kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, "k1")
    token_rewards = advantages.token_rewards(rollout.rewards, kl, rollout.mask, rl.kl_coef)
    advantage, rollout.returns = advantages.gae(token_rewards, rollout.values, rollout.mask, rl.gamma, rl.lam)
    rollout.advantages = advantages.whiten(advantage, rollout.mask)
    experience.cut_micro_batches(minibatches, rollout)

    # --- updates: rl.num_ppo_epochs passes over rl.minibatches minibatches; the critic alone in its warm-up
    parameters = {"critic": models.parameters["critic"]}
    if step >= rl.critic_warmup:
        parameters["policy"] = models.parameters["policy"]
    started, updates = time.perf_counter(), []
    for minibatch in minibatches:
        update = Update(minibatch.forward_tokens)
        updates.append(update)
        optimizer.zero_grad()
        for micro in minibatch.micro_batches:
            with run.autocast, lora.using(frozen, "critic"):
                values = reward_model.values(frozen, models.head, micro.tokens, micro.mask)
            value_loss = losses.value_loss(values, micro.values, micro.returns, rl.value_clip)
            loss = (rl.value_coeff * value_loss * micro.weight).sum() / minibatch.divisor
            loss.backward()
            update.add(micro.ids, loss, value_loss=value_loss.detach()[micro.mask.bool()])
        if "policy" in parameters:
            for micro in minibatch.micro_batches:
                with run.autocast:
                    logprobs, entropy = policy_logprobs(net, micro, rl)
                token_loss = ppo_objective(logprobs, entropy, micro, rl)
                loss = (token_loss * micro.weight).sum() / minibatch.divisor
                loss.backward()
                update.add(micro.ids, loss, **policy_shift(logprobs, micro, rl))
        if not optimizer_step(optimizer, parameters, update, step, training.max_grad_norm, rl.target_kl):
            break  # target_kl: far enough from the policy that sampled
    return step_metrics(models, rollout, minibatches, updates, started)


def step_metrics(models, rollout, minibatches, updates, started):
    """(metrics of a step, tokens of all ranks: sampled and trained, FLOPs)."""
    metrics = optim.mean_metrics(updates) | experience.rollout_metrics(rollout, minibatches)
    metrics |= {"updates": sum(update.taken for update in updates), "seconds_update": time.perf_counter() - started}
    tokens = rollout.sampled_tokens + sum(update.forward_tokens for update in updates)
    return metrics, tokens, experience.step_flops(models, rollout, minibatches, updates)


ONLINE = {
    "grpo": {"step": grpo_step, "critic": False},
    "ppo": {"step": ppo_step, "critic": True},
}


def train_on_prompts(run, models, records, score):
    """GRPO and PPO: each step samples answers to prompts and learns from their rewards."""
    cfg, training, rl = run.cfg, run.cfg.training, run.cfg.rl
    algorithm = ONLINE[rl.algorithm]

    # --- data: prompts that leave room for an answer
    longest, size = training.max_seq_length - rl.max_new_tokens, rl.rollout_size
    rewards.check_references(cfg, records)
    dataset = prompts.encode(records, models.tokenizer, longest, size, cfg.evaluation.max_items, cfg.seed)
    steps = number_of_steps(cfg, dataset.per_epoch)

    # --- tokens per step, for the budgets: rows are sampled once, then trained rl.num_ppo_epochs times
    sampled = rl.rollout_size * rl.max_new_tokens  # as if every answer ran to its limit
    tokens_per_step = rl.group_size * (sampled + rl.num_ppo_epochs * (dataset.tokens_per_step + sampled))
    flops_per_token = roles.flops_per_token(models, longest + rl.max_new_tokens)
    expected = optim.expected_steps(0, steps, 0, training.budget_tokens, tokens_per_step)
    expected = optim.expected_steps(0, expected, 0, training.budget_flops, tokens_per_step * flops_per_token)
    if algorithm["critic"] and rl.critic_warmup >= expected:  # the end that Run.planned_end will give
        raise UserError(f"rl.critic_warmup: {rl.critic_warmup} leaves none of the {expected} steps to the policy")
    row_lengths = [len(prompt.ids) + rl.max_new_tokens for prompt in dataset.train]
    sizes = explain.rollout_sizes(dataset, rl, cfg.evaluation)
    recompute.choose(run, models.net, list(models.named.values()), row_lengths, sizes["total"])
    if run.explained:
        few = dataclasses.replace(dataset, size=max(dist.world_size(), min(explain.PROMPTS, len(dataset.train))))
        shown = prompts.shown_by_explain(sample_and_score(run, models, few, score, 0))
        show(run, models, shown, **sizes)
        run.state.step = rl.critic_warmup if algorithm["critic"] else 0  # times a step in which all roles learn

    # --- optimizer; resume from the newest whole checkpoint of the same config, data, base and number of ranks
    optimizer, best = roles.make_optimizer(models, training, rl), prompts.best_metric(cfg, dataset.val)
    judge = cfg.evaluation.reward_checkpoint if best[0] == "eval/judge" else None
    facts = {"data": dataset.fingerprint} | rewards.facts(cfg, judge)
    run.state.memory = {"first": [], "last": []}  # see watch.observe
    how = {"not_read": ("evaluation.draws",), "best": best, "flops_per_token": flops_per_token}
    step_folder = run.start(steps, tokens_per_step, facts, **how)
    if step_folder:
        roles.restore(models, optimizer, step_folder)

    # --- loop: set lr -> evaluate -> save -> sample, update -> log. Step 0 evaluates the reference itself.
    for step in range(run.step, steps + 1):
        lr = optim.set_learning_rate(optimizer, run.position(step), run.planned_end, training)
        if run.evaluation_due(step):
            lines, metrics = prompts.evaluate(run, models, dataset, score, step)
            if run.metric not in metrics:  # a metric of the task picks best/
                answered = [dataset.val[line["row"]].record for line in lines], [line["completion"] for line in lines]
                metrics |= {f"eval/{name}": value for name, value in task_values(cfg.task, *answered).items()}
            assert step or not metrics.get("eval/kl"), "policy and reference differ before the first update"
            log.write_records(run.folder / "held_out.jsonl", lines)
            run.keep_evaluation(metrics)
        if run.save_due(step) and dist.is_main():
            with run.new_checkpoint(step) as step_folder:
                roles.save(models, optimizer, step_folder, run.base_name)
        if run.finished(step):
            break
        resume.seed_step(cfg.seed, step, dist.rank())

        metrics, tokens, cost = algorithm["step"](run, models, dataset, score, optimizer, step)
        run.count(tokens, cost)

        watch.observe(run.state.memory, metrics)
        warnings = watch.reward_hacking(run.state.memory, cfg.reward.normalize_rewards)
        warnings += watch.rollout(run.state.memory, run.record | metrics, run.dtype)
        warnings += [prompts.PICKED_BY_REWARD] if step == 0 and run.metric == "eval/reward" else []
        run.log(step, metrics | {"lr": lr, "epoch": step / dataset.per_epoch}, warnings)

    # --- report
    record = run.finish(watch.reward_hacking(run.state.memory, cfg.reward.normalize_rewards))
    if dist.is_main() and not run.explained:
        prompts.report(run.folder, cfg.evaluation.draws, rl.missing_stop_penalty, run.metric)
    return record


# ---------------------------------------------------------------- DPO: learn from pairs


def dpo_objective(logprobs, micro, rl):
    """DPO's losses: of each pair (pairs,), of each chosen token (pairs, T-1) or None, and {metric: (pairs,)}.

    logprobs: (B, T-1), its rows chosen, rejected, chosen, ...
    """
    num_tokens, totals = micro.mask.sum(1), (logprobs * micro.mask).sum(1)  # (B,)
    scale = 1 if rl.dpo_loss == "sigmoid" else 1 / num_tokens  # the other kinds want averages per token
    chosen, rejected = (totals * scale).view(-1, 2).T
    ref_chosen, ref_rejected = (micro.ref_logprobs * scale).view(-1, 2).T
    # >>> edit here: DPO's objective, a loss for each pair
    smoothing, kind = rl.dpo_label_smoothing, rl.dpo_loss
    pair_loss = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, rl.dpo_beta, smoothing, kind)
    sft_loss = -rl.dpo_sft_coeff * logprobs[0::2] * micro.mask[0::2] if rl.dpo_sft_coeff else None
    margin = rl.dpo_beta * ((chosen - ref_chosen) - (rejected - ref_rejected)).detach()
    accuracy = (margin > 0) + 0.5 * (margin == 0)
    per_token = (totals / num_tokens).detach().view(-1, 2)
    change = ((totals - micro.ref_logprobs) / num_tokens).detach().view(-1, 2)  # nats per token, from the reference
    values = (margin, accuracy, *per_token.T, *change.T)
    return pair_loss, sft_loss, dict(zip(DPO_METRICS, values, strict=True))


def dpo_step(run, models, dataset, optimizer, step):
    """DPO: Rafailov et al. 2023, eq. 7, one update on the step's pairs -> (metrics, tokens, FLOPs)."""
    rl, training = run.cfg.rl, run.cfg.training

    # --- batch: every rank draws the same pairs, takes its share, and counts those of all
    batch = [dataset.train[row] for row in dataset.batches[step]]
    num_pairs, num_chosen_tokens = len(batch), sum(sum(pair["chosen"]["mask"]) for pair in batch)
    micro_batch_rows = pairs.training_micro_batches(dataset, step, training.micro_batch_tokens)

    # --- update
    update = Update(sum(dataset.batches.lengths[row] for rows in micro_batch_rows for row in rows))
    optimizer.zero_grad()
    for rows in micro_batch_rows:
        micro = dataset.micro_batch("train", rows, run.device)
        with run.autocast:
            logprobs = model.sequence_logprobs(models.net, micro.tokens, micro.mask)
        pair_loss, sft_loss, metrics = dpo_objective(logprobs, micro, rl)
        loss = pair_loss.sum() / num_pairs
        if sft_loss is not None:
            loss = loss + sft_loss.sum() / num_chosen_tokens
        loss.backward()
        update.add(micro.ids, loss, **metrics)
    optimizer_step(optimizer, {"policy": models.parameters["policy"]}, update, step, training.max_grad_norm)
    return optim.mean_metrics([update]), update.forward_tokens, pairs.step_flops(models, dataset, step)


def train_on_pairs(run, models, records, score):
    """DPO: each step learns from preference pairs."""
    cfg, training, rl = run.cfg, run.cfg.training, run.cfg.rl

    # --- data: pairs, with the log-probs of the frozen reference
    if rl.pairs == "sampled":
        records = preferences.from_policy(run, models, records, score)
    dataset = pairs.encode(records, models.tokenizer, training.max_seq_length, training.batch_size, cfg.seed)
    batches = dataset.batches
    steps = number_of_steps(cfg, batches.per_epoch)
    recompute.choose(run, models.net, list(models.named.values()), batches.lengths, batches.tokens_per_step)
    if run.explained:
        show(run, models, pairs.shown_by_explain(dataset), total=round(batches.tokens_per_step))
    pairs.add_reference_logprobs(run, models.frozen, dataset, steps)

    # --- optimizer; resume from the newest whole checkpoint of the same config, data, base and number of ranks
    optimizer = roles.make_optimizer(models, training, rl)
    facts = {"data": dataset.fingerprint, "score": None}
    flops_per_token, not_read = roles.flops_per_token(models, training.max_seq_length), ("evaluation.", "reward.")
    step_folder = run.start(steps, batches.tokens_per_step, facts, not_read, flops_per_token=flops_per_token)
    run.record["reference_seconds"] = dataset.reference_seconds
    if step_folder:
        roles.restore(models, optimizer, step_folder)

    # --- loop: set lr -> evaluate -> save -> update -> log. Step 0 evaluates the reference itself.
    held_out = None
    for step in range(run.step, steps + 1):
        lr = optim.set_learning_rate(optimizer, run.position(step), run.planned_end, training)
        if run.evaluation_due(step):
            held_out, metrics = pairs.evaluate(run, models, dataset, dpo_objective, DPO_METRICS)
            assert step or not metrics["eval/kl"], "policy and reference differ before the first update"
            run.keep_evaluation(metrics)
        if run.save_due(step) and dist.is_main():
            with run.new_checkpoint(step) as step_folder:
                roles.save(models, optimizer, step_folder, run.base_name)
        if run.finished(step):
            break
        resume.seed_step(cfg.seed, step, dist.rank())

        metrics, tokens, cost = dpo_step(run, models, dataset, optimizer, step)
        run.count(tokens, cost)
        run.log(step, metrics | {"lr": lr, "epoch": step / batches.per_epoch}, watch.collapse(run.record))

    # --- report
    record = run.finish(watch.collapse(run.record))
    if held_out is None and not run.explained:  # resumed where all was done but this
        held_out, _ = pairs.evaluate(run, models, dataset, dpo_objective, DPO_METRICS)
    if dist.is_main() and not run.explained:
        pairs.report(run.folder, held_out, dataset.val)
    return record


# ---------------------------------------------------------------- what both have in common


def number_of_steps(cfg, per_epoch):
    """rl.max_steps, else training.max_steps, else whole epochs."""
    max_steps = cfg.training.max_steps if cfg.rl.max_steps is None else cfg.rl.max_steps
    return cfg.training.epochs * per_epoch if max_steps is None else max_steps


def show(run, models, examples, **sizes):
    """--explain: the examples, the checks on them and the memory plan."""
    on_frozen = models.frozen if models.adapter is None or models.has_reference else None
    how = models.tokenizer, models.net, models.named, run.training.micro_batch_tokens
    with run.autocast:
        explain.show(examples, *how, frozen=on_frozen, **sizes)


@command
def main(argv=None):
    # --- config, device, process group, run folder
    cfg, job = config.parse_args(**FLAGS, argv=argv)
    training, rl, peft = cfg.training, cfg.rl, cfg.model
    online = rl.algorithm != "dpo"
    check(rl, online)
    if training.packing or training.last_turn_only:
        raise UserError("training.packing and last_turn_only belong to train_sft.py: leave them out")
    panels, metric = (prompts.PANELS, "eval/reward") if online else (pairs.PANELS, "eval/loss")
    run = Run(cfg, job, "rl", panels, metric, maximise=online)

    # --- models: adapters on one base
    reference = not online or rl.kl_coef > 0
    critic = online and ONLINE[rl.algorithm]["critic"]
    reward = (online or rl.pairs == "sampled") and rewards.needs_model(cfg.reward)
    judge = online and cfg.evaluation.reward_checkpoint is not None
    models = roles.build(run.base_folder, run.device, run.dtype, peft, cfg.seed, reference, critic, reward or judge)
    sizes = ", ".join(f"{role} {sum(p.numel() for p in part):,}" for role, part in models.parameters.items())
    say(f"{peft.base_checkpoint} on {run.device} in {run.dtype}, {peft.peft_type}; parameters to train: {sizes}")

    # --- reward: heuristics, a trained model, both, or the user's function; then data, optimizer and loop
    score = roles.load_scorers(models, cfg, run.base_fingerprint, reward, judge)
    train = train_on_prompts if online else train_on_pairs
    return train(run, models, data.load_train_and_val(cfg), score)


if __name__ == "__main__":
    main()
