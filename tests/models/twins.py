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

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
QWEN2_MOE = {**QWEN, "shared_expert_intermediate_size": 20, "head_dim": None}

# Every family, and every feature that a family may turn on: the contract of test_families.py runs on each.
FAMILIES = {
    **TWINS,
    "llama biases everywhere, gelu": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}}),
    "llama dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 100.0}}),
    "llama llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}),
    "llama yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 32}),
    "mistral window": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "qwen2 window in the last": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gpt2": ("GPT2", {"intermediate_size": None, "num_key_value_heads": None}),
    "qwen2_moe": ("Qwen2Moe", {**QWEN2_MOE, "mlp_only_layers": [0]}),
    "qwen2_moe window, no biases": (
        "Qwen2Moe",
        {**QWEN2_MOE, "use_sliding_window": True, "sliding_window": 4, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.5, "pad_token_id": None}),
}


def twin(name):
    """A transformers model in evaluation mode whose every parameter, biases and norms too, is random."""
    family, options = FAMILIES[name]
    values = {key: value for key, value in {**SHAPE, **options}.items() if value is not None}
    config = getattr(transformers, f"{family}Config")(**values)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(config).eval()
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
