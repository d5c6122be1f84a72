"""Measurements of moekit beside its peers and the machine's limits."""

from moekit.bench.cases import EXPERT_COUNTS, EXPERT_SHAPE, LAYER_SHAPES, LayerShape, Row, experts, layer, limits
from moekit.bench.decoders import FAST, FULL, ModelFiles
from moekit.bench.generation import FORMATS, GenerationRow, Workload, generation
from moekit.bench.limits import gemm_rate, int8_gemm_rate, read_bandwidth

__all__ = [
    "EXPERT_COUNTS",
    "EXPERT_SHAPE",
    "FAST",
    "FORMATS",
    "FULL",
    "LAYER_SHAPES",
    "GenerationRow",
    "LayerShape",
    "ModelFiles",
    "Row",
    "Workload",
    "experts",
    "gemm_rate",
    "generation",
    "int8_gemm_rate",
    "layer",
    "limits",
    "read_bandwidth",
]
