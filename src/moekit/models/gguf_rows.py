"""`GGUFArch`, a family in GGUF files as one row of data, `GGUF_ARCHS`, the table, and what many rows read alike.

Names and numbers only: torch is never imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moekit.config import GroupLimit, ModelConfig, MoEConfig, SigmoidOptions, TopKOptions
from moekit.models.keys import Keys, unsupported
from moekit.models.layout import Layout
from moekit.registry import Registry

__all__ = [
    "FAMILY_OF",
    "GGUF_ARCHS",
    "ONE_WIDTH",
    "OWN_WIDTH",
    "SIGMOID",
    "SOFTMAX",
    "GGUFArch",
    "first_dense",
    "read_experts",
    "scored_experts",
    "softmax_experts",
]

SOFTMAX, SIGMOID = 1, 2
"""Values of expert_gating_func."""
OWN_WIDTH, ONE_WIDTH = "expert_feed_forward_length", "feed_forward_length"
"""Keys of the experts' inner width; the second where there is no dense MLP beside them."""


@dataclass(frozen=True)
class GGUFArch:
    """A family in GGUF files.

    Attributes:
        name: general.architecture, which also stands before the family's own keys.
        layout: names of the tensors.
        read: the family's keys to the fields of `ModelConfig` that are its own; they outdo the common ones.
        write: keys that only this family has, or that it writes otherwise.
        optional: fields of `ModelConfig` that llama.cpp tells by whether a tensor is there.
        experts_width: the key of the experts' inner width; None in a dense family.
        square: all heads together are as wide as the hidden state.
        partly_rotated: heads may be.
    """

    name: str
    layout: Layout
    read: Callable[[Keys], dict[str, Any]] = lambda keys: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    optional: tuple[str, ...] = ("tie_word_embeddings",)
    experts_width: str | None = None
    square: bool = False
    partly_rotated: bool = False

    def register(self, *families: str, told_by: Callable[[Keys], str] | None = None) -> None:
        """Put the row into the table under names of `ARCHS`; a file is the first of them unless its keys tell."""
        for family in families:
            GGUF_ARCHS.register(family)(self)
        if self.name not in FAMILY_OF:
            FAMILY_OF.register(self.name)(told_by or (lambda _: families[0]))


GGUF_ARCHS: Registry[GGUFArch] = Registry("architecture in GGUF")
"""By the name of the row in `ARCHS`."""

FAMILY_OF: Registry[Callable[[Keys], str]] = Registry("GGUF architecture")
"""general.architecture to the row that reads it: several families may be one architecture there."""


def read_experts(keys: Keys, width: str = OWN_WIDTH, **fields: Any) -> MoEConfig:
    """Experts whose inner width stands under the key `width`, with the fields that are the family's own."""
    return MoEConfig(
        hidden_size=keys.whole("embedding_length"),
        intermediate_size=keys.whole(width),
        num_experts=keys.whole("expert_count"),
        top_k=keys.whole("expert_used_count"),
        **fields,
    )


def softmax_experts(keys: Keys, normalised: bool, width: str = OWN_WIDTH, **fields: Any) -> MoEConfig:
    """Experts with a softmax over all logits, then normalised over the chosen ones or not."""
    return read_experts(keys, width, gate_order="softmax_topk", norm_topk_prob=normalised, **fields)


def first_dense(keys: Keys) -> tuple[int, ...]:
    """The first layers have no experts."""
    return tuple(range(min(keys.whole("leading_dense_block_count", 0), keys.whole("block_count"))))


def scored_experts(keys: Keys, otherwise: int, **fields: Any) -> MoEConfig:
    """Experts whose scores the file names; groups count by their two best, shared ones are as wide as the others."""
    scores = keys.whole("expert_gating_func", otherwise)
    unsupported(keys, scores not in (SOFTMAX, SIGMOID), f"expert_gating_func {scores}", "softmax (1) and sigmoid (2)")
    options = SigmoidOptions if scores == SIGMOID else TopKOptions
    return softmax_experts(
        keys,
        keys.flag("expert_weights_norm"),
        router="sigmoid" if scores == SIGMOID else "topk",
        router_options=options(groups=_groups(keys)),
        num_shared_experts=keys.whole("expert_shared_count", 0),
        routed_scaling_factor=keys.real("expert_weights_scale", 0.0) or 1.0,
        **fields,
    )


def _groups(keys: Keys) -> GroupLimit | None:
    groups = keys.whole("expert_group_count", 0)
    return GroupLimit(groups=groups, chosen=keys.whole("expert_group_used_count")) if groups > 1 else None
