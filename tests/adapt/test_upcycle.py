"""Upcycling keeps the dense model's function where the mathematics allows, and says where not."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.nn import functional as F

from moekit.adapt import upcycle, upcycled_config
from moekit.adapt.dense import DenseWeights
from moekit.adapt.from_dense import layer_from_dense
from moekit.config import (
    ROUTER_OPTIONS,
    CapacityConfig,
    GroupLimit,
    ModelConfig,
    SurgeryConfig,
    TopKOptions,
    UpcycleConfig,
)
from moekit.errors import ConfigError, UnsupportedError
from moekit.models.archs import config_to_hf
from moekit.models.decoder import Decoder
from moekit.models.weights import load_decoder
from moekit.models.weights_write import save_decoder
from tolerances import near

DENSE = ModelConfig(
    arch="llama",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def dense(**changes) -> Decoder:
    return Decoder(dataclasses.replace(DENSE, **changes))


def weights(*, gated: bool = True, bias: bool = True, inner: int = 36, hidden: int = 10) -> DenseWeights:
    """A random MLP in fp64, its matrices of different spreads."""

    def draw(std: float, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64) * std + std / 3

    return DenseWeights(
        up_FD=draw(0.4, inner, hidden),
        down_DF=draw(0.2, hidden, inner),
        gate_FD=draw(0.7, inner, hidden) if gated else None,
        up_bias_F=draw(0.5, inner) if bias else None,
        gate_bias_F=draw(0.6, inner) if bias and gated else None,
        down_bias_D=draw(0.8, hidden) if bias else None,
        activation="silu" if gated else "gelu_tanh",
    )


def output(mlp: DenseWeights, x: torch.Tensor) -> torch.Tensor:
    """The dense MLP, in plain PyTorch."""
    hidden = F.linear(x, mlp.up_FD, mlp.up_bias_F)
    if mlp.gate_FD is None:
        hidden = F.gelu(hidden, approximate="tanh")
    else:
        hidden = hidden * F.silu(F.linear(x, mlp.gate_FD, mlp.gate_bias_F))
    return F.linear(hidden, mlp.down_DF, mlp.down_bias_D)


def made(mlp: DenseWeights, config: UpcycleConfig):
    return layer_from_dense(mlp, config, torch.Generator().manual_seed(config.seed)).eval()


# Every router, both orders of the gate, normalised or not, with a random router and with one of equal logits.
FORMS = [
    {"router": router, "gate_order": order, "norm_topk_prob": norm, "router_init_scale": scale}
    for router, (order, norm), scale in itertools.product(
        sorted(set(ROUTER_OPTIONS) - {"hash"}),
        [("topk_softmax", False), ("softmax_topk", False), ("softmax_topk", True)],
        [1.0, 0.0],
    )
]


# Weights are normalised over two experts at least, or the gate would learn nothing.
SIZES = {
    "top_p": {"top_k": 4, "router_options": {"min_k": 2}},
    "hierarchical": {"router_options": {"groups": 3, "groups_per_token": 2}},
}


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "two matrices"])
@pytest.mark.parametrize("method", ["copy", "split"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form.values())))
def test_changes_output_is_the_truth(form, method, gated):
    config = SurgeryConfig(**{"method": method, "num_experts": 6, "top_k": 2} | SIZES.get(form["router"], {}) | form)
    mlp, x = weights(gated=gated), torch.randn(40, 10, dtype=torch.float64)
    equal = torch.allclose(made(mlp, config)(x)[0], output(mlp, x), **near("fp64"))
    if config.changes_output is None:
        assert equal
    elif "may" not in config.changes_output:
        assert not equal


@pytest.mark.parametrize(("experts", "top_k", "splits"), [(12, 3, 3), (8, 4, 2), (2, 2, 2), (9, 6, 3), (5, 5, 5)])
@pytest.mark.parametrize("order", ["topk_softmax", "softmax_topk"])
def test_splits_of_every_size_meet_whole_and_scaled(experts, top_k, splits, order):
    inner = 30 * splits
    scale = 0.0 if order == "softmax_topk" else 1.0
    config = UpcycleConfig(num_experts=experts, top_k=top_k, splits=splits, gate_order=order, router_init_scale=scale)
    mlp, x = weights(inner=inner), torch.randn(50, 10, dtype=torch.float64)
    layer = made(mlp, config)
    y, routing = layer(x)
    torch.testing.assert_close(y, output(mlp, x), **near("fp64"))
    # Of equal logits, products in blocks may round one up: a group is together, in whatever order.
    slices = (routing.expert_ids_TK % splits).view(-1, top_k // splits, splits).sort(-1).values
    assert (slices == torch.arange(splits)).all(), "a token met only part of an MLP"
    # 2410.07524: S for a gate of sum 1; (E/S) · S² / K when K probabilities of 1/E are taken.
    published = splits if order == "topk_softmax" else (experts / splits) * splits**2 / top_k
    torch.testing.assert_close(layer.experts.down_proj[0], mlp.down_DF[:, :30] * published)


def test_a_uniform_gate_without_normalisation_is_the_limit_of_a_small_one():
    mlp, x = weights(), torch.randn(200, 10, dtype=torch.float64)
    errors = []
    for scale in (1e-2, 1e-4, 1e-6):
        config = UpcycleConfig(method="copy", gate_order="softmax_topk", router_init_scale=scale)
        y, routing = made(mlp, config)(x)
        errors.append(((y - output(mlp, x)).norm() / output(mlp, x).norm()).item())
        assert (routing.counts_E > 0).all(), "small logits still spread the tokens over all experts"
    assert errors[0] > 5 * errors[1] > 25 * errors[2] > 0
    assert errors[2] < 5e-3
    equal = made(mlp, UpcycleConfig(method="copy", gate_order="softmax_topk", router_init_scale=0.0))
    assert equal(x)[1].counts_E.tolist() == [200, 200, 0, 0, 0, 0, 0, 0], "of equal logits the lower number wins"


def test_switch_takes_one_copy_scaled_by_the_number_of_experts():
    config = UpcycleConfig(method="copy", num_experts=7, top_k=1, gate_order="softmax_topk", router_init_scale=0.0)
    mlp, x = weights(gated=False), torch.randn(9, 10, dtype=torch.float64)
    layer = made(mlp, config)
    torch.testing.assert_close(layer(x)[0], output(mlp, x), **near("fp64"))
    torch.testing.assert_close(layer.experts.down_bias[3], 7 * mlp.down_bias_D)


def test_capacity_is_named_and_exact_below_it():
    mlp, x = weights(), torch.randn(64, 10, dtype=torch.float64)
    roomy = SurgeryConfig(num_experts=4, top_k=2, capacity=CapacityConfig(tokens=64))
    tight = SurgeryConfig(num_experts=4, top_k=2, capacity=CapacityConfig(tokens=8))
    assert roomy.changes_output == tight.changes_output == "equal only while no expert is over its capacity"
    torch.testing.assert_close(made(mlp, roomy)(x)[0], output(mlp, x), **near("fp64"))
    y, routing = made(mlp, tight)(x)
    assert routing.dropped == 64 * 2 - 4 * 8
    assert not torch.allclose(y, output(mlp, x))


def test_groups_of_experts_may_not_part_the_slices():
    limited = TopKOptions(groups=GroupLimit(groups=3, chosen=1))
    whole = SurgeryConfig(method="split", num_experts=12, top_k=2, router_options=limited)
    assert whole.changes_output is None
    mlp, x = weights(), torch.randn(30, 10, dtype=torch.float64)
    torch.testing.assert_close(made(mlp, whole)(x)[0], output(mlp, x), **near("fp64"))
    parted = SurgeryConfig(
        method="split",
        num_experts=6,
        top_k=2,
        splits=2,
        router_options=TopKOptions(groups=GroupLimit(groups=2, chosen=1)),
    )
    assert parted.changes_output == "2 groups of experts part an MLP's slices"


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "two matrices"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_drop_redraws_the_same_units_everywhere_and_keeps_the_rest(fraction, gated):
    inner = 37
    mlp = weights(gated=gated, inner=inner)
    config = UpcycleConfig(method="drop", num_experts=5, top_k=2, drop_fraction=fraction, seed=2)
    experts = made(mlp, config).experts
    entries, biases = experts.in_proj.chunk(2, 1) if gated else (experts.in_proj,), experts.in_bias
    dense_in = (mlp.gate_FD, mlp.up_FD) if gated else (mlp.up_FD,)
    dense_bias = torch.cat([mlp.gate_bias_F, mlp.up_bias_F]) if gated else mlp.up_bias_F
    chosen = []
    for expert in range(5):
        kept = (experts.down_proj[expert] == mlp.down_DF).all(0)
        assert (~kept).sum() == int(inner * fraction)
        assert ((experts.down_proj[expert] != mlp.down_DF).all(0) == ~kept).all(), "a column is drawn whole"
        for weight, old in zip(entries, dense_in, strict=True):
            assert ((weight[expert] == old).all(1) == kept).all()
            assert ((weight[expert] != old).all(1) == ~kept).all()
        assert ((biases[expert] == dense_bias) == kept.repeat(len(dense_in))).all()
        torch.testing.assert_close(experts.down_bias[expert], mlp.down_bias_D, **near("fp64"))
        chosen.append(kept)
    if 0 < fraction < 1:
        assert not torch.equal(chosen[0], chosen[1]), "every expert loses its own units"
    assert (config.changes_output is None) == (fraction == 0)


def test_drop_draws_with_each_matrix_own_mean_and_spread():
    mlp = weights(inner=600, hidden=400, bias=False)
    # Half of the units are special, so that statistics of the whole matrix would be other ones.
    mlp.up_FD[:300] += 3.0
    config = UpcycleConfig(method="drop", num_experts=2, top_k=2, drop_fraction=0.25)
    experts = made(mlp, config).experts
    gate, up = experts.gate_up_proj.chunk(2, 1)
    for expert in range(2):
        units = (experts.down_proj[expert] != mlp.down_DF).all(0)
        for new, old in (
            (gate[expert][units], mlp.gate_FD[units]),
            (up[expert][units], mlp.up_FD[units]),
            (experts.down_proj[expert][:, units], mlp.down_DF[:, units]),
        ):
            assert new.numel() == 150 * 400
            torch.testing.assert_close(new.mean(), old.mean(), rtol=0, atol=4 * old.std().item() / new.numel() ** 0.5)
            torch.testing.assert_close(new.std(), old.std(), **near("standard deviation of many"))
            # Normal numbers, not the old ones in another order.
            assert abs(torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1]) < 0.02


def test_noise_is_each_matrix_own():
    mlp = weights(inner=300, hidden=200, bias=False)
    experts = made(mlp, UpcycleConfig(method="noise", num_experts=3, top_k=2, noise=0.02)).experts
    gate, up = experts.gate_up_proj.chunk(2, 1)
    for new, old in ((gate, mlp.gate_FD), (up, mlp.up_FD), (experts.down_proj, mlp.down_DF)):
        added = (new - old).flatten(1)
        torch.testing.assert_close(added.std(1), (0.02 * old.std()).expand(3), **near("standard deviation of many"))
        assert torch.corrcoef(added)[0, 1].abs() < 0.02, "every expert gets its own noise"


@pytest.mark.parametrize("missing", ["up_bias_F", "gate_bias_F", "down_bias_D"])
def test_a_missing_bias_is_zero(missing):
    mlp = dataclasses.replace(weights(), **{missing: None})
    x = torch.randn(20, 10, dtype=torch.float64)
    layer = made(mlp, UpcycleConfig(num_experts=4, top_k=2))
    torch.testing.assert_close(layer(x)[0], output(mlp, x), **near("fp64"))


def test_layers_share_no_memory_and_keep_dtype():
    mlp = weights()
    mlp = dataclasses.replace(mlp, **{n: v.bfloat16() for n, v in vars(mlp).items() if isinstance(v, torch.Tensor)})
    layer = made(mlp, UpcycleConfig(num_experts=2, top_k=2, splits=2, router="sigmoid", norm_topk_prob=True))
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.router.selection_bias.dtype == torch.float32
    before = mlp.up_FD.clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(mlp.up_FD, before)


@pytest.mark.parametrize(
    "config",
    [
        UpcycleConfig(),
        UpcycleConfig(method="copy", num_experts=3, top_k=2),
        UpcycleConfig(num_experts=12, top_k=3, splits=3),
        UpcycleConfig(num_experts=8, top_k=4, splits=2),  # two groups a token, unequal weights
        UpcycleConfig(num_experts=2, top_k=2, splits=2),  # one group: no choice to make
        UpcycleConfig(gate_order="softmax_topk", router_init_scale=0.0),
        UpcycleConfig(router="sigmoid", norm_topk_prob=True),
    ],
    ids=lambda c: f"{c.method} {c.num_experts}/{c.top_k} {c.router} {c.gate_order}",
)
@pytest.mark.parametrize("tied", [True, False])
def test_output_is_the_dense_models(config, tied):
    model = dense(tie_word_embeddings=tied).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(61, (4, 30))
    sparse = upcycle(model, config)
    # fp64, but the router chooses in fp64 too: only the order of sums differs.
    torch.testing.assert_close(sparse(ids).logits, model(ids).logits, **near("fp64"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_equal_active_flops():
    sparse = upcycled_config(DENSE, UpcycleConfig())
    assert sparse.moe.top_k * sparse.moe.intermediate_size == DENSE.intermediate_size


def test_noise_is_near_not_equal():
    model, ids = dense(), torch.randint(61, (2, 20))
    sparse = upcycle(model, UpcycleConfig(method="noise", num_experts=4, top_k=2, noise=0.01))
    difference = (sparse(ids).logits - model(ids).logits).abs().max().item()
    assert 0 < difference < 0.05 * model(ids).logits.abs().max().item()


@pytest.mark.parametrize("method", ["split", "noise", "drop"])
def test_a_seed_is_a_model(method):
    model = dense()
    torch.manual_seed(1)
    same = upcycle(model, UpcycleConfig(method=method, seed=3))
    torch.manual_seed(2)  # the global generator has no say, and is left alone
    state = torch.get_rng_state()
    again, other = (
        upcycle(model, UpcycleConfig(method=method, seed=3)),
        upcycle(model, UpcycleConfig(method=method, seed=4)),
    )
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in same.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        drawn = "router" in name or ("experts" in name and method != "split")
        assert torch.equal(value, other.state_dict()[name]) != drawn


@pytest.mark.parametrize("router", ["noisy_topk", "hierarchical"])
def test_a_seed_is_a_router_that_draws_more_than_its_experts_rows(router):
    config = SurgeryConfig(router=router, num_experts=9, top_k=2, **SIZES.get(router, {}))
    first, again = made(weights(), config), made(weights(), config)
    assert torch.equal(first.router.weight, again.router.weight)
    other = made(weights(), dataclasses.replace(config, seed=1))
    differs = (first.router.weight != other.router.weight).all(1)
    # noisy_topk's noise rows start at 0 and stay so.
    assert differs.sum() == {"noisy_topk": 9, "hierarchical": 12}[router]


def test_trains_apart_from_the_dense_model():
    model = dense()
    sparse = upcycle(model, UpcycleConfig())
    assert all(parameter.requires_grad for parameter in sparse.parameters())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in sparse.parameters()}
    assert not shared
    # The pairs leave each other: their router rows get different gradients although they are equal.
    ids = torch.randint(61, (4, 30))
    sparse(ids).logits.logsumexp(-1).sum().backward()
    gradient = sparse.layers[0].mlp.router.weight.grad
    assert not torch.allclose(gradient[0], gradient[1])


def test_a_gate_of_sum_1_is_written_under_the_family_name_for_it(tmp_path):
    ids = torch.randint(61, (2, 20))
    for order, norm in (("topk_softmax", False), ("softmax_topk", True)):
        config = UpcycleConfig(gate_order=order, norm_topk_prob=norm)
        mixtral = upcycle(dense(), config)
        save_decoder(mixtral, tmp_path / order)
        torch.testing.assert_close(load_decoder(tmp_path / order)(ids).logits, mixtral(ids).logits, **near("fp32 twin"))
        qwen = upcycled_config(dataclasses.replace(DENSE, arch="qwen3", qk_norm=True), config)
        assert (qwen.arch, config_to_hf(qwen)["norm_topk_prob"]) == ("qwen3_moe", True)
    raw = UpcycleConfig(gate_order="softmax_topk")
    qwen = upcycled_config(dataclasses.replace(DENSE, arch="qwen3", qk_norm=True), raw)
    assert config_to_hf(qwen)["norm_topk_prob"] is False


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"gate_order": "softmax_topk"}, "moe.gate_order='softmax_topk'"),
        ({"router": "sigmoid", "norm_topk_prob": True}, "moe.router='sigmoid'"),
    ],
)
def test_what_the_familys_files_cannot_express_stays_in_memory(tmp_path, settings, field):
    sparse = upcycle(dense(), UpcycleConfig(**settings))
    assert sparse(torch.randint(61, (1, 5))).logits.isfinite().all()
    with pytest.raises(UnsupportedError, match=f"mixtral model on disk cannot express .*{field}"):
        save_decoder(sparse, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_refusals_name_the_reason():
    with pytest.raises(ConfigError, match=r"splits \(5\) must divide .* intermediate_size \(36\)"):
        upcycle(dense(), UpcycleConfig(num_experts=10, top_k=5, splits=5))
    with pytest.raises(UnsupportedError, match="already"):
        upcycle(upcycle(dense(), UpcycleConfig()), UpcycleConfig())
    with pytest.raises(UnsupportedError, match="with biases"):
        upcycle(dense(attention_bias=True), UpcycleConfig())
    for wrong, message in (
        ({"method": "drop", "drop_fraction": 1.5}, "drop_fraction"),
        ({"method": "copy", "top_k": 1}, "top_k 1 with renormalised weights"),
        ({"norm_topk_prob": True}, "norm_topk_prob belongs to"),
        ({"router": "magic"}, "choose from"),
    ):
        with pytest.raises(ConfigError, match=message):
            UpcycleConfig(**wrong)
