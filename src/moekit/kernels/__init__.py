"""The ops that experts are made of, in the fastest backend that is correct here; `explain()` says which."""

from moekit.kernels.reference import activate, grouped_mm, moe_decode

MOE_DECODE_MAX_TOKENS = 0

__all__ = ["MOE_DECODE_MAX_TOKENS", "activate", "grouped_mm", "moe_decode"]
