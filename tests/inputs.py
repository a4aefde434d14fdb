"""What short runs are given: flags, data, models to start from; and the folder of one that nothing stopped."""

import functools
import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from common import data, lora, model, reward_model, tasks
from common.runtime import base
from tests import processes

WEIGHTS = {"lora": "adapter_model.safetensors", "none": "model.safetensors"}
STEPS = 12


def settings(base_folder, source, *script, rate=1e-3):
    """A function that returns the flags of a short run: several micro-batches a step, dropout, two epoch edges."""

    def flags(output_dir, *more, peft="lora"):
        kind = ["--model.peft_type", peft, "--model.peft_dropout", 0.1]
        sizes = ["--training.max_steps", STEPS, "--training.batch_size", 4, "--training.micro_batch_tokens", 128]
        every = ["--training.eval_interval", 4, "--training.save_interval", 3]
        rates = ["--training.learning_rate", 0.1 * rate if peft == "none" else rate, "--logging.run_name", "run"]
        where = ["--model.base_checkpoint", base_folder, "--dataset_path", source, "--logging.output_dir", output_dir]
        return ["--debug", *kind, *sizes, *every, *rates, *where, *script, *more]

    return flags


def staged_settings(few, base_folder):
    """A function that returns the flags of train_staged.py: stages of three steps on few records, and a comparison."""

    def flags(folder, *more, algorithm="grpo"):
        sizes = ["--rl.algorithm", algorithm, "--rl.rollout_size", 4, "--rl.group_size", 2, "--rl.max_new_tokens", 8]
        sizes += ["--rl.minibatches", 1, "--rl.critic_warmup", 1, "--rl.max_steps", 3, "--training.max_steps", 3]
        sizes += ["--training.batch_size", 4, "--training.eval_interval", 50, "--training.save_interval", 2]
        sizes += ["--evaluation.max_items", 8, "--evaluation.max_new_tokens", 8, "--evaluation.draws", 100]
        where = ["--model.base_checkpoint", base_folder, "--dataset_path", few, "--logging.output_dir", folder]
        return ["--debug", "--training.mode", "staged", *sizes, *where, "--logging.run_name", "run", *more]

    return flags


def straight(main, tmp_path_factory, settings):
    """A function that returns the folder of a run that nothing stopped."""

    @functools.cache
    def folder(peft="lora"):
        out = tmp_path_factory.mktemp(f"straight-{peft}")
        processes.train(main, out, settings(out, peft=peft))
        return out / "run"

    return folder


def write_data(folder, task, changes=(), **sizes):
    folder.mkdir(parents=True)
    for split, count in sizes.items():
        lines = [json.dumps(record | dict(changes)) + "\n" for record in tasks.records(task, split, count)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def odd_pairs(folder, source):
    """The data of `source`, but one pair has equal answers, one an empty one, one only one, one an endless prompt."""
    shutil.copytree(source, folder)
    rows = data.load_split(source, "train")
    changes = [
        {"rejected": rows[0]["response"]},
        {"rejected": " \n"},
        {"rejected": None},
        {"prompt": [{"role": "user", "content": "How do I fix my car? " * 50}]},
    ]
    rows[:4] = [row | change for row, change in zip(rows, changes)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pairs_of(source, split, tokenizer):
    return data.encode_pairs(data.load_split(source, split), tokenizer, 128)[0]


def random_adapter(net, name, seed, std=0.1, dropout=0.0):
    """Give `net` an adapter that changes what it says."""
    torch.manual_seed(seed)
    lora.inject(net, name, 4, 8, dropout=dropout)
    with torch.no_grad():
        for key, p in lora.adapter_parameters(net, name).items():
            if "lora_B" in key:
                p.normal_(std=std)


def random_start(folder, base_folder, std=0.05):
    """The folder of a policy to start from, trained with dropout: in train mode it would differ from its reference."""
    folder.mkdir()
    net, tokenizer = model.load(base_folder, torch.device("cpu"), torch.float32)
    random_adapter(net, "policy", 2, std=std, dropout=0.1)
    model.save_adapter(net, tokenizer, folder, "policy", "base")
    return folder


def random_reward_model(folder, base_folder, seed=1, mean=0.1, std=2.0):
    """The folder of a reward model with random weights."""
    folder.mkdir()
    net, tokenizer = model.load(base_folder, torch.device("cpu"), torch.float32)
    random_adapter(net, "reward", seed, std=0.05)
    head = reward_model.new_head(net.config.hidden_size, net.device)
    about = {"base_checkpoint": "base", "base": base.fingerprint(base_folder), "mean": mean, "std": std}
    reward_model.save(net, tokenizer, folder, "reward", head, about)
    return folder


def mine(folder, body):
    (folder / "mine.py").write_text(f"calls = [0]\ndef mine(prompt, completion, reference):\n    {body}\n")
    return ["--reward.function", f"{folder}/mine.py:mine"]


def another_base(folder, source):
    """The folder of a base with one weight changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def flipped(content, mask=0x40):
    """Bytes with one bit of the middle one turned round."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ mask]) + content[middle + 1 :]
