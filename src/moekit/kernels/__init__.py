"""The ops that experts are made of, in the fastest backend that is correct here; `explain()` says which."""

from moekit.kernels.autograd import grouped_mm, grouped_mm_transposed, grouped_outer, moe_decode, top_k
from moekit.kernels.cpu import release_memory
from moekit.kernels.linear import linear
from moekit.kernels.mlp import moe_mlp
from moekit.kernels.reference import activate
from moekit.kernels.select import MOE_DECODE_MAX_TOKENS, explain, fast_bf16, forced, fuses_mlp

__all__ = [
    "MOE_DECODE_MAX_TOKENS",
    "activate",
    "explain",
    "fast_bf16",
    "forced",
    "fuses_mlp",
    "grouped_mm",
    "grouped_mm_transposed",
    "grouped_outer",
    "linear",
    "moe_decode",
    "moe_mlp",
    "release_memory",
    "top_k",
]
