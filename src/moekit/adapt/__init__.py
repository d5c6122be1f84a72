"""Turning one model into another."""

from moekit.adapt.upcycle import upcycle, upcycled_config

__all__ = ["upcycle", "upcycled_config"]
