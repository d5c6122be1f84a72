"""Turning one model into another."""

from moekit.adapt.packed_file import packed_formats
from moekit.adapt.packed_folder import load_packed, save_packed
from moekit.adapt.quant import hottest, quantise
from moekit.adapt.quant_report import QuantReport
from moekit.adapt.quant_stream import load_quantised
from moekit.adapt.surgery import routings, to_moe
from moekit.adapt.upcycle import upcycle, upcycled_config

__all__ = [
    "QuantReport",
    "hottest",
    "load_packed",
    "load_quantised",
    "packed_formats",
    "quantise",
    "routings",
    "save_packed",
    "to_moe",
    "upcycle",
    "upcycled_config",
]
