"""One LoRA step of a Gemma 3 of the 1B's exact shape, with random weights: the memory and time that it takes.

    python benchmarks/step_1b.py --tokenizer FOLDER_OF_A_REAL_GEMMA_3 [--peft_type qlora]

Writes the random model once (2 GB, bf16) beside the converted bases in the cache, then runs train_sft.py on synthetic
dialogues of the safety task: 4 rows of up to 512 tokens, or as --rows and --length say.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import Gemma3ForCausalLM, Gemma3TextConfig  # noqa: E402

import train_sft  # noqa: E402
from common import tasks  # noqa: E402
from common.runtime import cache  # noqa: E402

SHAPE = {"vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
         "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
         "query_pre_attn_scalar": 256, "max_position_embeddings": 32768}  # fmt: skip


def write_random(folder, tokenizer, shape=SHAPE, device="cpu"):
    torch.manual_seed(0)
    config = Gemma3TextConfig(**shape, architectures=["Gemma3ForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(0, shape["hidden_size"] ** -0.5)
    model.tie_weights()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / name, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--peft_type", default="lora", choices=("lora", "qlora"))
    parser.add_argument("--steps", default=1, type=int)
    parser.add_argument("--rows", default=4, type=int, help="of a step")
    parser.add_argument("--length", default=512, type=int, help="tokens of a row, at most")
    parser.add_argument("--recompute", default="auto", choices=("auto", "always", "never"))
    args = parser.parse_args()
    folder = cache.build_once(cache.root() / "random-1b", lambda target: write_random(target, args.tokenizer))
    with tempfile.TemporaryDirectory() as work:
        for split, count in (("train", args.rows * args.steps), ("val", 2)):
            many = 40 * args.length // 512 if split == "train" else 40  # answers that fill a row
            rows = tasks.records("safety", split, many * count)
            text = [" ".join(r["response"] for r in rows[many * i : many * (i + 1)]) for i in range(count)]
            lines = [json.dumps(rows[many * i] | {"response": text[i]}) for i in range(count)]
            Path(work, f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        last = train_sft.main([
            "--model.base_checkpoint", str(folder), "--model.peft_type", args.peft_type, "--dataset_path", work,
            "--training.max_steps", str(args.steps), "--training.batch_size", str(args.rows),
            "--logging.output_dir", work, "--device", "cpu",
            "--training.max_seq_length", str(args.length), "--training.recompute", args.recompute,
        ])  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{args.peft_type}: {args.steps} steps, peak memory {peak:.2f} GB, loss after {last['eval/loss']:.3f}")


if __name__ == "__main__":
    main()
