"""A model as one .gguf file, for llama.cpp and what is built on it (Ollama, LM Studio): write it, read it back.

Everything comes from the model and its tokenizer.json, whatever kind of base they were read from. Of a norm GGUF holds
1 + w, and one-dimensional tensors stay in fp32, as llama.cpp's own converter leaves them.
"""

import json
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, TokenType
from torch import Tensor

from common import chat
from common.log import UserError
from common.runtime import base
from common.runtime.types import Gemma, Tokenizer

TYPES = {  # --gguf_type: of the tensors, of the file
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
TORCH_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
STOPS_ELSEWHERE = {"</s>"}  # llama.cpp stops at this text and warns where its token is not of control type
# The first marks spaces and cuts off bytes as SentencePiece does; the second is GPT-2's alphabet of bytes.
GEMMAS, BYTE_LEVEL = "llama", "gpt2"
# The words that a tokenizer of bytes is cut into before it merges: single digits, then GPT-2's. As the tiny base does.
BYTE_LEVEL_WORDS = "starcoder"
MODELFILE = '''FROM ./{name}
TEMPLATE """<start_of_turn>user
{{{{ if .System }}}}{{{{ .System }}}}

{{{{ end }}}}{{{{ .Prompt }}}}<end_of_turn>
<start_of_turn>model
{{{{ .Response }}}}<end_of_turn>
"""
PARAMETER stop "<end_of_turn>"
PARAMETER stop "<eos>"
'''


def write(path: Path, net: Gemma, tokenizer: Tokenizer, state: dict[str, Tensor], kind: str) -> None:
    """Write `state`, fp32 weights under the names of a plain model, as a .gguf of TYPES[kind]; then read it back.

    UserError unless every key and every tensor is read as it was meant, the latter by torch's own rounding where torch
    has that type.
    """
    writer = GGUFWriter(path, "gemma3")
    _add_sizes(writer, net.config)
    _add_tokenizer(writer, json.loads(tokenizer.backend_tokenizer.to_str()), net.config.vocab_size)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = tensor_names(net.config.num_hidden_layers, state)
    for name, tensor in state.items():
        stored = TYPES[kind if tensor.ndim > 1 else "f32"][0]
        values = (tensor + 1 if _is_norm(name) else tensor).numpy()
        writer.add_tensor(names[name], gguf.quants.quantize(values, stored), raw_dtype=stored)
    fields = {key: field.value for key, field in writer.kv_data[0].items()}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check(path, fields, state, kind)


def read(path: Path) -> dict[str, Tensor]:
    """{name in the file: tensor in fp32}, as it was stored."""
    tensors = {}
    for tensor in GGUFReader(path).tensors:
        tensors[tensor.name] = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    return tensors


def read_model(path: Path, like: Gemma) -> Gemma:
    """A plain transformers model in fp32 with the weights of a .gguf and the sizes of `like`."""
    from transformers import Gemma3ForCausalLM

    net = Gemma3ForCausalLM(like.config).float()
    tensors = read(path)
    names = tensor_names(like.config.num_hidden_layers, dict(net.named_parameters()))
    state = {name: tensors[theirs] - 1 if _is_norm(name) else tensors[theirs] for name, theirs in names.items()}
    net.load_state_dict(state | {base.HEAD: state[base.EMBEDDING]})
    return net


def rounded(tensor: Tensor, kind: str) -> Tensor:
    """A weight in fp32 as a file of TYPES[kind] holds it, in fp32."""
    if kind in TORCH_TYPES:
        return tensor.to(TORCH_TYPES[kind]).float()
    stored = TYPES[kind][0]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.cpu().numpy(), stored), stored))


def tensor_names(layers: int, state: dict) -> dict[str, str]:
    """{name of a weight in a plain model: its name in a .gguf}"""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, layers)
    names = {name: table.get_name(name, (".weight",)) for name in state if name != base.HEAD}
    assert all(names.values()) and len(set(names.values())) == len(names), names
    return {name: str(theirs) for name, theirs in names.items()}


def _is_norm(name):
    return name.endswith("norm.weight")


def _check(path, fields, state, kind):
    reader = GGUFReader(path)
    odd = [key for key, value in fields.items() if not _same(reader.get_field(key), value)]
    stored, names = read(path), tensor_names(fields["gemma3.block_count"], state)
    odd += sorted(set(names.values()) ^ stored.keys())
    for name, tensor in state.items():
        meant = tensor + 1 if _is_norm(name) else tensor
        right = rounded(meant, kind) if tensor.ndim > 1 else meant
        if names[name] in stored and not torch.equal(stored[names[name]].view(right.shape), right):
            odd.append(names[name])
    if odd:
        raise UserError(f"--export: {path.name} was not written as it was meant: {len(odd)} entries, first {odd[0]}")


def _same(field, value):
    """Is a field of the file `value`, whose floats are of 32 bits there?"""
    if field is None:
        return False
    content = field.contents()
    listed = [content, value] if isinstance(value, list) else [[content], [value]]
    pairs = [[torch.tensor(x).float().item() if isinstance(x, float) else x for x in side] for side in listed]
    return pairs[0] == pairs[1]


def _add_sizes(writer, config):
    writer.add_type("model")
    writer.add_license("gemma")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(base.ROPE["full_attention"])
    writer.add_rope_freq_base_swa(base.ROPE["sliding_attention"])


def _add_tokenizer(writer, content, size):
    """content: of tokenizer.json; size: rows of the embedding, each of which is a token of the file."""
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    kind = GEMMAS if model["byte_fallback"] else BYTE_LEVEL
    texts = {index: text for text, index in model["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    tokens, types = [], []
    for index in range(size):
        text, token = texts.get(index, f"[PAD{index}]"), added.get(index)
        if index not in texts:
            token_type = TokenType.UNUSED
        elif (token and token["special"]) or text in STOPS_ELSEWHERE:
            token_type = TokenType.CONTROL
        elif token:
            text, token_type = text.replace("▁", " "), TokenType.USER_DEFINED  # is looked for in the text as it came
        elif kind == GEMMAS and len(text) == 6 and text.startswith("<0x"):
            token_type = TokenType.BYTE
        else:
            token_type = TokenType.NORMAL
        tokens.append(text)
        types.append(int(token_type))
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("default" if kind == GEMMAS else BYTE_LEVEL_WORDS)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    if kind == GEMMAS:  # llama.cpp merges the pair of the highest score first, tokenizers that of the earliest merge
        ranks = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault(model["vocab"]["".join(pair)], rank)
        writer.add_token_scores([-float(ranks.get(index, len(merges))) for index in range(size)])
        writer.add_add_space_prefix(False)
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(chat.BOS)
    writer.add_eos_token_id(chat.EOS)
    writer.add_eot_token_id(chat.END_OF_TURN)
    writer.add_unk_token_id(chat.UNK)
    writer.add_pad_token_id(chat.PAD)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat.TEMPLATE)
