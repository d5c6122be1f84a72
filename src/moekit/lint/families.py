"""What transformers' code does in each family, whatever its config.json says: read off version 5.23 and tested there.

Families go by the `model_type` of the part that holds the experts, without a closing "_text".
"""

from __future__ import annotations

__all__ = [
    "ADDS_BALANCE",
    "ALWAYS_RENORMALISED",
    "FP32_ROUTER",
    "IGNORES_JITTER",
    "JITTERS_EXPERTS",
    "KNOWN",
    "NEVER_RENORMALISED",
    "RENORMALISED_UNLESS_TOLD",
    "family_of",
]


def family_of(model_type: str) -> str:
    """The name under which the tables below know a `model_type`."""
    return model_type.removesuffix("_text").replace("-", "_")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALWAYS_RENORMALISED = _names(
    "afmoe aria cohere2_moe deepseek_v4 diffusion_gemma ernie4_5_moe ernie4_5_vl_moe gemma4 gpt_oss granitemoe "
    "granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 inkling2 jetmoe laguna minimax "
    "minimax_m2 minimax_m3_vl mistral_large4 mixtral muse_spark openai_privacy_filter qwen3_5_moe qwen3_vl_moe"
)
"""A token's weights are divided by their sum, or are a softmax over the chosen logits; norm_topk_prob is not read."""

NEVER_RENORMALISED = _names("deepseek_ocr2 deepseek_v2 jamba llama4 switch_transformers unlimited_ocr zaya")
"""They are not, and norm_topk_prob is not read."""

RENORMALISED_UNLESS_TOLD = _names(
    "axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots3_note exaone_moe flint glm4_moe glm4_moe_lite "
    "glm4v_moe glm5_next glm_moe_dsa hy_v4 kimi_linear lfm2_moe mellum mimo_v2_flash mistral4 nemotron_h "
    "qwen3_next qwen3_omni_moe qwen4_exp solar_open"
)
"""norm_topk_prob decides, and is true where config.json does not have it; for all others it is false then."""

ADDS_BALANCE = _names(
    "dbrx deepseek_v4 doge ernie4_5_moe ernie4_5_vl_moe flex_olmo flint glm4v_moe glm5_next gpt_oss granitemoe "
    "granitemoe_swa granitemoehybrid granitemoeshared jamba jetmoe laguna mellum minimax minimax_m2 minimax_m3_vl "
    "mixtral nllb_moe olmoe phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl_moe "
    "qwen4_exp switch_transformers"
)
"""Adds a balance loss when it returns the router logits; the others never do."""

FP32_ROUTER = _names(
    "axk1 axk2 bailing_hybrid beam deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 dots1 dots3_note "
    "ernie4_5_moe ernie4_5_vl_moe exaone_moe flint glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v3 "
    "hy_v4 kimi_linear kolibri1 longcat_flash mimo_v2_flash mistral_large4 muse_spark nemotron_h nllb_moe "
    "openai_privacy_filter solar_open switch_transformers unlimited_ocr"
)
"""Multiplies the router's weight in float32, whatever dtype the model has."""

JITTERS_EXPERTS = _names("dbrx minimax minimax_m2 mixtral")
"""Multiplies the noise into the hidden states in place, so that the experts compute on it too."""

IGNORES_JITTER = _names("deepseek_v4 llama4 minimax_m3_vl")
"""Has a key for noise, and no code that reads it."""

KNOWN = ALWAYS_RENORMALISED | NEVER_RENORMALISED | RENORMALISED_UNLESS_TOLD | ADDS_BALANCE | FP32_ROUTER
"""Every family that is in a table."""
