"""Training: rows of tokens, the loop and its checkpoints, evaluation, and a monitor of the routing."""

from moekit.train.data import Batch, Rows, TrainingData, prepare
from moekit.train.evaluate import Evaluation, perplexity, perplexity_of_files
from moekit.train.loss import chunked_cross_entropy
from moekit.train.metrics import StepMetrics
from moekit.train.monitor import LayerRouting, RoutingMonitor
from moekit.train.trainer import Trainer, TrainResult

__all__ = [
    "Batch",
    "Evaluation",
    "LayerRouting",
    "RoutingMonitor",
    "Rows",
    "StepMetrics",
    "TrainResult",
    "Trainer",
    "TrainingData",
    "chunked_cross_entropy",
    "perplexity",
    "perplexity_of_files",
    "prepare",
]
