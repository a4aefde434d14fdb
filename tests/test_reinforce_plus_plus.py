"""Another algorithm by copying one function: REINFORCE++ (Hu 2025) out of ppo_step, in a fork of train_rl.py.

A completion's advantage at a token is what is still to come, -k KL of each token and the score on the last, whitened
over the batch. There is no critic, and no group: equals of a prompt teach, if other prompts score otherwise.
"""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_rl
from common import config, dist, experience, lora, model
from tests import checks, inputs, processes
from tests.faults import trainers
from tests.test_train_online import naive_logprobs

SCRIPT = Path(train_rl.__file__)
ENTRY = '    "ppo": {"step": ppo_step, "critic": True},\n'
WHOLE = '{"step": reinforce_plus_plus_step, "critic": False}'
KL_COEF = 0.5
few, _, _ = trainers.fixtures("grpo")
own_cache = trainers.cache


def between(text, start, end):
    """From `start` up to `end`, each of which is there once."""
    assert text.count(start) == text.count(end) == 1, (start, end)
    return text[text.index(start) : text.index(end)]


def without_critic(step):
    """The text of ppo_step with what makes it REINFORCE++."""
    gae = "advantage, rollout.returns = advantages.gae(token_rewards, rollout.values, rollout.mask, rl.gamma, rl.lam)"
    update = "        if not optimizer_step("
    critic_update = between(
        step, "        for micro in minibatch.micro_batches:\n            with run.autocast, lora", update
    )
    policy_update = """        for micro in minibatch.micro_batches:
            with run.autocast:
                logprobs, entropy = policy_logprobs(net, micro, rl)
            token_loss = ppo_objective(logprobs, entropy, micro, rl)
            loss = (token_loss * micro.weight).sum() / minibatch.divisor
            loss.backward()
            update.add(micro.ids, loss, **policy_shift(logprobs, micro, rl))
"""
    warmup = between(step, '    parameters = {"critic": ', "    started, updates = ")
    for old, new in (
        ("def ppo_step(", "def reinforce_plus_plus_step("),
        ("        rollout.values = experience.values(frozen, models.head, rollout, first_pass)\n", ""),
        (gae, "advantage = token_rewards.flip(1).cumsum(1).flip(1)  # of what is still to come"),
        (warmup, '    parameters = {"policy": models.parameters["policy"]}\n'),
        (critic_update, policy_update),
    ):
        assert step.count(old) == 1, old
        step = step.replace(old, new)
    return step


def fork(folder, entry):
    """The main of a copy of train_rl.py with one function and one entry more."""
    text = SCRIPT.read_text(encoding="utf-8")
    after = "def step_metrics("
    step = without_critic(between(text, "def ppo_step(", after))
    assert text.count(ENTRY) == 1
    text = text.replace(after, step + after).replace(ENTRY, f'{ENTRY}    "reinforce_plus_plus": {entry},\n')
    path = folder / "my_train_rl.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def settings(tmp_path, few, micro_folder, monkeypatch):
    """Flags of a short run; configs/ has one word more."""
    copied = shutil.copytree(config.CONFIGS, tmp_path / "configs")
    text, choices = (copied / "defaults.yml").read_text(), "# ppo | grpo | dpo;"
    assert text.count(choices) == 1
    (copied / "defaults.yml").write_text(text.replace(choices, "# ppo | grpo | dpo | reinforce_plus_plus;"))
    monkeypatch.setattr(config, "CONFIGS", copied)
    sizes = ["--rl.kl_coef", KL_COEF, "--model.peft_rank", 4, "--training.max_steps", 2, "--training.save_interval", 1]
    sizes += ["--rl.missing_stop_penalty", 0, "--rl.loss_aggregation", "token", "--training.micro_batch_tokens", 100]
    return trainers.settings("reinforce_plus_plus", micro_folder, few, *sizes)


def caught(main, folder, argv):
    """What each step computed: tensors of its rollout, rows of its first minibatch, gradient of its first update."""

    def body(main, argv):
        steps, cut, sum_gradients = [], experience.cut_micro_batches, dist.sum_gradients

        def keep(minibatches, rollout):
            cut(minibatches, rollout)
            tensors = {name: getattr(rollout, name) for name in ("tokens", "mask", "rewards")}
            rows = sorted(row for rows in minibatches[0].micro_batch_rows for row in rows)
            steps.append(tensors | {"rows": rows, "updates": len(minibatches), "gradients": []})

        def grab(parameters):
            sum_gradients(parameters)
            steps[-1]["gradients"].append(torch.cat([p.grad.flatten() for p in parameters]).clone())

        experience.cut_micro_batches, dist.sum_gradients = keep, grab
        processes.call(main, argv)
        torch.save(steps, folder / "steps.pt")

    processes.train(main, folder, argv, body)
    return torch.load(folder / "steps.pt", weights_only=True)


def naive_gradient(net, step):
    """The gradient of the mean of -A log pi over the tokens of the first minibatch, where the ratio is 1."""
    tokens, mask, scores = step["tokens"], step["mask"].bool(), step["rewards"].tolist()
    with torch.no_grad(), lora.using(net, None):
        ref_logprobs = naive_logprobs(net, tokens)
    logprobs = naive_logprobs(net, tokens)
    returns = {}
    for row, score in enumerate(scores):
        at, running = mask[row].nonzero()[:, 0].tolist(), score
        for t in reversed(at):
            running -= KL_COEF * (logprobs[row, t] - ref_logprobs[row, t]).item()
            returns[row, t] = running
    every = torch.tensor(list(returns.values()), dtype=torch.float64)
    mean, deviation = every.mean().item(), (every.var().item() + 1e-8) ** 0.5
    own = [key for key in returns if key[0] in step["rows"]]
    loss = sum(-(returns[key] - mean) / deviation * logprobs[key].double() for key in own) / len(own)
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters(net))])


def parameters(net):
    return list(lora.adapter_parameters(net, "policy").values())


@pytest.mark.parametrize(
    ("reward", "passes", "minibatches"), [("equal_in_groups", 1, 1), ("equal_in_groups", 2, 2), ("mixed", 1, 2)]
)
def test_the_gradient_is_that_of_the_formula(tmp_path, settings, micro_folder, reward, passes, minibatches):
    """At the start, where the KL is 0, and after a step, where it is not."""
    body = {
        "equal_in_groups": "return len(prompt[-1]['content']) % 5",
        "mixed": "calls[0] += 1; return 2 * calls[0] % 5",
    }[reward]
    flags = ["--rl.num_ppo_epochs", passes, "--rl.minibatches", minibatches, *inputs.mine(tmp_path, body)]
    flags += ["--training.learning_rate", 1e-2]
    steps = caught(fork(tmp_path, WHOLE), tmp_path, settings(tmp_path, *flags))
    assert len(steps) == 2
    net, _ = model.load(micro_folder, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    lora.inject(net, "policy", 4, 16)
    for number, step in enumerate(steps):
        if number:
            saved = load_file(tmp_path / "run" / f"step-{number:06d}" / "adapter_model.safetensors")
            lora.fill(lora.adapter_parameters(net, "policy"), saved)
        groups = step["rewards"].view(-1, 2)
        equal = groups[:, 0] == groups[:, 1]
        assert equal.all() if reward == "equal_in_groups" else not equal.all()
        assert len(step["rewards"].unique()) > 1
        assert step["updates"] == len(step["gradients"]) == passes * minibatches
        assert len(step["rows"]) == 8 // minibatches  # equals are not left out
        found, naive = step["gradients"][0], naive_gradient(net, step)
        assert naive.norm() > 1e-2
        assert (found - naive).abs().max() < 1e-6 and (found - naive).norm() < 1e-5 * naive.norm()
    log = checks.lines(tmp_path / "run")
    assert log[0]["kl"] == 0 < log[1]["kl"] and log[0]["updates"] == passes * minibatches
    assert not (tmp_path / "run" / "step-000002" / "critic.safetensors").exists()


def test_a_forgotten_critic_entry_fails_loudly(tmp_path, settings):
    main = fork(tmp_path, '{"step": reinforce_plus_plus_step}')
    status, out, err = processes.run(main, tmp_path, settings(tmp_path))
    assert status != 0 and err.rstrip().endswith("KeyError: 'critic'"), err
    assert "RESULT" not in out and not (tmp_path / "run").exists()
