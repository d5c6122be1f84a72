"""Every configuration, typed, documented where declared and validated once, without importing torch.

The command line builds its flags from these classes. Each `__post_init__` raises `ConfigError`
(a `ValueError`) that names the field, what was given and what would be accepted.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from moekit.errors import ConfigError

__all__ = [
    "Activation",
    "DataConfig",
    "MoEConfig",
    "ModelConfig",
    "SamplingConfig",
    "TrainConfig",
    "UpcycleConfig",
    "from_dict",
]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
C = TypeVar("C")


def from_dict(cls: type[C], values: Mapping[str, Any], *, source: str = "configuration") -> C:
    """Build the configuration class `cls` from a mapping; unknown and missing keys are refused.

    Args:
        cls: one of the configuration dataclasses.
        values: field names to values; lists become tuples, mappings become nested configurations.
        source: what to call the mapping in an error message (a file name, say).
    Raises:
        ConfigError: for a key that is no field, a required field that is missing, or a bad value.

    >>> from_dict(SamplingConfig, {"temperature": 0.5}).temperature
    0.5
    >>> from_dict(SamplingConfig, {"temprature": 0.5})
    Traceback (most recent call last):
    ...
    moekit.errors.ConfigError: configuration: unknown key 'temprature' for SamplingConfig; did you mean 'temperature'?
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{source}: unknown key {key!r} for {cls.__name__}; {hint}")
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{source}: {cls.__name__} needs {', '.join(missing)}")
    return cls(**{key: _value(cls, key, value, source) for key, value in values.items()})


def _value(cls: type, key: str, value: Any, source: str) -> Any:
    if isinstance(value, Mapping) and cls is ModelConfig and key == "moe":
        return from_dict(MoEConfig, value, source=f"{source}.moe")
    return tuple(value) if isinstance(value, list) else value


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        _check(ok, f"{name} must be a whole number of at least 1, not {value!r}")


def _choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    _check(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One Mixture-of-Experts layer: y = Σ_i G(x)_i · E_i(x) over the selected experts.

    >>> MoEConfig(hidden_size=64, intermediate_size=32, num_experts=4, top_k=8)
    Traceback (most recent call last):
    ...
    moekit.errors.ConfigError: top_k must be at most num_experts (4), not 8
    """

    hidden_size: int
    """Width D of a token going in and coming out."""
    intermediate_size: int
    """Inner width F of each expert."""
    num_experts: int
    """Number of routed experts E."""
    top_k: int
    """Experts a token is sent to, K. K = E is the dense softmax gate."""
    router: str = "topk"
    """Name in the router registry."""
    gate_order: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    """Softmax over the selected logits (Mixtral) or over all of them before selecting (Switch, Qwen, DeepSeek)."""
    norm_topk_prob: bool = False
    """Divide the K selected probabilities by their sum; only for gate_order softmax_topk."""
    routed_scaling_factor: float = 1.0
    """Multiplies the combine weights after everything else (DeepSeek)."""
    router_init_scale: float = 1.0
    """Router rows start as N(0, scale / D); Switch Transformer uses 0.1."""
    expert: str = "swiglu"
    """Name in the expert registry: swiglu (gate, up, down) or mlp (up, down)."""
    activation: Activation = "silu"
    """Non-linearity of the experts and of the shared experts."""
    bias: bool = False
    """Give every expert projection a bias."""
    num_shared_experts: int = 0
    """Experts that see every token, beside the routed ones."""
    shared_intermediate_size: int | None = None
    """Width of one shared expert; intermediate_size when not given."""
    shared_gate: bool = False
    """Multiply the shared experts' output by sigmoid(w·x) (Qwen2-MoE)."""

    def __post_init__(self) -> None:
        _positive(self, "hidden_size", "intermediate_size", "num_experts", "top_k")
        _check(
            self.top_k <= self.num_experts,
            f"top_k must be at most num_experts ({self.num_experts}), not {self.top_k}",
        )
        _choice(self, "gate_order", ("topk_softmax", "softmax_topk"))
        _choice(self, "activation", ("silu", "gelu", "gelu_tanh", "relu"))
        _check(
            not (self.norm_topk_prob and self.gate_order == "topk_softmax"),
            "norm_topk_prob belongs to gate_order softmax_topk; weights of topk_softmax already sum to 1",
        )
        renormalised = self.norm_topk_prob or self.gate_order == "topk_softmax"
        _check(
            not (renormalised and self.top_k == 1 < self.num_experts),
            "top_k 1 with renormalised weights makes every weight 1, so the router never learns; "
            "set gate_order softmax_topk and norm_topk_prob False",
        )
        _check(
            self.routed_scaling_factor > 0, f"routed_scaling_factor must be above 0, not {self.routed_scaling_factor}"
        )
        _check(self.router_init_scale >= 0, f"router_init_scale must be at least 0, not {self.router_init_scale}")
        _check(self.num_shared_experts >= 0, f"num_shared_experts must be at least 0, not {self.num_shared_experts}")
        if self.shared_intermediate_size is not None:
            _positive(self, "shared_intermediate_size")
        _check(
            self.num_shared_experts > 0 or not (self.shared_gate or self.shared_intermediate_size),
            "shared_gate and shared_intermediate_size need num_shared_experts of at least 1",
        )

    @property
    def shared_width(self) -> int:
        """Inner width of all shared experts together; 0 without any."""
        return self.num_shared_experts * (self.shared_intermediate_size or self.intermediate_size)


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
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    """RMSNorm on each head's query and key (Qwen3)."""
    attention_bias: bool = False
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
        _positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        _positive(self, "num_key_value_heads", "head_dim", "max_position_embeddings")
        _check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({self.num_key_value_heads})",
        )
        _check(self.head_dim % 2 == 0, f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        _check(self.rope_theta > 0, f"rope_theta must be above 0, not {self.rope_theta}")
        if self.moe is not None:
            _check(
                self.moe.hidden_size == self.hidden_size,
                f"moe.hidden_size ({self.moe.hidden_size}) must equal hidden_size ({self.hidden_size})",
            )
        for layer in self.dense_layers:
            _check(0 <= layer < self.num_hidden_layers, f"dense_layers names layer {layer}, which does not exist")

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) holds an MoE instead of a dense MLP."""
        return self.moe is not None and layer not in self.dense_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers, in order."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How a dense model's MLPs become experts."""

    method: Literal["copy", "noise", "split"] = "split"
    """copy: every expert is the dense MLP; noise: the same plus noise; split: experts are slices of it."""
    num_experts: int = 8
    top_k: int = 2
    splits: int = 2
    """Slices one dense MLP is cut into (method split); top_k must be a multiple of it to stay exact."""
    noise: float = 0.01
    """Standard deviation added to each copied weight, relative to that matrix's own (method noise)."""
    router_init_scale: float = 0.1
    """Router rows start as N(0, scale / D)."""
    seed: int = 0

    def __post_init__(self) -> None:
        _choice(self, "method", ("copy", "noise", "split"))
        _positive(self, "num_experts", "top_k", "splits")
        _check(
            self.top_k <= self.num_experts, f"top_k must be at most num_experts ({self.num_experts}), not {self.top_k}"
        )
        _check(self.noise >= 0, f"noise must be at least 0, not {self.noise}")
        _check(self.router_init_scale >= 0, f"router_init_scale must be at least 0, not {self.router_init_scale}")
        if self.method == "split":
            _check(
                self.num_experts % self.splits == 0,
                f"num_experts ({self.num_experts}) must be a multiple of splits ({self.splits})",
            )
            _check(
                self.top_k % self.splits == 0,
                f"top_k ({self.top_k}) must be a multiple of splits ({self.splits}): "
                "a token must meet every slice of the MLP to keep its output",
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where training text comes from and how it is cut into rows."""

    train: tuple[str, ...] = ()
    """Files, folders or globs: .txt and .md (one document a file), .jsonl and .parquet (one document a line or row)."""
    valid: tuple[str, ...] = ()
    """Held-out files, in the same forms; never trained on."""
    text_field: str = "text"
    """Key (JSONL) or column (Parquet) that holds the text."""
    sequence_length: int = 256
    """Tokens in a row, L."""
    seed: int = 0
    """Seeds the order of the rows; row order is a pure function of (seed, epoch)."""

    def __post_init__(self) -> None:
        _positive(self, "sequence_length")
        _check(len(self.text_field) > 0, "text_field must not be empty")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast to learn."""

    steps: int = 100
    """Optimizer steps in all (a resumed run counts those already done)."""
    batch_size: int = 4
    """Rows in a micro-batch."""
    accumulate: int = 1
    """Micro-batches summed into one optimizer step."""
    lr: float = 1e-4
    """Peak learning rate."""
    router_lr_scale: float = 0.1
    """Routers learn at lr times this."""
    min_lr_ratio: float = 0.1
    """Cosine decay ends at lr times this."""
    warmup_steps: int = 5
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.1
    """AdamW decay of matrices; norms, biases and routers have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    balance_coef: float | None = None
    """Weight of the Switch load-balancing loss; the model's own router_aux_loss_coef when not given."""
    z_coef: float = 0.0
    """Weight of the router z-loss."""
    autocast: Literal["bfloat16", "none"] = "bfloat16"
    """Compute dtype over fp32 master weights; routers, norms and losses stay in fp32."""
    checkpointing: Literal["none", "moe", "block"] = "none"
    """Recompute MoE layers, or whole blocks, during backward instead of keeping their activations."""
    save_every: int = 50
    """Steps between checkpoints, and one at the end; 0 writes one on Ctrl-C alone."""
    eval_every: int = 0
    """Steps between evaluations on the held-out text; 0 evaluates only at the end."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run folder."""
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch_size", "accumulate", "log_every")
        _check(self.lr > 0, f"lr must be above 0, not {self.lr}")
        for name in ("router_lr_scale", "weight_decay", "clip_norm", "z_coef", "balance_coef", "min_lr_ratio"):
            value = getattr(self, name)
            _check(value is None or value >= 0, f"{name} must be at least 0, not {value}")
        for name in ("warmup_steps", "save_every", "eval_every"):
            value = getattr(self, name)
            _check(value >= 0, f"{name} must be at least 0, not {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"{name} must lie in [0, 1), not {value}")
        _choice(self, "autocast", ("bfloat16", "none"))
        _choice(self, "checkpointing", ("none", "moe", "block"))


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""
    seed: int | None = None
    """Same seed, same text; None draws one."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not returned."""

    def __post_init__(self) -> None:
        _positive(self, "max_new_tokens")
        _check(self.temperature >= 0, f"temperature must be at least 0, not {self.temperature}")
        _check(self.top_k >= 0, f"top_k must be at least 0, not {self.top_k}")
        _check(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        _check(all(self.stop), "stop strings must not be empty")
