"""Measurements of moekit beside its peers and the machine's limits."""

from moekit.bench.cases import LAYER_SHAPES, LayerShape, Row, layer, limits
from moekit.bench.limits import gemm_rate, read_bandwidth

__all__ = ["LAYER_SHAPES", "LayerShape", "Row", "gemm_rate", "layer", "limits", "read_bandwidth"]
