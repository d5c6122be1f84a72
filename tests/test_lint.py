"""Each mistake is found where it is, and nowhere else; what transformers really does is asked of transformers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moekit import cli
from moekit.config import ModelConfig, MoEConfig, TrainConfig
from moekit.errors import FileError, FormatError
from moekit.lint import lint, lint_file

MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": True,
    "num_hidden_layers": 4,
}
LAYER = {"hidden_size": 32, "intermediate_size": 16, "num_experts": 8, "top_k": 2}
MODEL = {
    "arch": "mixtral",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "router_aux_loss_coef": 0.01,
}


def names(values, *levels: str) -> list[str]:
    return [finding.name for finding in lint(values) if not levels or finding.level in levels]


def run(layer=None, **train):
    """A checkpoint's state: the model and how it is trained."""
    model = ModelConfig(**MODEL, moe=MoEConfig(**(LAYER | (layer or {}))))
    return json.loads(
        json.dumps({"model": dataclasses.asdict(model), "train": dataclasses.asdict(TrainConfig(**train))})
    )


def test_sound_configurations_have_no_errors_and_no_warnings():
    assert names(MIXTRAL, "error", "warning") == []
    assert names(LAYER) == []
    assert names(run()) == []
    sigmoid = {"router": "sigmoid", "norm_topk_prob": True}
    assert names(run(sigmoid, balance_coef=0.0)) == []  # it balances itself
    assert names({"model_type": "llama", "num_hidden_layers": 2}) == ["dense"]


@pytest.mark.parametrize(
    ("changes", "name", "level"),
    [
        ({"num_experts_per_tok": 1}, "k1_renormalised", "error"),
        ({"num_experts_per_tok": 9}, "too_many_choices", "error"),
        ({"output_router_logits": False}, "aux_switched_off", "warning"),
        ({"router_aux_loss_coef": 0.0}, "aux_off", "warning"),
        ({}, "aux_convention", "note"),
        ({"n_group": 3, "topk_group": 1}, "uneven_groups", "error"),
        ({"n_group": 8, "topk_group": 1}, "groups_too_small", "error"),
        ({"mlp_only_layers": [4]}, "no_such_layer", "warning"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "all_dense", "error"),
        ({"mlp_only_layers": [], "decoder_sparse_step": 5}, "all_dense", "error"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "experts_not_quantised", "warning"),
    ],
)
def test_transformers_configurations(changes, name, level):
    found = {finding.name: finding.level for finding in lint(MIXTRAL | changes)}
    assert found[name] == level


def test_experts_are_found_under_every_name():
    for experts, top_k in (("num_experts", "num_experts_per_tok"), ("n_routed_experts", "moe_topk")):
        values = {"model_type": "x", experts: 4, top_k: 5}
        assert names(values) == ["too_many_choices"]
    nested = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 4, "moe_top_k": 5, "model_type": ""}}
    assert names(nested) == ["too_many_choices"]


def test_transformers_really_leaves_the_loss_out():
    """The finding aux_switched_off, shown: the coefficient changes nothing until the router logits are asked for."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    sizes |= {"num_key_value_heads": 1, "num_hidden_layers": 1, "num_local_experts": 4}
    ids = torch.arange(8)[None]
    loss = {}
    for logits in (False, True):
        for coef in (0.0, 1.0):
            torch.manual_seed(0)
            config = MixtralConfig(**sizes, router_aux_loss_coef=coef, output_router_logits=logits)
            loss[logits, coef] = MixtralForCausalLM(config)(ids, labels=ids).loss.item()
            flagged = "aux_switched_off" in names(config.to_dict())
            assert flagged == (coef > 0 and not logits)
    assert loss[False, 1.0] == loss[False, 0.0]
    assert loss[True, 1.0] > loss[True, 0.0] + 1


@pytest.mark.parametrize(
    ("layer", "train", "name"),
    [
        ({}, {"balance_coef": 0.0}, "aux_off"),
        ({"router": "noisy_topk"}, {"balance_coef": 0.0}, "load_unused"),
        ({"router": "gumbel"}, {"steps": 100}, "anneal_too_long"),
        ({}, {"router_lr_scale": 0.0}, "router_frozen"),
        ({}, {"accumulate": 4}, "balance_by_micro_batch"),
        ({}, {"balance_coef": 0.5}, "balance_strong"),
        ({"capacity": {"factor": 0.5}}, {}, "capacity_below_one"),
        ({"capacity": {"factor": 1.25}}, {}, "capacity_looks_ahead"),
        ({"router": "sigmoid", "router_options": {"bias_rate": 0.0}}, {}, "bias_frozen"),
        ({"router": "top_p", "gate_order": "softmax_topk"}, {}, "k_unknown"),
        ({"routed_scaling_factor": 2.5}, {}, "scaled_weights"),
    ],
)
def test_our_own_runs(layer, train, name):
    state = run()
    state["model"]["moe"] |= layer | ({"router_options": layer.get("router_options")} if "router" in layer else {})
    state["train"] |= train
    assert name in names(state)


def test_what_a_configuration_refuses_is_an_error():
    assert names(LAYER | {"top_k": 9}) == ["refused"]
    assert names(LAYER | {"top_k": 1}) == ["k1_renormalised"]
    state = run()
    state["model"]["moe"] |= {"router": "expert_choice", "router_options": None}
    (found,) = lint(state)
    assert found.level == "error"
    assert "predicts the next token" in found.cause


def test_files(tmp_path):
    with pytest.raises(FileError, match=r"no config\.json"):
        lint_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert [finding.name for finding in lint_file(tmp_path)] == ["aux_convention"]
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    with pytest.raises(FormatError, match="no configuration"):
        lint_file(other)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MIXTRAL | {"num_experts_per_tok": 1}))
    assert cli.main(["lint", str(file), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["findings"][0]["name"] == "k1_renormalised"
    file.write_text(json.dumps(MIXTRAL | {"output_router_logits": False}))
    assert cli.main(["lint", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "aux_switched_off" in printed
    assert "1 warning in" in printed
    assert cli.main(["lint", str(tmp_path / "gone.json")]) == 2
