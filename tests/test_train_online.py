"""train_rl.py end to end, PPO and GRPO: where they start, their gradients, one base in memory, resume, refusals."""

import functools
import gc
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

import train_rl
from common import advantages, data, dist, experience, lora, model, reward_model
from tests import runs
from tests.faults import trainers
from tests.runs import lines, mine, samples, spying

ROOT = Path(train_rl.__file__).parent
MAIN = train_rl.main
BOTH = pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
train, run, refused = (functools.partial(each, MAIN) for each in (runs.train, runs.run, runs.refused))
few, settings, _ = trainers.fixtures("online")
judge, start = trainers.judge, trainers.start


# ---------------------------------------------------------------- a run, and what it leaves behind


@BOTH
def test_it_climbs_and_leaves_its_files(tmp_path, tiny_folder, algorithm):
    argv = ["--config", ROOT / "configs" / f"{algorithm}_rl_270m.yml", "--debug", "--logging.output_dir", tmp_path]
    argv += ["--model.base_checkpoint", tiny_folder]
    status, out, err = run(tmp_path, argv, pictures=True)
    assert status == 0, err
    run_dir = tmp_path / f"{algorithm}_rl_270m-debug"
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith("step-")}
    files = "config.yml run.json metrics.jsonl samples.jsonl held_out.jsonl curves.png report.json"
    assert names == {".lock", "best", "final", *files.split()}
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    log, rows, held_out = lines(run_dir), samples(run_dir), samples(run_dir, "held_out")
    assert [line["step"] for line in log] == list(range(21))
    assert [line["step"] for line in log if "eval/reward" in line] == [0, 10, 20]
    first, *_, last = log
    assert last == json.loads(out.partition("RESULT ")[2])
    assert first["kl"] == first["eval/kl"] == 0 < last["eval/kl"]

    report = json.loads((run_dir / "report.json").read_text())
    assert report["reward"]["interval"][0] > 0 and report["steps"] == [0, 20] and report["prompts"] == 64
    for step, name in ((0, "first"), (20, "last")):
        part = [line for line in held_out if line["step"] == step]
        for key, value in (("reward", "reward"), ("length", "tokens"), ("stop_rate", "stopped")):
            mean = sum(float(line[value]) for line in part) / 64
            assert report[key][name] == pytest.approx(mean) == pytest.approx(log[step][f"eval/{key}"]), key
    for line in log[:-1]:
        part = [row for row in rows if row["step"] == line["step"]]
        assert [row["row"] for row in part] == list(range(24))
        rewards = torch.tensor([row["reward"] for row in part], dtype=torch.float64)
        assert line["reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)
        assert line["reward_std"] == pytest.approx(rewards.std().item(), abs=1e-6)
        assert line["length"] == pytest.approx(sum(row["tokens"] for row in part) / 24)
        assert line["stop_rate"] == pytest.approx(sum(row["stopped"] for row in part) / 24)
        for name in ("toxicity", "refusal", "length", "repetition"):
            assert line[f"reward/{name}"] == pytest.approx(sum(row["parts"][name] for row in part) / 24, abs=1e-6)
        weights = {"toxicity": 1.0, "length": 0.2, "repetition": 0.5, "refusal": 0.5}
        for row in part:  # the heuristics, less the missing stop
            score = sum(row["parts"][name] * weight for name, weight in weights.items()) / 2.2
            assert row["reward"] == pytest.approx(score - (not row["stopped"]), abs=1e-6)
        assert 0 <= line["clip_share"] < 0.5 if line["step"] > 1 else True
        assert line["sampler_mean"] < 1e-4 and line["sampler_max"] < 1e-3 and line["entropy"] > 0.01
        assert line["seconds"] >= line["seconds_rollout"] + line["seconds_reward"] + line["seconds_update"]
        assert ("grad_norm" in line) == (algorithm == "grpo" or line["step"] >= 2)
        assert ("explained_variance" in line) == ("critic_grad_norm" in line) == (algorithm == "ppo")
    if algorithm == "ppo":  # a critic that has learned something
        explained = [line["explained_variance"] for line in log[:-1]]  # of one rollout it is noisy
        assert explained[0] == 0 and statistics.median(explained[1:]) > 0.2
        assert statistics.median(line["value_loss"] for line in log[10:20]) < 0.5 * first["value_loss"]
        step = run_dir / "step-000020"
        assert (step / "critic.safetensors").is_file() and not (run_dir / "final" / "critic.safetensors").exists()


# ---------------------------------------------------------------- gradients against a naive implementation


def caught(argv, tmp_path):
    """What a real run computed: the tensors of its last rollout, its plan, and the summed gradients of every update."""

    def body(main, argv):
        kept, real, sum_gradients = {}, experience.plan, dist.sum_gradients

        def plan(batch, *more):
            kept["batch"] = batch
            found = real(batch, *more)
            kept["plan"] = found["plan"]
            return found

        def grab(parameters):
            sum_gradients(parameters)
            kept.setdefault("grads", []).append(torch.cat([p.grad.flatten() for p in parameters]).clone())

        experience.plan, dist.sum_gradients = plan, grab
        runs.call(main, argv)
        batch = {name: value for name, value in kept["batch"].items() if torch.is_tensor(value)}
        torch.save({"batch": batch, "plan": kept["plan"], "grads": kept["grads"]}, tmp_path / "kept.pt")

    train(tmp_path, argv, body)
    return torch.load(tmp_path / "kept.pt", weights_only=True)


def naive_logprobs(net, tokens):
    """(B, T-1) by whole logits in one padded forward of transformers' own model; attention is causal."""
    logits = net(tokens, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1).gather(2, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_grpo_gradient_is_that_of_the_formula(tmp_path, settings, tiny_folder, aggregation):
    """On the first minibatch r = 1 and pi = ref: the gradient is that of -A log pi, weighted by the aggregation."""
    argv = settings("grpo", "--rl.loss_aggregation", aggregation, "--model.peft_rank", 4)
    kept = caught(argv(tmp_path, "--training.max_steps", 1, "--training.micro_batch_tokens", 100), tmp_path)
    net, _ = model.load(tiny_folder, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    lora.inject(net, "policy", 4, 16)
    batch, rows = kept["batch"], sorted(row for cut in kept["plan"][0] for row in cut)
    assert len(rows) == 4 and batch["rewards"].shape == (8,)
    rewards = batch["rewards"].double().view(4, 2)
    a = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    total, tokens = 0.0, 0
    logprobs = naive_logprobs(net, batch["tokens"][rows])
    for row, logprob in zip(rows, logprobs):
        mask = batch["mask"][row].bool()
        own = -(a[row] * logprob[mask].double())
        tokens += len(own)
        total = total + {"token": own.sum(), "sequence": own.mean(), "constant": own.sum() / 8}[aggregation]
    (total / (tokens if aggregation == "token" else 4)).backward()
    naive = torch.cat([p.grad.flatten() for p in lora.adapter_parameters(net, "policy").values()])
    assert naive.norm() > 1e-3
    assert (kept["grads"][0] - naive).norm() < 1e-4 * naive.norm()


def test_ppo_gradients_are_those_of_the_formulas(tmp_path, settings, tiny_folder):
    """Critic: (V - R)^2 / 2 with V = 0, R by a loop; policy: -A log pi with A whitened over the whole rollout."""
    argv = settings("ppo", "--rl.gamma", 0.99, "--rl.lam", 0.9, "--model.peft_rank", 4, "--rl.critic_warmup", 0)
    kept = caught(argv(tmp_path, "--training.max_steps", 1, "--training.micro_batch_tokens", 100), tmp_path)
    net, _ = model.load(tiny_folder, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    lora.inject(net, "policy", 4, 16)
    lora.inject(net, "critic", 4, 16)
    head = torch.nn.Parameter(torch.zeros(1, net.config.hidden_size))
    batch, rows = kept["batch"], sorted(row for cut in kept["plan"][0] for row in cut)
    advantage, returns = torch.zeros(2, *batch["mask"].shape, dtype=torch.float64)
    for row, reward in enumerate(batch["rewards"].tolist()):
        at, running = batch["mask"][row].nonzero()[:, 0].tolist(), 0.0
        for t in reversed(at):  # V is 0 everywhere, KL too
            running = (reward if t == at[-1] else 0.0) + 0.99 * 0.9 * running
            advantage[row, t] = returns[row, t] = running
    mask = batch["mask"].bool()
    white = (advantage - advantage[mask].mean()) / (advantage[mask].var() + 1e-8).sqrt()
    kept_rows = torch.tensor(rows)
    few = mask[kept_rows]
    lora.use(net, "policy")
    ((-white[kept_rows] * naive_logprobs(net, batch["tokens"][kept_rows]))[few].mean()).backward()
    policy = torch.cat([p.grad.flatten() for p in lora.adapter_parameters(net, "policy").values()])
    lora.use(net, "critic")
    states = net.model(batch["tokens"][kept_rows], use_cache=False).last_hidden_state[:, :-1]
    values = (states.float() * head).sum(-1)
    (0.5 * 0.5 * (values - returns[kept_rows]).square()[few].mean()).backward()  # rl.value_coeff 0.5
    critic = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                        for p in reward_model.parameters(net, "critic", head).values()])  # fmt: skip
    for found, naive in zip(kept["grads"], (critic, policy)):
        assert naive.norm() > 1e-3
        assert (found - naive).norm() < 1e-4 * naive.norm()


@BOTH
def test_b1_gradient_of_micro_batches(tmp_path, settings, algorithm):
    """How a minibatch is cut does not count; every cut at most 64 tokens against all in one."""
    found = []
    for name, budget in (("one", 100_000), ("cut", 1)):
        folder = tmp_path / name
        folder.mkdir()
        argv = settings(algorithm)(folder, "--training.max_steps", 1, "--training.micro_batch_tokens", budget)
        kept = caught([*argv, "--rl.critic_warmup", 0, "--rl.entropy_coeff", 0.01], folder)
        found.append((kept["grads"][: 2 if algorithm == "ppo" else 1], len(kept["plan"][0])))
    (one, few), (cut, many) = found
    assert few == 1 and many == 4
    for a, b in zip(one, cut):
        assert (a - b).norm() < 2e-6 * a.norm() and a.norm() > 1e-3


# ---------------------------------------------------------------- one base in memory


def test_four_roles_on_one_base(tmp_path, settings, start, judge):
    """Policy, reference, critic and reward model: the base's bytes once, and four adapters with two heads."""

    def body(main, argv):
        loads, real = [], model.load

        def load(*args, **more):
            loads.append(real(*args, **more))
            return loads[-1]

        def count():
            net = loads[0][0]
            alive = [t for t in gc.get_objects() if isinstance(t, torch.nn.Parameter) and id(t) not in before]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
            lora_bytes = sum(p.nbytes for name, p in net.named_parameters() if "lora_" in name)
            base_bytes = sum(p.nbytes for name, p in net.named_parameters() if "lora_" not in name)
            adapters = {name for module in lora.lora_modules(net).values() for name in module.lora_A}
            heads = 2 * net.config.hidden_size * 4
            print("BYTES " + json.dumps([len(loads), sum(storages.values()), base_bytes + lora_bytes + heads,
                                         sorted(adapters)]))  # fmt: skip

        model.load = load
        gc.collect()
        before = {id(t) for t in gc.get_objects() if isinstance(t, torch.nn.Parameter)}  # other tests' models
        runs.at_step(2, count)(main, argv)

    flags = ["--model.adapter", start, "--reward.type", "hybrid", "--reward.checkpoint", judge]
    status, out, err = run(tmp_path, settings("ppo")(tmp_path, "--training.max_steps", 3, *flags), body)
    assert status == 0, err
    loads, alive, expected, adapters = json.loads(out.partition("BYTES ")[2].splitlines()[0])
    assert loads == 1 and alive == expected and adapters == ["critic", "policy", "reference", "reward"]
    assert "reward/trained" in lines(tmp_path / "run")[0]


def test_kl_coef_0_has_no_reference(tmp_path, settings, start):
    def body(main, argv):
        def never(*args):
            raise AssertionError("a reference was made")

        lora.copy_adapter = never
        runs.call(main, argv)

    flags = ["--model.adapter", start, "--rl.kl_coef", 0, "--training.max_steps", 2]
    train(tmp_path, settings("grpo")(tmp_path, *flags), body)
    assert not any("kl" in line or "eval/kl" in line for line in lines(tmp_path / "run"))


# ---------------------------------------------------------------- R15, R18: not finite, degenerate


def test_r15_a_sampler_that_diverges_ends_the_run_on_all_ranks(tmp_path, settings):
    def poison():
        for tensor in gc.get_objects():
            if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad:
                tensor.data.fill_(math.nan)

    argv = settings("grpo")(tmp_path, "--training.max_steps", 4)
    found = runs.ranks(MAIN, tmp_path, argv, (runs.call, runs.at_step(2, poison)))
    for status, _, err in found:
        assert status == 2 and err.count("\n") == 1, err
    assert "another rank could not sample" in found[0][2]
    assert "step 2: logits are not finite" in found[1][2] and "synthetic-safety-train-" in found[1][2]
    assert len(lines(tmp_path / "run")) == 2 and not (tmp_path / "run" / "final").exists()


def test_r18_a_reward_that_fails_later_ends_both_ranks(tmp_path, settings):
    flags = mine(tmp_path, "calls[0] += 1; return float('nan') if calls[0] > 12 else calls[0]")
    for number, (status, _, err) in enumerate(runs.ranks(MAIN, tmp_path, settings("grpo")(tmp_path / "two", *flags))):
        assert status == 2 and "is not finite" not in err and "nan" in err, (number, err)


def test_equal_groups_count_in_the_mean_unless_left_out(tmp_path, settings):
    """Of a mean over all completions, half of which are in equal groups, dynamic sampling makes one over the others."""
    flags = ["--rl.kl_coef", 0, "--rl.missing_stop_penalty", 0, "--rl.minibatches", 1, "--rl.num_ppo_epochs", 1]
    flags += [*mine(tmp_path, "calls[0] += 1; return calls[0] if calls[0] % 8 < 5 else 0"), "--training.max_steps", 1]
    flags += ["--evaluation.max_items", 8, "--rl.loss_aggregation", "constant"]
    grads = []
    for dynamic in ("false", "true"):
        folder = tmp_path / dynamic
        folder.mkdir()
        kept = caught(settings("grpo")(folder, *flags, "--rl.dynamic_sampling", dynamic), folder)
        assert sorted(row for cut in kept["plan"][0] for row in cut) != list(range(8))
        grads.append(kept["grads"][0])
        assert 0 < lines(folder / "run")[0]["zero_advantage_share"] < 1
    assert (grads[1] / grads[0]).nanmedian().item() > 1.3
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.9999


def test_b22_masked_truncated_completions(tmp_path, settings):
    """Left out of loss and divisor, but not of the baseline; all of them left out is an error."""
    refused(tmp_path, settings("grpo")(tmp_path / "all", "--rl.mask_truncated", "true", "--rl.max_new_tokens", 1),
            "step 0", "rl.mask_truncated", "rl.max_new_tokens")  # fmt: skip
    kept = caught(settings("grpo")(tmp_path, "--rl.mask_truncated", "true", "--rl.max_new_tokens", 24,
                                   "--rl.num_ppo_epochs", 1, "--training.max_steps", 1), tmp_path)  # fmt: skip
    batch, rows = kept["batch"], sorted(row for part in kept["plan"] for cut in part for row in cut)
    stopped = batch["stopped"].nonzero()[:, 0].tolist()
    assert rows == stopped and 0 < len(stopped) < 8
    assert (batch["mask"].sum(1) > 0).tolist() == batch["stopped"].tolist()
    assert (batch["sizes"][:, 0] > 0).tolist() == batch["stopped"].tolist()


def test_target_kl_ends_a_rollouts_updates(tmp_path, settings):
    calls = {}
    for limit in ("null", 1e-9):
        found = []

        def body(main, argv, found=found):
            spying(lambda step, name, *_: found.append(step) if name == "policy_loss" else None)(main, argv)
            print("FOUND " + json.dumps(found))

        argv = settings("ppo")(tmp_path / str(limit), "--rl.target_kl", limit, "--training.max_steps", 3,
                               "--rl.num_ppo_epochs", 2, "--training.micro_batch_tokens", 10_000)  # fmt: skip
        status, out, err = run(tmp_path, argv, body)
        assert status == 0, err
        calls[limit] = json.loads(out.rpartition("FOUND ")[2])
    assert [calls["null"].count(step) for step in range(3)] == [0, 4, 4]  # 2 epochs of 2 minibatches
    assert [calls[1e-9].count(step) for step in range(3)] == [0, 2, 2]  # one update, then it is too far
    log = [lines(tmp_path / str(limit) / "run") for limit in ("null", 1e-9)]
    assert [line["updates"] for line in log[0][:3]] == [4, 4, 4] and [line["updates"] for line in log[1][:3]] == [
        4,
        1,
        1,
    ]


def test_one_rank_too_many_for_the_prompts(tmp_path, settings):
    argv = settings("grpo")(tmp_path, "--rl.rollout_size", 1, "--rl.minibatches", 1)
    for status, _, err in runs.ranks(MAIN, tmp_path, argv):
        assert status == 2 and "rl.rollout_size: 1 prompts" in err, err


def test_a_token_budget_ends_a_run(tmp_path, settings):
    result = train(tmp_path, settings("grpo")(tmp_path, "--training.budget_tokens", 1200))
    log = lines(tmp_path / "run")
    assert log[-2]["tokens_seen"] >= 1200 > log[-3]["tokens_seen"] and result["step"] == len(log) - 1 < runs.STEPS
    assert (tmp_path / "run" / "final").is_dir() and "eval/reward" in log[-1]


def test_the_watcher_speaks_of_a_hacked_reward(tmp_path, settings):
    """A reward for nothing but short answers: the length runs away, and it is said and logged."""
    flags = [*mine(tmp_path, "return -len(completion) / 20"), "--rl.max_new_tokens", 24, "--rl.missing_stop_penalty", 0]
    flags += ["--training.max_steps", 18, "--training.eval_interval", 18, "--training.learning_rate", 1e-2]
    flags += ["--rl.group_size", 6, "--rl.kl_coef", 0, "--training.save_interval", 30]
    flags += ["--training.micro_batch_tokens", 2048]
    status, out, err = run(tmp_path, settings("grpo")(tmp_path, *flags))
    assert status == 0, err
    said = [line["warning"] for line in lines(tmp_path / "run") if "warning" in line]
    assert any("the reward rose from" in words and "answers went from" in words for words in said), said
    assert "answers went from" in out


def test_entropy_has_a_price(tmp_path, settings):
    """A large bonus makes the policy more random than none."""
    ends = []
    for coefficient in (0, 0.5):
        folder = tmp_path / str(coefficient)
        flags = ["--rl.entropy_coeff", coefficient, "--training.max_steps", 5, "--rl.num_ppo_epochs", 2]
        flags += ["--training.micro_batch_tokens", 2048]
        train(tmp_path, settings("grpo")(folder, *flags))
        ends.append(lines(folder / "run")[-1]["eval/entropy"])
    assert ends[1] > 1.2 * ends[0], ends


# ---------------------------------------------------------------- --explain and bad input


def test_explain_writes_nothing(tmp_path, settings, few):
    before = runs.snapshot(few)
    for algorithm in ("grpo", "ppo"):
        out_dir = tmp_path / "out"
        status, out, err = run(tmp_path, settings(algorithm)(out_dir, "--explain"))
        assert status == 0 and not err and not out_dir.exists() and runs.snapshot(few) == before
        assert out.count(": reward ") == 4 and "toxicity" in out and "[[" in out and "estimated peak" in out


def test_bad_input_is_one_line(tmp_path, settings, judge):
    out_dir, bare = tmp_path / "out", runs.write_data(tmp_path / "bare", "conala", {"reference": None}, train=10, val=4)
    for algorithm, flags, *words in (
        ("grpo", ["--rl.group_size", 1], "rl.group_size"),
        ("grpo", ["--rl.kl_estimator", "k1"], "rl.kl_estimator", "k2 or k3"),
        ("ppo", ["--rl.kl_estimator", "k3"], "rl.kl_estimator", "only k1"),
        ("ppo", ["--rl.minibatches", 5], "rl.minibatches", "rl.rollout_size"),
        ("ppo", ["--rl.rollout_size", 21], "train: 20 prompts", "at least 21"),
        ("ppo", ["--training.max_seq_length", 16], "train: 0 prompts of at most 8 tokens"),
        ("ppo", ["--training.packing", "true"], "training.packing"),
        ("ppo", ["--rl.critic_warmup", 12], "rl.critic_warmup: 12", "12 steps"),
        ("ppo", ["--reward.type", "hybrid"], "reward.checkpoint"),
        ("ppo", ["--reward.type", "hybrid", "--reward.checkpoint", tmp_path], "reward.checkpoint", str(tmp_path)),
        ("grpo", ["--reward.function", f"{tmp_path}/none.py:f"], "reward.function"),
        ("grpo", ["--rl.loss_aggregation", "dapo"], "rl.loss_aggregation", "token | sequence | constant"),
        ("grpo", ["--task", "conala", "--dataset_path", bare], "reference", "synthetic-conala-val-"),
    ):
        refused(tmp_path, settings(algorithm)(out_dir, *flags), *words)
    assert not list(out_dir.rglob("step-*"))


def test_leave_one_out_is_rloo(tmp_path, settings):
    kept = caught(settings("grpo")(tmp_path, "--rl.baseline", "leave_one_out", "--training.max_steps", 1), tmp_path)
    batch = kept["batch"]
    rewards = batch["rewards"].view(-1, 2)
    rl = type("rl", (), {"baseline": "leave_one_out", "group_size": 2})
    found = train_rl.grpo_advantages(batch, rl)["advantages"]
    expected = torch.stack([rewards[:, 0] - rewards[:, 1], rewards[:, 1] - rewards[:, 0]], 1).flatten()
    assert torch.allclose(found, expected[:, None] * batch["mask"], atol=1e-6)
    assert advantages.leave_one_out(batch["rewards"], 2).abs().max() > 0 and len(data.piece(batch, [0, 1])) > 5
