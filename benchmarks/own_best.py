"""SFT data from a policy's own samples: the best of each group, and in its place one at random, as a control.

    python benchmarks/own_best.py --base MERGED --out data/own8 --seed 1 --budget_flops 16936457916416

MERGED is the policy merged into its base (evaluate.py --export). Samples are drawn as train_staged.py --paradigms rft
draws them, by configs/grpo_arithmetic_270m.yml. Writes OUT/best and OUT/random, each with train.jsonl and val.jsonl. A
random answer is kept if it stops by itself, right or wrong.
"""

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import config, log  # noqa: E402
from common.runtime import base, rejection, resume  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--config", default=str(ROOT / "configs" / "grpo_arithmetic_270m.yml"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budget_flops", required=True)
    args = parser.parse_args()
    flags = {"model.base_checkpoint": args.base, "model.dtype": args.dtype, "seed": str(args.seed)}
    cfg = config.load_config(args.config, flags | {"training.budget_flops": args.budget_flops})
    best, control = args.out / "best", args.out / "random"
    best.mkdir(parents=True, exist_ok=True)
    decides = config.flatten(cfg) | {"model.base_checkpoint": base.fingerprint(base.resolve(args.base))}
    key = resume.fingerprint([decides[key] for key in sorted(decides) if not key.startswith("training.budget_")])
    rejection.write_best_samples(cfg, best, [key])

    groups, rows = rejection.groups_of(log.read_records(best / "samples.jsonl"), cfg.rl.group_size), []
    prompts, draw = rejection.load_prompts(cfg)[1], random.Random(args.seed)
    for (step, number), group in groups.items():
        one = draw.choice(group)
        if one["stopped"] and one["completion"].strip():
            rows.append(rejection.answered_by(one, prompts.batch(step)[number].record))
    control.mkdir(exist_ok=True)
    log.replace_records(control / "train.jsonl", rows)
    (control / "val.jsonl").write_bytes((best / "val.jsonl").read_bytes())
    print(f"{len(groups)} groups, {len(rows)} random answers kept")


if __name__ == "__main__":
    main()
