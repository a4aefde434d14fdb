"""Find a base and make sure of it: hub id, folder, `.gguf` file or `tiny` -> a local folder that can be trusted.

Whatever it is becomes a local folder of safetensors first; only weights, a checked config and a tokenizer are read
from it, never code and never a pickle. What a source loses (GGUF: chat template, stop set, tie) is put back.
"""

import contextlib
import functools
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common import chat
from common.log import UserError, say
from common.runtime import cache, versions
from common.runtime.checkpoint import verify
from common.runtime.types import GemmaConfig, Tokenizer

HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "*.safetensors",
    "*.index.json",
]
# config.json may only choose numbers; these choose code or another architecture
FORBIDDEN = (
    "auto_map",
    "trust_remote_code",
    "quantization_config",
    "_attn_implementation",
    "_attn_implementation_internal",
)
LIMITS = {
    "vocab_size": 2**20,
    "hidden_size": 2**14,
    "intermediate_size": 2**16,
    "num_hidden_layers": 256,
    "num_attention_heads": 256,
    "num_key_value_heads": 256,
    "head_dim": 1024,
    "sliding_window": 2**20,
}
LARGEST = 2**20  # bytes of a config.json: Gemma's has 2,000
ROPE = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
RECORD = "base.json"  # beside an adapter's files: the base that it was trained on
LARGEST_SCALE = 10
CONVERTED_BY = "5.23.0"  # the version of transformers in the config.json of every base that was converted
SPECIALS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 105, "<end_of_turn>": 106}


def resolve(checkpoint: str) -> Path:
    """A local folder with config.json, safetensors and tokenizer for any kind of `model.base_checkpoint`."""
    versions.check()
    if checkpoint == "tiny":
        from common.runtime import tiny  # it needs transformers, which takes seconds to import

        return tiny.ensure(cache.root())
    path = Path(checkpoint).expanduser()
    if path.suffix == ".gguf":
        return _converted_gguf(path)
    if path.is_dir():
        verify(path, optional=True)  # a run's: a flipped bit would go unseen
        return path
    if path.exists() or checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1:
        raise UserError(f"model.base_checkpoint: no such folder or .gguf file: {checkpoint}")
    return _downloaded(checkpoint)


def locate(source: str, given: str | None = None) -> tuple[Path, Path | None]:
    """(folder of the base, folder of the adapter or None) of a checkpoint: a run's final/ or any kind of base.

    given: the base to use for an adapter (--model.base_checkpoint), in place of the one that its files name. A run's
    folder stands for its final/. The adapter of DIR@0.5 keeps its scale in its name, see split_scale.
    """
    folder, scale = split_scale(source)
    if not _is_checkpoint(folder) and (inside := checkpoints_in(folder)):
        if inside[0] != folder / "final":
            raise UserError(f"{folder} is no checkpoint{did_you_mean(folder)}")
        say(f"{folder} is a run: its final/ is taken")
        source = folder = inside[0]
    path = folder / "adapter_config.json"
    if not path.is_file():
        if scale != 1:
            raise UserError(f"{source}: only an adapter has a scale, and no adapter_config.json is in {folder}")
        return resolve(str(source)), None
    adapter = folder if scale == 1 else folder.with_name(f"{folder.name}@{scale}")
    try:
        config = json.loads(path.read_text())
        name = str(config["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: names no base_model_name_or_path ({error!r})") from error
    if config.get("task_type") == "SEQ_CLS":
        raise UserError(f"{folder} is a reward model, not a policy")
    if given:
        return resolve(given), adapter
    if Path(name).is_absolute() and not Path(name).exists():
        todo = "pass --model.base_checkpoint with its new place"
        raise UserError(f"{folder} was trained on {name}, which is gone: {todo}")
    return resolve(name), adapter


def split_scale(source: Path | str) -> tuple[Path, float]:
    """DIR@0.5 -> (DIR, 0.5): the adapter in DIR with B A times 0.5. The scale is 1 without an @, and where a file or
    folder has that very name. UserError for what is no scale."""
    path = Path(source).expanduser()
    name, _, text = path.name.rpartition("@")
    if not name or path.exists():
        return path, 1.0
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale <= LARGEST_SCALE:
        raise UserError(
            f"{source}: expected DIR@SCALE, an adapter times a number above 0 and at most {LARGEST_SCALE}, "
            f"got {text!r:.40} as SCALE"
        )
    return path.with_name(name), scale


def name_of(source: Path | str) -> str:
    """What a checkpoint is called that has no NAME in front: as its run's folder or its file, with the @ of a scale."""
    path, scale = split_scale(source)
    named = path.absolute().parent if path.name in ("final", "best") else path
    return named.name.removesuffix(".gguf") + (f"@{scale:g}" if scale != 1 else "")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, or of its stages, the likeliest first: for a folder named in their place."""
    steps = sorted(folder.glob("step-*"), reverse=True)
    places = (folder / "final", folder / "best", *steps, *sorted(folder.glob("*/final")))
    return [place for place in places if _is_checkpoint(place)]


def did_you_mean(folder: Path) -> str:
    """The end of a message on a folder without a checkpoint."""
    inside = checkpoints_in(folder)
    return f": did you mean {inside[0]}?" if inside else ""


def check_adapter(folder: Path | str, key: str) -> None:
    """UserError unless `folder`, given as setting `key`, holds an adapter."""
    folder, _ = split_scale(folder)
    if not (folder / "adapter_config.json").is_file():
        fault = "no adapter_config.json in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{key}: {folder} cannot be used: {fault}{did_you_mean(folder)}")


def _is_checkpoint(folder):
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _downloaded(repo):
    from huggingface_hub import snapshot_download

    instead = "or use a .gguf file (--model.base_checkpoint FILE.gguf, see README) or --debug, which needs no download"
    try:
        return Path(snapshot_download(repo, allow_patterns=HUB_FILES))
    except Exception as error:
        todo = hub_remedy(error, f"https://huggingface.co/{repo}")
        raise UserError(f"model.base_checkpoint: cannot load {repo}: {todo}, {instead}") from error


def hub_remedy(error: Exception, page: str) -> str:
    """What to do about an error of huggingface_hub, for a message; page: of what was asked for."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"accept the licence at {page} and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"check the name; for a gated one accept the licence at {page}, then `hf auth login`"
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", "?")
        login = "; accept the licence and log in with `hf auth login`" if status in (401, 403) else ""
        return f"the hub answered {status}{login}"
    # offline, no route, a timeout: each layer below has its own types
    return f"the hub cannot be reached and it is not in its cache ({type(error).__name__}); check the network"


def _converted_gguf(path):
    """The safetensors folder of a .gguf, converted once into the cache under the file's hash."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"model.base_checkpoint: cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise UserError(f"model.base_checkpoint: {path} is not a GGUF file (it does not start with 'GGUF')")
    return cache.build_once(cache.root() / f"{path.stem}-{digest}", lambda folder: _convert_gguf(path, folder))


def _convert_gguf(path, folder):
    from transformers import AutoTokenizer, Gemma3ForCausalLM, GgufConfig

    print(f"converting {path.name} to safetensors, once (about a minute and 3 GB for 270M) ...", file=sys.stderr)
    try:
        loaded: Any = Gemma3ForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the reader raises whatever a broken or foreign file makes it stumble over
        raise UserError(
            f"model.base_checkpoint: {path} is broken or no Gemma 3 text model ({type(error).__name__}: {error})"
        ) from error
    if report["missing_keys"]:  # they would be random numbers
        missing = sorted(report["missing_keys"])
        raise UserError(f"model.base_checkpoint: {path} lacks {len(missing)} weights, the first is {missing[0]}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # It is part of the base's fingerprint, and an adapter has to find its base after an upgrade, too.
    content = json.loads((folder / "config.json").read_text()) | {"transformers_version": CONVERTED_BY}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def public_name(checkpoint: str, folder: Path) -> str:
    """What an adapter names as its base: the hub id, also of a folder in the hub's cache, or the local folder."""
    if checkpoint != "tiny" and not Path(checkpoint).expanduser().exists():
        return checkpoint
    folder = folder.resolve()
    repo = folder.parent.parent.name  # .../models--google--gemma-3-270m-it/snapshots/<revision>
    if folder.parent.name == "snapshots" and re.fullmatch("models--[^-].*?--.+", repo):
        return repo.removeprefix("models--").replace("--", "/", 1)
    return str(folder)


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and every weight: another model or another fine-tune of it, another string.

    Of config.json the content counts, not the layout. It is hashed as transformers writes it.
    """
    files = (_config_path(folder), *sorted(folder.glob("*.safetensors")))
    return _fingerprint(files, _sizes_and_times(files))


def _sizes_and_times(files):
    """Sizes and times of files: what was read of them holds until these change."""
    return tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@functools.cache  # files are read once in a process, as long as these stay as they are
def _fingerprint(files, sizes_and_times):
    content = files[0].read_bytes()
    with contextlib.suppress(ValueError, RecursionError):  # damaged: read_config refuses it
        content = (json.dumps(json.loads(content), indent=2, sort_keys=True) + "\n").encode()
    digest = hashlib.sha256(content)
    for shard in files[1:]:
        with shard.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def record(folder: Path | str) -> dict | None:
    """The base that the adapter in `folder` was trained on -> {"base_checkpoint": its public name, "fingerprint",
    "quantised": "nf4" or None}. None without that file: peft writes none, nor did earlier versions."""
    path = split_scale(folder)[0] / RECORD
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text())
        name, digest, quantised = (saved[key] for key in ("base_checkpoint", "fingerprint", "quantised"))
        if not isinstance(name, str) or not isinstance(digest, str) or quantised not in (None, "nf4"):
            raise ValueError("a value of another kind")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: does not say which base the adapter was trained on ({error!r:.200})") from error
    return {"base_checkpoint": name, "fingerprint": digest, "quantised": quantised}


def check_record(
    folder: Path | str, key: str, here: Path | None, fingerprint: str | None, quantised: bool | None
) -> None:
    """UserError if the adapter in `folder`, given as setting `key`, was trained on another base than the one in folder
    `here` with this fingerprint (None: unknown). An adapter without a record is taken as it is.

    quantised: is this base held in 4 bits? None: it does not matter. An adapter of a 4-bit base has learned to correct
    the error of the 4 bits, so without that error it is refused. The other way is only said: to go on with QLoRA from a
    LoRA adapter is usual, and training then corrects what the 4 bits changed.
    """
    check_adapter(folder, key)
    trained_on = record(folder)
    if trained_on and fingerprint and trained_on["fingerprint"] != fingerprint:
        name, here = trained_on["base_checkpoint"], here.resolve()
        todo = f"pass --model.base_checkpoint {name}"
        if name == str(here) or f"models--{name.replace('/', '--')}" in here.parts:
            todo = "the files of this base have changed since: put back those that it was trained on"
        raise UserError(
            f"{key}: {folder} was trained on another base, {name} (sha256 {trained_on['fingerprint'][:12]}), "
            f"and this is {here} (sha256 {fingerprint[:12]}): {todo}"
        )
    if trained_on and trained_on["quantised"] and quantised is False:
        raise UserError(
            f"{key}: {folder} was trained on a 4-bit base, and this one is not quantised: "
            "pass --model.peft_type qlora, or take one that was trained with lora"
        )
    if trained_on and not trained_on["quantised"] and quantised:
        say(
            f"{key}: {folder} was trained on the unquantised base; on this 4-bit one its numbers differ from those it "
            "ended with. If that is not meant, pass --model.peft_type lora"
        )


def _config_path(folder):
    path = folder / "config.json"
    if not path.is_file():
        hint = did_you_mean(folder)
        if (folder / "adapter_config.json").is_file():
            hint = "; it holds an adapter: give it as --model.adapter"
        raise UserError(f"{folder}: no config.json{hint}")
    return path


def read_config(folder: Path) -> GemmaConfig:
    """A Gemma3TextConfig from folder/config.json in which nothing but numbers was taken from the file."""
    path = _config_path(folder)
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: {path.stat().st_size} bytes, a config has at most {LARGEST}")
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "gemma3_text":
        larger = " (the 4B and larger models see images; 270M and 1B are the text models)" if kind == "gemma3" else ""
        raise UserError(f"{path}: model_type is {kind!r}, not 'gemma3_text'{larger}")
    for key in FORBIDDEN:
        if raw.get(key):
            raise UserError(f"{path}: key {key!r} is refused: a config may not choose code or another loader")
    for key, limit in LIMITS.items():
        if key in raw and (type(raw[key]) is not int or not 0 < raw[key] <= limit):
            raise UserError(f"{path}: {key} is {str(raw[key])[:40]}, expected a whole number from 1 to {limit}")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Gemma3TextConfig

    known = set(Gemma3TextConfig().to_dict()) | {"rope_theta", "rope_local_base_freq"}
    try:
        return _repaired(Gemma3TextConfig(**{k: v for k, v in raw.items() if k in known}))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{path}: not a Gemma 3 config ({str(error)[:200]})") from error


def _repaired(config):
    """Put back what a source may lose: rope bases, layer pattern, tie of head and embedding."""
    layers = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in ROPE.items()}
    for key, right in (("layer_types", layers), ("rope_parameters", rope), ("tie_word_embeddings", True)):
        value = getattr(config, key, None)
        if value != right:
            say(f"repaired: {key} was {str(value)[:80]}, which is not Gemma 3's")
            setattr(config, key, right)
    if config.final_logit_softcapping or config.attn_logit_softcapping or config.attention_bias:
        raise ValueError("Gemma 3 has no soft-capping and no attention bias")
    return config


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a base, with Gemma's special ids checked and its chat template put in place.

    Gemma's takes seconds to read, so the last one that was read serves again while its files stay as they are.
    """
    return _load_tokenizer(folder, _sizes_and_times(sorted(folder.glob("*token*.json"))))


@functools.lru_cache(maxsize=1)
def _load_tokenizer(folder, sizes_and_times):
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions on a damaged file
        raise UserError(f"{folder}: tokenizer.json is missing or damaged ({str(error)[:200]})") from error
    for token, index in SPECIALS.items():
        if (here := tokenizer.convert_tokens_to_ids(token)) != index:
            raise UserError(f"{folder}: not Gemma's tokenizer: {token} has id {here}, not {index}")
    tokenizer.chat_template = chat.TEMPLATE
    return tokenizer


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 of what the tokenizer does, whatever the layout of its file.

    Hashed as `tokenizers` writes it, so for a file that it wrote this is the file's own hash.
    """
    return hashlib.sha256(load_tokenizer(folder).backend_tokenizer.to_str(pretty=True).encode()).hexdigest()


def check_weights(folder: Path, config: GemmaConfig) -> None:
    """Every shard's header is read before anything is allocated, so a cut or foreign file costs nothing.

    A head of its own is refused: Gemma's is the embedding, and the model has one tensor for both.
    """
    from transformers import Gemma3ForCausalLM

    try:
        with torch.device("meta"):
            wanted = {name: list(p.shape) for name, p in Gemma3ForCausalLM(config).named_parameters()}
    except Exception as error:  # an unknown activation, a size that does not divide, ...
        raise UserError(f"{folder / 'config.json'}: no model can be built from it ({error!r})") from error
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt")]
        hint = " (pickled .bin/.pt weights are never loaded; convert them to safetensors)" if pickled else ""
        raise UserError(f"{folder}: no .safetensors file{hint}")
    shard_of = {}
    for shard in shards:
        try:
            with safe_open(shard, "pt") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
                shard_of |= dict.fromkeys(shapes, shard)
        except (SafetensorError, OSError) as error:
            todo = "copy or download it again"
            raise UserError(f"{shard}: truncated or not a safetensors file ({error}); {todo}") from error
        for key, shape in shapes.items():
            if shape != wanted.get(key, shape):
                raise UserError(f"{shard}: {key} is {shape}, config.json says {wanted[key]}")
    if {HEAD, EMBEDDING} <= shard_of.keys():
        head, embedding = (_load_tensor(shard_of[key], key) for key in (HEAD, EMBEDDING))
        if not torch.equal(head, embedding.to(head.dtype)):
            raise UserError(
                f"{shard_of[HEAD]}: {HEAD} differs from {EMBEDDING}: Gemma 3 has one weight for both, so this is "
                "another architecture, or a fine-tune that untied them"
            )


def _load_tensor(shard: Path, key: str) -> torch.Tensor:
    with safe_open(shard, "pt") as file:
        return file.get_tensor(key)
