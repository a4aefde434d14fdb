"""training.budget_flops: what a step counts, by a naive loop; it ends a run as budget_tokens does; resume and ranks."""

import functools

import pytest
import torch

import train_rl
import train_sft
from common import chat, config, data, lora, model, roles
from common.runtime import base, checkpoint
from tests import checks, inputs, processes
from tests.faults import inject, trainers

few, settings, _ = trainers.fixtures("sft")
train, run, refused = processes.train, processes.run, processes.refused


class Naive:
    """FLOPs token by token and layer by layer, of a base with the adapter that the short runs train."""

    def __init__(self, folder):
        net, self.tokenizer = model.load(folder, torch.device("cpu"), torch.float32)
        lora.inject(net, "policy", 8, 16)
        self.layers = [module.base.weight.numel() for module in lora.lora_modules(net).values()]
        self.adapter = [p.numel() for p in lora.adapter_parameters(net, "policy").values()]
        self.heads = net.config.num_attention_heads * net.config.head_dim
        self.windows = [net.config.sliding_window if kind == "sliding_attention" else 10**9
                        for kind in net.config.layer_types]  # fmt: skip
        self.head = net.lm_head.weight.numel()

    def forward(self, start, end, logits):
        """(of frozen linears, attention, adapter, head) for the tokens from start to before end."""
        tokens = range(start, end)
        linears = sum(2 * size for _ in tokens for size in self.layers)
        attention = sum(4 * self.heads * min(place + 1, window) for place in tokens for window in self.windows)
        return linears, attention, sum(2 * size for _ in tokens for size in self.adapter), 2 * self.head * logits

    def update(self, start, end, logits):
        linears, attention, adapter, head = self.forward(start, end, logits)
        return 2 * linears + 3 * attention + 3 * adapter + 2 * head


@pytest.fixture(scope="module")
def naive(micro_folder):
    return Naive(micro_folder)


def test_a_step_of_sft_by_a_naive_loop(tmp_path, settings, few, naive):
    train(train_sft.main, tmp_path, settings(tmp_path, "--training.max_steps", 2))
    examples, _ = data.encode_records(data.load_split(few, "train"), naive.tokenizer, 128)
    batches = data.EpochBatches([len(example["ids"]) for example in examples], 4, 0)
    seen = 0
    for step, line in enumerate(checks.lines(tmp_path / "run")[:2]):
        seen += sum(naive.update(0, len(examples[i]["ids"]), sum(examples[i]["mask"])) for i in batches[step])
        assert line["flops_seen"] == pytest.approx(seen, rel=1e-9)


def online(micro_folder, few, *more):
    more = ["--rl.minibatches", 1, "--rl.kl_coef", 0, "--rl.entropy_coeff", 0.01, "--rl.max_steps", 2, *more]
    return trainers.settings("grpo", micro_folder, few, *more)


@pytest.fixture(scope="module")
def safety(tmp_path_factory):
    return trainers.write_data(tmp_path_factory.mktemp("data") / "safety", "grpo")


def test_a_step_of_grpo_by_a_naive_loop(tmp_path, micro_folder, safety, naive):
    """Sampling and the update compute the prompt of a group once; with a second pass there are old log-probs too."""
    prompts = {record["id"]: record["prompt"] for record in data.load_split(safety, "train")}
    costs = {}
    for passes in (1, 2):
        out = tmp_path / str(passes)
        out.mkdir()
        train(train_rl.main, out, online(micro_folder, safety, "--rl.num_ppo_epochs", passes)(out))
        sampled = logprobs = updated = 0
        done = {}
        for row in checks.samples(out / "run"):
            if row["step"] == 0:
                length = len(chat.encode_prompt(naive.tokenizer, prompts[row["id"]]))
                if row["id"] not in done:
                    done[row["id"]] = True
                    sampled += sum(naive.forward(0, length, 0))
                    updated += naive.update(0, length, 0)
                span = length, length + row["tokens"], row["tokens"]
                sampled += sum(naive.forward(*span))
                updated += naive.update(*span)
        logprobs = sampled if passes > 1 else 0
        costs[passes] = checks.lines(out / "run")[0]["flops_seen"]
        assert costs[passes] == pytest.approx(sampled + logprobs + passes * updated, rel=1e-9)
    assert costs[2] > 1.8 * costs[1]


def test_two_ranks_count_what_one_does(tmp_path, micro_folder, safety):
    flags = online(micro_folder, safety)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train(train_rl.main, tmp_path / "one", flags(tmp_path / "one"))
    assert [status for status, *_ in processes.ranks(train_rl.main, tmp_path / "two", flags(tmp_path / "two"))] == [
        0,
        0,
    ]
    one, two = (checks.lines(tmp_path / name / "run")[0] for name in ("one", "two"))
    assert one["tokens_seen"] == two["tokens_seen"] and one["flops_seen"] == pytest.approx(two["flops_seen"])


def test_a_reward_model_and_a_critic_cost_their_part(tmp_path, micro_folder, safety):
    judges = [inputs.random_reward_model(tmp_path / f"judge-{n}", micro_folder, seed=n) for n in (1, 2)]
    costs = []
    for number in range(3):
        out = tmp_path / f"with-{number}"
        out.mkdir()
        more = ["--reward.type", "hybrid", "--reward.checkpoint", ",".join(map(str, judges[:number]))]
        train(train_rl.main, out, online(micro_folder, safety, *(more if number else ()))(out))
        costs.append(checks.lines(out / "run")[0]["flops_seen"])
    assert costs[1] - costs[0] == pytest.approx(costs[2] - costs[1], rel=1e-9) and costs[1] > costs[0]
    out = tmp_path / "ppo"
    out.mkdir()
    train(train_rl.main, out, online(micro_folder, safety, "--rl.algorithm", "ppo", "--rl.critic_warmup", 0)(out))
    assert checks.lines(out / "run")[0]["flops_seen"] > 1.5 * costs[0]


def test_it_ends_a_run_and_resumes_to_the_bit(tmp_path, settings):
    flags = ["--training.max_steps", 1000]
    train(train_sft.main, tmp_path, settings(tmp_path / "measure", "--training.max_steps", 6))
    budget = checks.lines(tmp_path / "measure" / "run")[-1]["flops_seen"] - 1
    flags += ["--training.budget_flops", budget]
    whole, cut = settings(tmp_path / "whole", *flags), settings(tmp_path / "cut", *flags)
    end = train(train_sft.main, tmp_path, whole)
    assert end["flops_seen"] >= budget > checks.lines(tmp_path / "whole" / "run")[-3]["flops_seen"] and end["step"] < 20
    assert run(train_sft.main, tmp_path, cut, inject.at_step(3, processes.terminate))[0] == 1
    train(train_sft.main, tmp_path, cut)
    checks.assert_same_records(tmp_path / "whole" / "run", tmp_path / "cut" / "run")
    weights = [
        checkpoint.sha256(tmp_path / name / "run" / "final" / inputs.WEIGHTS["lora"]) for name in ("whole", "cut")
    ]
    assert weights[0] == weights[1]
    rates = [line["lr"] for line in checks.lines(tmp_path / "whole" / "run") if "lr" in line]
    assert rates[-1] < 0.3 * max(rates)  # the schedule ends with the budget


def test_a_critic_warm_up_that_takes_the_budget_is_refused(tmp_path, micro_folder, safety):
    argv = online(micro_folder, safety, "--rl.algorithm", "ppo", "--rl.critic_warmup", 2)(tmp_path)
    refused(train_rl.main, tmp_path, [*argv, "--training.budget_flops", 1000], "rl.critic_warmup: 2 leaves none")


def before_they_were_counted(body):
    """A body whose runs keep no FLOPs, as those of before."""

    def patched(main, argv):
        commit = checkpoint.new_step

        def new_step(folder, step, state):
            return commit(folder, step, {key: value for key, value in state.items() if key != "flops_seen"})

        checkpoint.new_step = new_step
        body(main, argv)

    return patched


def test_a_run_of_before_goes_on_without(tmp_path, settings):
    argv = settings(tmp_path)
    assert run(train_sft.main, tmp_path, argv, before_they_were_counted(inject.at_step(6, processes.terminate)))[0] == 1
    refused(train_sft.main, tmp_path, [*argv, "--training.budget_flops", 1e9], "begun before FLOPs were counted")
    assert "flops_seen" not in train(train_sft.main, tmp_path, argv)


def test_sizes_of_adapters(tmp_path, micro_folder):
    cfg = config.load_config(None, {"model.peft_rank": 4})
    build = functools.partial(roles.build, base.resolve(str(micro_folder)), torch.device("cpu"), torch.float32)
    models = build(cfg.model, 0, reference=True, critic=True, reward=False)
    assert models.adapter_size("policy") == models.adapter_size("critic") > 0
    assert models.adapter_size("reference") == models.adapter_size(None) == 0  # the bare base
