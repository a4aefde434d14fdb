"""train_staged.py end to end: which stages run, equal cost, what RL starts from, going on, the comparison, refusals."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import train_rl
import train_sft
import train_staged
from common import chat, config, data
from common.evaluation import answers
from common.runtime import base as bases
from common.runtime import checkpoint
from common.tasks.safety import is_harmful_request
from tests import checks, inputs, processes
from tests.checks import lines
from tests.faults.test_staged import in_stage
from tests.inputs import write_data

ROOT = Path(train_staged.__file__).parent
MAIN = train_staged.main
train, run, refused = (functools.partial(each, MAIN) for each in (processes.train, processes.run, processes.refused))
BUDGET = 3000


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "few", "safety", train=24, val=8, test=10)


@pytest.fixture(scope="module")
def settings(few, micro_folder):
    return inputs.staged_settings(few, micro_folder)


def count_reads(folder, main, argv):
    """`processes.call`, with a file in `folder` that says how often a tokenizer was read."""
    read, reads = PreTrainedTokenizerFast.from_pretrained, []
    PreTrainedTokenizerFast.from_pretrained = lambda *a, **options: reads.append(a) or read(*a, **options)
    bases._load_tokenizer.cache_clear()
    processes.bases.clear()
    processes.call(main, argv)
    (folder / "reads").write_text(str(len(reads)))


@pytest.fixture(scope="module")
def compared(tmp_path_factory, settings):
    """The folder of a comparison of all paradigms, its command, its result."""
    out = tmp_path_factory.mktemp("compared")
    argv = settings(out, "--paradigms", "sft,rl,staged", "--training.budget_tokens", BUDGET)
    return out / "run", argv, train(out, argv, functools.partial(count_reads, out))


# ---------------------------------------------------------------- stages


def test_stages_of_each_mode(tmp_path):
    def plan(arms=None, **changes):
        cfg = config.load_config(None, {key.replace("__", "."): value for key, value in changes.items()})
        return train_staged.stages(cfg, arms, tmp_path)

    def names(*words, **changes):
        return [name for name, _, _ in plan(*words, **changes)]

    heuristic = {"reward__type": "heuristic"}
    assert names(training__mode="sft") == ["sft"] and names(training__mode="reward") == ["reward"]
    assert names(training__mode="rl") == ["reward", "rl"] and names(training__mode="rl", **heuristic) == ["rl"]
    assert names(training__mode="staged") == ["sft", "reward", "rl"]
    assert names(training__mode="staged", reward__checkpoint="somewhere") == ["sft", "rl"]
    assert names(training__mode="staged", rl__algorithm="dpo") == ["sft", "rl"]  # learns from pairs alone
    own = config.load_config(None, {"training.mode": "staged"})
    own.rl.algorithm = "reinforce"  # of a fork, which samples as all do but dpo
    assert [name for name, _, _ in train_staged.stages(own, None, tmp_path)] == ["sft", "reward", "rl"]
    assert names(training__mode="staged", rl__algorithm="dpo", rl__pairs="sampled") == ["sft", "reward", "rl"]
    every = ["sft", "rl", "staged"]
    assert names(every, training__budget_tokens=9) == ["reward", "judge", "sft", "rl", "staged-sft", "staged-rl"]
    assert names(every, task="conala", training__budget_tokens=9) == ["reward", "sft", "rl", "staged-sft", "staged-rl"]
    assert names(["sft"], training__budget_tokens=9, **heuristic) == ["judge", "sft"]

    more = ["base", "rft", "dpo", "grpo", "ppo"]
    trained = ["reward", "judge", "rft-samples", "rft", "dpo", "grpo", "ppo"]
    assert names(more, training__budget_tokens=9) == trained
    assert names(["base"], training__budget_tokens=9) == ["judge"]
    assert names(["dpo", "sft"], training__budget_tokens=9) == ["judge", "sft", "dpo"]  # no reward is asked for
    assert names(["dpo"], training__budget_tokens=9, rl__pairs="sampled") == ["reward", "judge", "dpo"]
    arms = {name: (mode, flags) for name, mode, flags in plan(more, training__budget_tokens=9)}
    assert [arms[name][1]["rl.algorithm"] for name in ("dpo", "grpo", "ppo")] == ["dpo", "grpo", "ppo"]
    assert arms["dpo"][1]["dataset_path"] == arms["reward"][1]["dataset_path"] == tmp_path / "pairs-reward"
    assert arms["rft-samples"][0] == "samples" and arms["rft"][0] == "sft"
    assert arms["rft"][1]["dataset_path"] == tmp_path / "rft-samples"
    assert arms["rft-samples"][1]["training.budget_tokens"] == arms["rft"][1]["training.budget_tokens"] == 4
    assert arms["grpo"][1]["evaluation.reward_checkpoint"] == tmp_path / "judge" / "final"  # picks best/
    assert "evaluation.reward_checkpoint" not in arms["rft"][1]
    second = train_staged.stages(
        config.load_config(None, {"training.budget_tokens": 9}), every, tmp_path, tmp_path / "judge"
    )
    assert [name for name, _, _ in second] == ["reward", "sft", "rl", "staged-sft", "staged-rl"]
    assert second[0][2]["dataset_path"] == tmp_path / "pairs-reward"  # it still leaves the judge's half out
    assert second[2][2]["evaluation.reward_checkpoint"] == tmp_path / "judge"

    staged = {name: flags for name, _, flags in plan(every, training__budget_tokens=9)}
    assert [staged[name].get("training.budget_tokens") for name in ("sft", "staged-sft", "staged-rl")] == [None, 4, 4]
    assert staged["staged-rl"]["model.adapter"] == tmp_path / "staged-sft" / "final"
    assert (
        staged["rl"]["reward.checkpoint"] == staged["staged-rl"]["reward.checkpoint"] == tmp_path / "reward" / "final"
    )
    full = {name: flags for name, _, flags in plan(training__mode="staged", model__peft_type="none")}
    start = tmp_path / "sft" / "final"
    assert full["reward"]["model.base_checkpoint"] == full["rl"]["model.base_checkpoint"] == start
    assert full["reward"]["model.peft_type"] == "lora" and "model.adapter" not in full["rl"]


def test_staged_is_its_scripts_one_after_the_other(tmp_path, settings):
    """The same bits as train_sft.py and train_rl.py by hand, RL starting, and measuring its KL, from the end of SFT."""
    argv = settings(tmp_path, "--reward.type", "heuristic", algorithm="ppo")
    train(tmp_path, argv)
    out = tmp_path / "run"
    by_hand = ["--config", out / "config.yml", "--logging.output_dir", tmp_path / "hand"]
    processes.train(train_sft.main, tmp_path, [*by_hand, "--training.mode", "sft", "--logging.run_name", "sft"])
    start = ["--model.adapter", tmp_path / "hand" / "sft" / "final"]
    processes.train(train_rl.main, tmp_path, [*by_hand, "--training.mode", "rl", "--logging.run_name", "rl", *start])
    for stage in ("sft", "rl"):
        checks.assert_same_records(out / stage, tmp_path / "hand" / stage)
        names = [folder / stage / "final" / "adapter_model.safetensors" for folder in (out, tmp_path / "hand")]
        assert checkpoint.sha256(names[0]) == checkpoint.sha256(names[1])
    first = lines(out / "rl")[0]
    assert first["eval/kl"] == 0 and config.load_config(out / "rl" / "config.yml").model.adapter == str(
        out / "sft" / "final"
    )


def test_it_goes_on_where_its_base_was_moved(tmp_path, micro_folder, settings):
    """Nothing that was trained is trained or written again, although the adapters name the place where the base lay."""
    home, away = Path(shutil.copytree(micro_folder, tmp_path / "X")), tmp_path / "Y"
    train(tmp_path, settings(tmp_path, "--model.base_checkpoint", home))
    out = tmp_path / "run"
    before = {name: checks.snapshot(out / name) for name in ("sft", "reward")}
    home.rename(away)
    status, text, err = run(tmp_path, settings(tmp_path, "--model.base_checkpoint", away, "--rl.max_steps", 4))
    assert status == 0, err
    assert text.count("finished before") == 2 and "at step 3 of 4" in text and "  before" in text
    assert before == {name: checks.snapshot(out / name) for name in before}
    results = json.loads((out / "comparison" / "results.json").read_text())
    assert results["systems"] == ["base", "sft", "staged"] and results["cells"]["kl_base"]["base"]["value"] == 0


def test_rl_goes_on_after_its_adapters_came_anew_on_a_moved_base(tmp_path, micro_folder, settings):
    """An adapter's files name the place of its base: that alone makes it no other start and no other reward."""
    home, away = Path(shutil.copytree(micro_folder, tmp_path / "X")), tmp_path / "Y"
    train(tmp_path, settings(tmp_path, "--model.base_checkpoint", home))
    home.rename(away)
    (tmp_path / "run" / "stages.json").unlink()
    for stage in ("sft", "reward"):
        shutil.rmtree(tmp_path / "run" / stage / "step-000003")
    status, text, err = run(tmp_path, settings(tmp_path, "--model.base_checkpoint", away, "--rl.max_steps", 4))
    assert status == 0, err
    assert "sft at step 2 of 3" in text and "reward at step 2 of 3" in text and "rl at step 3 of 4" in text
    for stage in ("sft", "reward"):
        written = json.loads((tmp_path / "run" / stage / "final" / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(away)


def test_staged_says_what_it_does_and_compares_at_the_end(tmp_path, settings):
    """A title and the change of each stage, one prompt before and after it; the base, SFT and the end side by side."""
    argv = settings(tmp_path)
    status, text, err = run(tmp_path, argv)
    assert status == 0 and not err, err
    titles = re.findall(r"(?m)^stage (\d) of 3: (\w+), (.+)$", text)
    assert titles == [(str(n), name, train_staged.PURPOSES[name]) for n, name in enumerate(("sft", "reward", "rl"), 1)]
    out = tmp_path / "run"
    first, last = lines(out / "sft")[0]["eval/loss"], lines(out / "sft")[-1]["eval/loss"]
    assert f"sft: its loss on val answers went from {first:.2f} to {last:.2f} nats per token\n" in text
    accuracy = json.loads((out / "reward" / "report.json").read_text())["held_out"]["accuracy"]
    assert f"reward model: accuracy {accuracy:.3f} [" in text and " of 8 val pairs\nbest rule without a model, " in text
    rewards = json.loads((out / "rl" / "report.json").read_text())["reward"]
    assert f"reward of 8 val prompts: {rewards['first']:.3f} -> {rewards['last']:.3f}, " in text
    assert text.count("does not end by itself loses 1 (rl.missing_stop_penalty)") == 1 and "held-out" not in text
    shown = ("val prompt", "before(?:, after)?", "(?:before, )?after")
    prompts, before, after = (re.findall(rf"(?m)^  {name}: +(.+)$", text) for name in shown)
    assert prompts[0] == prompts[1] and len(prompts) == len(before) == 2  # of the policy's stages
    assert after[0] == before[1] == by_transformers(out / "sft" / "final", config.load_config(out / "config.yml"))
    results = json.loads((out / "comparison" / "results.json").read_text())
    assert results["systems"] == ["base", "sft", "staged"] and "reward" in results["cells"]
    assert json.loads(text.partition("RESULT ")[2])["headline"] == results["headline"]


def by_transformers(adapter, cfg):
    """The greedy answer of plain transformers and peft to the first harmless held-out prompt, cut as on the console."""
    base = AutoModelForCausalLM.from_pretrained(cfg.model.base_checkpoint, dtype=torch.float32)
    net, tokenizer = PeftModel.from_pretrained(base, adapter), bases.load_tokenizer(Path(cfg.model.base_checkpoint))
    records = data.load(cfg.task, cfg.dataset_path, "val", cfg.debug, cfg.seed)
    record = next(record for record in records if not is_harmful_request(record["prompt"]))
    ids = torch.tensor([chat.encode_prompt(tokenizer, record["prompt"])])
    made = net.generate(ids, do_sample=False, max_new_tokens=answers.SHOWN_TOKENS, eos_token_id=[1, 106])
    text = " ".join(chat.decode(tokenizer, made[0, ids.shape[1] :].tolist()).split())
    most = answers.SHOWN_CHARACTERS
    return text[:most] + "..." * (len(text) > most)


def test_without_a_test_split_it_warns_and_trains(tmp_path, settings, few):
    """People with two files still train; what the comparison needs is said before anything is trained."""
    two = Path(shutil.copytree(few, tmp_path / "two"))
    (two / "test.jsonl").unlink()
    status, text, err = run(tmp_path, settings(tmp_path, "--dataset_path", two, "--reward.type", "heuristic"))
    assert status == 0 and not err, err
    warning = f"warning: there will be no comparison at the end: {two}/test.jsonl: no such file"
    assert text.count("warning: there will") == 1 and text.index(warning) < text.index("stage 1 of 2")
    assert not (tmp_path / "run" / "comparison").exists() and (tmp_path / "run" / "rl" / "final").is_dir()


def test_one_stage_is_its_scripts_own_run(tmp_path, settings):
    argv = [*settings(tmp_path), "--training.mode", "rl", "--reward.type", "heuristic"]
    train(tmp_path, argv)
    assert (tmp_path / "run" / "final").is_dir() and not (tmp_path / "run" / "stages.json").exists()


def test_staged_full_fine_tuning(tmp_path, settings):
    """The reward model is trained on what RL starts from: the base of SFT is gone."""
    train(tmp_path, settings(tmp_path, "--model.peft_type", "none", "--training.learning_rate", 1e-4))
    out = tmp_path / "run"
    assert sorted(json.loads((out / "stages.json").read_text())) == ["reward", "rl", "sft"]
    assert lines(out / "rl")[0]["eval/kl"] == 0 and (out / "rl" / "final" / "model.safetensors").is_file()


# ---------------------------------------------------------------- the comparison


def test_every_arm_spends_the_budget(compared):
    out = compared[0]
    spent = {name: lines(out / name)[-1]["tokens_seen"] for name in ("sft", "rl", "staged-sft", "staged-rl")}
    for name, budget in (("sft", BUDGET), ("rl", BUDGET), ("staged-sft", BUDGET // 2), ("staged-rl", BUDGET // 2)):
        before_the_last = lines(out / name)[-3]["tokens_seen"]
        assert spent[name] >= budget > before_the_last, (name, spent[name], before_the_last)
    results = json.loads((out / "comparison" / "results.json").read_text())
    cost = {name: results["cost"][name].get("tokens") for name in results["systems"]}
    assert cost == {"base": None, "sft": spent["sft"], "rl": spent["rl"],
                    "staged": spent["staged-sft"] + spent["staged-rl"]}  # fmt: skip
    assert [stage["name"] for stage in results["cost"]["staged"]["stages"]] == ["staged-sft", "staged-rl"]
    assert set(results["extra_cost"]) == {"reward model", "second reward model"}
    sampled = sum(row["tokens"] for row in map(json.loads, (out / "rl" / "samples.jsonl").read_text().splitlines()))
    assert 0 < sampled < spent["rl"]  # sampled and trained tokens both count


def test_the_judge_has_never_seen_the_reward_models_pairs(compared, few):
    out = compared[0]
    for split in ("train", "val"):
        halves = [data.load_split(out / f"pairs-{name}", split) for name in ("reward", "judge")]
        firsts = [{record["prompt"][0]["content"].strip().lower() for record in half} for half in halves]
        assert not firsts[0] & firsts[1]
        ids = [record["id"] for half in halves for record in half]
        assert sorted(ids) == sorted(record["id"] for record in data.load_split(few, split))
    for name in ("rl", "staged-rl"):
        cfg = config.load_config(out / name / "config.yml")
        assert cfg.reward.checkpoint == str(out / "reward" / "final") and cfg.dataset_path == str(few)
        assert "eval/judge" in lines(out / name)[0] and lines(out / name)[0]["eval/judge"] is not None
        state = json.loads(next((out / name).glob("step-*/state.json")).read_text())
        assert state["best_metric"] == "eval/judge"  # safety has no truth of its own: the judge picks best/
    judge = config.load_config(out / "judge" / "config.yml")
    assert judge.dataset_path == str(out / "pairs-judge") and judge.seed == 1


def test_the_tokenizer_is_read_once(compared):
    """Five stages, their fingerprints, the answers between them and the comparison need it; Gemma's takes seconds."""
    assert (compared[0].parent / "reads").read_text() == "1"


def test_the_comparison_names_all_arms(compared):
    out, _, result = compared
    results = json.loads((out / "comparison" / "results.json").read_text())
    assert result["headline"] == "reward" == results["headline"]
    assert results["systems"] == ["base", "sft", "rl", "staged"] and len(results["pairs"]["reward"]) == 6
    assert results["judge"]["pairs"] == 18 and not results["gate"]["passed"]  # so few pairs teach and show nothing
    kl = results["cells"]["kl_reference"]  # RL from the base was held to the base, staged to the end of its SFT
    assert list(kl) == ["rl", "staged"] and kl["rl"]["value"] == results["cells"]["kl_base"]["rl"]["value"] > 0
    assert 0 < kl["staged"]["value"] != results["cells"]["kl_base"]["staged"]["value"]
    text = (out / "comparison" / "report.md").read_text()
    assert all(word in text for word in ("staged", "best of 4", "always refuse")) and "report.html" not in text
    assert lines(out / "staged-rl")[0]["eval/kl"] == 0


def test_started_again_it_trains_nothing(compared):
    out, argv, result = compared
    before = {name: checks.snapshot(out / name) for name in ("reward", "judge", "sft", "rl", "staged-sft", "staged-rl")}
    status, text, err = run(out.parent, argv)
    assert status == 0, err
    assert text.count("finished before") == 6 and text.count("answered before") == 7
    assert before == {name: checks.snapshot(out / name) for name in before}
    assert json.loads(text.partition("RESULT ")[2])["cells"] == result["cells"]


def test_r1_r3_killed_in_any_stage_it_goes_on_to_the_same_bits(tmp_path, compared, settings):
    """SIGTERM in the first SFT, SIGKILL in RL: started again, every stage ends as if nothing had happened."""
    argv = settings(tmp_path, "--paradigms", "rl,staged", "--training.budget_tokens", BUDGET)

    status, out, err = run(tmp_path, argv, in_stage("rl", lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert status == -9
    status, out, err = run(tmp_path, argv, in_stage("staged-sft", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert status == 1 and "run the same command again" in err and out.count("finished before") == 2
    train(tmp_path, argv)
    for name in ("rl", "staged-sft", "staged-rl"):
        checks.assert_same_records(tmp_path / "run" / name, compared[0] / name)


def test_half_adds_each_adapter_at_half_its_scale(tmp_path, settings):
    """Nothing more is trained; half of an adapter lies nearer to the base."""
    argv = settings(tmp_path, "--paradigms", "sft,half", "--training.budget_tokens", 800, "--reward.type", "heuristic")
    train(tmp_path, argv)
    results = json.loads((tmp_path / "run" / "comparison" / "results.json").read_text())
    assert results["systems"] == ["base", "sft", "sft-half"]
    kl = {name: cell["value"] for name, cell in results["cells"]["kl_base"].items()}
    assert kl["base"] == 0 < kl["sft-half"] < kl["sft"]
    assert sorted(json.loads((tmp_path / "run" / "stages.json").read_text())) == ["judge", "sft"]
    full = settings(tmp_path / "full", "--paradigms", "sft,half", "--training.budget_tokens", 800)
    refused(tmp_path, [*full, "--model.peft_type", "none"], "--paradigms half", "model.peft_type")


# ---------------------------------------------------------------- several seeds


def test_seeds_are_runs_of_their_own_and_one_comparison(tmp_path, settings):
    """Killed in the second seed: it goes on, trains nothing twice, and each arm is what --seed alone gives."""
    few_steps = ["--paradigms", "sft,grpo", "--training.budget_tokens", 800]
    argv = settings(tmp_path, *few_steps, "--seeds", "0,1")
    status, text, _ = run(tmp_path, argv, killed_in(tmp_path / "run" / "seed1" / "sft"))
    assert status == -9 and (tmp_path / "run" / "seed0" / "grpo" / "final").is_dir()
    plan = text.partition("stage 1 of")[0]
    assert "plan: seeds 0, 1 in" in plan and "7 stages to train" in plan, plan
    assert len(re.findall(r"(?m)^  (reward|sft|grpo): +2 times \S+ \w+, by a timed step$", plan)) == 3
    assert len(re.findall(r"(?m)^  judge: +1 times \S+ \w+, by a timed step$", plan)) == 1
    assert len(re.findall(r", as seed 0 took$", text, re.M)) == 3  # before the second seed
    status, text, err = run(tmp_path, argv)
    assert status == 0, err
    assert text.count("finished before") == 5 and "  judge:           finished" in text
    results = json.loads((tmp_path / "run" / "comparison" / "results.json").read_text())
    assert results["seeds"] == {"base": 1, "sft": 2, "grpo": 2}
    assert not (tmp_path / "run" / "seed1" / "judge").exists()
    alone = settings(tmp_path / "alone", *few_steps, "--seed", 1)
    train(tmp_path, alone)
    for name in ("reward", "sft", "grpo"):
        folders = tmp_path / "run" / "seed1" / name, tmp_path / "alone" / "run" / name
        of_the_judge = ("eval/judge", "best_eval_judge") if name == "grpo" else ()  # which seed 0 has trained
        checks.assert_same_records(*folders, apart=of_the_judge)
        weights = [checkpoint.sha256(folder / "final" / "adapter_model.safetensors") for folder in folders]
        assert weights[0] == weights[1]


def test_a_step_on_data_with_keys_of_their_own_is_timed(tmp_path, monkeypatch):
    """SFT on samples that are not drawn yet: the step is timed on the data, by the data's own keys."""
    data_keys = "prompt=ask,response=gold"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"ask": ask, "gold": "b"}) + "\n" for ask in "cdefghijkl"))
    flags = {"dataset_path": str(tmp_path), "data_keys": data_keys, "training.budget_tokens": "800"}
    cfg = config.load_config(None, flags | {"reward.type": "heuristic"})
    plan = train_staged.stages(cfg, ["rft"], tmp_path / "run")
    study = train_staged.Study(cfg, plan, tmp_path / "run", "fingerprint")
    study.folder.mkdir()
    study.draft.write_text(config.dump(cfg))
    read = []

    def run_script(mode, draft, flags, *words):
        read.append(config.load_config(draft, flags))
        return {"expected_seconds": 80}

    monkeypatch.setattr(train_staged, "run_script", run_script)
    assert train_staged.time_stage(study, plan[-1], {}) == 80
    assert (read[0].dataset_path, read[0].data_keys) == (str(tmp_path), data_keys)


def test_rft_of_prompts_alone_has_a_plan(tmp_path, settings, few):
    """SFT on samples that are not drawn yet cannot be timed where the data has no answers: the plan says so."""
    (tmp_path / "data").mkdir()
    for split in ("train", "val", "test"):
        rows = [json.dumps({"prompt": record["prompt"]}) + "\n" for record in data.load_split(few, split)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(rows))
    argv = ["--task", "dialogue", "--paradigms", "rft", "--seeds", "0", "--training.budget_tokens", 1500]
    argv += ["--reward.type", "heuristic", "--dataset_path", tmp_path / "data"]
    _, text, err = run(tmp_path, settings(tmp_path, *argv))
    plan = text.partition("stage 1 of")[0]
    assert "rft-samples:" in plan and "1 times, how long is not known before" in plan, (text, err)
    assert "stage 2 of 2: rft," in text or "too few to learn from" in err


def killed_in(folder):
    """A body that dies by SIGKILL after the first checkpoint of the run in `folder`."""

    def body(main, argv):
        real = checkpoint.commit

        @contextlib.contextmanager
        def commit(final, *more):
            with real(final, *more) as temp:
                yield temp
            if final.parent == folder:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.commit = commit
        processes.call(main, argv)

    return body


# ---------------------------------------------------------------- refusals


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, settings):
    budget = ["--training.budget_tokens", 100]
    refused(tmp_path, settings(tmp_path, "--paradigms", "sft,rl"), "--training.budget_tokens")
    refused(tmp_path, settings(tmp_path, "--paradigms", "sft,gpro", *budget), "--paradigms", "did you mean grpo?")
    refused(tmp_path, settings(tmp_path, "--paradigms", "grpo,rl", *budget), "--paradigms: rl is grpo here")
    refused(tmp_path, settings(tmp_path, "--seeds", "0,0", *budget), "--seeds: expected different seeds")
    refused(tmp_path, settings(tmp_path, "--seeds", "0,1", "--training.mode", "reward"), "train_reward.py --seeds")
    alone = ["--paradigms", "ppo,grpo", "--rl.group_size", 1]
    refused(tmp_path, settings(tmp_path, *alone, *budget, algorithm="ppo"), "rl.group_size")
    refused(tmp_path, settings(tmp_path, "--paradigms", "rft", "--rl.group_size", 1, *budget), "rl.group_size")
    conala = ["--task", "conala", "--dataset_path", "null", "--paradigms", "dpo"]
    refused(tmp_path, settings(tmp_path, *conala, *budget), "--paradigms dpo", "--rl.pairs sampled")
    (tmp_path / "own.jsonl").write_text("".join(f'{{"prompt": "q {i}", "response": "a"}}\n' for i in range(60)))
    own = ["--dataset_path", tmp_path / "own.jsonl", "--paradigms", "base,sft"]
    refused(tmp_path, settings(tmp_path, *own, *budget), "the judge learns from pairs", "--task dialogue")
    refused(tmp_path, settings(tmp_path, "--paradigms", "sft,sft", *budget), "each once")
    refused(tmp_path, settings(tmp_path, "--paradigms", "sft", "--model.adapter", "x", *budget), "model.adapter")
    full = ["--model.peft_type", "none", "--reward.type", "hybrid"]
    refused(tmp_path, settings(tmp_path, "--paradigms", "rl,staged", *full, *budget), "model.peft_type none")
    refused(tmp_path, settings(tmp_path, "--model.base_checkpoint", tmp_path / "nowhere"), "nowhere")
    refused(tmp_path, settings(tmp_path, "--training.no_such_key", 1), "no_such_key")
    refused(tmp_path, settings(tmp_path, "--rl.group_size", 1, *budget), "rl.group_size")
    refused(tmp_path, settings(tmp_path, "--paradigms", "sft", "--dataset_path", tmp_path, *budget), "test.jsonl")
    other = ["--dataset_path", tmp_path, "--evaluation.split", "val"]
    refused(tmp_path, settings(tmp_path, "--paradigms", "sft", *other, *budget), "val.jsonl")
    greedy = ["--evaluation.samples", 4, "--evaluation.temperature", 0]
    refused(tmp_path, settings(tmp_path, "--paradigms", "sft", *greedy, *budget), "evaluation.samples 4")
    warm = ["--rl.critic_warmup", 2, "--reward.type", "heuristic", "--training.budget_tokens", 500]
    status, _, err = run(tmp_path, settings(tmp_path, *warm, "--training.mode", "rl", algorithm="ppo"))
    assert status == 2 and "rl.critic_warmup: 2 leaves none" in err, err
    assert not (tmp_path / "run" / "sft").exists()
