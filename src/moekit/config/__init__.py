"""Every configuration, typed, documented where declared and validated once, without importing torch.

The command line builds its flags from these classes. Each `__post_init__` raises `ConfigError`
(a `ValueError`) that names the field, what was given and what would be accepted.
"""

from moekit.config.adapt import SurgeryConfig, UpcycleConfig
from moekit.config.attention import (
    AttentionConfig,
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    MLAConfig,
    RopeConfig,
    RopeScaling,
    YarnRope,
)
from moekit.config.base import from_dict
from moekit.config.model import ModelConfig
from moekit.config.moe import Activation, CapacityConfig, ExpertGroup, MoEConfig
from moekit.config.routers import (
    ROUTER_OPTIONS,
    ExpertChoiceOptions,
    GateOptions,
    GroupLimit,
    GShardOptions,
    GumbelOptions,
    HashOptions,
    HierarchicalOptions,
    NoisyTopKOptions,
    RouterOptions,
    SigmoidOptions,
    SinkhornOptions,
    SparseMixerOptions,
    SwitchOptions,
    TopKOptions,
    TopPOptions,
)
from moekit.config.sampling import SamplingConfig
from moekit.config.train import Autocast, DataConfig, TrainConfig

__all__ = [
    "ROUTER_OPTIONS",
    "Activation",
    "AttentionConfig",
    "Autocast",
    "CapacityConfig",
    "DataConfig",
    "DynamicRope",
    "ExpertChoiceOptions",
    "ExpertGroup",
    "GShardOptions",
    "GateOptions",
    "GroupLimit",
    "GumbelOptions",
    "HashOptions",
    "HierarchicalOptions",
    "LinearRope",
    "Llama3Rope",
    "LongRope",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "NoisyTopKOptions",
    "RopeConfig",
    "RopeScaling",
    "RouterOptions",
    "SamplingConfig",
    "SigmoidOptions",
    "SinkhornOptions",
    "SparseMixerOptions",
    "SurgeryConfig",
    "SwitchOptions",
    "TopKOptions",
    "TopPOptions",
    "TrainConfig",
    "UpcycleConfig",
    "YarnRope",
    "from_dict",
]
