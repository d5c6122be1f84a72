"""Families that transformers has no code for, written plainly from the originals' code: loops, no cache.

DeepSeek-MoE: 2401.06066 and its modeling_deepseek.py; Grok-1: model.py of xai-org/grok-1.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x, theta):
    """(B, L, H, d): each pair (i, i + d/2) as a complex number, times exp(i · position · theta^(−2i/d))."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None, None] * theta ** -(torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


class PlainModel(nn.Module):
    """Weights under the names they have on disk; a subclass says which there are and how a layer computes."""

    def __init__(self, **values):
        super().__init__()
        self.values = values
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(torch.empty(shape)) for name, shape in self.shapes().items()}
        )

    def __getitem__(self, name):
        return self.weights[name.replace(".", "/")]

    def num_parameters(self, only_trainable):
        return sum(each.numel() for each in self.parameters())

    def forward(self, ids, labels=None):
        v, x = self.values, F.embedding(ids, self["model.embed_tokens.weight"]) * self.scales()[0]
        for layer in range(v["num_hidden_layers"]):
            x = self.layer(x, f"model.layers.{layer}.", layer)
        logits = self.head(x) * self.scales()[1]
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)

    def attention(self, x, prefix, scale, cap=None):
        v, (batch, length, _) = self.values, x.shape
        heads, groups = v["num_attention_heads"], v["num_attention_heads"] // v["num_key_value_heads"]
        q, k, w = (F.linear(x, self[f"{prefix}{n}_proj.weight"]).view(batch, length, -1, v["head_dim"]) for n in "qkv")
        q, k = (rotated(each, v["rope_theta"]) for each in (q, k))
        out = torch.empty_like(q)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        for head in range(heads):
            scores = scale * q[:, :, head] @ k[:, :, head // groups].transpose(1, 2)
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            out[:, :, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ w[:, :, head // groups]
        return F.linear(out.flatten(2), self[f"{prefix}o_proj.weight"])

    def routed(self, x, router, expert, normalise):
        probabilities = F.linear(x, self[router]).softmax(-1)
        best = probabilities.topk(self.values["num_experts_per_tok"], dim=-1)
        shares = best.values / best.values.sum(-1, keepdim=True) if normalise else best.values
        y = torch.zeros_like(x)
        for number in range(probabilities.shape[-1]):
            share = (shares * (best.indices == number)).sum(-1, keepdim=True)
            y = y + share * expert(x, number)
        return y

    def glu(self, x, names, activation):
        gate, up, down = (self[name] for name in names)
        return F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down)

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        tensors = {name.replace("/", "."): each.detach() for name, each in self.weights.items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.values))

    @classmethod
    def from_pretrained(cls, folder):
        model = cls(**json.loads((folder / "config.json").read_text()))
        with torch.no_grad():
            for name, tensor in load_file(folder / "model.safetensors").items():
                model[name].copy_(tensor)
        return model

    def sizes(self):
        v = self.values
        return v["hidden_size"], v["num_attention_heads"] * v["head_dim"], v["num_key_value_heads"] * v["head_dim"]


class DeepseekModel(PlainModel):
    """DeepSeek-MoE 16B: Llama's attention, shared experts, the first layers dense."""

    def shapes(self):
        v, (hidden, queries, keys) = self.values, self.sizes()
        found = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (v["vocab_size"], hidden))
        found["model.norm.weight"] = (hidden,)
        for layer in range(v["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            found |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
            found |= {f"{prefix}self_attn.{n}_proj.weight": (keys, hidden) for n in "kv"}
            found[f"{prefix}self_attn.q_proj.weight"] = queries, hidden
            found[f"{prefix}self_attn.o_proj.weight"] = hidden, queries
            parts = {"mlp": v["intermediate_size"]}
            if layer >= v["first_k_dense_replace"]:
                found[f"{prefix}mlp.gate.weight"] = v["n_routed_experts"], hidden
                parts = {f"mlp.experts.{e}": v["moe_intermediate_size"] for e in range(v["n_routed_experts"])}
                parts["mlp.shared_experts"] = v["n_shared_experts"] * v["moe_intermediate_size"]
            for part, width in parts.items():
                found |= {f"{prefix}{part}.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
                found[f"{prefix}{part}.down_proj.weight"] = hidden, width
        return found

    def scales(self):
        return 1.0, 1.0

    def layer(self, x, prefix, layer):
        eps = self.values["rms_norm_eps"]
        y = rms(x, self[f"{prefix}input_layernorm.weight"], eps)
        x = x + self.attention(y, f"{prefix}self_attn.", self.values["head_dim"] ** -0.5)
        y = rms(x, self[f"{prefix}post_attention_layernorm.weight"], eps)
        if layer < self.values["first_k_dense_replace"]:
            return x + self.mlp(y, f"{prefix}mlp")
        routed = self.routed(
            y,
            f"{prefix}mlp.gate.weight",
            lambda rows, e: self.mlp(rows, f"{prefix}mlp.experts.{e}"),
            self.values["norm_topk_prob"],
        )
        return x + routed + self.mlp(y, f"{prefix}mlp.shared_experts")

    def mlp(self, x, part):
        return self.glu(x, [f"{part}.{name}_proj.weight" for name in ("gate", "up", "down")], F.silu)

    def head(self, x):
        return F.linear(rms(x, self["model.norm.weight"], self.values["rms_norm_eps"]), self["lm_head.weight"])


class GrokModel(PlainModel):
    """Grok-1: four norms a layer, soft-capped scores, GeGLU experts, embeddings that are the head too."""

    NORMS = ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")

    def shapes(self):
        v, (hidden, queries, keys) = self.values, self.sizes()
        found = {"model.embed_tokens.weight": (v["vocab_size"], hidden), "model.norm.scale": (hidden,)}
        for layer in range(v["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            found |= {f"{prefix}{name}.scale": (hidden,) for name in self.NORMS}
            found |= {f"{prefix}attn.{n}_proj.weight": (keys, hidden) for n in "kv"}
            found[f"{prefix}attn.q_proj.weight"] = queries, hidden
            found[f"{prefix}attn.o_proj.weight"] = hidden, queries
            found[f"{prefix}moe_block.gate.weight"] = v["num_experts"], hidden
            for expert in range(v["num_experts"]):
                part = f"{prefix}moe_block.experts.{expert}."
                found |= {f"{part}{name}.weight": (v["intermediate_size"], hidden) for name in ("linear", "linear_v")}
                found[f"{part}linear_1.weight"] = hidden, v["intermediate_size"]
        return found

    def scales(self):
        return self.values["embedding_multiplier_scale"], self.values["output_multiplier_scale"]

    def layer(self, x, prefix, layer):
        v, norms = self.values, [self[f"{prefix}{name}.scale"] for name in self.NORMS]
        eps = v["rms_norm_eps"]
        y = self.attention(
            rms(x, norms[0], eps), f"{prefix}attn.", v["attn_output_multiplier"], cap=v["max_attn_value"]
        )
        x = x + rms(y, norms[1], eps)
        routed = self.routed(
            rms(x, norms[2], eps),
            f"{prefix}moe_block.gate.weight",
            lambda rows, e: self.expert(rows, f"{prefix}moe_block.experts.{e}."),
            normalise=False,
        )
        return x + rms(routed, norms[3], eps)

    def expert(self, x, part):
        names = [f"{part}{name}.weight" for name in ("linear", "linear_v", "linear_1")]
        return self.glu(x, names, lambda rows: F.gelu(rows, approximate="tanh"))

    def head(self, x):
        v = self.values
        return F.linear(rms(x, self["model.norm.scale"], v["rms_norm_eps"]), self["model.embed_tokens.weight"])
