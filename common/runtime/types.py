"""transformers' classes for type hints, without importing transformers: that alone takes seconds."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Gemma3ForCausalLM as Gemma
    from transformers import Gemma3TextConfig as GemmaConfig
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    Gemma = GemmaConfig = Tokenizer = Any
