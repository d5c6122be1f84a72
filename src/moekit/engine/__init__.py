"""The engine: from prompts to text, one sequence or many at a time, over caches that chats reuse."""

from moekit.engine.completion import ChosenToken, Completion, TokenLogprob
from moekit.engine.engine import Model, load
from moekit.engine.generation import Stream
from moekit.engine.sampler import Sampler
from moekit.engine.session import Session
from moekit.engine.stats import ExpertStats, GenerationStats
from moekit.engine.trace import RoutingTrace, TraceHead, TraceRow, TraceWriter

__all__ = [
    "ChosenToken",
    "Completion",
    "ExpertStats",
    "GenerationStats",
    "Model",
    "RoutingTrace",
    "Sampler",
    "Session",
    "Stream",
    "TokenLogprob",
    "TraceHead",
    "TraceRow",
    "TraceWriter",
    "load",
]
