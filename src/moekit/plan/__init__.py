"""What a model costs, from its configuration alone: parameters, work, memory, speed. Pure functions, no torch."""

from moekit.plan.advice import Advice, Case, advise
from moekit.plan.count import (
    ParameterCount,
    flops_per_token,
    kv_cache_bytes,
    kv_cache_bytes_read,
    parameters,
    training_flops,
)
from moekit.plan.memory import FORMATS, Offload, PartBytes, decode_bound, offload, part_bytes, prefill_bound
from moekit.plan.published import Published, find, published
from moekit.plan.switch import SwitchConfig

__all__ = [
    "FORMATS",
    "Advice",
    "Case",
    "Offload",
    "ParameterCount",
    "PartBytes",
    "Published",
    "SwitchConfig",
    "advise",
    "decode_bound",
    "find",
    "flops_per_token",
    "kv_cache_bytes",
    "kv_cache_bytes_read",
    "offload",
    "parameters",
    "part_bytes",
    "prefill_bound",
    "published",
    "training_flops",
]
