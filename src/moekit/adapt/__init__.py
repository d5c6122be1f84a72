"""Turning one model into another."""

from moekit.adapt.surgery import routings, to_moe
from moekit.adapt.upcycle import upcycle, upcycled_config

__all__ = ["routings", "to_moe", "upcycle", "upcycled_config"]
