"""A tiny random model that speaks bytes, for tests of everything above the decoder."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moekit.config import ModelConfig, MoEConfig
from moekit.engine import Model
from moekit.models.decoder import Decoder
from moekit.models.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
PRINTABLE = 94  # ids before this are the visible ASCII characters
VOCABULARY = 256 + len(SPECIAL)


def byte_tokenizer(chat: bool = True) -> Tokenizer:
    """One token a byte, four special ones after them; <|end|> (256) ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    if chat:
        hf.chat_template = CHAT_TEMPLATE
    return Tokenizer(hf)


def tiny_config(*, moe: bool = True, context: int = 256) -> ModelConfig:
    layer = MoEConfig(hidden_size=32, intermediate_size=16, num_experts=4, top_k=2)
    return ModelConfig(
        arch="mixtral" if moe else "llama",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        moe=layer if moe else None,
    )


def tiny_model(*, moe: bool = True, chat: bool = True, context: int = 256, endless: bool = True) -> Model:
    """Random weights whose logits differ clearly and favour ASCII; an `endless` one never says <|end|> by itself."""
    decoder = Decoder(tiny_config(moe=moe, context=context)).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" not in name and "router" not in name:
                parameter.mul_(6)
        assert decoder.head is not None
        decoder.head.weight[PRINTABLE:] *= 0.4
        if endless:
            decoder.head.weight[256] = 0
    return Model(decoder, byte_tokenizer(chat))
