"""Score any checkpoints on the same test items, compare them with paired statistics, and write the report.

    value = f(sum over items of their statistics);  interval: bootstrap over items (and seeds);  rates: Wilson
    a against b: paired bootstrap of the difference, paired randomisation (rates: McNemar), Holm over a metric's pairs

A system is NAME=CHECKPOINT: a run's final/ (adapter or whole model), a hub id, a folder, a .gguf, or `tiny`; a name
given several times is one system under several seeds. All get the same test prompts, the same random numbers and the
same decoding. evaluation.reward_checkpoint judges: a reward model that no policy was trained on. Beside the systems
stand floors, and the best of BEST_OF answers of the one named `base`. Left out: BERTScore, CodeBLEU, judging by a
hosted model.

    python evaluate.py --checkpoints base=google/gemma-3-270m-it sft=outputs/sft_lora_270m/final
    python evaluate.py --task conala --checkpoints base=FILE.gguf sft=outputs/conala/final
    python evaluate.py --checkpoints base=tiny sft=outputs/a/sft/final sft=outputs/b/sft/final --debug     two seeds
    python evaluate.py --checkpoints ... --human_eval            also writes the blind sheets for human raters
    python evaluate.py --items RUN/items/*.jsonl OTHER/items/*.jsonl.gz      compares what was recorded, without a model
    python evaluate.py --export DIR --checkpoints sft=outputs/RUN/final      merged, checked against the adapter
    python evaluate.py --export NAME.gguf --checkpoints sft=outputs/RUN/final      the same for llama.cpp and Ollama
    python evaluate.py --human_results RATINGS.csv ... --human_key outputs/RUN/human_eval.key.csv   analyses the ratings
Run the same command again to go on: a system whose answers are already recorded is not run again.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import config

SECTIONS = ("model", "training", "reward", "evaluation", "logging")
PATH = {"type": config.expand_home}
RECORDED = "compare recorded answers, files of a run's items/ folder, without loading a model"
EXPORT = "merge the adapter of the one checkpoint into its base, check the result and write it"
KEY = "key of the study that was rated [default: human_eval.key.csv of this run]"
JOBS = (
    ("--checkpoints", {"nargs": "+", "metavar": "NAME=CHECKPOINT", "help": "what to compare, `base` first"}),
    ("--items", PATH | {"nargs": "+", "metavar": "FILE", "help": RECORDED}),
    ("--export", PATH | {"metavar": "DIR|NAME.gguf", "help": EXPORT}),
    (
        "--gguf_type",
        {
            "choices": ("bf16", "f16", "f32", "q8_0"),
            "help": "type of the weights in --export NAME.gguf [default bf16]",
        },
    ),
    ("--push_to_hub", {"metavar": "OWNER/NAME", "help": "send the export to the hub; a new repository is private"}),
    ("--human_eval", {"action": "store_true", "help": "also write human_eval.csv for blind human raters, and its key"}),
    ("--human_results", PATH | {"nargs": "+", "metavar": "RATINGS", "help": "analyse these files of human ratings"}),
    ("--human_key", PATH | {"metavar": "KEY.csv", "help": KEY}),
    (
        "--human_pairs",
        PATH | {"metavar": "NEW.jsonl", "help": "also write the ratings as preference pairs to train on"},
    ),
)
FLAGS = dict(script="evaluate.py", description=__doc__, sections=SECTIONS, modes=(), jobs=JOBS)
if __name__ == "__main__":
    config.check_flags(**FLAGS)  # before torch is imported, which takes seconds

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
from common.evaluation import comparison, drift, export, gate, measure, metrics, report, results, systems
from common.human import sheets
from common.log import UserError, command, say
from common.runtime import base, cache, checkpoint, resume
from common.tasks import numbers, text

SCORING = (drift, functions, gate, measure, metrics, numbers, reward_model, rewards, text)  # what decides a score
SOURCES = (chat, data, decoder, gemma, lora, losses, model, products, prompts, rollouts, systems)  # an answer


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


def comparable_facts(cfg, bare, items, scorer_facts, other_tasks):
    """What must be equal where recorded answers are compared with others."""
    settings = {name: getattr(cfg.evaluation, name) for name in results.DECODING}
    settings["metric"] = (cfg.evaluation.metric or "").rpartition(":")[2] or None
    asked = resume.fingerprint([item.record for item in items])
    facts = {"task": cfg.task, "items": asked, **settings, "seed": cfg.seed}
    facts |= {"max_seq_length": cfg.training.max_seq_length, "base": bare.fingerprint, "dtype": str(bare.dtype)}
    facts |= {"scorers": scorer_facts, "code": cache.key(tasks.fingerprint(cfg.task), *SCORING)}
    return facts | {"other_tasks": {name: resume.fingerprint(rows) for name, rows in other_tasks.items()}}


@dataclass
class Recorder:
    """Keeps what was answered in items/, for a later call of the same command and for --items."""

    folder: Path
    facts: dict  # what must be equal where answers are compared
    shared: list  # what decides every answer
    recordings: list = field(default_factory=list)

    def keep(self, name, head, key, make, *arguments):
        """Record the rows that make(*arguments) returns, or those that an earlier call left under the same key."""
        key = cache.key([self.shared, key], sys.modules[__name__], *SOURCES)
        head, is_new = {"facts": self.facts} | head, []

        def answer_now():
            say(f"measuring {name}")
            is_new.append(True)
            return make(*arguments)

        rows = cache.records(self.folder / f"{name}.jsonl", key, answer_now, needed=True, head=head)
        if not is_new:
            say(f"{name}: answered before")
        self.recordings.append(results.Recording(head | {"key": key}, rows))


def answer(system, bare, items, cfg, scorers, other_tasks):
    """The lines of a system: its answers with all statistics, and how fast they were sampled."""
    net, adapter, others = systems.load(system, bare)
    with lora.using(net, adapter):
        lines, speed = ask(net, bare.tokenizer, items, cfg, scorers, others, other_tasks)
    return [line | {"tokens_per_second": speed} for line in lines]


def conclude(out, recordings, draws, curves=None, counts=None):
    """Write results.json and the report of recordings, and say the verdicts; returns what main returns."""
    tables = results.build(recordings, draws)
    tables |= {"left_out": counts or {}, "command": shlex.join(["python", *sys.argv])}
    if dist.is_main():
        log.write_json(out / "results.json", tables)
        items = results.side_by_side(results.runs_by_system(recordings), tables["item_score"])
        report.write(out, tables, curves or {}, items)
        row = tables["cells"][tables["headline"]]
        say(f"\n{tables['headline']}, {tables['metrics'][tables['headline']]['what']}")
        for name, cell in row.items():
            say(f"  {name:{max(map(len, row))}}  {cell['value']:7.3f} {report.interval(cell)}".rstrip())
        for sentence in [*report.judge_sentence(tables), *report.verdicts(tables), *report.next_steps(tables)]:
            say(sentence)
        say(f"wrote {out}/report.html, report.md and results.json")
    return {name: tables[name] for name in ("headline", "cells", "pairs")} | {"folder": str(out)}


@command
def main(argv=None):
    cfg, job = config.parse_args(**FLAGS, argv=argv)
    check_metrics(cfg)
    name = cfg.logging.run_name or config.run_name(cfg, job.config, "checkpoints") + "-evaluation"
    out = Path(cfg.logging.output_dir) / name
    sheet = out / "human_eval.csv"

    # --- side jobs
    if job.export:
        return export.run(cfg, job)
    if job.push_to_hub or job.gguf_type:
        raise UserError("--push_to_hub and --gguf_type go with --export DIR or NAME.gguf")
    if job.human_results:
        if job.checkpoints or job.items or job.human_eval:
            raise UserError("--human_results analyses ratings, and does nothing beside it: leave out the other flags")
        key = job.human_key or out / "human_eval.key.csv"
        return sheets.results(job.human_results, key, cfg.evaluation.draws, job.human_pairs)
    if job.human_key or job.human_pairs:
        raise UserError("--human_key and --human_pairs go with --human_results RATINGS")
    if job.items:
        if job.checkpoints or job.human_eval:
            raise UserError("--items compares what was recorded, and does nothing beside it: leave out the other flags")
        recordings = results.read(job.items)
        log.on_exit(checkpoint.lock_run(out).release)
        return conclude(out, recordings, cfg.evaluation.draws)

    # --- the systems, the base that they share, and what scores their answers
    if not job.checkpoints:
        raise UserError("--checkpoints: name what to compare, as base=CHECKPOINT sft=CHECKPOINT ...")
    metrics.require(cfg.task)
    named = systems.parse(job.checkpoints)
    if job.human_eval:
        sheets.check(sheet, len(named))
    device = model.pick_device(cfg.device)
    resume.prepare(device)
    base_folder, located = systems.locate(named, cfg, job.flags.get("model.base_checkpoint"))
    dist.init(device, cfg.training.timeout)
    bare = systems.load_base(base_folder, cfg, device)
    scorers, scorer_facts, notes = systems.scorers(cfg, bare)

    # --- the items
    records = data.from_config(cfg, cfg.evaluation.split)
    longest = cfg.training.max_seq_length - cfg.evaluation.max_new_tokens
    items, counts = measure.items(records, bare.tokenizer, longest, cfg.evaluation.max_items, cfg.seed)
    log.say_counts(cfg.evaluation.split, counts)
    other_tasks = drift.load_others(cfg)
    if dist.is_main():
        log.on_exit(checkpoint.lock_run(out).release)
    dist.barrier()

    # --- the answers of every system, one at a time, and of what needs no training
    facts = comparable_facts(cfg, bare, items, scorer_facts, other_tasks)
    shared = [facts, base.tokenizer_fingerprint(base_folder), vars(cfg.evaluation) | {"draws": None}]
    recorder = Recorder(out / "items", facts, shared)
    for system in located:
        head = {"of": "system", "name": system.name, "four_bit": system.four_bit}
        head["notes"] = notes + system.notes
        head["cost"] = comparison.cost(system.runs)
        arguments = system, bare, items, cfg, scorers, other_tasks
        recorder.keep(f"{system.name}-{system.seed}", head, system.weights_key, answer, *arguments)
    head = {"of": "floors", "cost": comparison.cost_of_models(cfg.reward.checkpoint)}
    recorder.keep("floors", head, "floors", systems.fixed_answers, bare.tokenizer, items, cfg, scorers)
    if "reward" in scorers and any((system.name, system.adapter) == ("base", None) for system in located):
        arguments = bare.net, bare.tokenizer, items, cfg, scorers
        recorder.keep("base-best", {"of": "best"}, systems.BEST_OF, systems.best_of, *arguments)
    if judge := cfg.evaluation.reward_checkpoint:
        pairs = gate.held_out_records(items, records, cfg)
        head = {"of": "judge", "cost": comparison.cost_of_models(judge), "reliability": comparison.reliability(judge)}
        arguments = scorers["judge"], pairs, bare.tokenizer, cfg.task, cfg.training.max_seq_length
        recorder.keep("judge", head, ["judge", resume.fingerprint(pairs)], gate.score_pairs, *arguments)

    # --- tables and report
    curves = {system.name: comparison.curve(system.runs) for system in located if system.seed == 0 and system.runs}
    summary = conclude(out, recorder.recordings, cfg.evaluation.draws, curves, counts)
    if dist.is_main() and job.human_eval:
        sheets.write(sheet, cfg.task, items, results.runs_by_system(recorder.recordings))
    dist.barrier()
    return summary


if __name__ == "__main__":
    main()
