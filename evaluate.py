"""Score any checkpoints on the same held-out items, compare them with paired statistics, and write the report.

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
    python evaluate.py --export DIR --checkpoints sft=outputs/RUN/final      merged, checked against the adapter
    python evaluate.py --human_results RATINGS.csv ... --logging.run_name RUN                  reads what they answered
Run the same command again to go on: systems whose answers are there already are not asked again.
"""

import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common import (
    chat,
    config,
    data,
    decoder,
    dist,
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
    stats,
)
from common.evaluation import comparison, export, measure, metrics, report
from common.human import manifest
from common.log import UserError, command, say
from common.runtime import base, checkpoint, resume

SECTIONS = ("model", "training", "reward", "evaluation", "logging")
JOBS = (
    ("--checkpoints", {"nargs": "+", "metavar": "NAME=CHECKPOINT", "help": "what to compare, `base` first"}),
    ("--export", {"metavar": "DIR", "help": "merge the one checkpoint into a plain model, checked on test prompts"}),
    ("--human_eval", {"action": "store_true", "help": "write human_eval.csv, blind, and its key"}),
    ("--human_results", {"nargs": "+", "metavar": "FILE", "help": "analyse these ratings against the run's key"}),
)
BEST_OF = 4
SHOWN = 6  # items side by side in the report
HEADLINES = {"safety": ("judge", "reward", "loss_per_byte"), "clinical": ("rougeL",), "conala": ("bleu",)}
SOURCES = (chat, data, decoder, gemma, lora, losses, measure, metrics, model, prompts, reward_model)
SOURCES += (products, rewards, rollouts)  # what decides an answer and its scores


def parse_systems(arguments):
    """["base=ID", "sft=DIR", ...] -> {name: [checkpoint of each seed]}"""
    systems = {}
    for argument in arguments:
        name, sign, source = argument.partition("=")
        if not sign or not source or not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"--checkpoints: expected NAME=CHECKPOINT, got {argument!r:.80}")
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
    lines, speed = ask(net, tokenizer, items, cfg, scorers or {}, others or {})
    cells = {name: comparison.cell([lines], name, cfg.evaluation.draws) for name in lines[0]["stats"]}
    return {"metrics": {name: cell for name, cell in cells.items() if cell}, "lines": lines, "speed": speed}


def ask(net, tokenizer, items, cfg, scorers, others):
    """One answer of `net` to each item -> (lines with all statistics, sampled tokens per second)."""
    net.eval()
    answers, speed = measure.generate(net, items, sampling(cfg))
    answers = [group[0] for group in answers]
    lines = measure.text_lines(cfg.task, items, answers, tokenizer, scorers)
    more = measure.model_stats(net, others, items, answers, tokenizer, cfg.training.max_seq_length)
    return measure.merge(lines, more), speed


def sampling(cfg):
    evaluation = cfg.evaluation
    return {"seed": cfg.seed, "max_new_tokens": evaluation.max_new_tokens, "temperature": evaluation.temperature,
            "top_p": evaluation.top_p}  # fmt: skip


def cached(path, key, make):
    """What make() returns, (lines, speed or None), from `path` where it was left under the same key.

    JSON lines, written whole or not at all. Their head calls the speed "about".
    """
    kept = None
    if dist.is_main() and path.is_file():
        try:
            lines = log.read_records(path)
            kept = lines if lines and lines[0].get("key") == key else None
        except (ValueError, AttributeError):
            say(f"{path} is damaged: asking anew")
    if dist.any_rank(kept is not None):
        head, *lines = dist.gather_rows(kept or [])
        say(f"{path.stem}: answered before")
        return lines, head["about"]
    lines, speed = make()
    if dist.is_main():
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.unlink(missing_ok=True)
        log.write_records(draft, [{"key": key, "about": speed}, *lines])
        os.replace(draft, path)
    return lines, speed


def best_of(base_model, tokenizer, items, cfg, scorers):
    """Lines of the base's best answer by the optimised reward among the first n samples, n = 2 and BEST_OF.

    Always at temperature 1 and over the whole distribution: of equal answers none is the best, and the KL is only then
    log n - (n - 1) / n (Stiennon et al. 2020). Where the reward reads the reference it is an oracle, and is called so.
    """
    whole = sampling(cfg) | {"temperature": 1.0, "top_p": 1.0}
    oracle = " (oracle)" if task_reads_references(cfg) else ""
    with lora.using(base_model, None):  # the adapter that was loaded last is active
        answers, _ = measure.generate(base_model, items, whole, BEST_OF)
    records = [item.record for item in items for _ in range(BEST_OF)]
    mine, scores = range(dist.rank(), len(records), dist.world_size()), torch.zeros(len(records)).double()
    flat = [ids for group in answers for ids in group]
    scores[mine] = scorers["reward"]([records[i] for i in mine], [flat[i] for i in mine]).double().cpu()
    table, best = dist.sum_tensor(scores).view(-1, BEST_OF), {}
    for n in (2, BEST_OF):
        picked = table[:, :n].argmax(1).tolist()
        lines = measure.text_lines(cfg.task, items, [g[i] for g, i in zip(answers, picked)], tokenizer, scorers)
        kl = measure.values_and_counts([np.log(n) - (n - 1) / n] * len(items))
        best[f"base, best of {n}{oracle}"] = measure.merge(lines, {"kl_base_sequence": kl})
    return best


def task_reads_references(cfg):
    """Does the optimised reward see the answer that it should lead to?"""
    return cfg.reward.function is not None or (cfg.task != "safety" and cfg.reward.type != "trainable")


@command
def main(argv=None):
    # --- config
    cfg, job = config.parse_args("evaluate.py", __doc__, SECTIONS, (), argv, JOBS)
    out = Path(cfg.logging.output_dir) / (
        cfg.logging.run_name or config.run_name(cfg, job.config, "checkpoints") + "-evaluation"
    )
    if job.export:
        return write_export(cfg, job)
    if job.human_results:
        return human_results(out, job.human_results, cfg.evaluation.draws)
    if not job.checkpoints:
        raise UserError("--checkpoints: name what to compare, as base=CHECKPOINT sft=CHECKPOINT ...")
    metrics.require(cfg.task)
    systems, task, sheet = parse_systems(job.checkpoints), cfg.task, out / "human_eval.csv"
    if job.human_eval and not 2 <= len(systems) <= 4:
        raise UserError(f"--human_eval: raters compare 2 to 4 systems, these are {len(systems)}")
    if job.human_eval and sheet.exists() and manifest.key_path(sheet).exists():
        manifest.check_pair(sheet, manifest.read_manifest(sheet))
    device = model.pick_device(cfg.device)
    dtype = model.pick_dtype(cfg.model.dtype, device)
    resume.prepare(device)
    places = {(name, k): base.locate(source) for name, sources in systems.items() for k, source in enumerate(sources)}
    base_folder = places["base", 0][0] if "base" in systems else base.resolve(cfg.model.base_checkpoint)
    tokenizer_sha256, base_sha256 = checkpoint.sha256(base_folder / "tokenizer.json"), base.fingerprint(base_folder)
    fingerprints, four_bit = {base_folder: base_sha256}, {}
    for (name, k), (folder, adapter) in places.items():
        if checkpoint.sha256(folder / "tokenizer.json") != tokenizer_sha256:
            raise UserError(f"--checkpoints: {name} has another tokenizer than the base: not the same items")
        fingerprints[folder] = fingerprints.get(folder) or base.fingerprint(folder)
        four_bit[name, k] = adapter is not None and model.trained_quantised(adapter)
        if adapter:  # before hours of answers
            base.check_record(adapter, f"--checkpoints {name}", folder, fingerprints[folder], None)
    dist.init(device, cfg.training.timeout)

    # --- the base in memory, its judges, the items
    base_model, tokenizer = model.load(base_folder, device, dtype)
    lora.wrap(base_model)
    lora.use(base_model, None)

    @functools.cache
    def base_in_4_bits():
        """The base once more, for what was trained on it with qlora. The system `base` is the unquantised one."""
        net = model.load(base_folder, device, dtype, quantize=True)[0]
        lora.wrap(net)
        return net

    def base_for(folder):
        """The base as the reward model in `folder` saw it."""
        return base_in_4_bits() if model.trained_quantised(folder) else base_model

    records = data.load(task, cfg.dataset_path, "test", cfg.debug, cfg.seed)
    longest = cfg.training.max_seq_length - cfg.evaluation.max_new_tokens
    items, counts = measure.items(records, tokenizer, longest, cfg.evaluation.max_items, cfg.seed)
    log.say_counts("test", counts)
    scorers, judge, notes, scorer_fingerprints = {}, cfg.evaluation.reward_checkpoint, [], {}
    if judge:
        if cfg.reward.checkpoint and model.adapter_fingerprint(judge) == model.adapter_fingerprint(
            cfg.reward.checkpoint
        ):
            raise UserError(
                "evaluation.reward_checkpoint is the model of reward.checkpoint: a judge must be another one"
            )
        settings = SimpleNamespace(checkpoint=judge, normalize_rewards=True)
        scorers["judge"] = reward_model.scorer(
            base_for(judge), tokenizer, settings, base_sha256, measure.TOKENS_PER_PASS, "judge"
        )
        scorer_fingerprints["judge"] = model.adapter_fingerprint(judge)
    if rewards.wants_model(cfg.reward) and cfg.reward.checkpoint is None:
        notes.append(f"The optimised reward was not measured: reward.type {cfg.reward.type} needs --reward.checkpoint.")
        say(notes[-1])
    else:
        wanted = rewards.wants_model(cfg.reward)
        trained = wanted and reward_model.scorer(
            base_for(cfg.reward.checkpoint), tokenizer, cfg.reward, base_sha256, measure.TOKENS_PER_PASS
        )
        scored = rewards.scorer(task, cfg.reward, functools.partial(chat.decode, tokenizer), trained)
        scorers["reward"] = lambda *answers: scored(*answers)[0]
        scorer_fingerprints["reward"] = [rewards.fingerprint(cfg.reward), config.plain(cfg.reward)]
    lora.use(base_model, None)
    if dist.is_main():
        log.on_exit(functools.partial(os.close, checkpoint.lock_run(out)))
    dist.barrier()
    decoding = vars(cfg.evaluation) | {"draws": None}
    shared = [base_sha256, tokenizer_sha256, scorer_fingerprints, task, decoding, cfg.seed,
              cfg.training.max_seq_length, str(dtype),
              resume.fingerprint([item.record for item in items]),
              [checkpoint.sha256(file) for file in (__file__, *(module.__file__ for module in SOURCES))]]  # fmt: skip

    # --- every system, one at a time
    runs_by_system, speed, runs = {}, {}, {}
    for (name, k), (folder, adapter) in places.items():
        runs[name, k] = comparison.history(systems[name][k])
        last_config = config.load_config(runs[name, k][-1] / "config.yml") if runs[name, k] else None
        is_whole = folder.resolve() != base_folder.resolve()  # with weights of its own, not the base's
        by_rl = last_config is not None and last_config.training.mode == "rl"
        rl_start = last_config.model if by_rl else None
        full = by_rl and is_whole and not adapter  # then what RL started from is a whole model too
        ref_folder = base.resolve(rl_start.base_checkpoint) if full else base_folder
        key = resume.fingerprint([*shared, fingerprints[folder] if is_whole else None, by_rl,
                                  base.fingerprint(ref_folder) if ref_folder != base_folder else None,
                                  model.adapter_fingerprint(adapter), four_bit[name, k],
                                  model.adapter_fingerprint(rl_start.adapter if by_rl else None)])  # fmt: skip

        def answer(
            name=name, k=k, folder=folder, adapter=adapter, rl_start=rl_start, is_whole=is_whole, ref_folder=ref_folder
        ):
            if is_whole:
                net = model.load(folder, device, dtype, quantize=four_bit[name, k])[0]
            else:
                net = base_in_4_bits() if four_bit[name, k] else base_model
            others = {"kl_base": (base_model, None)}
            if rl_start:  # what RL started from and was held to
                frozen = net if adapter else base_model  # an adapter's reference is one beside it, on the same base
                frozen = frozen if ref_folder == base_folder else model.load(ref_folder, device, dtype)[0]
                if rl_start.adapter:
                    model.load_adapter(frozen, f"reference-{name}-{k}", rl_start.adapter, trainable=False)
                others["kl_reference"] = (frozen, f"reference-{name}-{k}" if rl_start.adapter else None)
            if adapter:
                model.load_adapter(net, f"{name}-{k}", adapter, trainable=False)
            with lora.using(net, f"{name}-{k}" if adapter else None):
                return ask(net, tokenizer, items, cfg, scorers, others)

        lines, speed[name] = cached(out / "items" / f"{name}-{k}.jsonl", key, answer)
        runs_by_system.setdefault(name, []).append(lines)

    # --- what needs no training: floors, and the best of several answers of the base
    floors = {}
    for name, texts in metrics.floors(task, [item.record for item in items]).items():
        answers = [[*chat.encode_text(tokenizer, text), chat.END_OF_TURN] for text in texts]
        floors[name] = measure.merge(measure.text_lines(task, items, answers, tokenizer, scorers), {})
    if places.get(("base", 0), (None, True))[1] is None and "reward" in scorers:
        key = resume.fingerprint([*shared, "best", BEST_OF])
        make = functools.partial(best_of, base_model, tokenizer, items, cfg, scorers)
        lines, _ = cached(out / "items" / "base-best.jsonl", key, lambda: (list(make().items()), None))
        floors |= dict(lines)

    # --- tables
    draws, all_runs = cfg.evaluation.draws, runs_by_system | {name: [lines] for name, lines in floors.items()}
    table = comparison.cells(all_runs, draws)
    headline = next((name for name in HEADLINES[task] if name in table), next(iter(table)))
    order = [headline, *(name for name in table if name != headline)]
    costs = {name: comparison.cost(runs[name, 0]) for name in systems}
    notes += remarks(cfg, systems, costs, floors, judge)
    if any(four_bit.values()):
        names = ", ".join(dict.fromkeys(name for (name, _), quantised in four_bit.items() if quantised))
        notes.append(
            f"Trained on a 4-bit base and measured on it: {names}. The KL to the base, which is not quantised, "
            "counts what the 4 bits change, too."
        )
    results = {
        "task": task, "items": len(items), "draws": draws, "systems": list(systems), "headline": headline,
        "seeds": {name: len(sources) for name, sources in systems.items()},
        "metrics": {name: vars(metrics.METRICS[name]) for name in order},
        "cells": {name: table[name] for name in order},
        "floors": list(floors),
        "pairs": comparison.pairs(runs_by_system, order, draws),
        "wins": comparison.wins(runs_by_system, headline) if metrics.METRICS[headline].kind != "corpus" else [],
        "frontier": [
            {"system": name, "seed": k, "kl": comparison.value(lines, "kl_base_sequence")}
            | {m: comparison.value(lines, m) for m in ("reward", "judge") if m in table}
            for name, seeds in all_runs.items() for k, lines in enumerate(seeds)
            if comparison.value(lines, "kl_base_sequence") is not None
        ],
        "by_seed": {
            m: {name: [comparison.value(lines, m) for lines in runs_by_system[name]]
                for name in systems if name in table[m]} for m in order
        },
        "cost": costs,
        "extra_cost": {
            title: comparison.cost([Path(folder).resolve().parent])
            for title, folder in (("reward model", cfg.reward.checkpoint), ("second reward model", judge))
            if folder and comparison.history(folder)
        },
        "speed": speed,
        "judge": judge_accuracy(scorers["judge"], items, tokenizer) if judge else None,
        "decoding": f"temperature {cfg.evaluation.temperature:g}, top_p {cfg.evaluation.top_p:g}, at most "
                    f"{cfg.evaluation.max_new_tokens} tokens, seed {cfg.seed}",
        "left_out": counts, "notes": notes, "command": " ".join(["python", *sys.argv]),
        **examples(runs_by_system, headline, cfg.seed),
    }  # fmt: skip

    # --- report
    if dist.is_main():
        log.write_json(out / "results.json", results)
        report.write(out, results, {name: comparison.curve(runs[name, 0]) for name in systems if runs[name, 0]})
        if job.human_eval and sheet.exists() and manifest.key_path(sheet).exists():
            say(f"{sheet} is there already and may have been rated: kept")
        elif job.human_eval:
            texts = {name: [line["answer"] for line in seeds[0]] for name, seeds in runs_by_system.items()}
            asked = [
                {"task": task, "prompt": line["prompt"], "reference": item.record["reference"] or ""}
                for item, line in zip(items, next(iter(runs_by_system.values()))[0])
            ]
            manifest.write(asked, texts, sheet)  # by a seed that nobody knows, or it would not be blind
        for name, row in results["cells"][headline].items():
            say(f"{headline} of {name}: {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
        say(f"wrote {out}/report.md, report.html, results.json and items/")
    dist.barrier()
    return {"headline": headline, "cells": results["cells"], "pairs": results["pairs"], "folder": str(out)}


def remarks(cfg, systems, costs, floors, judge):
    """What a reader of the tables should know, in sentences."""
    spent, said = {name: cost["tokens"] for name, cost in costs.items() if cost}, []
    if spent and max(spent.values()) > 1.05 * min(spent.values()):
        said.append(
            "The systems did not cost the same: "
            + ", ".join(f"{name} {tokens:,} tokens" for name, tokens in spent.items())
            + "."
        )
    if any(len(sources) > 1 for sources in systems.values()):
        said.append("Cost and learning curves are those of each system's first seed.")
    if cfg.evaluation.temperature != 1 or cfg.evaluation.top_p < 1:
        said.append("Answers were not drawn from the policy itself, so the KL along them is no expectation under it.")
    if judge:
        said.append(
            "No policy was optimised against the judge's scores, but SFT may have learned the answers that the "
            "judge learned to prefer."
        )
    if any(name.endswith("(oracle)") for name in floors):
        said.append("The best of several answers was picked by a reward that reads the reference: an upper bound.")
    return said


def judge_accuracy(score, items, tokenizer):
    """Accuracy of a reward model on the items' own pairs, beside that of the shorter answer; None without pairs."""
    records = [item.record for item in items if item.record["rejected"]]
    if not records:
        return None
    answers = [
        [[*chat.encode_text(tokenizer, record[side]), chat.END_OF_TURN] for record in records]
        for side in ("response", "rejected")
    ]
    good, bad = (score(records, side) for side in answers)
    accuracy, low, high = stats.preference_accuracy(good - bad)
    shorter = stats.preference_accuracy([len(b) - len(a) for a, b in zip(*answers)])[0]
    return {"accuracy": accuracy, "low": low, "high": high, "pairs": len(records), "shorter": shorter}


def write_export(cfg, job):
    """Merge the one checkpoint into a new folder; returns the check's figures. dtype auto is float32: exact."""
    systems = parse_systems(job.checkpoints or [])
    if [len(sources) for sources in systems.values()] != [1] or job.human_eval or job.human_results:
        raise UserError("--export: needs --checkpoints NAME=CHECKPOINT with one checkpoint, and does nothing beside it")
    ((source,),) = systems.values()
    how = model.pick_device(cfg.device), torch.bfloat16 if cfg.model.dtype == "bfloat16" else torch.float32
    sizes = {"row": cfg.training.max_seq_length, "answer": cfg.evaluation.max_new_tokens, "seed": cfg.seed,
             "items": min(cfg.evaluation.max_items or export.PROBES, export.PROBES)}  # fmt: skip
    records = data.load(cfg.task, cfg.dataset_path, "test", cfg.debug, cfg.seed)
    return export.run(source, job.export, how, records, sizes)


def human_results(out, files, draws):
    """Unblind the ratings of `files` with out/human_eval.key.csv: human_results.json and .md in `out`."""
    path = out / "human_eval.key.csv"
    key = manifest.read_key(path)
    remedy = f"{path} is not its key, name the run that wrote its blind file with --logging.run_name"
    results = manifest.analyse(key, manifest.read_ratings(files, key, remedy), draws)
    text = manifest.report(results)
    log.write_json(out / "human_results.json", results)
    (out / "human_results.md").write_text(text, encoding="utf-8")
    say(text)
    return results


def examples(runs_by_system, headline, seed):
    """{"samples": items drawn by `seed`, "top": the two of highest optimised reward of each system but the first}."""
    names, count = list(runs_by_system), len(next(iter(runs_by_system.values()))[0])

    def row(i):
        lines = {name: runs_by_system[name][0][i] for name in names}
        first = lines[names[0]]
        return {
            "id": first["id"],
            "prompt": first["prompt"],
            "answers": {name: line["answer"] for name, line in lines.items()},
            "scores": {name: line["scores"].get(headline) for name, line in lines.items()},
        }

    top = []
    for name in names[1:] if all("reward" in line["scores"] for line in runs_by_system[names[0]][0]) else []:
        scores = [line["scores"].get("reward", -np.inf) for line in runs_by_system[name][0]]
        order = sorted(range(count), key=lambda i: -scores[i])
        top += [row(i) | {"system": name, "reward": scores[i]} for i in order[:2]]
    return {"samples": [row(i) for i in sorted(data.shuffled(count, f"shown/{seed}")[:SHOWN])], "top": top}


if __name__ == "__main__":
    main()
