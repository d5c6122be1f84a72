"""`Layout`: what our parameters are called in a file, and the `Piece`s that fused ones are cut into there.

Names and numbers only: torch is never imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from moekit.config import ModelConfig, MoEConfig
from moekit.errors import UnsupportedError

__all__ = ["HF_ATTENTION", "HF_DENSE", "HF_FUSED", "HF_OUTER", "LLAMA_GGUF", "Layout", "Piece"]


@dataclass(frozen=True)
class Piece:
    """One tensor on disk, and the part of one of our parameters that it holds.

    Attributes:
        name: on disk.
        index: what to index our parameter with; () is all of it.
        where: for messages, "expert 3 of layer 0" or "".
        rotary_heads: when not 0, the rows come interleaved for this many heads (GGUF's llama).
    """

    name: str
    index: tuple[int | slice, ...] = ()
    where: str = ""
    rotary_heads: int = 0


@dataclass(frozen=True)
class Layout:
    """Our parameter names to those of a file format.

    Attributes:
        outer: parameters outside the layers.
        prefix: what stands before a layer's parameters; {i} is its number.
        inner: parameters of a layer.
        experts: fused parameters to the per-expert tensors stacked in them, in order; {e} is the expert.
        fused: the same parameters' names where a file holds them fused.
        interleaved: parameters whose rows are stored interleaved for rotary positions.
    """

    outer: Mapping[str, str]
    prefix: str
    inner: Mapping[str, str]
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    interleaved: Mapping[str, str] = field(default_factory=dict)

    def pieces(self, name: str, config: ModelConfig, *, fused: bool = False) -> Iterator[Piece]:
        """What our parameter `name` is made of on disk; with `fused`, experts in one tensor.

        Raises:
            UnsupportedError: this format has no name for it.
        """
        if name in self.outer:
            yield Piece(self.outer[name])
            return
        layer, inner = _split(name)
        prefix = self.prefix.format(i=layer)
        if inner in self.experts and config.moe is not None and not fused:
            yield from self._experts(prefix, layer, inner, config.moe)
        elif inner in (names := self.fused if fused else self.inner):
            heads = getattr(config, self.interleaved[inner]) if inner in self.interleaved else 0
            yield Piece(prefix + names[inner], rotary_heads=heads)
        else:
            raise UnsupportedError(f"parameter {name!r} has no place in this file format")

    def fused_name(self, name: str) -> str | None:
        """What a fused expert parameter is called on disk, or None when `name` is not one."""
        layer, inner = _split(name)
        return self.prefix.format(i=layer) + self.fused[inner] if inner in self.fused else None

    def _experts(self, prefix: str, layer: str, inner: str, moe: MoEConfig) -> Iterator[Piece]:
        parts, width = self.experts[inner], moe.intermediate_size
        for expert in range(moe.num_experts):
            for number, part in enumerate(parts):
                rows = () if len(parts) == 1 else (slice(number * width, (number + 1) * width),)
                yield Piece(prefix + part.format(e=expert), (expert, *rows), f"expert {expert} of layer {layer}")


def _split(name: str) -> tuple[str, str]:
    parts = name.split(".", 2)
    return (parts[1], parts[2]) if parts[0] == "layers" and len(parts) == 3 else ("", name)


HF_OUTER = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HF_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    **{f"attn.{name}.{kind}": f"self_attn.{name}.{kind}" for name in _PROJECTIONS for kind in ("weight", "bias")},
}
HF_DENSE = {f"mlp.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
HF_FUSED = {f"mlp.experts.{name}": f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}

LLAMA_GGUF = Layout(
    outer={"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"},
    prefix="blk.{i}.",
    inner={
        "attn_norm.weight": "attn_norm.weight",
        "mlp_norm.weight": "ffn_norm.weight",
        "attn.q_proj.weight": "attn_q.weight",
        "attn.k_proj.weight": "attn_k.weight",
        "attn.v_proj.weight": "attn_v.weight",
        "attn.o_proj.weight": "attn_output.weight",
        **{f"mlp.{name}_proj.weight": f"ffn_{name}.weight" for name in ("gate", "up", "down")},
    },
    interleaved={"attn.q_proj.weight": "num_attention_heads", "attn.k_proj.weight": "num_key_value_heads"},
)
