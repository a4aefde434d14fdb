"""What a policy answers to one prompt before a stage of training and after it."""

from types import SimpleNamespace as Config

from common import chat, data, model, prompts, rollouts, tasks
from common.evaluation import measure
from common.log import say
from common.runtime import base

SHOWN_TOKENS, SHOWN_CHARACTERS = 48, 200  # of an answer


class Answers:
    """The greedy answers of checkpoints to the first prompt of val that may be shown."""

    def __init__(self, cfg: Config):
        self.cfg, self.known = cfg, {}
        self.tokenizer = base.load_tokenizer(base.resolve(cfg.model.base_checkpoint))
        records = data.from_config(cfg, "val")
        encoded, _ = prompts.encode_prompts(records, self.tokenizer, cfg.training.max_seq_length)
        plain = tasks.load(cfg.task).plain
        self.prompts = [prompt for prompt in encoded if plain and plain(prompt.record["prompt"])] or encoded

    def by(self, source: str) -> str:
        """The answer of a base, or of the policy in the final/ of a run, whose base may have been moved."""
        if source not in self.known:
            folder, adapter = base.locate(source, self.cfg.model.base_checkpoint)
            device = model.pick_device(self.cfg.device)
            dtype = model.pick_dtype(self.cfg.model.dtype, device)
            net, _ = model.load(str(folder), device, dtype, quantize=self.cfg.model.peft_type == "qlora")
            if adapter:
                model.load_adapter(net, "policy", adapter, trainable=False)
            answer = rollouts.sample(net, [self.prompts[0].ids], 1, SHOWN_TOKENS, greedy=True)
            self.known[source] = chat.decode(self.tokenizer, answer["completions"][0])
        return self.known[source]

    def show(self, before: str, after: str) -> None:
        """Say the prompt and both answers, or once what is the same; nothing where no prompt fits."""
        if not self.prompts:
            return
        answers = {"before": self.by(before), "after": self.by(after)}
        if answers["before"] == answers["after"]:
            answers = {"before, after": answers["after"]}
        prompt = measure.dialogue(self.prompts[0].record["prompt"])
        for name, text in {"val prompt": prompt, **answers}.items():
            line = " ".join(text.split())
            cut = line[:SHOWN_CHARACTERS] + "..." * (len(line) > SHOWN_CHARACTERS)
            say(f"  {name + ':':16} {cut or '(nothing)'}")
