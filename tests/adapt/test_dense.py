"""Reading an MLP out of any module: what is read recomputes the module, and nothing is guessed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moekit.adapt.dense import check_replaceable, read_mlp
from moekit.errors import UnsupportedError
from moekit.models.blocks import DenseMLP
from tolerances import near

transformers = pytest.importorskip("transformers")


def gpt2_mlp(**changes) -> nn.Module:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    config = transformers.GPT2Config(n_embd=12, n_head=2, resid_pdrop=0.1, **changes)
    return GPT2MLP(28, config)


def t5(gated: bool) -> nn.Module:
    from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

    config = transformers.T5Config(d_model=12, d_ff=20, dropout_rate=0.2)
    config.dense_act_fn = "gelu_new" if gated else "relu"
    return (T5DenseGatedActDense if gated else T5DenseActDense)(config)


def switch() -> nn.Module:
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersDenseActDense

    return SwitchTransformersDenseActDense(transformers.SwitchTransformersConfig(d_model=12, d_ff=20))


def llama() -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = transformers.LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2, mlp_bias=True)
    return LlamaMLP(config)


def fused() -> nn.Module:
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    config = transformers.Phi3Config(
        hidden_size=12, intermediate_size=20, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0
    )
    return Phi3MLP(config)


class UpFirst(nn.Module):
    """Its children's names say nothing, and the ungated half comes first in the fused matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 40), nn.Linear(20, 12, bias=False)

    def forward(self, x):
        up, gate = self.one(x).chunk(2, -1)
        return self.two(up * F.relu(gate))


class UpCalledFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20, bias=False), nn.Linear(20, 12)

    def forward(self, x):
        return self.down(self.up(x) * F.gelu(self.gate(x)))


class Functional(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.one, self.two, self.p = nn.Linear(12, 20), nn.Linear(20, 12), p

    def forward(self, x):
        return F.dropout(self.two(F.silu(self.one(x))), self.p, self.training)


class Residual(Functional):
    def forward(self, x):
        return x + super().forward(x)


def sequential(activation: nn.Module, *, inner: int = 20, bias: tuple[bool, bool] = (True, True)) -> nn.Module:
    return nn.Sequential(nn.Linear(12, inner, bias=bias[0]), activation, nn.Linear(inner, 12, bias=bias[1]))


READABLE = {
    "GPT-2": (gpt2_mlp, "gelu_tanh", False, (0.0, 0.1)),
    "GPT-2 with gelu": (lambda: gpt2_mlp(activation_function="gelu"), "gelu", False, (0.0, 0.1)),
    "T5": (lambda: t5(False), "relu", False, (0.2, 0.0)),
    "T5 gated": (lambda: t5(True), "gelu_tanh", True, (0.2, 0.0)),
    "Switch dense": (switch, "relu", False, (0.1, 0.0)),
    "Llama": (llama, "silu", True, (0.0, 0.0)),
    "Phi-3 fused": (fused, "silu", True, (0.0, 0.0)),
    "ours": (lambda: DenseMLP(12, 20), "silu", True, (0.0, 0.0)),
    "fused, up first": (UpFirst, "relu", True, (0.0, 0.0)),
    "up called first": (UpCalledFirst, "gelu", True, (0.0, 0.0)),
    "Sequential gelu": (lambda: sequential(nn.GELU()), "gelu", False, (0.0, 0.0)),
    "Sequential tanh gelu": (lambda: sequential(nn.GELU("tanh")), "gelu_tanh", False, (0.0, 0.0)),
    "square": (lambda: sequential(nn.SiLU(), inner=12, bias=(True, False)), "silu", False, (0.0, 0.0)),
    "half": (lambda: sequential(nn.ReLU(), inner=6, bias=(False, True)), "relu", False, (0.0, 0.0)),
    "functional": (lambda: Functional(0.0), "silu", False, (0.0, 0.0)),
}


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["as made", "tiny weights"])
@pytest.mark.parametrize("name", READABLE)
def test_the_reading_recomputes_the_module(name, scale):
    make, activation, gated, dropouts = READABLE[name]
    module = make().train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3 * scale)
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    mlp = read_mlp(module)
    assert (mlp.activation, mlp.gate_FD is not None) == (activation, gated)
    assert (mlp.inner_dropout, mlp.dropout) == dropouts
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(part.p in (0.1, 0.2) for part in module.modules() if isinstance(part, nn.Dropout))
    x = torch.randn(2, 7, 12)
    got = F.linear(mlp.hidden(x), mlp.down_DF, mlp.down_bias_D)
    torch.testing.assert_close(got, module.eval()(x), **near("fp32 twin"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_come_out_bit_for_bit_in_the_modules_dtype(dtype):
    module = gpt2_mlp().to(dtype)
    mlp = read_mlp(module)
    assert torch.equal(mlp.up_FD, module.c_fc.weight.T)
    assert torch.equal(mlp.down_DF, module.c_proj.weight.T)
    assert torch.equal(mlp.up_bias_F, module.c_fc.bias)
    assert mlp.up_FD.dtype == mlp.down_bias_D.dtype == dtype


def test_a_zero_down_matrix_is_still_read():
    module = sequential(nn.GELU("tanh"))
    nn.init.zeros_(module[2].weight)
    assert read_mlp(module).activation == "gelu_tanh"


def dead() -> nn.Module:
    module = sequential(nn.GELU(), bias=(False, False))
    nn.init.zeros_(module[0].weight)
    return module


def patched() -> nn.Module:
    module = sequential(nn.GELU())
    module[0].forward = lambda x: x
    return module


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return sequential(nn.GELU())


def gpt2_block() -> nn.Module:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    return GPT2Block(transformers.GPT2Config(n_embd=12, n_head=2), layer_idx=0)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = sequential(nn.GELU())

    def forward(self, x):
        return self.mlp(x), x


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (gpt2_block, r"takes past_key_values, .* beside a tensor, so it is a block"),
        (Pair, r"for a tensor of shape .* it returns a tuple"),
        (lambda: nn.Linear(12, 12), r"matrix products: 12→12"),
        (lambda: nn.Linear(12, 20), r"it returns one of shape \[2, 12, 20\]"),
        (lambda: nn.LayerNorm(12), "it has no matrix"),
        (lambda: sequential(nn.Tanh()), r"none of silu, .* explains its inner values .*12→20, 20→12"),
        (lambda: sequential(nn.LeakyReLU(0.01)), "none of silu"),
        (lambda: nn.Sequential(nn.LayerNorm(12), *sequential(nn.GELU())), "its matrices are not some that read"),
        (lambda: nn.Sequential(*sequential(nn.GELU()), nn.LayerNorm(12)), "its output is not that of one matrix"),
        (lambda: Residual(0.0), "its output is not that of one matrix"),
        (lambda: Functional(0.1), "something else while training"),
        (lambda: nn.Sequential(nn.Dropout(0.1), *sequential(nn.GELU())), "a dropout elsewhere"),
        (lambda: nn.Sequential(*sequential(nn.GELU()), *sequential(nn.GELU())), "20→12, 12→20, 20→12"),
        (dead, "several readings fit"),
        (patched, "its forward was replaced"),
        (on_meta, "meta device"),
        (lambda: nn.ModuleList([sequential(nn.GELU())]), "container"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_was_seen(make, reason):
    with pytest.raises(UnsupportedError, match=reason):
        read_mlp(make())


def test_anything_that_keeps_a_tensors_shape_is_replaceable():
    check_replaceable(nn.Sequential(nn.LayerNorm(12), nn.Tanh()), 12)
    with pytest.raises(UnsupportedError, match="width 9 alone"):
        check_replaceable(nn.Linear(12, 12), 9)
    with pytest.raises(UnsupportedError, match="returns one of shape"):
        check_replaceable(nn.Linear(12, 9), 12)
