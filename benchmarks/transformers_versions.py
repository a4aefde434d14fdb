"""Do written folders open alike under transformers 4 and 5? One fresh environment for each, the same answers asked.

    python benchmarks/transformers_versions.py FOLDER ...            exports, or the final/ of runs
    python benchmarks/transformers_versions.py FOLDER ... --environments DIR     keeps the environments, some GB

Equal means: the same ids of texts and of a dialogue by the chat template, and, where the folder holds a whole model,
log-probs of these ids within 1e-4 nats in fp32. Of an adapter only the tokenizer is asked: peft opens its weights.
The exit status is 1 if an answer differs.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

OLD = "4.57.1"
TEXTS = ["How do I fix my car?", "  two  spaces\n\nx = [1, 23]\t", "naïve 日本 🫠 <end_of_turn></s>", "<bos>"]
TURNS = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "x"}]
NEAR = 1e-4  # nats


def answer(folder):
    """{"ids", "logprobs": of every token, None without a model} by the transformers of this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rendered = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    ids.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    if not (Path(folder) / "config.json").is_file():
        return {"ids": ids, "logprobs": None}
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    logprobs = []
    with torch.no_grad():
        for row in ids:
            tokens = torch.tensor([row])
            table = net(tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            logprobs += table.gather(1, tokens[0, 1:, None])[:, 0].tolist()
    return {"ids": ids, "logprobs": logprobs}


def make_environment(folder, version):
    """The Python of an environment with this version of transformers, made once."""
    python = folder / version / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        venv.create(folder / version, with_pip=True)
        packages = [f"transformers=={version}", "torch", "jinja2"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--environments", metavar="DIR", type=Path)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        print(json.dumps([answer(folder) for folder in args.folders]))
        return
    pins = (Path(__file__).parents[1] / "requirements.txt").read_text()
    versions = [OLD, re.search(r"(?m)^transformers==(\S+)", pins).group(1)]
    answers, failed = {}, False
    with tempfile.TemporaryDirectory() as temporary:
        for version in versions:
            python = make_environment((args.environments or Path(temporary)).resolve(), version)
            words = [python, Path(__file__).resolve(), "--answer", *(Path(name).resolve() for name in args.folders)]
            done = subprocess.run(words, cwd=temporary, stdout=subprocess.PIPE, text=True, check=True)
            answers[version] = json.loads(done.stdout.splitlines()[-1])
    for folder, old, new in zip(args.folders, *answers.values(), strict=True):
        same = old["ids"] == new["ids"]
        pairs = zip(old["logprobs"] or [], new["logprobs"] or [], strict=True) if same else ()
        apart = max((abs(a - b) for a, b in pairs), default=0)
        failed = failed or not same or apart > NEAR
        told = f"log-probs at most {apart:.2g} nats apart" if old["logprobs"] else "no model in it"
        print(f"{folder}: {' and '.join(versions)}: {'equal' if same else 'OTHER'} ids, {told}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
