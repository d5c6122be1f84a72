"""Configurations refuse what they cannot mean, and name the field."""

from __future__ import annotations

import dataclasses

import pytest

from moekit import config
from moekit.config import DataConfig, ModelConfig, MoEConfig, SamplingConfig, TrainConfig, UpcycleConfig, from_dict
from moekit.errors import ConfigError, MoekitError

MOE = {"hidden_size": 8, "intermediate_size": 16, "num_experts": 4, "top_k": 2}
MODEL = {
    "arch": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("cls", "values", "field"),
    [
        (MoEConfig, MOE | {"top_k": 5}, "top_k"),
        (MoEConfig, MOE | {"top_k": 0}, "top_k"),
        (MoEConfig, MOE | {"top_k": True}, "top_k"),
        (MoEConfig, MOE | {"hidden_size": 8.0}, "hidden_size"),
        (MoEConfig, MOE | {"gate_order": "softmax"}, "gate_order"),
        (MoEConfig, MOE | {"activation": "swish"}, "activation"),
        (MoEConfig, MOE | {"norm_topk_prob": True}, "norm_topk_prob"),
        (MoEConfig, MOE | {"routed_scaling_factor": 0.0}, "routed_scaling_factor"),
        (MoEConfig, MOE | {"num_shared_experts": -1}, "num_shared_experts"),
        (MoEConfig, MOE | {"shared_gate": True}, "shared_gate"),
        (ModelConfig, MODEL | {"num_key_value_heads": 3}, "num_key_value_heads"),
        (ModelConfig, MODEL | {"head_dim": 3}, "head_dim"),
        (ModelConfig, MODEL | {"moe": MOE | {"hidden_size": 9}}, "moe.hidden_size"),
        (ModelConfig, MODEL | {"dense_layers": [2]}, "dense_layers"),
        (UpcycleConfig, {"num_experts": 7}, "num_experts"),
        (UpcycleConfig, {"top_k": 3}, "top_k"),
        (UpcycleConfig, {"method": "magic"}, "method"),
        (DataConfig, {"sequence_length": 0}, "sequence_length"),
        (TrainConfig, {"lr": 0.0}, "lr"),
        (TrainConfig, {"autocast": "float8"}, "autocast"),
        (TrainConfig, {"beta2": 1.0}, "beta2"),
        (TrainConfig, {"save_every": -1}, "save_every"),
        (SamplingConfig, {"top_p": 0.0}, "top_p"),
        (SamplingConfig, {"temperature": -1.0}, "temperature"),
        (SamplingConfig, {"stop": ("",)}, "stop"),
    ],
)
def test_bad_value_names_the_field(cls, values, field):
    with pytest.raises(ConfigError, match=field) as caught:
        from_dict(cls, values)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MoekitError)


@pytest.mark.parametrize(
    "order", [{"gate_order": "topk_softmax"}, {"gate_order": "softmax_topk", "norm_topk_prob": True}]
)
def test_top_1_with_renormalised_weights_is_refused(order):
    # Every weight would be 1 whatever the router says, so it would never learn.
    with pytest.raises(ConfigError, match="router never learns"):
        from_dict(MoEConfig, MOE | {"top_k": 1} | order)
    from_dict(MoEConfig, MOE | {"top_k": 1, "gate_order": "softmax_topk"})
    from_dict(MoEConfig, MOE | {"top_k": 1, "num_experts": 1} | order)


def test_unknown_and_missing_keys_are_refused():
    with pytest.raises(ConfigError, match=r"model\.json: unknown key 'num_expert' .* did you mean 'num_experts'"):
        from_dict(MoEConfig, MOE | {"num_expert": 3}, source="model.json")
    with pytest.raises(ConfigError, match=r"model\.json\.moe: unknown key 'k'"):
        from_dict(ModelConfig, MODEL | {"moe": MOE | {"k": 3}}, source="model.json")
    with pytest.raises(ConfigError, match="MoEConfig needs num_experts, top_k"):
        from_dict(MoEConfig, {"hidden_size": 8, "intermediate_size": 16})


def test_round_trip_through_a_mapping():
    model = from_dict(ModelConfig, MODEL | {"moe": MOE, "dense_layers": [1]})
    assert model.moe_layers == (0,)
    assert from_dict(ModelConfig, dataclasses.asdict(model)) == model


def test_every_public_configuration_documents_itself():
    for name in config.__all__:
        if name.endswith("Config"):
            assert getattr(config, name).__doc__
