"""Tiny models of every family that llama.cpp knows, with what it computes of each; numbers that fp32 holds."""

from __future__ import annotations

from plain_models import DeepseekModel, GrokModel
from twins import DEEPSEEK, ERNIE, FAMILIES, LATENT, PLAIN, QWEN, VOCAB, YARN

WORDS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [chr(33 + number) for number in range(VOCAB - 3)] + ["ab", "cd", "ef"],
    "tokenizer.ggml.merges": ["a b", "c d", "e f"],
}
"""A tokenizer of as many words."""
EPS = {"rms_norm_eps": 2.0**-17}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GRANITE = {
    **EPS,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.375,
    "attention_multiplier": 0.25,
    "logits_scaling": 2.0,
}
SCALED = {**DEEPSEEK, **EPS, "routed_scaling_factor": 1.75}

GGUF_TWINS = {
    "llama tied": ("Llama", {**EPS, "tie_word_embeddings": True}),
    "llama biases everywhere, wide heads": (
        "Llama",
        {**EPS, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama llama3": ("Llama", {**EPS, "head_dim": 64, "rope_parameters": LLAMA3}),
    "llama linear": (
        "Llama",
        {**EPS, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    ),
    "llama yarn": ("Llama", {**EPS, "head_dim": 32, "rope_parameters": YARN}),
    "mistral": ("Mistral", {**EPS, "sliding_window": None, "head_dim": 16}),
    "mixtral": ("Mixtral", {**EPS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2 tied": ("Qwen2", {**EPS, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**EPS, "head_dim": 16}),
    "qwen3 yarn": ("Qwen3", {**EPS, "head_dim": 32, "rope_parameters": YARN}),
    "qwen2_moe": ("Qwen2Moe", {**EPS, **QWEN, "head_dim": None, "shared_expert_intermediate_size": 20}),
    "qwen3_moe tied": ("Qwen3Moe", {**EPS, **QWEN, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "olmoe": (
        "Olmoe",
        {**EPS, "num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 4, "pad_token_id": None},
    ),
    "deepseek": (
        DeepseekModel,
        {
            **DEEPSEEK,
            **PLAIN,
            **EPS,
            "model_type": "deepseek",
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
    ),
    "deepseek_v2": ("DeepseekV2", {**LATENT, **SCALED, "topk_method": "greedy"}),
    "deepseek_v2 direct queries, yarn": (
        "DeepseekV2",
        {
            **LATENT,
            **SCALED,
            "topk_method": "greedy",
            "q_lora_rank": None,
            "rope_parameters": {**YARN, "mscale": 0.75, "mscale_all_dim": 0.75},
        },
    ),
    "deepseek_v3 groups, yarn": (
        "DeepseekV3",
        {
            **LATENT,
            **SCALED,
            "n_group": 3,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3 one group, not normalised": (
        "DeepseekV3",
        {**LATENT, **SCALED, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "glm4_moe_lite": ("Glm4MoeLite", {**LATENT, **SCALED, "first_k_dense_replace": None, "n_shared_experts": 1}),
    "glm4_moe norms, biases": ("Glm4Moe", {**SCALED, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "glm4_moe groups": (
        "Glm4Moe",
        {**SCALED, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 1},
    ),
    "solar_open": ("SolarOpen", {**SCALED, "first_k_dense_replace": None, "intermediate_size": None, "head_dim": 8}),
    "dots1": ("Dots1", {**SCALED, "sliding_window": None, "num_key_value_heads": 4, "head_dim": 16}),
    "minimax_m2": (
        "MiniMaxM2",
        {
            **EPS,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {**ERNIE, **EPS, "moe_layer_start_index": 1, "moe_layer_interval": 1, "moe_num_shared_experts": 2},
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        {**EPS, "num_experts": 6, "moe_topk": 3, "head_dim": 16, "pad_token_id": 0},
    ),
    "granitemoe tied": ("GraniteMoe", {**GRANITE, "tie_word_embeddings": True}),
    "granitemoeshared": ("GraniteMoeShared", {**GRANITE, "shared_intermediate_size": 20}),
    "dbrx": FAMILIES["dbrx"],
    "grok-1": (GrokModel, {**FAMILIES["grok-1"][1], **EPS, "attn_output_multiplier": 0.25}),
    "gpt2": (
        "GPT2",
        {"intermediate_size": None, "num_key_value_heads": None, "layer_norm_epsilon": 2.0**-17},
    ),
    # The ramp of YaRN ends just before feature 3, so that llama.cpp's, which is cut to whole ones, is the same.
    "gpt_oss": (
        "GptOss",
        {
            **EPS,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "sliding_window": 4,
            "rope_parameters": {
                **YARN,
                "rope_theta": 488.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            },
        },
    ),
}
