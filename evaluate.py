"""Score any checkpoints on the same test items, compare them with paired statistics, and write the report.

    value = f(sum over items of their statistics);  interval: bootstrap over items (and seeds);  rates: Wilson
    a against b: paired bootstrap of the difference, paired randomisation (rates: McNemar), Holm over a metric's pairs

A system is NAME=CHECKPOINT: a run's final/ (adapter or whole model), a hub id, a folder, a .gguf, or `tiny`; a name
given several times is one system under several seeds. All get the same test prompts, the same random numbers and the
same decoding. evaluation.reward_checkpoint judges: a reward model that no policy was trained on. Beside the systems
stand floors, and the best of BEST_OF answers of the one named `base`. Left out: BERTScore, CodeBLEU, judges elsewhere.

    python evaluate.py --checkpoints base=google/gemma-3-270m-it sft=outputs/sft_lora_270m/final
    python evaluate.py --task conala --checkpoints base=FILE.gguf sft=outputs/conala/final
    python evaluate.py --checkpoints base=tiny sft=outputs/a/sft/final sft=outputs/b/sft/final --debug     two seeds
    python evaluate.py --checkpoints ... --human_eval            also writes the blind sheets for human raters
    python evaluate.py --items RUN/items/*.jsonl OTHER/items/*.jsonl.gz      compares what was recorded, without a model
    python evaluate.py --export DIR --checkpoints sft=outputs/RUN/final      merged, checked against the adapter
    python evaluate.py --export NAME.gguf --checkpoints sft=outputs/RUN/final      the same for llama.cpp and Ollama
    python evaluate.py --human_results RATINGS.csv ... --human_key outputs/RUN/human_eval.key.csv     what they answered
Run the same command again to go on: systems whose answers are there already are not asked again.
"""

import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from common import config

SECTIONS = ("model", "training", "reward", "evaluation", "logging")
JOBS = (
    ("--checkpoints", {"nargs": "+", "metavar": "NAME=CHECKPOINT", "help": "what to compare, `base` first"}),
    (
        "--export",
        {
            "metavar": "DIR|NAME.gguf",
            "type": config.expand_home,
            "help": "merge the one checkpoint into a plain model, checked on test prompts",
        },
    ),
    (
        "--items",
        {
            "nargs": "+",
            "metavar": "FILE",
            "type": config.expand_home,
            "help": "compare these of items/, without models",
        },
    ),
    (
        "--gguf_type",
        {"choices": ("bf16", "f16", "f32", "q8_0"), "help": "of the weights of --export NAME.gguf [default bf16]"},
    ),
    (
        "--push_to_hub",
        {"metavar": "OWNER/NAME", "help": "send what --export wrote to the hub; a new repository is private"},
    ),
    ("--human_eval", {"action": "store_true", "help": "write human_eval.csv, blind, and its key"}),
    (
        "--human_results",
        {"nargs": "+", "metavar": "RATINGS", "type": config.expand_home, "help": "analyse what raters said"},
    ),
    (
        "--human_key",
        {"metavar": "KEY.csv", "type": config.expand_home, "help": "of the study they rated [the run's own]"},
    ),
    (
        "--human_pairs",
        {"metavar": "NEW.jsonl", "type": config.expand_home, "help": "also write the ratings as training pairs"},
    ),
)
FLAGS = dict(script="evaluate.py", description=__doc__, sections=SECTIONS, modes=(), jobs=JOBS)
if __name__ == "__main__":
    config.check_flags(**FLAGS)  # before torch is imported, which takes seconds

import numpy as np
import torch

from common import (
    chat,
    data,
    decoder,
    dist,
    functions,
    gemma,
    log,
    lora,
    losses,
    model,
    products,
    prompts,
    reward_model,
    rewards,
    rollouts,
    tasks,
)
from common.evaluation import comparison, drift, export, gate, measure, metrics, report, results
from common.human import analysis, ratings, study
from common.log import UserError, command, say
from common.runtime import base, cache, checkpoint, resume
from common.tasks import numbers, text

BEST_OF = 4
SOURCES = (chat, data, decoder, drift, gemma, lora, losses, measure, metrics, model, prompts, reward_model)
SOURCES += (functions, numbers, products, rewards, rollouts, text)  # what decides an answer and its scores
SCORING = (drift, functions, gate, measure, metrics, numbers, reward_model, rewards, text)  # the scores alone


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

    @property
    def net_name(self):
        """As a part of a model is called, which may have no dot in its name."""
        return f"{self.name}-{self.seed}".replace(".", ":")


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


def parse_systems(arguments):
    """["base=ID", "sft=DIR", ...] -> {name: [checkpoint of each seed]}"""
    systems = {}
    for argument in arguments:
        name, source = config.named_checkpoint(argument)
        if not name or not source:
            raise UserError(f"--checkpoints: expected NAME=CHECKPOINT, got {argument!r:.80}; {config.NAME_RULE}")
        systems.setdefault(name, []).append(source)
    counts = {len(sources) for sources in systems.values()} - {1}
    if len(counts) > 1:
        raise UserError(f"--checkpoints: systems have {sorted(counts)} seeds; give each of them one, or equally many")
    return systems


def evaluate(net, tokenizer, records, cfg, scorers=None, others=None):
    """Score `net` (of common.model.load; its active adapter) on records -> {"metrics": {name: cell}, "lines", "speed"}.

    scorers: {metric: function (records, answers as ids) -> (n,)}; others: {"kl_base": (net, adapter or None), ...}.
    Without them: no reward, no KL. A cell is {"value", "low", "high", "n"}, a line that of common.evaluation.measure.
    """
    metrics.require(cfg.task)
    longest = cfg.training.max_seq_length - cfg.evaluation.max_new_tokens
    items, _ = measure.items(records, tokenizer, longest, cfg.evaluation.max_items, cfg.seed)
    other_tasks = drift.load_others(cfg)
    lines, speed = ask(net, tokenizer, items, cfg, scorers or {}, others or {}, other_tasks)
    known = metrics.table(cfg.task, cfg.evaluation.samples, cfg.evaluation.metric, other_tasks)
    cells = comparison.cells({"": [lines]}, known, cfg.evaluation.draws)
    return {"metrics": {name: row[""] for name, row in cells.items()}, "lines": lines, "speed": speed}


def ask(net, tokenizer, items, cfg, scorers, others, other_tasks):
    """One answer of `net` to each item -> (lines with all statistics, sampled tokens per second).

    other_tasks: {name: held-out records}, on which the loss is measured.
    """
    net.eval()
    settings = vars(cfg.evaluation) | {"seed": cfg.seed}
    answers, speed = measure.generate(net, items, settings)
    answers = [group[0] for group in answers]
    lines = measure.text_lines(cfg.task, items, answers, tokenizer, scorers)
    limit = cfg.training.max_seq_length
    more = measure.model_stats(net, others, items, answers, tokenizer, limit)
    more |= drift.losses_on(net, other_tasks, tokenizer, limit, len(items))
    if cfg.evaluation.drift and "kl_base" in others:
        more |= drift.kl_both_ways(net, others["kl_base"][0], items, answers, tokenizer, limit)
    if cfg.evaluation.samples > 1:
        several, _ = measure.generate(net, items, settings, cfg.evaluation.samples)
        texts = [[chat.decode(tokenizer, ids) for ids in group] for group in several]
        more |= metrics.several_answers(cfg.task, [item.record for item in items], texts)
    return measure.merge(lines, more), speed


def check_metrics(cfg):
    """UserError where several answers per item make no sense, or a user's metric has the name of another."""
    samples, task = cfg.evaluation.samples, tasks.load(cfg.task)
    metrics.table(task, samples, cfg.evaluation.metric)
    if samples > 1 and cfg.evaluation.temperature == 0:
        raise UserError(f"evaluation.samples {samples}: greedy answers are all equal; set evaluation.temperature")
    if samples > 1 and not task.correct:
        raise UserError(f"evaluation.samples {samples}: task {task.name} has no right answers to count")


def kept_answers(path, key, head, make, *arguments):
    """The rows that make(*arguments) returns, from `path` where an earlier call left them under the same key."""
    asked = []
    rows = cache.records(path, key, lambda: asked.append(True) or make(*arguments), needed=True, head=head)
    if not asked:
        say(f"{path.stem}: answered before")
    return results.Recording(head | {"key": key}, rows)


def best_of(base_model, tokenizer, items, cfg, scorers):
    """[name, lines] of the base's best answer by the optimised reward among the first n samples, n = 1, 2 and BEST_OF.

    The first sample alone is what a random choice in place of the best is worth.

    Always at temperature 1 and over the whole distribution: of equal answers none is the best, and the KL is only then
    log n - (n - 1) / n (Stiennon et al. 2020). Where the reward reads the reference it is an oracle, and is called so.
    """
    whole = vars(cfg.evaluation) | {"seed": cfg.seed, "temperature": 1.0, "top_p": 1.0}
    oracle = " (oracle)" if task_reads_references(cfg) else ""
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


def task_reads_references(cfg):
    """Does the optimised reward see the answer that it should lead to?"""
    return cfg.reward.function is not None or (tasks.load(cfg.task).needs_reference and cfg.reward.type != "trainable")


def locate(named, cfg, given):
    """{name: [checkpoint of each seed]} -> (the base's folder, [System]). UserError where one does not fit the base.

    given: the base of all adapters, in place of those that their files name.
    """
    places = {
        (name, k): base.locate(source, given) for name, sources in named.items() for k, source in enumerate(sources)
    }
    base_folder = places["base", 0][0] if "base" in named else base.resolve(cfg.model.base_checkpoint)
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
        systems.append(System(name, k, folder, adapter, runs, is_whole, four_bit, rl_start, ref_folder, weights_key))
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


def make_scorers(cfg, bare):
    """({"judge", "reward": function (records, answers as ids) -> (n,)}, what decides their scores, notes)."""
    scorers, facts, notes, judge = {}, {}, [], cfg.evaluation.reward_checkpoint
    if judge:
        reward_model.check_judge(judge, cfg.reward.checkpoint)
        settings = SimpleNamespace(checkpoint=judge, normalize_rewards=True)
        scorers["judge"] = trained_scorer(bare, settings, "judge")
        facts["judge"] = model.adapter_fingerprint(judge)
    if cfg.evaluation.metric:
        own = functions.load(cfg.evaluation.metric, "evaluation.metric")

        def measured(records, answers):
            texts = [chat.decode(bare.tokenizer, ids) for ids in answers]
            return torch.tensor(functions.call(own, "evaluation.metric", records, texts, answers))

        path, _, name = cfg.evaluation.metric.rpartition(":")
        scorers[name], facts[name] = measured, checkpoint.sha256(path)
    wants_model = rewards.wants_model(cfg.reward)
    if wants_model and cfg.reward.checkpoint is None:
        notes.append(f"The optimised reward was not measured: reward.type {cfg.reward.type} needs --reward.checkpoint.")
        say(notes[-1])
    else:
        trained = trained_scorer(bare, cfg.reward) if wants_model else None
        score = rewards.scorer(cfg.task, cfg.reward, lambda ids: chat.decode(bare.tokenizer, ids), trained)
        scorers["reward"] = lambda records, answers: score(records, answers)[0]
        settings = config.plain(cfg.reward) | {"checkpoint": None}  # what the first decides, wherever it lies
        facts["reward"] = [rewards.fingerprint(cfg.reward, cfg.task), settings]
    lora.use(bare.net, None)
    return scorers, facts, notes


def trained_scorer(bare, settings, *name):
    """The scores of the reward model in settings.checkpoint, on the base as it was trained on."""
    net = bare.for_adapter(config.paths(settings.checkpoint)[0])
    return reward_model.scorer(net, bare.tokenizer, settings, bare.fingerprint, measure.TOKENS_PER_PASS, *name)


def answer(system, bare, items, cfg, scorers, other_tasks):
    """The lines of a system: its answers with all statistics, and how fast they were sampled."""
    if system.is_whole:
        net = model.load(system.folder, bare.device, bare.dtype, quantize=system.four_bit)[0]
    else:
        net = bare.for_adapter(system.adapter)
    others = {"kl_base": (bare.net, None)}
    if system.rl_start:  # what RL started from and was held to
        frozen = net if system.adapter else bare.net  # an adapter's reference is one beside it, on the same base
        if system.ref_folder != bare.folder:
            frozen = model.load(system.ref_folder, bare.device, bare.dtype)[0]
        reference = f"reference-{system.net_name}" if system.rl_start.adapter else None
        if reference:
            model.load_adapter(frozen, reference, system.rl_start.adapter, trainable=False)
        others["kl_reference"] = (frozen, reference)
    adapter = system.net_name if system.adapter else None
    if adapter:
        model.load_adapter(net, adapter, system.adapter, trainable=False)
    with lora.using(net, adapter):
        lines, speed = ask(net, bare.tokenizer, items, cfg, scorers, others, other_tasks)
    return [line | {"tokens_per_second": speed} for line in lines]


def fixed_answers(tokenizer, items, cfg, scorers):
    """[name, lines] of the task's answers that need no training."""
    make, rows = tasks.load(cfg.task).floors, []
    for name, texts in (make([item.record for item in items]) if make else {}).items():
        answers = [[*chat.encode_text(tokenizer, text), chat.END_OF_TURN] for text in texts]
        rows.append([name, measure.merge(measure.text_lines(cfg.task, items, answers, tokenizer, scorers), {})])
    return rows


@command
def main(argv=None):
    # --- config
    cfg, job = config.parse_args(**FLAGS, argv=argv)
    check_metrics(cfg)
    name = cfg.logging.run_name or config.run_name(cfg, job.config, "checkpoints") + "-evaluation"
    out = Path(cfg.logging.output_dir) / name
    if job.export:
        return write_export(cfg, job)
    if job.push_to_hub or job.gguf_type:
        raise UserError("--push_to_hub and --gguf_type are of --export: name what to write")
    if job.human_results:
        return human_results(job, out, cfg.evaluation.draws)
    if job.human_key or job.human_pairs:
        raise UserError("--human_key and --human_pairs go with --human_results RATINGS")
    if job.items:
        return compare_items(cfg, job, out)
    if not job.checkpoints:
        raise UserError("--checkpoints: name what to compare, as base=CHECKPOINT sft=CHECKPOINT ...")
    metrics.require(cfg.task)
    named, task, sheet = parse_systems(job.checkpoints), cfg.task, out / "human_eval.csv"
    if job.human_eval and not 2 <= len(named) <= 4:
        raise UserError(f"--human_eval: raters compare 2 to 4 systems, these are {len(named)}")
    if job.human_eval and sheet.exists() and study.key_path(sheet).exists():
        study.check_pair(sheet, study.read_manifest(sheet))
    elif job.human_eval:
        study.check_free(sheet)
    device = model.pick_device(cfg.device)
    resume.prepare(device)
    base_folder, systems = locate(named, cfg, job.flags.get("model.base_checkpoint"))
    dist.init(device, cfg.training.timeout)

    # --- the base in memory, its judges, the items
    bare = load_base(base_folder, cfg, device)
    records = data.from_config(cfg, cfg.evaluation.split)
    longest = cfg.training.max_seq_length - cfg.evaluation.max_new_tokens
    items, counts = measure.items(records, bare.tokenizer, longest, cfg.evaluation.max_items, cfg.seed)
    log.say_counts(cfg.evaluation.split, counts)
    scorers, scorer_facts, notes = make_scorers(cfg, bare)
    other_tasks = drift.load_others(cfg)
    if dist.is_main():
        log.on_exit(checkpoint.lock_run(out).release)
    dist.barrier()

    # --- the answers of every system, one at a time, and of what needs no training
    decoding = vars(cfg.evaluation) | {"draws": None}
    item_records = [item.record for item in items]
    shared = [bare.fingerprint, base.tokenizer_fingerprint(base_folder), scorer_facts, resume.fingerprint(item_records)]
    shared += [tasks.fingerprint(task), decoding, cfg.seed, cfg.training.max_seq_length, str(bare.dtype)]
    facts = comparable_facts(cfg, bare, item_records, scorer_facts)
    facts["other_tasks"] = {name: resume.fingerprint(rows) for name, rows in other_tasks.items()}
    shared.append(facts["other_tasks"])

    def kept(name, key, head, make, *arguments):
        key = cache.key([shared, key], sys.modules[__name__], *SOURCES)
        return kept_answers(out / "items" / f"{name}.jsonl", key, {"facts": facts} | head, make, *arguments)

    recordings = []
    for system in systems:
        head = {"of": "system", "name": system.name, "four_bit": system.four_bit, "notes": notes}
        head["cost"] = comparison.cost(system.runs)
        name = f"{system.name}-{system.seed}"
        recordings.append(kept(name, system.weights_key, head, answer, system, bare, items, cfg, scorers, other_tasks))
    head = {"of": "floors", "cost": cost_of_models(cfg.reward.checkpoint)}
    recordings.append(kept("floors", ["floors"], head, fixed_answers, bare.tokenizer, items, cfg, scorers))
    if "reward" in scorers and any((system.name, system.adapter) == ("base", None) for system in systems):
        best = best_of, bare.net, bare.tokenizer, items, cfg, scorers
        recordings.append(kept("base-best", BEST_OF, {"of": "best"}, *best))
    if judge := cfg.evaluation.reward_checkpoint:
        pairs = gate.held_out_records(items, records, cfg)
        head = {"of": "judge", "cost": cost_of_models(judge), "reliability": reliability(judge)}
        how = gate.score_pairs, scorers["judge"], pairs, bare.tokenizer, task, cfg.training.max_seq_length
        recordings.append(kept("judge", ["judge", resume.fingerprint(pairs)], head, *how))

    # --- tables and report
    curves = {system.name: comparison.curve(system.runs) for system in systems if system.seed == 0 and system.runs}
    summary = conclude(out, recordings, cfg.evaluation.draws, curves, {"left_out": counts})
    if dist.is_main() and job.human_eval:
        write_sheets(sheet, task, items, results.runs_by_system(recordings))
    dist.barrier()
    return summary


def conclude(out, recordings, draws, curves, extra):
    """Write results.json and the report of recordings, and say the verdicts; returns what main returns."""
    tables = results.build(recordings, draws) | extra | {"command": " ".join(["python", *sys.argv])}
    if dist.is_main():
        log.write_json(out / "results.json", tables)
        items = results.side_by_side(results.runs_by_system(recordings), tables["item_score"])
        report.write(out, tables, curves, items)
        for name, row in tables["cells"][tables["headline"]].items():
            say(f"{tables['headline']} of {name}: {row['value']:.3f} {report.interval(row)}")
        for sentence in [*report.instrument(tables), *report.verdicts(tables), *report.next_steps(tables)]:
            say(sentence)
        say(f"wrote {out}/report.md, report.html and results.json")
    return {name: tables[name] for name in ("headline", "cells", "pairs")} | {"folder": str(out)}


def comparable_facts(cfg, bare, item_records, scorer_facts):
    """What must be equal where recorded answers are compared with others."""
    settings = {name: getattr(cfg.evaluation, name) for name in results.DECODING}
    settings["metric"] = (cfg.evaluation.metric or "").rpartition(":")[2] or None
    facts = {"task": cfg.task, "items": resume.fingerprint(item_records), **settings, "seed": cfg.seed}
    facts |= {"max_seq_length": cfg.training.max_seq_length, "base": bare.fingerprint, "dtype": str(bare.dtype)}
    return facts | {"scorers": scorer_facts, "code": cache.key(tasks.fingerprint(cfg.task), *SCORING)}


def cost_of_models(checkpoint):
    """What the training of reward models took, {} where a run is not there."""
    folders = config.paths(checkpoint)
    known = folders and all(map(comparison.history, folders))
    return comparison.cost([Path(folder).resolve().parent for folder in folders]) if known else {}


def reliability(judge):
    """What the report of its own run says of a reward model's probabilities, [] where there is none."""
    path = Path(judge).resolve().parent / "report.json"
    return json.loads(path.read_text(encoding="utf-8")).get("reliability", []) if path.is_file() else []


def compare_items(cfg, job, out):
    """Compare answers that were recorded before, without any model."""
    if job.checkpoints or job.human_eval:
        raise UserError("--items compares what was recorded, and does nothing beside it: leave out the other flags")
    recordings = results.read(job.items)
    log.on_exit(checkpoint.lock_run(out).release)
    return conclude(out, recordings, cfg.evaluation.draws, {}, {})


def write_sheets(sheet, task, items, runs_by_system):
    """The blind file for raters and its key, once."""
    if sheet.exists() and study.key_path(sheet).exists():
        say(f"{sheet} is there already and may have been rated: kept")
        return
    texts = {name: [line["answer"] for line in seeds[0]] for name, seeds in runs_by_system.items()}
    asked = []
    for item in items:
        prompt = measure.dialogue(item.record["prompt"])
        asked.append({"task": task, "prompt": prompt, "reference": item.record["reference"] or ""})
    study.write(asked, texts, sheet)  # by a seed that nobody knows, or it would not be blind


def write_export(cfg, job):
    """Merge the one checkpoint into a new folder or .gguf file; returns the check's figures. dtype auto is float32."""
    systems = parse_systems(job.checkpoints or [])
    if [len(sources) for sources in systems.values()] != [1] or job.human_eval or job.human_results:
        raise UserError("--export: needs --checkpoints NAME=CHECKPOINT with one checkpoint, and does nothing beside it")
    ((source,),) = systems.values()
    if job.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", job.push_to_hub):
        raise UserError(f"--push_to_hub: expected OWNER/NAME, got {job.push_to_hub!r:.80}")
    is_file = job.export.endswith(".gguf")
    if job.gguf_type and not is_file:
        raise UserError(f"--gguf_type {job.gguf_type}: is of --export NAME.gguf; the type of a folder is --model.dtype")
    kind = (job.gguf_type or "bf16") if is_file else "bfloat16" if cfg.model.dtype == "bfloat16" else "float32"
    how = model.pick_device(cfg.device), kind
    sizes = {
        "row": cfg.training.max_seq_length,
        "answer": cfg.evaluation.max_new_tokens,
        "seed": cfg.seed,
        "items": min(cfg.evaluation.max_items or export.PROBES, export.PROBES),
    }
    records = data.from_config(cfg, cfg.evaluation.split)
    figures = export.run(source, job.export, how, records, sizes, job.flags.get("model.base_checkpoint"))
    if job.push_to_hub:
        export.push(Path(job.export), job.push_to_hub)
    return figures


def human_results(job, out, draws):
    """Unblind ratings with their key: human_results.json and .md beside it. Without --human_key it is that of `out`."""
    if job.human_pairs and (Path(job.human_pairs).exists() or not job.human_pairs.endswith(".jsonl")):
        raise UserError(f"--human_pairs {job.human_pairs}: name a new file that ends with .jsonl")
    path = Path(job.human_key or out / "human_eval.key.csv")
    key = study.read_key(path)
    remedy = f"{path} is not its key, name that with --human_key, or the run that has it with --logging.run_name"
    rated = ratings.read_ratings(job.human_results, key, remedy)
    results = analysis.analyse(key, rated, draws)
    text = analysis.report(results)
    log.write_json(path.parent / "human_results.json", results)
    log.write(path.parent / "human_results.md", text)
    say(text)
    if job.human_pairs:
        write_pairs(job.human_pairs, path, key, rated)
    return results


def write_pairs(target, path, key, rated):
    """The ratings as training pairs, records of data.py. path: of the key, beside which the blind file lies.

    Where the answers of the run lie there too, a pair says which of its answers were cut off at max_new_tokens.
    """
    records, left_out = analysis.training_pairs(key, study.read_manifest(study.blind_path(path)), rated)
    reasons = "".join(f"; {count} left out: {why}" for why, count in left_out.items())
    if not records:
        raise UserError(f"--human_pairs: raters preferred no answer over another{reasons}")
    unfinished = set()
    for line in itertools.chain.from_iterable(map(log.read_records, (path.parent / "items").glob("*.jsonl"))):
        if isinstance(line, dict) and line.get("stopped") is False:
            unfinished.add(study.digest(line["answer"]))
    for record in records:
        record["prompt"] = measure.turns(record["prompt"])
        record["unfinished"] = [side for side in ("response", "rejected") if study.digest(record[side]) in unfinished]
    log.replace(target, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    say(f"wrote {len(records)} pairs to {target}{reasons}; measure what they train on other prompts than these")


if __name__ == "__main__":
    main()
