"""What evaluate.py measures: the systems, the base that they share, what scores answers, and what needs no training."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common import chat, config, functions, lora, model, reward_model, rewards, tasks
from common.evaluation import comparison, measure
from common.log import UserError, say
from common.runtime import base, checkpoint

BEST_OF = 4


@dataclass
class System:
    """A checkpoint to measure; several seeds of one system have the same name."""

    name: str
    seed: int  # 0, 1, ...
    folder: Path  # of the base it stands on, or of the whole model
    adapter: Path | None
    runs: list  # the run folders that led to it, the first stage first
    is_whole: bool  # has weights of its own, not the base's
    four_bit: bool  # was trained on a base in 4 bits
    rl_start: SimpleNamespace | None  # if its last stage was RL: the model that this started from and was held to
    ref_folder: Path  # the base of rl_start
    weights_key: list  # what decides its weights and those of rl_start
    notes: list[str]  # what a reader of its figures should know


@dataclass
class Base:
    """The base that adapters and judges share, in memory once; once more in 4 bits where one was trained so."""

    folder: Path
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    net: torch.nn.Module
    tokenizer: object
    in_4_bits: torch.nn.Module | None = None  # filled by for_adapter

    def for_adapter(self, folder):
        """The base as the adapter in `folder` saw it in training; without one, unquantised."""
        if not folder or not model.trained_quantised(folder):
            return self.net
        if self.in_4_bits is None:
            self.in_4_bits, _ = model.load(self.folder, self.device, self.dtype, quantize=True)
            lora.wrap(self.in_4_bits)
        return self.in_4_bits


def parse(arguments):
    """["base=ID", "sft=DIR", ...] -> {name: [checkpoint of each seed]}"""
    named = {}
    for argument in arguments:
        name, source = config.named_checkpoint(argument)
        if not name or not source:
            raise UserError(f"--checkpoints: expected NAME=CHECKPOINT, got {argument!r:.80}; {config.NAME_RULE}")
        named.setdefault(name, []).append(source)
    comparison.check_seeds("--checkpoints", named)
    return named


def locate(named, cfg, given):
    """{name: [checkpoint of each seed]} -> (the base's folder, [System]). UserError where one does not fit the base.

    given: the base of all adapters, in place of those that their files name.
    """
    places = {
        (name, k): base.locate(source, given) for name, sources in named.items() for k, source in enumerate(sources)
    }
    own = [folder for folder, adapter in places.values() if adapter and not given]
    if "base" in named:
        base_folder = places["base", 0][0]
    else:  # that of the adapters, or where none has one that of the config
        base_folder = own[0] if own else base.resolve(cfg.model.base_checkpoint)
    tokenizer_sha256, fingerprints, systems = base.tokenizer_fingerprint(base_folder), {}, []
    for (name, k), (folder, adapter) in places.items():
        if folder != base_folder and base.tokenizer_fingerprint(folder) != tokenizer_sha256:
            raise UserError(f"--checkpoints: {name} has another tokenizer than the base: not the same items")
        if folder not in fingerprints:
            fingerprints[folder] = base.fingerprint(folder)
        if adapter:  # before hours of answers
            base.check_record(adapter, f"--checkpoints {name}", folder, fingerprints[folder], None)
        runs = comparison.history(adapter or folder)
        last_config = comparison.run_config(runs[-1]) if runs else None
        rl_start = last_config.model if last_config is not None and last_config.training.mode == "rl" else None
        notes = comparison.picked_by_reward(name, adapter or folder)
        start = last_config.model.adapter if last_config is not None else None
        if start and not base.split_scale(start)[0].is_dir():
            rl_start = None
            notes.append(
                f"{name} started from {start}, which is gone: the KL to it and what it cost are left out. "
                f"To have them, unpack its run beside {runs[-1]}."
            )
            say(notes[-1])
        is_whole = folder.resolve() != base_folder.resolve()
        whole_start = rl_start and is_whole and not adapter  # then what RL started from is a whole model too
        ref_folder = ref_base(runs[-1], rl_start.base_checkpoint, given) if whole_start else base_folder
        four_bit = adapter is not None and model.trained_quantised(adapter)
        weights_key = [
            fingerprints[folder] if is_whole else None,
            model.adapter_fingerprint(adapter),
            four_bit,
            base.fingerprint(ref_folder) if ref_folder != base_folder else None,
            rl_start is not None,
            model.adapter_fingerprint(rl_start.adapter if rl_start else None),
        ]
        systems.append(
            System(name, k, folder, adapter, runs, is_whole, four_bit, rl_start, ref_folder, weights_key, notes)
        )
    return base_folder, systems


def ref_base(run, started_from, given):
    """The folder of the whole model that a run started from: `given` if that is it, or where it lay then."""
    trained_on = json.loads((run / "run.json").read_text()).get("facts", {}).get("model")
    if given and base.fingerprint(base.resolve(given)) == trained_on:
        return base.resolve(given)
    return base.resolve(started_from)


def load_base(folder, cfg, device):
    """The base with room for adapters, none of which is active."""
    dtype = model.pick_dtype(cfg.model.dtype, device)
    net, tokenizer = model.load(folder, device, dtype)
    lora.wrap(net)
    lora.use(net, None)
    return Base(folder, base.fingerprint(folder), device, dtype, net, tokenizer)


def load(system, bare):
    """(net, its adapter's name or None, {"kl_base": ..., "kl_reference": ...}) of a system on the base `bare`.

    What a KL is taken to is (net, adapter's name or None); the second one is there if the last stage was RL.
    """
    if system.is_whole:
        net = model.load(system.folder, bare.device, bare.dtype, quantize=system.four_bit)[0]
    else:
        net = bare.for_adapter(system.adapter)
    others, part = {"kl_base": (bare.net, None)}, f"{system.name}-{system.seed}".replace(".", ":")  # no dot in a part
    if system.rl_start:  # what RL started from and was held to
        frozen = net if system.adapter else bare.net  # an adapter's reference is one beside it, on the same base
        if system.ref_folder != bare.folder:
            frozen = model.load(system.ref_folder, bare.device, bare.dtype)[0]
        reference = f"reference-{part}" if system.rl_start.adapter else None
        if reference:
            model.load_adapter(frozen, reference, system.rl_start.adapter, trainable=False)
        others["kl_reference"] = (frozen, reference)
    if system.adapter:
        model.load_adapter(net, part, system.adapter, trainable=False)
    return net, part if system.adapter else None, others


# ---------------------------------------------------------------- what scores answers


def scorers(cfg, bare):
    """({"judge", "reward": function (records, answers as ids) -> (n,)}, what decides their scores, notes)."""
    functions_of, facts, notes, judge = {}, {}, [], cfg.evaluation.reward_checkpoint
    if judge:
        reward_model.check_judge(judge, cfg.reward.checkpoint)
        settings = SimpleNamespace(checkpoint=judge, normalize_rewards=True)
        functions_of["judge"] = trained_scorer(bare, settings, "judge")
        facts["judge"] = model.adapter_fingerprint(judge)
    if cfg.evaluation.metric:
        own = functions.load(cfg.evaluation.metric, "evaluation.metric")

        def measured(records, answers):
            texts = [chat.decode(bare.tokenizer, ids) for ids in answers]
            return torch.tensor(functions.call(own, "evaluation.metric", records, texts, answers))

        path, _, name = cfg.evaluation.metric.rpartition(":")
        functions_of[name], facts[name] = measured, checkpoint.sha256(path)
    wants_model = rewards.wants_model(cfg.reward)
    if wants_model and cfg.reward.checkpoint is None:
        notes.append(f"The optimised reward was not measured: reward.type {cfg.reward.type} needs --reward.checkpoint.")
        say(notes[-1])
    else:
        trained = trained_scorer(bare, cfg.reward) if wants_model else None
        score = rewards.scorer(cfg.task, cfg.reward, lambda ids: chat.decode(bare.tokenizer, ids), trained)
        functions_of["reward"] = lambda records, answers: score(records, answers)[0]
        settings = config.plain(cfg.reward) | {"checkpoint": None}  # the fingerprint stands for it, wherever it lies
        facts["reward"] = [rewards.fingerprint(cfg.reward, cfg.task), settings]
    lora.use(bare.net, None)
    return functions_of, facts, notes


def trained_scorer(bare, settings, *name):
    """The scores of the reward model in settings.checkpoint, on the base as it was trained on."""
    net = bare.for_adapter(config.paths(settings.checkpoint)[0])
    return reward_model.scorer(net, bare.tokenizer, settings, bare.fingerprint, measure.TOKENS_PER_PASS, *name)


# ---------------------------------------------------------------- beside the systems: what needs no training


def fixed_answers(tokenizer, items, cfg, scorers):
    """[name, lines] of the task's answers that need no training."""
    make, rows = tasks.load(cfg.task).floors, []
    for name, texts in (make([item.record for item in items]) if make else {}).items():
        answers = [[*chat.encode_text(tokenizer, text), chat.END_OF_TURN] for text in texts]
        rows.append([name, measure.merge(measure.text_lines(cfg.task, items, answers, tokenizer, scorers), {})])
    return rows


def best_of(base_model, tokenizer, items, cfg, scorers):
    """[name, lines] of the base's best answer by the optimised reward among the first n samples, n = 1, 2 and BEST_OF.

    The first sample alone is what a random choice in place of the best is worth.

    Always at temperature 1 and over the whole distribution: of equal answers none is the best, and the KL is only then
    log n - (n - 1) / n (Stiennon et al. 2020). Where the reward reads the reference it is an oracle, and is called so.
    """
    whole = vars(cfg.evaluation) | {"seed": cfg.seed, "temperature": 1.0, "top_p": 1.0}
    reads_reference = tasks.load(cfg.task).needs_reference and cfg.reward.type != "trainable"
    oracle = " (oracle)" if cfg.reward.function or reads_reference else ""
    with lora.using(base_model, None):  # the adapter that was loaded last is active
        answers, _ = measure.generate(base_model, items, whole, BEST_OF)
    records = [item.record for item in items for _ in range(BEST_OF)]
    scores = measure.share_scores(scorers["reward"], records, [ids for group in answers for ids in group])
    table, best = scores.reshape(-1, BEST_OF), []
    for n in (1, 2, BEST_OF):
        picked = np.where(np.isnan(table), -np.inf, table)[:, :n].argmax(1)  # NaN: no score
        lines = measure.text_lines(cfg.task, items, [g[i] for g, i in zip(answers, picked)], tokenizer, scorers)
        kl = measure.values_and_counts([np.log(n) - (n - 1) / n] * len(items))
        name = f"base, best of {n}{oracle}" if n > 1 else f"base, 1 of {BEST_OF} at random"
        best.append([name, measure.merge(lines, {"kl_base_sequence": kl})])
    return best
