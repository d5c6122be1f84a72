"""Each mistake is found where it is, and nowhere else; what transformers really does is asked of transformers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from integrations.families import FAMILIES, SIZES, build, output, tokens
from moekit import cli
from moekit.config import ModelConfig, MoEConfig, TrainConfig
from moekit.errors import FileError, FormatError
from moekit.integrations.transformers import expert_modules
from moekit.lint import families, lint, lint_file

MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": True,
    "num_hidden_layers": 4,
}
DEEPSEEK = {"model_type": "deepseek_v3", "router_aux_loss_coef": None}
SWITCH = {"model_type": "switch_transformers", "num_experts_per_tok": None, "n_positions": 512}
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
        ({"num_experts_per_tok": 8}, "all_chosen", "note"),
        ({"ep_size": 3}, "uneven_processes", "error"),
        ({"n_group": 4, "topk_group": 5}, "groups_too_small", "error"),
        ({"norm_topk_prob": False}, "norm_ignored", "warning"),
        ({"first_k_dense_replace": 4}, "all_dense", "error"),
        ({"capacity_factor": 0.9}, "capacity_below_one", "warning"),
        ({"capacity_factor": 1.0}, "capacity_zero", "note"),
        ({"expert_capacity": 15, "max_position_embeddings": 64}, "capacity_below_one", "warning"),
        ({"router_jitter_noise": 0.01}, "jitter", "note"),
        ({"model_type": "minimax_m3_vl", "router_jitter_noise": 0.01}, "jitter_ignored", "warning"),
        ({"dtype": "bfloat16"}, "router_narrow", "note"),
        ({"torch_dtype": "float16"}, "router_narrow", "note"),
        ({"router_dtype": "bfloat16"}, "router_narrow", "warning"),
        ({"model_type": "llama4_text"}, "aux_never_added", "warning"),
        (
            {"model_type": "deepseek_v3", "router_aux_loss_coef": None, "aux_loss_alpha": 0.001},
            "aux_never_added",
            "warning",
        ),
        ({"model_type": "jetmoe", "router_aux_loss_coef": None, "aux_loss_coef": 0.0}, "aux_off", "warning"),
        ({"model_type": "jetmoe"}, "counted_twice", "note"),
        (SWITCH | {"expert_capacity": 63}, "capacity_below_one", "warning"),
        ({"model_type": "nllb-moe"}, "experts_unreached", "error"),
        ({"model_type": "switch_transformers"}, "padding_counted", "note"),
        ({"model_type": "qwen3_next", "num_experts_per_tok": 1}, "k1_renormalised", "error"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_ignored", "warning"),
    ],
)
def test_transformers_configurations(changes, name, level):
    found = {finding.name: finding.level for finding in lint(MIXTRAL | changes)}
    assert found[name] == level


def test_experts_are_found_under_every_name():
    for experts, top_k in (("num_experts", "num_experts_per_tok"), ("n_routed_experts", "moe_topk")):
        values = {"model_type": "x", experts: 4, top_k: 5}
        assert names(values) == ["too_many_choices"]
    text = {"model_type": "qwen3_vl_moe_text", "num_experts": 4, "num_experts_per_tok": 1}
    assert names({"model_type": "qwen3_vl_moe", "vision_config": {"depth": 2}, "text_config": text}) == [
        "k1_renormalised"
    ]
    deep = {"model_type": "qwen3_omni_moe", "thinker_config": {"model_type": "x", "text_config": text}}
    assert names(deep) == ["k1_renormalised"]
    for _ in range(2000):  # deeper than any real one, and than Python's stack
        deep = {"model_type": "x", "inner_config": deep}
    assert names(deep) == ["dense"]
    nested = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 4, "moe_top_k": 5, "model_type": ""}}
    assert names(nested) == ["too_many_choices"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts_per_tok": 1, "model_type": "qwen3_moe", "norm_topk_prob": False},
        SWITCH | {"expert_capacity": 64},
        DEEPSEEK | {"dtype": "bfloat16"},
        {"model_type": "phimoe", "router_jitter_noise": 0.01},
        {"model_type": "somebody_s", "router_aux_loss_coef": 0.01},
        {"n_group": 4, "topk_group": 2},
        {"expert_capacity": 16, "max_position_embeddings": 64},
        {"norm_topk_prob": True},
    ],
)
def test_what_is_sound_is_left_alone(changes):
    assert names(MIXTRAL | changes, "error", "warning") == []
    assert not {"router_narrow", "jitter"} & set(names(MIXTRAL | changes))


def test_the_shortest_row_that_gets_no_room():
    """int(factor · k · tokens ÷ experts), as it is often written, at the number of tokens that the finding names."""
    for factor, top_k, experts in ((1.0, 2, 8), (1.25, 1, 64), (0.7, 3, 10)):
        values = MIXTRAL | {"capacity_factor": factor, "num_experts_per_tok": top_k, "num_local_experts": experts}
        (finding,) = [finding for finding in lint(values) if finding.name == "capacity_zero"]
        tokens_ = next(int(word) for word in finding.cause.split() if word.isdigit() and int(word) > 1)
        assert int(factor * top_k * tokens_ / experts) == 0
        assert int(factor * top_k * (tokens_ + 1) / experts) == 1


def source_of(family):
    return inspect.getsource(import_module(f"transformers.models.{family}.modeling_{family}"))


def test_which_families_add_a_balance_loss():
    """The tables against the code of the transformers at hand."""
    others = {"dbrx", "doge", "jetmoe", "llama4", "nllb_moe", "switch_transformers"}
    adding = {family for family in {*FAMILIES, *others} if "load_balancing_loss_func(" in source_of(family)}
    assert adding == families.ADDS_BALANCE
    for family in families.JITTERS_EXPERTS:
        assert "hidden_states *= torch.empty_like(hidden_states)" in source_of(family)
    for family in families.IGNORES_JITTER:
        assert "jitter" not in source_of(family)
        module = import_module(f"transformers.models.{family}.configuration_{family}")
        assert "router_jitter_noise" in inspect.getsource(module)


TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts")


def weights_and_logits(family, **changes):
    """What the first experts of a tiny model are given, and what the router beside them returns and is given."""
    row = FAMILIES[family]
    config = getattr(import_module(f"transformers.models.{family}.configuration_{family}"), row.config)
    known = {name for base in config.__mro__ for name in getattr(base, "__annotations__", {})}
    known |= set(config.attribute_map)
    asked = {name: 1 for name in TOP_K if name in known and name in SIZES} | changes
    model = build(family, **{name: value for name, value in asked.items() if name in known}).eval()
    seen = {}
    path, module = next(iter(expert_modules(model).items()))
    block = model.get_submodule(path.rpartition(".")[0])
    router = getattr(block, "gate", None) or block.router
    module.register_forward_pre_hook(lambda _, args: seen.update(weights=args[2].detach().float()))
    router.register_forward_hook(lambda router, args, out: seen.update(x=args[0], logits=out[0], router=router))
    with torch.no_grad():
        output(model, tokens())
    return model, config, seen


OFTEN = ["mixtral", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe", "gemma4", "jamba"]
# Their weights at K = 1 are no function of one choice: SparseMixer, √softplus by hash, unnormalised with a skip.
ODD = {"phimoe", "inkling"}


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.heavy) for name in FAMILIES if name not in ODD],
)
def test_when_a_family_renormalises(family):
    """With one expert a token: the weights are all 1 (or a factor), or they are not."""
    _, config, seen = weights_and_logits(family)
    default = {"model_type": config.model_type, "num_experts": 4, "num_experts_per_tok": 1}
    scale = getattr(seen["router"], "per_expert_scale", None)
    weights = seen["weights"] if scale is None else seen["weights"] / scale[seen["logits"].argmax(-1, keepdim=True)]
    constant = bool((weights - weights.flatten()[0]).abs().max() < 1e-4)
    assert ("k1_renormalised" in names(default)) == constant
    if "norm_topk_prob" in {name for base in config.__mro__ for name in getattr(base, "__annotations__", {})}:
        _, _, seen = weights_and_logits(family, norm_topk_prob=False)
        constant = bool((seen["weights"] - seen["weights"].flatten()[0]).abs().max() < 1e-4)
        assert ("k1_renormalised" in names(default | {"norm_topk_prob": False})) == constant


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "granitemoe", "deepseek_v3", "dots1", "olmoe", "ernie4_5_moe"]
)
def test_which_routers_are_multiplied_in_float32(family):
    model, config, _ = weights_and_logits(family)
    seen = {}
    path = next(iter(expert_modules(model)))
    block = model.get_submodule(path.rpartition(".")[0])
    router = getattr(block, "gate", None) or block.router
    router.register_forward_hook(lambda _, args, out: seen.update(x=args[0], logits=out[0]))
    model.to(torch.bfloat16)
    with torch.no_grad():
        output(model, tokens())
        exact = seen["x"].flatten(0, -2).double() @ router.weight.double().T
    error = ((seen["logits"].double() - exact).abs().max() / exact.abs().max()).item()
    narrow = "router_narrow" in names({"model_type": config.model_type, "num_experts": 4, "dtype": "bfloat16"})
    assert narrow == (error > 1e-4)


def test_nllb_really_runs_two_experts_alone():
    """The finding experts_unreached, shown. When this fails, the finding has had its time."""
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    torch.manual_seed(0)
    layer = NllbMoeSparseMLP(NllbMoeConfig(d_model=16, num_experts=4), 8).eval()
    ran = set()
    for name, expert in layer.experts.named_children():
        expert.register_forward_hook(lambda *_, name=name: ran.add(name))
    x = torch.randn(1, 40, 16)
    with torch.no_grad():
        layer(x)
        chosen = layer.router(x.view(-1, 16))[0].argmax(-1).unique().tolist()
    assert len(chosen) == 4
    assert ran - {"token_dropout"} == {"expert_0", "expert_1"}


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
        ({"router": "topk", "router_options": {"bias": True, "bias_rate": 0.0}}, {}, "bias_frozen"),
        ({"router": "top_p", "gate_order": "softmax_topk"}, {}, "k_unknown"),
        ({"routed_scaling_factor": 2.5}, {}, "scaled_weights"),
        ({"top_k": 8}, {}, "all_chosen"),
        ({"router": "sinkhorn"}, {}, "eval_differs"),
        ({"router_options": {"jitter": 0.1}}, {}, "jitter"),
        ({"router_options": {"noise_std": 0.1}}, {}, "jitter"),
        ({}, {"warmup_steps": 0}, "no_warmup"),
        ({}, {"warmup_steps": 101}, "only_warmup"),
        ({}, {"clip_norm": 0.0}, "no_clipping"),
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


def test_a_layer_alone():
    assert names(LAYER | {"router": "expert_choice"}) == ["not_causal"]
    assert names(LAYER | {"router": "hash"}) == ["needs_token_ids"]
    assert "needs_token_ids" not in names(run({"router": "hash"})), "a model gives its ids to its layers"


def test_a_training_alone():
    assert names({"lr": 1e-4, "balance_coef": 0.0, "router_lr_scale": 0.0}) == ["aux_off", "router_frozen"]
    assert names({"lr": 1e-4, "steps": 10}) == []
    assert names({"lr": -1.0}) == ["refused"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"method": "copy", "gate_order": "softmax_topk"}, "upcycled_weak"),
        ({"method": "noise"}, "upcycled_changed"),
        ({"method": "copy"}, "upcycled_copies"),
        ({"method": "split", "top_k": 3}, "refused"),
    ],
)
def test_an_upcycling(changes, name):
    assert names({"num_experts": 8, "top_k": 2} | changes) == [name]
    assert names({"method": "split", "num_experts": 8, "top_k": 2}) == []


def test_an_adapter():
    adapter = {"peft_type": "LORA", "target_modules": ["q_proj", "w1"]}
    assert names(adapter) == ["experts_frozen"]
    assert names(adapter | {"target_modules": "all-linear"}) == ["experts_frozen"]
    assert names(adapter | {"target_modules": ["q_proj", "v_proj"]}) == []
    assert names(adapter | {"target_parameters": ["mlp.experts.down_proj"]}) == []
    assert names({"peft_type": "IA3"}) == []


@pytest.mark.parametrize(
    ("family", "modules"),
    [("gpt_oss", "all-linear"), ("mixtral", ["q_proj", "up_proj"]), ("qwen3_moe", ["q_proj", "w1"])],
)
def test_peft_really_leaves_experts_frozen(family, modules):
    """The finding experts_frozen, shown."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(build(family), peft.LoraConfig(r=2, target_modules=modules))
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert any("q_proj" in name for name in trained)
    assert not any("experts" in name for name in trained)


def test_a_bias_that_is_stored_too_narrow(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    name = "model.layers.{}.mlp.gate.e_score_correction_bias"
    save_file({name.format(0): torch.zeros(8)}, tmp_path / "model-00001.safetensors")
    assert [finding.name for finding in lint_file(tmp_path)] == ["aux_convention"]
    for dtype, stuck, moves in ((torch.bfloat16, 0.51, 0.3), (torch.float16, 4.1, 2.1)):
        save_file({name.format(i): torch.zeros(8, dtype=dtype) for i in (1, 2)}, tmp_path / "model-00002.safetensors")
        finding = lint_file(tmp_path)[0]
        assert (finding.level, finding.name) == ("warning", "bias_narrow")
        assert finding.seen == f"{name.format(1)} and 1 more in {str(dtype).removeprefix('torch.')}"
        limit = float(finding.cause.split()[1])
        assert moves < limit < stuck
        assert torch.tensor(stuck, dtype=dtype) + 0.001 == torch.tensor(stuck, dtype=dtype)
        assert torch.tensor(moves, dtype=dtype) + 0.001 != torch.tensor(moves, dtype=dtype)
    (tmp_path / "model-00003.safetensors").write_bytes(b"\xff" * 9)
    with pytest.raises(FormatError, match="no safetensors file"):
        lint_file(tmp_path)
    (tmp_path / "model-00003.safetensors").write_bytes((50).to_bytes(8, "little") + b"{}")
    with pytest.raises(FormatError, match="ends within its header"):
        lint_file(tmp_path)


def test_files(tmp_path):
    with pytest.raises(FileError, match=r"no config\.json"):
        lint_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert [finding.name for finding in lint_file(tmp_path)] == ["aux_convention"]
    (tmp_path / "config.json").rename(tmp_path / "kept.json")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": "all-linear"}')
    assert [finding.name for finding in lint_file(tmp_path)] == ["experts_frozen"]
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    with pytest.raises(FormatError, match="no configuration"):
        lint_file(other)


def test_torch_stays_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    code = f"import sys; from moekit.cli import main; main(['lint', {str(tmp_path)!r}])"
    code += "; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_page_names_every_finding_and_shows_what_is_printed(tmp_path, capsys, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "lint.md").read_text()
    found = set()
    for path in (Path(__file__).parents[1] / "src" / "moekit" / "lint").glob("*.py"):
        found |= set(re.findall(r'(?:Finding\(\s*"(?:error|warning|note)",|name =) "(\w+)"', path.read_text()))
    assert len(found) > 35
    assert [name for name in found - {"dense"} if f"`{name}`" not in page] == []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, text in re.findall(r"\$ cat (\S+)\n    (\{.*\})\n", page):
        Path(name).write_text(text)
        cli.main(["lint", name])
        printed = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
        assert f"    $ moekit lint {name}\n{printed}" in page


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
