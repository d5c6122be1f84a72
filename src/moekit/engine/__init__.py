"""The engine: from a prompt to text, one sequence at a time, over a cache that chats reuse."""

from moekit.engine.engine import Model, load
from moekit.engine.sampler import Sampler
from moekit.engine.session import Session
from moekit.engine.stats import GenerationStats

__all__ = ["GenerationStats", "Model", "Sampler", "Session", "load"]
