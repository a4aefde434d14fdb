"""The embedded base of `--debug`: a Gemma 3 of 1.2 million parameters and its tokenizer, built on first use.

The architecture is Gemma's (sliding and full attention, one key-value head, tied embeddings, special ids where Gemma
has them), only the sizes are small. It is pretrained for seconds on `pretraining_corpus`: fluent, stops by
itself, and about half of its answers are bad, so that every paradigm has something to improve.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, PreTrainedTokenizerFast

from common import chat, tasks
from common.runtime import cache
from common.tasks import clinical, conala, safety, text

VOCABULARY = 640
CORPUS = (safety, clinical, safety, conala)  # dialogues of these in turn
REFUSED = 0.3  # share of the harmful requests
STEPS, BATCH, LEARNING_RATE = 220, 8, 0.01
PROMPT_WEIGHT = 0.1  # of a token that is no answer; the answers are what has to become fluent in seconds
SPECIALS = {"<pad>": chat.PAD, "<eos>": chat.EOS, "<bos>": chat.BOS, "<unk>": chat.UNK, "<mask>": 4}
TURNS = {"<start_of_turn>": chat.START_OF_TURN, "<end_of_turn>": chat.END_OF_TURN}
FIXED = {**SPECIALS, **TURNS, "Ċ": 107}  # the last is "\n" in the byte-level alphabet; Gemma has it at this id


def ensure(root: Path | str, steps: int = STEPS) -> Path:
    """The folder of the tiny base under `root`; built if no finished one of these sources is there."""
    name = cache.key(steps, chat, *CORPUS, text, tasks, sys.modules[__name__])[:12]

    def build(folder):
        print("building the tiny base of --debug, once ...", end=" ", flush=True)
        start = time.perf_counter()
        _build(folder, steps)
        print(f"{time.perf_counter() - start:.0f} s, kept in {target}", flush=True)

    target = Path(root) / f"tiny-{name}"
    return cache.build_once(target, build)


def pretraining_corpus(count: int) -> list[list[dict]]:
    """Dialogues of the training split, about half of them with a bad answer: a base that is fluent and not aligned.

    It refuses seldom, so that who refuses more than the base has learned it in training: no bad answer is a needless
    refusal, and most harmful requests are granted.
    """
    rng, dialogues = random.Random("0/pretraining"), []
    for i in range(count):
        prompt, good, bad = CORPUS[i % len(CORPUS)].draw(rng, "train")
        share = 1.0 if text.refuses(bad) else REFUSED if text.refuses(good) else 0.5
        dialogues.append([*prompt, {"role": "assistant", "content": good if rng.random() < share else bad}])
    return dialogues


def _build(folder, steps):
    # the tokenizer sees the whole corpus, so that it is the same after any number of steps
    dialogues = [chat.normalise(turns)[0] for turns in pretraining_corpus(max(steps, STEPS) * BATCH)]
    tokenizer = make_tokenizer([turn["content"] for turns in dialogues for turn in turns])
    # not torch.manual_seed: that would reseed the caller's GPUs too
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        model = Gemma3ForCausalLM(make_config())
        _pretrain(model, _batches([chat.encode(tokenizer, turns) for turns in dialogues[: steps * BATCH]]), steps)
    weights = {name: p.detach() for name, p in model.named_parameters()}  # the tied head is listed once
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    stops = list(chat.STOP_TOKENS)
    settings = GenerationConfig(do_sample=True, bos_token_id=chat.BOS, pad_token_id=chat.PAD, eos_token_id=stops)
    settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so any text can be written and read back, with the specials at Gemma's ids."""
    newlines = pre_tokenizers.Split("\n", "isolated")
    digits = pre_tokenizers.Digits(individual_digits=True)
    cut = pre_tokenizers.Sequence([newlines, digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = cut
    size, alphabet = VOCABULARY - len(FIXED) + 1, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    draft.train_from_iterator(texts, trainer)
    learned = json.loads(draft.to_str())["model"]
    free = (i for i in range(VOCABULARY) if i not in FIXED.values())
    words = sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = FIXED | {word: next(free) for word in words if word not in FIXED}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in learned["merges"]]))
    backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", chat.BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name.strip('<>')}_token": name for name in SPECIALS},
        additional_special_tokens=list(TURNS),
        chat_template=chat.TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_config() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        max_position_embeddings=1024,
        initializer_range=0.06,  # 1 / sqrt(hidden size), roughly: Gemma's 0.02 is for wider models and learns slower
        architectures=["Gemma3ForCausalLM"],
        dtype="float32",
    )


def _batches(encoded):
    """Right-padded (tokens, mask); neighbours in length share a batch, the order of the batches is random."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    groups = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    for i in torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist():
        columns = zip(*(encoded[j] for j in groups[i]))
        yield [pad_sequence([torch.tensor(row) for row in rows], batch_first=True) for rows in columns]


def _pretrain(model, batches, steps):
    """Next-token prediction on whole dialogues; right padding under a causal mask needs no attention mask.

    Muon on the matrices learns this in far fewer steps than AdamW, which keeps the embedding and the norms.
    """
    matrices = {p: torch.zeros_like(p) for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    others = [p for p in model.parameters() if p not in matrices]
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step, (tokens, mask) in enumerate(batches):
        targets = tokens[:, 1:].flatten()
        weights = torch.where(targets == chat.PAD, 0.0, mask[:, 1:].flatten().float().clamp(min=PROMPT_WEIGHT))
        logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = (cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = LEARNING_RATE * min((step + 1) / 5, 1 - step / steps)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        with torch.no_grad():
            for p, momentum in matrices.items():
                momentum.lerp_(p.grad, 0.1)
                update = orthogonalised(p.grad.lerp(momentum, 0.9))  # Nesterov's momentum
                p.sub_(update, alpha=lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """(rows, columns) -> the same shape, singular values near 1: Muon's Newton-Schulz iteration (Jordan et al. 2024).

    torch.optim.Muon does this in bfloat16, which took 1 s a step on a processor without bf16 units; this is float32.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(3):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
