"""One experts module: experts of other processes, how weights are read, dtypes, and what is refused."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    FineGrainedFP8Config,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from integrations.families import build, output, tokens
from moekit import kernels
from moekit.errors import ConfigError, UnsupportedError
from moekit.integrations.transformers import expert_modules, use_moekit
from tolerances import near

LAYOUTS = ["mixtral", "gpt_oss", "aria", "nemotron_h", "muse_spark"]


def experts_of(family, backend="moekit"):
    module = next(iter(expert_modules(build(family)).values()))
    module.config._experts_implementation = backend
    return module


def inputs_for(module, count=19, top_k=2):
    """Tokens, ids and weights of four experts, the first and last with a gradient."""
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    ids = torch.rand(count, 4).topk(top_k).indices
    return torch.randn(count, width, requires_grad=True), ids, torch.rand(count, top_k, requires_grad=True)


def passes(module, x, ids, weights):
    """The output, the gradients of tokens and weights, and those of the parameters by name; linear in the output."""
    out = module(x, ids, weights)
    direction = torch.linspace(-1, 1, out.numel()).view_as(out)
    names = dict(module.named_parameters())
    grads = torch.autograd.grad((out * direction).sum(), [x, weights, *names.values()])
    return out.detach(), *grads[:2], dict(zip(names, grads[2:], strict=True))


def shard(module, start, stop):
    """What an expert-parallel process holds that owns the experts start to stop."""
    part = copy.deepcopy(module)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(part, name, nn.Parameter(parameter[start:stop].detach().clone()))
    part.num_experts, part._is_expert_parallel = stop - start, True
    return part


# ---- an id equal to the number of experts


@pytest.mark.parametrize("family", LAYOUTS)
def test_shards_of_an_expert_parallel_group_add_up_to_the_whole(family, poisoned):
    module = experts_of(family)
    x, ids, weights = inputs_for(module)
    whole = passes(module, x, ids, weights)
    parts = []
    for start, stop in ((0, 1), (1, 4)):
        here = (ids >= start) & (ids < stop)
        parts.append(passes(shard(module, start, stop), x, torch.where(here, ids - start, stop - start), weights))
    for index in range(3):
        assert_close(parts[0][index] + parts[1][index], whole[index], **near("fp32 twin"))
    for name, grad in whole[3].items():
        left, right = (part[3][name] for part in parts)
        joined = left + right if "." in name else torch.cat([left, right])  # the norm's weight is in both
        assert_close(joined, grad, **near("fp32 twin"), msg=name)


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("grad", [True, False])
def test_tokens_whose_experts_are_all_elsewhere_get_exact_zeros(family, grad, poisoned):
    module = experts_of(family)
    x, ids, weights = inputs_for(module, count=5)
    ids[::2] = 4
    with torch.set_grad_enabled(grad):
        out = module(x, ids, weights)
    assert torch.equal(out[::2], torch.zeros(3, x.shape[1]))
    assert out[1::2].abs().min(dim=1).values.min() > 0
    if grad:
        grads = torch.autograd.grad(out.sum(), [x, weights])
        assert all(torch.equal(each[::2], torch.zeros_like(each[::2])) for each in grads)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("wrong", [-1, 5, 1000])
def test_ids_beyond_are_an_error(wrong, grad):
    module = experts_of("mixtral")
    x, ids, weights = inputs_for(module, count=5)
    ids[2, 1] = wrong
    with torch.set_grad_enabled(grad), pytest.raises((ConfigError, RuntimeError)):
        module(x, ids, weights)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("family", LAYOUTS)
def test_no_token_and_one_expert_a_token(family, grad):
    module, eager = experts_of(family), experts_of(family, "eager")
    with torch.set_grad_enabled(grad):
        x, ids, weights = inputs_for(module, count=0)
        out = module(x, ids, weights)
        assert out.shape == x.shape
        if grad:
            out.sum().backward()
            assert x.grad.shape == x.shape
            assert not module.down_proj.grad.any()
        inputs = inputs_for(module, top_k=1)
        assert_close(module(*inputs), eager(*inputs), **near("fp32 twin"))
        inputs = (inputs[0], inputs[1].int(), inputs[2])
        assert_close(module(*inputs), eager(inputs[0], inputs[1].long(), inputs[2]), **near("fp32 twin"))


# ---- dtypes


def test_gradient_of_a_bias_is_summed_in_fp32():
    module = experts_of("gpt_oss").bfloat16()
    x, weights = torch.zeros(4096, 32, dtype=torch.bfloat16), torch.ones(4096, 1, dtype=torch.bfloat16)
    module(x, torch.zeros(4096, 1, dtype=torch.int64), weights).sum().backward()
    assert module.down_proj_bias.grad[0].tolist() == [4096] * 32  # bf16 alone stops at 256 ones


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_the_dtypes_of_eager(family, dtype):
    """What goes into the activation: bf16, or fp32 where an fp32 bias was added to a bf16 product."""
    outs, dtypes = [], []
    x, ids, weights = inputs_for(experts_of(family))
    for backend in ("moekit", "eager"):
        module = experts_of(family, backend)
        name = "act_fn" if hasattr(module, "act_fn") else "_apply_gate"
        act = getattr(module, name)
        module._modules.pop(name, None)
        setattr(module, name, lambda hidden, act=act: dtypes.append(hidden.dtype) or act(hidden))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(module(x.to(dtype), ids, weights))
    assert set(dtypes) == {torch.float32 if family == "gpt_oss" else torch.bfloat16}
    assert_close(*outs, **near("bf16 layer"))  # the same dtype, too


def test_autocast_leaves_float64_alone():
    module = experts_of("mixtral").double()
    x, ids, weights = inputs_for(module)
    want = module(x.double(), ids, weights.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x.double(), ids, weights.double()), want)


# ---- how weights are read


class Counting(nn.Module):
    """A parametrization that writes down when it is computed."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log

    def forward(self, weight):
        self.log.append(self.name)
        return weight * 1


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_every_weight_is_read_once_and_in_one_order(family, grad):
    module, log = experts_of(family), []
    x, ids, weights = inputs_for(module, count=5)
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        parametrize.register_parametrization(module, name, Counting(name, log))
    log.clear()
    with torch.set_grad_enabled(grad):
        module(x, ids, weights)
        assert log == names
        module(x, ids, weights)
    assert log == names * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_of_parametrized_experts(reentrant):
    module = experts_of("gpt_oss")
    for name in ("gate_up_proj", "down_proj_bias"):
        parametrize.register_parametrization(module, name, Counting(name, []))
    x, ids, weights = inputs_for(module)
    for run in (module, lambda *inputs: checkpoint(module, *inputs, use_reentrant=reentrant)):
        module.zero_grad()
        run(x, ids, weights).square().sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        assert all(grad.abs().sum() > 0 for grad in grads.values())
        if run is module:
            want = grads
    assert all(torch.equal(grads[name], grad) for name, grad in want.items())


def test_few_tokens_without_gradient_take_one_op(monkeypatch):
    calls = []
    decode = kernels.moe_decode
    monkeypatch.setattr(kernels, "moe_decode", lambda *args: calls.append(args[-1]) or decode(*args))
    for family in ("mixtral", "gemma4", "nemotron_h", "gpt_oss", "deepseek_v4", "muse_spark"):
        module = experts_of(family)
        inputs = inputs_for(module, count=3)
        module(*inputs)
        with torch.no_grad():
            module(*inputs)
            module(*inputs_for(module, count=kernels.MOE_DECODE_MAX_TOKENS + 1))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                module(*inputs)
    assert calls == ["silu", "gelu_tanh"]  # relu², biases, own gates and norms need the other way


# ---- what is covered, and what is refused


def test_use_moekit_returns_the_model_and_logs_how_many_modules(caplog):
    model = build("qwen3_moe")
    with caplog.at_level(logging.INFO, logger="moekit"):
        assert use_moekit(model) is model
    assert caplog.messages == ["moekit runs the 2 expert modules of Qwen3MoeForCausalLM"]
    assert list(expert_modules(model)) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert model.get_experts_implementation() == {"": "moekit"}


def test_dense_model_is_refused():
    dense = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match="Linear has no experts behind"):
        use_moekit(dense)


def test_models_that_take_the_setting_and_ignore_it_are_refused():
    """Their own setter says nothing: their experts are not behind the interface."""
    switch = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, num_experts=2)
    )
    dbrx = DbrxForCausalLM(
        DbrxConfig(
            d_model=16,
            n_heads=2,
            n_layers=1,
            vocab_size=64,
            attn_config={"kv_n_heads": 1, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 16},
        )
    )
    for model in (switch, dbrx):
        model.set_experts_implementation("moekit")
        with pytest.raises(UnsupportedError, match=f"{type(model).__name__} has no experts behind"):
            use_moekit(model)


def test_fp8_experts_are_refused_by_name():
    model = build("mixtral")
    replace_with_fp8_linear(model, quantization_config=FineGrainedFP8Config(weight_block_size=(16, 16)))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts \(.*FP8Experts\): .*gate_up_proj_scale_inv"):
        use_moekit(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_not_floating_point_are_refused_by_name(dtype):
    module = experts_of("mixtral")
    inputs = inputs_for(module)
    module.down_proj = nn.Parameter(module.down_proj.detach().to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedError, match=rf"MixtralExperts\.down_proj is a Parameter of {dtype}"[:40]):
        module(*inputs)


def test_wrapped_tensors_are_refused_by_name():
    from torch.testing._internal.two_tensor import TwoTensor

    module = experts_of("mixtral")
    inputs = inputs_for(module)
    module.down_proj = nn.Parameter(TwoTensor(module.down_proj.detach(), module.down_proj.detach()))
    with pytest.raises(UnsupportedError, match=r"MixtralExperts\.down_proj is a TwoTensor of float32"):
        module(*inputs)


def test_flag_that_moekit_does_not_know_is_refused():
    model = build("mixtral")
    experts = next(iter(expert_modules(model).values()))
    experts.has_pre_expert_norm = False
    use_moekit(model)
    experts.has_pre_expert_norm = True
    for call in (lambda: use_moekit(model), lambda: output(model, tokens())):
        with pytest.raises(UnsupportedError, match="does not know what its has_pre_expert_norm means"):
            call()


@pytest.mark.parametrize("extra", [nn.Parameter(torch.ones(4)), nn.Linear(2, 2)])
def test_weight_that_moekit_does_not_know_is_refused(extra):
    model = build("mixtral")
    next(iter(expert_modules(model).values())).per_expert_scale = extra
    with pytest.raises(UnsupportedError, match="does not know what its per_expert_scale is for"):
        use_moekit(model)


def test_setting_that_does_not_reach_an_experts_module_is_refused():
    model = build("mixtral")
    experts = next(iter(expert_modules(model).values()))
    experts.config = copy.deepcopy(experts.config)
    with pytest.raises(UnsupportedError, match=r"took the setting, but not for its model\.layers\.0\.mlp\.experts"):
        use_moekit(model)


def test_the_setting_is_not_saved_and_loads_by_name(tmp_path):
    model = use_moekit(build("mixtral")).eval()
    model.save_pretrained(tmp_path)
    assert "moekit" not in (tmp_path / "config.json").read_text()
    plain = MixtralForCausalLM.from_pretrained(tmp_path)
    assert plain.get_experts_implementation() == {"": "grouped_mm"}
    named = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="moekit").eval()
    assert named.get_experts_implementation() == {"": "moekit"}
    assert torch.equal(output(named, tokens()), output(model, tokens()))


# ---- importing


def python(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_import_is_quiet_and_changes_nothing_but_the_registry():
    done = python(
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known\n"
        "before = set(known)\n"
        "import moekit.integrations.transformers as ours\n"
        "assert set(known) - before == {'moekit'} and known['moekit'] is ours.experts_forward"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("setting", ["sys.modules['transformers'] = None", "transformers.__version__ = '5.6.2'"])
def test_missing_or_old_transformers_is_one_clear_error(setting):
    done = python(f"import sys, transformers\n{setting}\nimport moekit.integrations.transformers")
    assert "UnsupportedError: the experts backend needs transformers 5.7 or later" in done.stderr.splitlines()[-1]
