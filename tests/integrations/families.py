"""Every family whose experts call transformers' experts interface, as a random model of some ten thousand weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A size and the names that configurations give it; each configuration takes the names it knows.
SIZES = {
    name: size
    for size, names in (
        (0, "first_k_dense_replace num_dense_layers moe_layer_start_index pad_token_id"),
        (1, "n_group topk_group n_groups n_shared_experts o_groups bos_token_id mamba_n_groups"),
        (2, "num_hidden_layers num_key_value_heads num_global_key_value_heads swa_num_key_value_heads index_n_heads"),
        (2, "num_experts_per_tok moe_topk moe_k num_experts_per_token top_k_experts eos_token_id"),
        (2, "linear_num_key_heads linear_num_heads mamba_num_heads hc_mult hc_count"),
        (4, "num_attention_heads swa_num_attention_heads linear_num_value_heads ssm_state_size hc_sinkhorn_iters"),
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim mamba_d_state"),
        (8, "head_dim global_head_dim swa_head_dim v_head_dim qk_nope_head_dim index_head_dim mamba_head_dim"),
        (8, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
        (8, "kv_lora_rank o_lora_rank hc_lowrank index_topk"),
        (16, "q_lora_rank sliding_window sliding_window_size router_hidden_size d_rel hidden_size_per_layer_input"),
        (16, "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size"),
        (16, "moe_shared_expert_intermediate_size"),
        (32, "hidden_size moe_hidden_size"),
        (48, "intermediate_size"),
        (64, "vocab_size vocab_size_per_layer_input max_position_embeddings"),
    )
    for name in names.split()
}
LATENT = {"num_key_value_heads": 4}  # latent attention has no grouped heads
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}


class Family(NamedTuple):
    """Class names in `transformers.models.<family>`, and what its configuration needs beyond SIZES."""

    model: str
    config: str
    needs: dict[str, Any] | None = None


FAMILIES = {
    "afmoe": Family("AfmoeForCausalLM", "AfmoeConfig"),
    "aria": Family("AriaTextForCausalLM", "AriaTextConfig"),
    "axk1": Family("AXK1ForCausalLM", "AXK1Config", LATENT | SPARSE),
    "axk2": Family("AXK2ForCausalLM", "AXK2Config", LATENT | SPARSE),
    "bailing_hybrid": Family("BailingHybridForCausalLM", "BailingHybridConfig", LATENT | LINEAR | SPARSE),
    "beam": Family("BeamForCausalLM", "BeamConfig", SPARSE),
    "cohere2_moe": Family("Cohere2MoeForCausalLM", "Cohere2MoeConfig"),
    "deepseek_ocr2": Family("DeepseekOcr2TextModel", "DeepseekOcr2TextConfig", SPARSE),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", "DeepseekV2Config", LATENT),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", "DeepseekV32Config", LATENT),
    "deepseek_v4": Family("DeepseekV4ForCausalLM", "DeepseekV4Config"),
    "diffusion_gemma": Family("DiffusionGemmaEncoderTextModel", "DiffusionGemmaTextConfig"),
    "dots1": Family("Dots1ForCausalLM", "Dots1Config"),
    "dots3_note": Family("Dots3NoteForCausalLM", "Dots3NoteTextConfig", LATENT | SPARSE),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig"),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeTextModel",
        "Ernie4_5_VLMoeTextConfig",
        SPARSE
        | {
            "moe_intermediate_size": [16, 16],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
    ),
    "exaone_moe": Family("ExaoneMoeForCausalLM", "ExaoneMoeConfig"),
    "flex_olmo": Family("FlexOlmoForCausalLM", "FlexOlmoConfig"),
    "flint": Family("FlintForCausalLM", "FlintConfig", {"mlp_only_layers": []}),
    "gemma4": Family("Gemma4ForCausalLM", "Gemma4TextConfig", {"enable_moe_block": True}),
    "glm4_moe": Family("Glm4MoeForCausalLM", "Glm4MoeConfig"),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", LATENT | SPARSE),
    "glm4v_moe": Family(
        "Glm4vMoeTextModel",
        "Glm4vMoeTextConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    ),
    "glm5_next": Family(
        "Glm5NextTextModel", "Glm5NextTextConfig", LATENT | LINEAR | SPARSE | {"qk_rope_head_dim": 0, "index_kpool": 4}
    ),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", LATENT),
    "gpt_oss": Family("GptOssForCausalLM", "GptOssConfig"),
    "granitemoe": Family("GraniteMoeForCausalLM", "GraniteMoeConfig"),
    "granitemoe_swa": Family("GraniteMoeSWAForCausalLM", "GraniteMoeSWAConfig"),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16},
    ),
    "granitemoeshared": Family("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config"),
    "hy_v3": Family("HYV3ForCausalLM", "HYV3Config", SPARSE),
    "hy_v4": Family("HYV4ForCausalLM", "HYV4Config", SPARSE),
    "inkling": Family("InklingForCausalLM", "InklingTextConfig"),
    "inkling2": Family("Inkling2ForCausalLM", "Inkling2TextConfig"),
    "jamba": Family(
        "JambaForCausalLM",
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0, "expert_layer_period": 1},
    ),
    "kimi_linear": Family("KimiLinearForCausalLM", "KimiLinearConfig", LATENT | LINEAR | SPARSE),
    "kolibri1": Family("Kolibri1ForCausalLM", "Kolibri1Config"),
    "laguna": Family("LagunaForCausalLM", "LagunaConfig", SPARSE),
    "lfm2_moe": Family("Lfm2MoeForCausalLM", "Lfm2MoeConfig", {"layer_types": ["conv", "full_attention"]}),
    "mellum": Family("MellumForCausalLM", "MellumConfig"),
    "mimo_v2_flash": Family("MiMoV2FlashForCausalLM", "MiMoV2FlashConfig", SPARSE),
    "minimax": Family("MiniMaxForCausalLM", "MiniMaxConfig"),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", "MiniMaxM2Config"),
    "minimax_m3_vl": Family("MiniMaxM3VLForCausalLM", "MiniMaxM3VLTextConfig", SPARSE),
    "mistral4": Family("Mistral4ForCausalLM", "Mistral4Config", LATENT),
    "mistral_large4": Family("MistralLarge4TextModel", "MistralLarge4TextConfig", LATENT),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig"),
    "muse_spark": Family("MuseSparkTextModel", "MuseSparkTextConfig"),
    "nemotron_h": Family("NemotronHForCausalLM", "NemotronHConfig"),
    "olmoe": Family("OlmoeForCausalLM", "OlmoeConfig"),
    "openai_privacy_filter": Family("OpenAIPrivacyFilterForTokenClassification", "OpenAIPrivacyFilterConfig"),
    "phimoe": Family("PhimoeForCausalLM", "PhimoeConfig"),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", "Qwen2MoeConfig"),
    "qwen3_5_moe": Family("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", LINEAR),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig"),
    "qwen3_next": Family("Qwen3NextForCausalLM", "Qwen3NextConfig", LINEAR),
    "qwen3_omni_moe": Family("Qwen3OmniMoeThinkerTextModel", "Qwen3OmniMoeTextConfig"),
    "qwen3_vl_moe": Family("Qwen3VLMoeTextModel", "Qwen3VLMoeTextConfig"),
    "qwen4_exp": Family(
        "Qwen4ExpForCausalLM",
        "Qwen4ExpTextConfig",
        LINEAR
        | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
        | {"indexer_budget": 8, "indexer_compress_ratio": 4},
    ),
    "solar_open": Family("SolarOpenForCausalLM", "SolarOpenConfig"),
    "unlimited_ocr": Family("UnlimitedOcrTextModel", "UnlimitedOcrTextConfig", SPARSE),
    "zaya": Family("ZayaForCausalLM", "ZayaConfig", {"num_experts_per_tok": 1}),
}


def build(family: str, **overrides: Any) -> Any:
    """The family's model in training mode, every weight moved off the value its initialisation gives all alike."""
    row = FAMILIES[family]
    package = f"transformers.models.{family}"
    config_class = getattr(import_module(f"{package}.configuration_{family}"), row.config)
    known = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    known |= set(config_class.attribute_map)
    sizes = {name: size for name, size in SIZES.items() if name in known}
    config = config_class(**(sizes | (row.needs or {}) | overrides))
    torch.manual_seed(0)
    model = getattr(import_module(f"{package}.modeling_{family}"), row.model)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0, 0, 0).clamp_(-1, 1).add_(0.1 * torch.randn_like(parameter))
    return model.train()


def tokens(batch: int = 2, length: int = 17) -> Tensor:
    """(batch, length) ids that are not special to any family."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def output(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    result = model(input_ids=ids, **options)
    out: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return out


def loss_of(out: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy with the next token; hidden states and class scores are read as the first logits."""
    return F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten() % out.shape[-1])
