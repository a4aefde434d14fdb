"""The model card, README.md of final/ and of exports: what a model is, from what and how, what it must not be used for.

It is a function of config, data, base and libraries: a run that was stopped and resumed writes the same one. Of paths
on this machine it holds the last two names.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from types import SimpleNamespace as Config

from common import config, log, tasks
from common.runtime import resume

NAME = "README.md"
METHODS = {
    "sft": "supervised fine-tuning on answers",
    "reward": "a Bradley-Terry reward model on preference pairs",
    "ppo": "reinforcement learning with PPO",
    "grpo": "reinforcement learning with GRPO",
    "dpo": "preference learning with DPO",
}
FREE_BUT_SHOWN = {"rl.max_steps", "reward.ensemble"}  # a run that goes on may change them, and they decide numbers
FREE_BUT_SHOWN |= {f"training.{key}" for key in ("epochs", "max_steps", "budget_tokens", "budget_flops")}
FREE_BUT_SHOWN |= {"training.patience", "training.eval_interval"}
TERMS = """\
## Terms

Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms. They bind
whoever uses or passes on this model, with the Gemma Prohibited Use Policy that they name. The data has a licence of its
own, given above.

## What it must not be used for

- What Gemma's Prohibited Use Policy forbids.
- Decisions about people, medical, legal or financial advice, or code that runs unread: nobody checked it for these.
- As a safe model. It was trained and measured on one task; refusing more of that task's requests says little of others.
- As evidence beyond the figures above, which are of one run.
"""


def text(
    base_name: str,
    base_sha256: str,
    figures: Mapping[str, str],
    cfg: Config | None = None,
    facts: Mapping = MappingProxyType({}),
    whole: bool = False,
) -> str:
    """The card. figures: {what was measured: its value}; cfg, facts: of the run that trained it, None and {}
    without one; whole: a model with all weights, not an adapter."""
    from huggingface_hub import ModelCardData

    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base_name) and not Path(base_name).exists()
    hub_id = base_name if on_hub else None
    method = (cfg.rl.algorithm if cfg.training.mode == "rl" else cfg.training.mode) if cfg else None
    how = METHODS.get(method, method)
    source = cfg.dataset_path if cfg else None
    metadata = ModelCardData(
        base_model=hub_id,
        datasets=[source.removeprefix("hub:").split(":")[0]] if source and source.startswith("hub:") else None,
        library_name="transformers" if whole else "peft",
        license="gemma",
        pipeline_tag=None if method == "reward" else "text-generation",
        tags=["gemma3", *([method] if method else [])],
    )
    rows = {"base": f"{hub_id or Path(base_name).name}, sha256 {base_sha256}"}
    if cfg:
        kind = {"lora": "LoRA", "qlora": "QLoRA, on the base in 4 bits", "none": "all weights"}[cfg.model.peft_type]
        size = "" if cfg.model.peft_type == "none" else f", rank {cfg.model.peft_rank}, alpha {cfg.model.peft_alpha}"
        rows["method"] = f"{how}; {kind}{size}"
        if facts.get("start"):
            rows["started from"] = f"{short(cfg.model.adapter)}, sha256 {facts['start'][0]}"
        rows["data"] = data_of(cfg, facts)
    rows["versions"] = ", ".join(f"{name} {number}" for name, number in log.versions().items())
    title = rows["base"].partition(",")[0] + (f", {how}" if how else "")
    launch = ["```bash", command(cfg), "```", ""] if cfg else []
    comparison = "`evaluate.py` compares it with its base on test prompts, with intervals."
    lines = ["---", metadata.to_yaml(), "---", "", f"# {title}", "", *_table(rows), "", *launch]
    return "\n".join([*lines, "## Held-out figures", "", *_table(figures), "", comparison, "", TERMS])


def _table(rows):
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def of_run(cfg: Config, facts: Mapping, base_name: str, evaluation: Mapping[str, float]) -> str:
    """The card of a run's final/. evaluation: of these weights, {"eval/...": value}."""
    figures = {f"{key.removeprefix('eval/')} (val)": f"{value:.4g}" for key, value in evaluation.items()}
    return text(base_name, facts["model"], figures, cfg, facts, cfg.model.peft_type == "none")


def data_of(cfg: Config, facts: Mapping) -> str:
    """Where the data is from, its licence and its hash."""
    task = tasks.load(cfg.task)
    if cfg.dataset_path:
        where = f"{short(cfg.dataset_path)}, under the licence of its source"
    elif cfg.debug or not task.files:
        where = "records that this project generates, MIT"
    else:
        where = f"the publisher's files, {task.licence}"
    digest = facts.get("data")
    return f"task {task.name}: {where}" + (f"; sha256 of what was kept {digest}" if isinstance(digest, str) else "")


def command(cfg: Config) -> str:
    """The command that trains with this config, by what differs from the defaults and decides the numbers."""
    source = config.CONFIGS / "debug.yml" if cfg.debug else None
    defaults = config.flatten(config.load_config(source, {"task": cfg.task}))
    words = ["python", config.SCRIPTS[cfg.training.mode], *["--debug"] * cfg.debug]
    for key, value in config.flatten(cfg).items():
        hidden = key in ("debug", "task") or (resume.matches(key, resume.FREE_TO_CHANGE) and key not in FREE_BUT_SHOWN)
        if key == "task" or (not hidden and value != defaults.get(key)):
            values = value if isinstance(value, list) else [value]
            shown = ",".join("null" if each is None else str(short(each)) for each in values)
            words += [f"--{key}", shown.lower() if isinstance(value, bool) else shown]
    return shlex.join(words)


def short(value: object) -> object:
    """A setting as others may read it: of a path on this machine the last names."""
    path = Path(value) if isinstance(value, str) else None
    return "/".join(path.parts[-2:]) if path and path.is_absolute() else value
