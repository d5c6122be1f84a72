"""Tiny models of each family with random weights, made and written by transformers."""

from __future__ import annotations

import torch
import transformers
from plain_models import DeepseekModel, GrokModel

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

PLAIN = {"head_dim": 8, "rope_theta": 500.0, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
DEEPSEEK = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
ERNIE = {
    "moe_intermediate_size": 20,
    "moe_num_experts": 6,
    "moe_k": 3,
    "vocab_size": VOCAB + 1,
    "pad_token_id": VOCAB,  # transformers gives its embedding no gradient: one that no test draws
}

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
    "deepseek": (
        DeepseekModel,
        {
            **DEEPSEEK,
            **PLAIN,
            "model_type": "deepseek",
            "routed_scaling_factor": 1.0,  # the original has none
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
    ),
    "grok-1": (
        GrokModel,
        {
            **PLAIN,
            "model_type": "grok-1",
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "attn_output_multiplier": 0.3,
            "max_attn_value": 1.5,
            "embedding_multiplier_scale": 3.0,
            "output_multiplier_scale": 0.5,
        },
    ),
    "dbrx": (
        "Dbrx",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 500.0},
            "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 5, "moe_top_k": 3},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            **dict.fromkeys(SHAPE.keys() - {"vocab_size"}),
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {**LATENT, **DEEPSEEK, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    ),
    "deepseek_v2 greedy, direct queries, yarn": (
        "DeepseekV2",
        {**LATENT, **DEEPSEEK, "q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1}},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**LATENT, **DEEPSEEK, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 4},
    ),
    "deepseek_v3 yarn, one group, biases": (
        "DeepseekV3",
        {
            **LATENT,
            **DEEPSEEK,
            "n_group": 1,
            "topk_group": 1,
            "attention_bias": True,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "glm4_moe": ("Glm4Moe", {**DEEPSEEK, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "glm4_moe groups": (
        "Glm4Moe",
        {**DEEPSEEK, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 1},
    ),
    "solar_open": ("SolarOpen", {**DEEPSEEK, "first_k_dense_replace": None, "intermediate_size": None, "head_dim": 8}),
    "dots1": ("Dots1", {**DEEPSEEK, "sliding_window": 5, "max_window_layers": 2, "head_dim": 16}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {**ERNIE, "moe_layer_start_index": 1, "moe_layer_interval": 1, "moe_num_shared_experts": 2},
    ),
    "ernie4_5_moe untied, every second but the last, nothing shared": (
        "Ernie4_5_Moe",
        {
            **ERNIE,
            "num_hidden_layers": 6,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_layer_interval": 2,
            "moe_num_shared_experts": 0,
            "tie_word_embeddings": False,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"num_experts": 6, "moe_topk": 3, "head_dim": 16, "pad_token_id": 0}),
    "glm4_moe_lite": ("Glm4MoeLite", {**LATENT, **DEEPSEEK, "first_k_dense_replace": None, "n_shared_experts": 1}),
    "granitemoeshared": (
        "GraniteMoeShared",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "shared_intermediate_size": 20,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "flex_olmo": (
        "FlexOlmo",
        {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "pad_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "sliding_window": 4,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "phimoe": (
        "Phimoe",
        {
            "num_local_experts": 6,
            "router_jitter_noise": 0.4,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "short_factor": [1.0, 1.3, 1.6, 2.0],
                "long_factor": [1.5, 2.0, 3.0, 5.0],
                "short_mscale": 1.1,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "phimoe plain rotation, no biases": ("Phimoe", {"num_local_experts": 6, "tie_word_embeddings": True}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.5, "pad_token_id": None}),
}


def twin(name, families=FAMILIES):
    """A transformers model in evaluation mode whose every parameter, biases and norms too, is random."""
    family, options = families[name]
    if not isinstance(family, str):
        return randomised(family(**SHAPE, **options))
    config = configuration(name, families)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(config).eval()
    return randomised(model)


def configuration(name, families=FAMILIES):
    """Its configuration, for a family that transformers has."""
    family, options = families[name]
    kept = {key: value for key, value in {**SHAPE, **options}.items() if value is not None or key == "q_lora_rank"}
    return getattr(transformers, f"{family}Config")(**kept)


def config_values(name):
    """The keys and values of its config.json."""
    family, options = FAMILIES[name]
    return configuration(name).to_dict() if isinstance(family, str) else {**SHAPE, **options}


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that a wrong rotation, order or expert shows far above the tolerance.
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
        for what, buffer in model.named_buffers():
            if "correction_bias" in what:
                buffer.normal_(0.0, 0.2)
    return model


def write(name, folder, families=FAMILIES):
    """The same model, after it was written to the folder."""
    model = twin(name, families)
    model.save_pretrained(folder)
    return model


def tokens(*shape):
    return torch.randint(0, VOCAB, shape)
