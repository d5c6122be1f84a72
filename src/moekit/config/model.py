"""A language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moekit.config.attention import AttentionConfig, MLAConfig, RopeConfig
from moekit.config.base import check, choice, positive
from moekit.config.moe import ACTIVATIONS, Activation, MoEConfig

__all__ = ["ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model, in the field names of Hugging Face where they exist."""

    arch: str
    """Row of `models.archs` the model is read from and written as, for example llama or mixtral."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Inner width of the dense MLPs (unused when every layer is MoE)."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary positions where they are not the plain ones."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary, or a learned vector a position added to the embedding (GPT-2)."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm, everywhere."""
    norm_bias: bool = False
    """The LayerNorms have a bias."""
    norm_place: Literal["before", "after", "both"] = "before"
    """Attention and MLP are normed on their way in, on their way out (OLMo 2), or both (Grok-1)."""
    rms_norm_eps: float = 1e-6
    """What either kind of norm adds to the mean square."""
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    """RMSNorm on queries and keys before they are rotated (Qwen3)."""
    attention_bias: bool = False
    """The projections of attention have biases."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """What the family's attention has beside that."""
    mla: MLAConfig | None = None
    """Latent attention instead of grouped queries (DeepSeek-V2 and V3)."""
    activation: Activation = "silu"
    """Non-linearity of the dense MLPs."""
    mlp_gated: bool = True
    """The dense MLPs are down · (act(gate · x) ⊙ up · x); else down · act(up · x) (GPT-2)."""
    mlp_bias: bool = False
    """The projections of the dense MLPs have biases."""
    embedding_multiplier: float = 1.0
    """What embeddings are multiplied by on their way in (Granite, Grok-1)."""
    residual_multiplier: float = 1.0
    """What attention and MLP are multiplied by before they are added to the stream (Granite)."""
    logits_multiplier: float = 1.0
    """What the logits are multiplied by (Granite: 1 / logits_scaling; Grok-1)."""
    head_bias: bool = False
    """The head has a bias (Phi-3.5-MoE)."""
    moe: MoEConfig | None = None
    """The MoE layer; None makes a dense model."""
    dense_layers: tuple[int, ...] = ()
    """Layers that keep a dense MLP although moe is set."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    router_aux_loss_coef: float = 0.0
    """Load-balancing coefficient the model was trained with; what `train` uses unless told otherwise."""

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        positive(self, "num_key_value_heads", "head_dim", "max_position_embeddings")
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({self.num_key_value_heads})",
        )
        self._check_choices()
        check(self.rope_theta > 0, f"rope_theta must be above 0, not {self.rope_theta}")
        if self.moe is not None:
            check(
                self.moe.hidden_size == self.hidden_size,
                f"moe.hidden_size ({self.moe.hidden_size}) must equal hidden_size ({self.hidden_size})",
            )
            check(
                self.moe.options.causal,
                f"router {self.moe.router} lets later tokens change what earlier ones get: it cannot be used in a "
                "model that predicts the next token",
            )
        for layer in self.dense_layers:
            check(0 <= layer < self.num_hidden_layers, f"dense_layers names layer {layer}, which does not exist")

    def _check_choices(self) -> None:
        choice(self, "positions", ("rope", "learned"))
        choice(self, "norm", ("rms", "layer"))
        choice(self, "norm_place", ("before", "after", "both"))
        choice(self, "activation", ACTIVATIONS)
        even = self.positions == "learned" or self.head_dim % 2 == 0
        check(even, f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        check(
            self.rope.dims is None or self.rope.dims <= self.head_dim,
            f"rope.dims must be at most head_dim ({self.head_dim}), not {self.rope.dims}",
        )
        check(
            self.mla is None or self.mla.rope_head_dim == self.head_dim,
            f"with mla, head_dim ({self.head_dim}) must be its rope_head_dim",
        )
        check(not self.norm_bias or self.norm == "layer", "norm_bias needs norm layer: an RMSNorm has none")
        check(not (self.head_bias and self.tie_word_embeddings), "a tied head has no bias")
        for name in ("embedding_multiplier", "residual_multiplier", "logits_multiplier"):
            check(getattr(self, name) > 0, f"{name} must be above 0, not {getattr(self, name)}")

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) holds an MoE instead of a dense MLP."""
        return self.moe is not None and layer not in self.dense_layers

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Tensors, heads and features that the cache holds a position and layer: keys and values, or MLA's vector."""
        if self.mla is None:
            return 2, self.num_key_value_heads, self.head_dim
        return 1, 1, self.mla.kv_lora_rank + self.mla.rope_head_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers, in order."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))
