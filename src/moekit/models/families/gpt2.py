"""GPT-2: LayerNorm, learned positions, one matrix for queries, keys and values, matrices stored transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moekit.config import ModelConfig
from moekit.models.families.row import Arch
from moekit.models.keys import Keys
from moekit.models.layout import Layout, Piece

_NORMS = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2"))
          for kind in ("weight", "bias")}  # fmt: skip
_MATRICES = {"attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}


def _third(number: int, kind: str) -> Callable[[ModelConfig], Iterable[Piece]]:
    """Queries, keys or values within c_attn, whose matrix is (in, out)."""

    def pieces(config: ModelConfig) -> Iterable[Piece]:
        size = config.hidden_size
        part = slice(number * size, (number + 1) * size)
        stored = (part,) if kind == "bias" else (slice(0, size), part)
        yield Piece(f"attn.c_attn.{kind}", stored=stored, transposed=kind == "weight")

    return pieces


def _transposed(name: str) -> Callable[[ModelConfig], Iterable[Piece]]:
    return lambda _: [Piece(f"{name}.weight", transposed=True)]


def _joined() -> Mapping[str, Callable[[ModelConfig], Iterable[Piece]]]:
    thirds = {
        f"attn.{name}_proj.{kind}": _third(number, kind)
        for kind in ("weight", "bias")
        for number, name in enumerate("qkv")
    }
    return thirds | {f"{ours}.weight": _transposed(theirs) for ours, theirs in _MATRICES.items()}


def _read(keys: Keys) -> dict[str, Any]:
    return {
        "intermediate_size": keys.whole("intermediate_size", 4 * keys.whole("hidden_size")),
        "positions": "learned",
        "norm": "layer",
        "norm_bias": True,
        "attention_bias": True,
        "mlp_gated": False,
        "mlp_bias": True,
    }


Arch(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    defaults={
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "rope_theta": 10_000.0,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=lambda _: {},
    hf=Layout(
        outer={
            "embed.weight": "transformer.wte.weight",
            "positions": "transformer.wpe.weight",
            "norm.weight": "transformer.ln_f.weight",
            "norm.bias": "transformer.ln_f.bias",
            "head.weight": "lm_head.weight",
        },
        prefix="transformer.h.{i}.",
        inner=_NORMS | {f"{ours}.bias": f"{theirs}.bias" for ours, theirs in _MATRICES.items()},
        joined=_joined(),
        base="transformer.",
        ignored=("*.attn.bias", "*.attn.masked_bias"),
    ),
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    absent=frozenset({"num_key_value_heads", "head_dim", "rope_theta", "rope_parameters"}),
).register()
