"""Quantising in place and while loading: what the modules compute, what the report says, what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import moekit
from moekit.adapt import hottest, load_quantised, quantise
from moekit.adapt.quant import QuantEmbedding, QuantExperts, QuantLinear
from moekit.config import ExpertGroup, MoEConfig
from moekit.errors import ConfigError, UnknownNameError, UnsupportedError
from moekit.kernels.formats import Format, pack, unpack
from moekit.models.decoder import Decoder
from moekit.moe import MoE, RoutingRecord
from tiny import tiny_config, tiny_model
from tolerances import rel

FORMATS = ["int8", "int4", "int4-g64", "int4-g128-asym", "nf4", "mxfp4"]
MIXED = ["int8", "nf4", "int4-g64-asym", "mxfp4"]


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def dequantised(quantised: Decoder, config) -> Decoder:
    """A plain decoder of the numbers that the packed matrices stand for."""
    plain = Decoder(config).eval()
    state = {}
    for name, module in quantised.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            state[f"{name}.weight"] = unpack(module.packed)
        elif isinstance(module, QuantExperts):
            pairs = [module.packed_expert(expert) for expert in range(len(module.formats))]
            stacks = [torch.stack([unpack(each) for each in side]) for side in zip(*pairs, strict=True)]
            state |= {f"{name}.gate_up_proj": stacks[0], f"{name}.down_proj": stacks[1]}
    floats = {
        name: value for name, value in quantised.state_dict().items() if getattr(value, "is_floating_point", bool)()
    }
    plain.load_state_dict({**floats, **state})
    return plain


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
def test_a_quantised_decoder_is_its_dequantised_one(format, moe, threads):
    model = tiny_model(moe=moe)
    quantise(model.decoder, format, head=format)
    plain = dequantised(model.decoder, model.config)
    ids, record = torch.randint(90, (2, 40)), RoutingRecord()
    with torch.no_grad():
        with record.recording():
            want = plain(ids).logits
        with record.replaying():  # a rounded activation can send a token near a tie elsewhere, which no bound covers
            got = model.decoder(ids).logits
    assert distance(got, want) < rel("int8 activations, nf4" if format == "nf4" else "int8 activations")


def test_a_token_at_a_time_gives_what_a_prompt_gives():
    model = tiny_model()
    quantise(model.decoder, "int4", per_expert={0: MIXED})
    ids = model.encode("to be or not to be")
    session = model.new_session()
    for token in ids:
        last = session.append([token])
    with torch.no_grad():
        whole = model(torch.tensor([ids])).logits[0, -1]
    assert distance(last, whole) < rel("int8 activations")  # the cache holds float16


def test_experts_of_mixed_formats_in_both_calls():
    config = MoEConfig(hidden_size=48, intermediate_size=20, num_experts=5, top_k=2)
    layer = MoE(config)
    formats = ["int8-g32", "int4", "nf4", "mxfp4", "int4-g128-asym"]
    quantise(holder := nn.ModuleDict({"moe": layer}), "int4", per_expert={"moe.experts": formats})
    assert [str(each) for each in layer.experts.formats] == [str(Format.parse(each)) for each in formats]
    x = torch.randn(33, 48)
    with torch.no_grad():
        whole, routing = layer(x)
    rows, plan = layer.dispatcher.dispatch(x, routing)
    sorted_way = layer.dispatcher.combine(layer.experts(rows, plan.counts_E), plan)
    assert distance(sorted_way, whole) < rel("int8 activations")
    x.requires_grad_()
    layer(x)[0].square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    del holder


@pytest.mark.parametrize("kind", ["mlp", "swiglu", "clamped_swiglu"])
def test_plain_and_gated_experts_with_biases_and_no_rows(kind):
    config = MoEConfig(hidden_size=32, intermediate_size=24, num_experts=3, top_k=2, expert=kind, bias=True)
    layer = MoE(config)
    for name in ("down_bias", "up_bias" if kind == "mlp" else "gate_up_bias"):
        nn.init.normal_(getattr(layer.experts, name), std=5.0)  # beyond the limits of clamped_swiglu too
    exact = copy.deepcopy(layer.experts)
    quantise(layer, "int8-g32")
    rows, counts = torch.randn(7, 32), torch.tensor([4, 0, 2])  # nobody for the second, a row past the last
    with torch.no_grad():
        got, want = layer.experts(rows, counts), exact(rows, counts)
    assert got.shape == (7, 32)
    assert distance(got[:6], want[:6]) < rel("int8 weights")
    assert layer.experts(rows[:0], torch.zeros(3, dtype=torch.long)).shape == (0, 32)


def test_an_embedding_gives_its_rows():
    embedding = QuantEmbedding(50, 24, Format.parse("int4"))
    weight = torch.randn(50, 24)
    embedding.fill("weight", weight)
    ids = torch.tensor([[49, 0, 17], [17, 16, 15]])
    assert torch.equal(embedding(ids), unpack(pack(weight, Format.parse("int4")))[ids])


def test_tied_heads_share_one_matrix():
    config = tiny_config(moe=False)
    decoder = Decoder(type(config)(**{**vars(config), "tie_word_embeddings": True})).eval()
    report = quantise(decoder, "int4", head="int8")
    assert decoder.head is None
    assert decoder.head_packed is decoder.embed.packed
    assert [each.name for each in report.packed].count("embed.weight") == 1
    assert decoder(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, config.vocab_size)
    with pytest.raises(UnsupportedError, match="head is quantised"):
        decoder.head_weight  # noqa: B018


def test_copies_states_and_moves():
    model = tiny_model()
    quantise(model.decoder, "int4", per_expert={1: MIXED})
    ids = torch.randint(90, (1, 9))
    with torch.no_grad():
        want = model.decoder(ids).logits
        twin = copy.deepcopy(model.decoder)
        assert torch.equal(twin(ids).logits, want)
        for buffer in twin.buffers():
            buffer.zero_()
        assert torch.equal(model.decoder(ids).logits, want)
        assert not torch.equal(twin(ids).logits, want)
        twin.load_state_dict(model.decoder.state_dict())
        assert torch.equal(twin(ids).logits, want)
        twin.load_state_dict(copy.deepcopy(model.decoder.state_dict()), assign=True)
        assert torch.equal(twin(ids).logits, want)
        assert torch.equal(model.decoder.to(torch.bfloat16).float()(ids).logits, twin.bfloat16().float()(ids).logits)
    assert twin.layers[0].attn.q_proj.data.dtype == torch.uint8


def test_a_copy_multiplies_with_its_own_bytes():
    layer = MoE(MoEConfig(hidden_size=32, intermediate_size=16, num_experts=4, top_k=2, num_shared_experts=1))
    quantise(layer, "int4")
    x = torch.randn(3, 32)
    with torch.no_grad():
        want = layer(x)[0]  # the addresses are kept from here on
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            for buffer in twin.buffers():
                buffer.zero_()
            assert not twin(x)[0].any()
        assert torch.equal(layer(x)[0], want)


def test_a_state_of_another_format_is_refused():
    model, other = tiny_model(), tiny_model()
    quantise(model.decoder, "int4")
    quantise(other.decoder, "int4-g64-asym")  # of 4.5 bits too
    with pytest.raises((ConfigError, RuntimeError), match="int4-g64-asym"):
        model.decoder.load_state_dict(other.decoder.state_dict())


def test_the_report_lists_every_parameter_once():
    model = tiny_model()
    shapes = {name: tuple(value.shape) for name, value in model.decoder.named_parameters()}
    nbytes = sum(value.nbytes for value in model.decoder.parameters())
    report = quantise(model.decoder, "int4", per_expert={0: ["int8", "int8", "int4", "int4"]})
    assert {each.name: each.shape for each in report.tensors} == shapes
    assert report.bytes_before == nbytes
    assert report.expert_bytes == (4 * 4 * 3 * 32 * 16 * 2, 4 * 4 * 3 * 32 * 16 * 2)
    by_name = {each.name: each for each in report.packed}
    assert by_name["layers.0.mlp.experts.down_proj"].format == "2 × int8-g64, 2 × int4-g32"
    assert report.worst(1)[0].error == max(each.error for each in report.packed)
    reasons = {each.name: each.why for each in report.kept}
    assert "a router" in reasons["layers.0.mlp.router.weight"]
    assert reasons["norm.weight"] == "a vector"
    assert report.to_dict()["bits_per_weight"] == pytest.approx(
        8 * report.bytes_after / sum(map(_count, shapes.values()))
    )


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def test_the_error_is_the_definition():
    linear = nn.Sequential(nn.Linear(70, 33))
    weight = linear[0].weight.detach().clone()
    (entry,) = quantise(linear, "nf4").packed
    lost = (unpack(linear[0].packed).double() - weight.double()).norm() / weight.double().norm()
    assert entry.error == pytest.approx(lost.item())


def test_other_modules_and_what_stays():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    shared = nn.Linear(16, 16)
    net = nn.ModuleDict(
        {"a": shared, "b": shared, "gate": nn.Linear(16, 4), "odd": Odd(16, 16), "conv": nn.Conv1d(2, 2, 3)}
    ).bfloat16()
    report = quantise(net, "int8")
    assert net["a"] is net["b"]
    assert isinstance(net["a"], QuantLinear)
    assert [each.name for each in report.packed] == ["a.weight"]
    reasons = {each.name: each.why for each in report.kept}
    assert "'*gate'" in reasons["gate.weight"]
    assert "Odd" in reasons["odd.weight"]
    assert "convolution" in reasons["conv.weight"]
    assert net["a"](torch.ones(1, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_tied_linears_of_other_modules_are_counted_once():
    net = nn.ModuleDict({"embed": nn.Embedding(20, 16), "head": nn.Linear(16, 20, bias=False)})
    net["head"].weight = net["embed"].weight
    report = quantise(net, "int8")
    assert report.bytes_before == 20 * 16 * 4
    assert isinstance(net["embed"], nn.Embedding)
    assert isinstance(net["head"], QuantLinear)


def test_groups_of_different_experts():
    groups = (ExpertGroup(count=2, intermediate_size=16), ExpertGroup(count=1, kind="identity"))
    config = MoEConfig(
        hidden_size=32, intermediate_size=8, num_experts=3, top_k=2, expert="mixed", expert_groups=groups
    )
    layer = MoE(config)
    exact = copy.deepcopy(layer)
    quantise(layer, "int8-g32")
    assert isinstance(layer.experts.groups[0], QuantExperts)
    x = torch.randn(9, 32)
    with torch.no_grad():
        got, want = layer(x)[0], exact(x)[0]
    assert distance(got, want) < rel("int8 weights")


def test_shared_experts_are_packed_and_their_gate_is_not():
    config = MoEConfig(
        hidden_size=32, intermediate_size=16, num_experts=4, top_k=2, num_shared_experts=1, shared_gate=True
    )
    report = quantise(MoE(config), "int4")
    assert {each.name for each in report.packed} >= {f"shared.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert "shared.gate.weight" in {each.name for each in report.kept}


class Stacked(nn.Module):
    """Experts as other libraries have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 8))


def test_experts_that_it_does_not_know_are_never_skipped_silently():
    net = nn.ModuleDict({"experts": Stacked(), "proj": nn.Linear(8, 8)})
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj of Stacked is a stack of matrices"):
        quantise(net, "int8")
    assert isinstance(net["proj"], nn.Linear)
    report = quantise(net, "int8", skip=["experts"])
    assert report.expert_bytes == (0, 4 * 16 * 8 * 4)


def test_refusals_leave_the_model_as_it_was():
    model = tiny_model()
    before = copy.deepcopy(model.decoder.state_dict())
    for error, match, options in (
        (UnknownNameError, "unknown format 'int5'", {"format": "int5"}),
        (UnknownNameError, "unknown format 'int3'", {"format": "int8", "head": "int3"}),
        (ConfigError, "per_expert names 7", {"format": "int8", "per_expert": {7: MIXED}}),
        (ConfigError, "3 formats for 4 experts", {"format": "int8", "per_expert": {0: MIXED[:3]}}),
    ):
        with pytest.raises(error, match=match):
            quantise(model.decoder, **options)
    with torch.no_grad():
        model.decoder.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts\.down_proj cannot be quantised"):
        quantise(model.decoder, "int4")
    assert model.decoder.state_dict().keys() == before.keys()
    with pytest.raises(UnsupportedError, match="cannot be replaced in itself"):
        quantise(nn.Linear(4, 4), "int8")
    with pytest.raises(UnsupportedError, match="no linear layer"):
        quantise(nn.Sequential(nn.ReLU()), "int8")
    with pytest.raises(UnsupportedError, match="quantised already"):
        quantise(tiny_quantised().decoder, "int8")


def tiny_quantised():
    model = tiny_model()
    quantise(model.decoder, "int8")
    return model


def test_loading_quantised_is_quantising_what_was_loaded(tmp_path):
    model = tiny_model()
    model.save(tmp_path)
    steps = []
    decoder, report = load_quantised(tmp_path, "int4", progress=lambda done, total: steps.append((done, total)))
    other = quantise(model.decoder, "int4")
    assert report == other
    assert steps == [(i + 1, 25) for i in range(25)]
    state = decoder.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.decoder.state_dict().items() if isinstance(v, torch.Tensor))
    ids = torch.randint(90, (1, 5))
    with torch.no_grad():
        assert torch.equal(moekit.load(tmp_path, quant="int4")(ids).logits, decoder(ids).logits)


def test_a_quantised_model_computes_in_float32_and_remembers_in_float16():
    model = tiny_model()
    model.decoder.bfloat16()
    quantise(model.decoder, "int8")
    assert {value.dtype for value in model.decoder.parameters()} == {torch.float32}
    assert model.decoder.cache_dtype == torch.float16
    session = model.new_session()
    assert session.append([1, 2, 3]).dtype == torch.float32


def test_the_busiest_experts():
    assert hottest([[5, 0, 9, 1], [0, 0, 0, 1]], [1, 4], 0.5, "int8", "int4") == {
        1: ["int8", "int4", "int8", "int4"],
        4: ["int8", "int4", "int4", "int8"],
    }
    assert hottest([[1, 2, 3]], [0], 0.0, "int8", "int4") == {0: ["int4"] * 3}
    with pytest.raises(ConfigError, match="between 0 and 1"):
        hottest([[1]], [0], 1.5, "int8", "int4")
