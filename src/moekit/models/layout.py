"""`Layout`: what our parameters are called in a file, and the `Piece`s that fused ones are cut into there.

Names and numbers only: torch is never imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moekit.config import ModelConfig, MoEConfig
from moekit.errors import UnsupportedError

__all__ = [
    "HF_ATTENTION",
    "HF_DENSE",
    "HF_EXPERTS",
    "HF_FUSED",
    "HF_OUTER",
    "HF_PREFIX",
    "Layout",
    "Piece",
    "of_expert",
    "stored_shape",
]


@dataclass(frozen=True)
class Piece:
    """One tensor on disk, and the part of one of our parameters that it holds.

    Attributes:
        name: on disk.
        index: what to index our parameter with; () is all of it, None an axis of length 1 on disk.
        stored: what to index the tensor on disk with, slices with both ends; () is all of it.
        transposed: the part on disk is the transpose of ours.
        where: for messages, "expert 3 of layer 0" or "".
        rotary_heads: when not 0, the rows come interleaved for this many heads (GGUF's llama).
        one_of: when not None, only this one of the first axis on disk.
    """

    name: str
    index: tuple[int | slice | None, ...] = ()
    stored: tuple[slice, ...] = ()
    transposed: bool = False
    where: str = ""
    rotary_heads: int = 0
    one_of: int | None = None


@dataclass(frozen=True)
class Layout:
    """Our parameter names to those of a file format.

    Attributes:
        outer: parameters outside the layers.
        prefix: what stands before a layer's parameters; {i} is its number.
        inner: parameters of a layer.
        experts: fused parameters to the per-expert tensors stacked in them, in order; {e} is the expert.
        fused: the same parameters' names where a file holds them fused.
        stacked: fused parameters to the tensors of all experts that their rows are made of, in order.
        interleaved: parameters whose rows are stored interleaved for rotary positions.
        joined: parameters of a layer to the pieces they are made of, for tensors that are stored together, transposed
            or otherwise cut; names without the prefix.
        base: a prefix that every name has here, and that a file may lack altogether.
        ignored: patterns of names that a file may have and the model does not use; {layers} is their number.
    """

    outer: Mapping[str, str]
    prefix: str
    inner: Mapping[str, str]
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, Callable[[ModelConfig], Iterable[Piece]]] = field(default_factory=dict)
    base: str = ""
    ignored: tuple[str, ...] = ()

    def pieces(self, name: str, config: ModelConfig, *, fused: bool = False) -> Iterator[Piece]:
        """What our parameter `name` is made of on disk; with `fused`, in one tensor where it may be.

        Raises:
            UnsupportedError: this format has no name for it.
        """
        if name in self.outer:
            yield Piece(self.outer[name])
            return
        layer, inner = _split(name)
        prefix = self.prefix.format(i=layer)
        if fused and inner in self.fused:
            yield Piece(prefix + self.fused[inner])
        elif inner in self.experts and config.moe is not None:
            yield from self._experts(prefix, layer, inner, config.moe)
        elif inner in self.joined:
            for piece in self.joined[inner](config):
                yield replace(piece, name=prefix + piece.name, where=piece.where and f"{piece.where} of layer {layer}")
        elif inner in self.stacked and config.moe is not None:
            for part, rows in _parts(self.stacked[inner], config.moe.intermediate_size):
                yield Piece(prefix + part, (slice(None), *rows) if rows else ())
        elif inner in self.inner:
            heads = getattr(config, self.interleaved[inner]) if inner in self.interleaved else 0
            yield Piece(prefix + self.inner[inner], rotary_heads=heads)
        else:
            raise UnsupportedError(f"parameter {name!r} has no place in this file format")

    def fused_name(self, name: str) -> str | None:
        """What the parameter is called on disk where a file holds it fused, or None when there is no such name."""
        layer, inner = _split(name)
        return self.prefix.format(i=layer) + self.fused[inner] if inner in self.fused else None

    def _experts(self, prefix: str, layer: str, inner: str, moe: MoEConfig) -> Iterator[Piece]:
        for expert in range(moe.num_experts):
            for part, rows in _parts(self.experts[inner], moe.intermediate_size):
                yield Piece(prefix + part.format(e=expert), (expert, *rows), where=f"expert {expert} of layer {layer}")


def of_expert(pieces: Iterable[Piece], expert: int) -> Iterator[Piece]:
    """What the matrix of one expert is made of, given what a stack of all of them is."""
    for piece in pieces:
        which = piece.index[0] if piece.index else slice(None)
        if which == expert:
            yield replace(piece, index=piece.index[1:])
        elif isinstance(which, slice):
            yield replace(piece, index=piece.index[1:], one_of=expert)


def stored_shape(piece: Piece, part: Sequence[int], known: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape on disk as far as a piece tells, joined with what the pieces before it told."""
    shape = tuple(part[:-2]) + tuple(reversed(part[-2:])) if piece.transposed else tuple(part)
    ends = tuple(each.stop for each in piece.stored)
    shape = ends + shape[len(ends) :]
    return shape if known is None else tuple(map(max, known, shape))


def _parts(names: tuple[str, ...], width: int) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """Each name and the rows of an expert's matrix it holds; () when it is the only one and holds all."""
    for number, name in enumerate(names):
        yield name, () if len(names) == 1 else (slice(number * width, (number + 1) * width),)


def _split(name: str) -> tuple[str, str]:
    parts = name.split(".", 2)
    return (parts[1], parts[2]) if parts[0] == "layers" and len(parts) == 3 else ("", name)


HF_OUTER = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
HF_PREFIX = "model.layers.{i}."
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HF_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    **{f"attn.{name}.{kind}": f"self_attn.{name}.{kind}" for name in _PROJECTIONS for kind in ("weight", "bias")},
}
_KINDS = ("weight", "bias")
HF_DENSE = {f"mlp.{n}_proj.{kind}": f"mlp.{n}_proj.{kind}" for n in ("gate", "up", "down") for kind in _KINDS}
HF_EXPERTS = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{e}.down_proj.weight",),
}
HF_FUSED = {f"mlp.experts.{name}": f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
