"""`gguf_layout`: what our parameters are called in GGUF files; the names are nearly the same in all families.

Those of llama.cpp's src/llama-arch.cpp. Names and numbers only: torch is never imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from moekit.config import ModelConfig
from moekit.models.layout import Layout, Piece

__all__ = ["ROPE_FREQS", "gguf_layout"]

ROPE_FREQS = "rope_freqs.weight"
"""What each frequency is divided by, where that follows Llama 3's rule."""


def gguf_layout(
    *, interleaved: bool = False, joined_qkv: bool = False, ignored: tuple[str, ...] = (), **renamed: str
) -> Layout:
    """The layout of a family.

    Args:
        interleaved: llama.cpp rotates neighbours, and the file has the rows of queries and keys in that order.
        joined_qkv: queries, keys and values are one tensor.
        ignored: patterns of names, as `Layout` has them.
        **renamed: norms that the family calls otherwise: mlp_norm="post_attention_norm".
    """
    norms = {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in {**_NORMS, **renamed}.items()
        for kind in ("weight", "bias")
    }
    return Layout(
        outer=_OUTER,
        prefix="blk.{i}.",
        inner=_INNER | norms,
        stacked=_STACKED,
        fused=_FUSED,
        interleaved=_INTERLEAVED if interleaved else {},
        joined={**_JOINED, **(_QKV if joined_qkv else {})},
        ignored=ignored,
    )


Pieces = Callable[[ModelConfig], Iterable[Piece]]

_KINDS = ("weight", "bias")
_OUTER = {
    "embed.weight": "token_embd.weight",
    "positions": "position_embd.weight",
    "norm.weight": "output_norm.weight",
    "norm.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
_NORMS = {
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attn_out_norm": "attn_output_norm",
    "mlp_out_norm": "layer_output_norm",
}
_INNER = {
    **{
        f"attn.{ours}.{kind}": f"attn_{theirs}.{kind}"
        for ours, theirs in (
            ("q_proj", "q"),
            ("k_proj", "k"),
            ("v_proj", "v"),
            ("o_proj", "output"),
            ("q_norm", "q_norm"),
            ("k_norm", "k_norm"),
            ("q_a_proj", "q_a"),
            ("q_a_norm", "q_a_norm"),
            ("q_b_proj", "q_b"),
            ("kv_a_proj", "kv_a_mqa"),
            ("kv_a_norm", "kv_a_norm"),
        )
        for kind in _KINDS
    },
    "attn.sinks": "attn_sinks.weight",
    **{f"mlp.{name}_proj.{kind}": f"ffn_{name}.{kind}" for name in ("gate", "up", "down") for kind in _KINDS},
    **{f"mlp.router.{kind}": f"ffn_gate_inp.{kind}" for kind in _KINDS},
    "mlp.router.selection_bias": "exp_probs_b.bias",
    **{f"mlp.shared.{name}_proj.weight": f"ffn_{name}_shexp.weight" for name in ("gate", "up", "down")},
}
_STACKED = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.gate_up_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
    "mlp.experts.down_bias": ("ffn_down_exps.bias",),
}
_FUSED = {"mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight", "attn.kv_b_proj.weight": "attn_kv_b.weight"}
"""Names in files of newer and of older converters."""
_INTERLEAVED = {
    f"attn.{name}_proj.{kind}": heads
    for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for kind in _KINDS
}


def _keys_and_values(config: ModelConfig) -> Iterable[Piece]:
    """Of each head the rows that make keys, transposed, and those that make values; a tensor of its own for each."""
    sizes = config.mla
    assert sizes is not None
    width = sizes.nope_head_dim + sizes.value_head_dim
    for head in range(config.num_attention_heads):
        start, of = head * width, f"head {head}"
        keys, heads = slice(start, start + sizes.nope_head_dim), slice(head, head + 1)
        whole = (heads, slice(0, sizes.kv_lora_rank), slice(0, sizes.nope_head_dim))
        yield Piece("attn_k_b.weight", (None, keys), stored=whole, transposed=True, where=of)
    for head in range(config.num_attention_heads):
        start, of = head * width + sizes.nope_head_dim, f"head {head}"
        values, heads = slice(start, start + sizes.value_head_dim), slice(head, head + 1)
        yield Piece("attn_v_b.weight", (None, values), stored=(heads,), where=of)


_JOINED: Mapping[str, Pieces] = {
    "attn.kv_b_proj.weight": _keys_and_values,
    "mlp.shared.gate.weight": lambda _: [Piece("ffn_gate_inp_shexp.weight", (0,))],
}


def _third(number: int, kind: str) -> Pieces:
    """Queries, keys or values within attn_qkv."""

    def pieces(config: ModelConfig) -> Iterable[Piece]:
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        start = sum(heads[:number]) * config.head_dim
        yield Piece(f"attn_qkv.{kind}", stored=(slice(start, start + heads[number] * config.head_dim),))

    return pieces


_QKV: Mapping[str, Pieces] = {
    f"attn.{name}_proj.{kind}": _third(number, kind) for number, name in enumerate("qkv") for kind in _KINDS
}
