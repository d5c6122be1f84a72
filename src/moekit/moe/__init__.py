"""The layer: router, dispatcher, experts, and the losses of a routing."""

from moekit.moe import losses
from moekit.moe.dispatch import Dispatcher, LocalDispatcher
from moekit.moe.experts import EXPERTS, GroupedMLP, GroupedSwiGLU, SharedExperts
from moekit.moe.layer import MoE
from moekit.moe.linear import Linear
from moekit.moe.replay import RoutingRecord
from moekit.moe.router import ROUTERS, TopKRouter
from moekit.moe.types import Plan, Routing

__all__ = [
    "EXPERTS",
    "ROUTERS",
    "Dispatcher",
    "GroupedMLP",
    "GroupedSwiGLU",
    "Linear",
    "LocalDispatcher",
    "MoE",
    "Plan",
    "Routing",
    "RoutingRecord",
    "SharedExperts",
    "TopKRouter",
    "losses",
]
