"""Tiny models of each family with random weights, made and written by transformers."""

from __future__ import annotations

import torch
import transformers

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QWEN = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 16}

TWINS = {
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama untied, biases, wide heads": ("Llama", {"attention_bias": True, "head_dim": 16, "rope_theta": 500.0}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3_moe not normalised, every second": (
        "Qwen3Moe",
        {**QWEN, "decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True},
    ),
}


def twin(name):
    """A transformers model in evaluation mode whose every parameter, biases and norms too, is random."""
    family, options = TWINS[name]
    config = getattr(transformers, f"{family}Config")(**SHAPE, **options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that a wrong rotation, order or expert shows far above the tolerance.
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def write(name, folder):
    """The same model, and the folder it was written to."""
    model = twin(name)
    model.save_pretrained(folder)
    return model


def tokens(*shape):
    return torch.randint(0, VOCAB, shape)
