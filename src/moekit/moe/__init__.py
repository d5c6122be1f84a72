"""The layer: router, dispatcher, experts, and the losses of a routing."""

from moekit.moe import losses
from moekit.moe.dispatch import Dispatcher, LocalDispatcher
from moekit.moe.experts import (
    EXPERTS,
    ClampedSwiGLU,
    Experts,
    FreeExperts,
    GroupedMLP,
    GroupedSwiGLU,
    MixedExperts,
    SharedExperts,
)
from moekit.moe.layer import MoE
from moekit.moe.linear import Linear
from moekit.moe.replay import RoutingRecord
from moekit.moe.router import ROUTERS, Router, SigmoidRouter, TopKRouter
from moekit.moe.router_adaptive import HierarchicalRouter, TopPRouter
from moekit.moe.router_balanced import ExpertChoiceRouter, HashRouter, SinkhornRouter
from moekit.moe.router_noisy import GShardRouter, GumbelRouter, NoisyTopKRouter
from moekit.moe.router_published import SparseMixerRouter, SwitchRouter
from moekit.moe.types import Choice, Plan, Routing, RoutingTotals

__all__ = [
    "EXPERTS",
    "ROUTERS",
    "Choice",
    "ClampedSwiGLU",
    "Dispatcher",
    "ExpertChoiceRouter",
    "Experts",
    "FreeExperts",
    "GShardRouter",
    "GroupedMLP",
    "GroupedSwiGLU",
    "GumbelRouter",
    "HashRouter",
    "HierarchicalRouter",
    "Linear",
    "LocalDispatcher",
    "MixedExperts",
    "MoE",
    "NoisyTopKRouter",
    "Plan",
    "Router",
    "Routing",
    "RoutingRecord",
    "RoutingTotals",
    "SharedExperts",
    "SigmoidRouter",
    "SinkhornRouter",
    "SparseMixerRouter",
    "SwitchRouter",
    "TopKRouter",
    "TopPRouter",
    "losses",
]
