"""A token in native steps against the same token through the modules, which define it, and against transformers."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn
from twins import TWINS, tokens, write

from moekit.adapt.quant import quantise
from moekit.config import CapacityConfig, GroupLimit, ModelConfig, MoEConfig, SigmoidOptions, TopKOptions
from moekit.kernels import cpu, forced
from moekit.kernels.formats import Format, pack
from moekit.kernels.quant import Matrices, quant_linear, quant_moe
from moekit.models import Decoder, KVCache, load_decoder
from moekit.moe import Experts, GroupedSwiGLU, MoE, RoutingRecord
from tolerances import assert_near, near

BASE = {"hidden_size": 24, "intermediate_size": 20, "num_experts": 7, "top_k": 3}
LAYERS = {
    "topk_softmax": {},
    "softmax_topk": {"gate_order": "softmax_topk"},
    "normalised, scaled": {"gate_order": "softmax_topk", "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "every expert": {"top_k": 7},
    "shared": {"num_shared_experts": 2, "shared_intermediate_size": 9},
    "gated shared": {"num_shared_experts": 1, "shared_gate": True},
    "two matrices, biases": {"expert": "mlp", "activation": "gelu", "bias": True},
    "biases, shared": {"bias": True, "num_shared_experts": 1, "activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    # The Python router runs between two native calls.
    "sigmoid": {"router": "sigmoid", "router_options": SigmoidOptions()},
    "selection bias": {"router_options": TopKOptions(bias=True)},
    "groups": {"num_experts": 8, "router_options": TopKOptions(groups=GroupLimit(groups=4, chosen=2))},
    "top_p": {"router": "top_p", "top_k": 4, "gate_order": "softmax_topk"},
    "hash": {"router": "hash"},
    "capacity": {"capacity": CapacityConfig(factor=1.0)},
}


def decoder_with(moe=None, dtype=torch.float32, **options):
    """Random everywhere, norms and biases too."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 2000}
    sizes |= {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, **options}
    config = ModelConfig(arch="qwen3_moe", moe=moe and MoEConfig(**moe), **sizes)
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
        for name, buffer in decoder.named_buffers():
            if name.endswith("selection_bias"):
                buffer.normal_(0.0, 0.2)
    return decoder.to(dtype)


def decoded(decoder, ids, prompt=5, cache_dtype=None, capacity=4, threads=None):
    """Logits (L, V) and routings of each token after the prompt, one at a time, then with so many threads."""
    cache = KVCache(decoder.config, dtype=cache_dtype or decoder.norm.weight.dtype, capacity=capacity)
    outputs = []
    with torch.inference_mode():
        if prompt:
            decoder(ids[:, :prompt], cache=cache)
        if threads:
            torch.set_num_threads(threads)
        for position in range(prompt, ids.shape[1]):
            outputs.append(decoder(ids[:, position : position + 1], cache=cache))
    return torch.cat([out.logits[0] for out in outputs]), [out.routings for out in outputs]


def same_routings(left, right):
    for ours, theirs in zip(left, right, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.expert_ids_A, other.expert_ids_A)
            assert torch.equal(one.token_ids_A, other.token_ids_A)
            torch.testing.assert_close(one.weights_A, other.weights_A, **near("fp32 twin"))
            torch.testing.assert_close(one.logits_TE, other.logits_TE, **near("fp32 twin"))
            assert (one.top_k, one.score_function, one.groups) == (other.top_k, other.score_function, other.groups)
            assert torch.equal(one.counts_E, other.counts_E)


def both_ways(decoder, ids, **options):
    """(steps, modules)."""
    assert "of 2 and the MLP of 2 of 2" in decoder.explain() or "of 3 and the MLP of 3 of 3" in decoder.explain()
    steps = decoded(decoder, ids, **options)
    with forced("reference"):
        assert "modules" in decoder.explain()
        return steps, decoded(decoder, ids, **options)


def packed_both_ways(decoder, ids):
    """(steps, modules), where the modules run the same native products: a reference does not round activations, and a
    router near a tie chooses another expert for that. A hook is what sends a pass through the modules."""
    steps = decoded(decoder, ids)
    hooks = [
        part.register_forward_hook(lambda *_: None) for block in decoder.layers for part in (block.attn, block.mlp)
    ]
    assert "attention of 0 and the MLP of 0" in decoder.explain()
    modules = decoded(decoder, ids)
    for hook in hooks:
        hook.remove()
    return steps, modules


@pytest.fixture(params=TWINS)
def pair(request, tmp_path):
    """(ours, transformers') with the same weights."""
    theirs = write(request.param, tmp_path)
    return load_decoder(tmp_path), theirs


def test_tokens_in_steps_equal_one_full_pass_of_transformers(pair, threads):
    ours, theirs = pair
    ids = tokens(1, 21)
    (logits, _), _ = both_ways(ours, ids, prompt=0)
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs(ids).logits[0], **near("fp32 twin"))


@pytest.mark.parametrize("layer", LAYERS)
def test_steps_equal_modules_for_every_kind_of_layer(layer):
    decoder = decoder_with({**BASE, **LAYERS[layer]}, qk_norm=True, attention_bias=True)
    (logits, routings), (wanted, wanted_routings) = both_ways(decoder, tokens(1, 16) % 50)
    torch.testing.assert_close(logits, wanted, **near("fp32 twin"))
    same_routings(routings, wanted_routings)


@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(1, 1, 34), (4, 4, 16), (12, 2, 6), (8, 1, 48)], ids=str)
def test_steps_equal_modules_on_every_instruction_set(isa, dtype, cache_dtype, heads):
    query, key, size = heads
    sizes = {"num_attention_heads": query, "num_key_value_heads": key, "head_dim": size}
    moe = {**BASE, "num_shared_experts": 1, "shared_gate": True}
    decoder = decoder_with(moe, dtype, dense_layers=(1,), qk_norm=query == 4, attention_bias=query == 12, **sizes)
    with cpu.forced_isa(isa):
        (logits, _), (wanted, _) = both_ways(decoder, tokens(1, 14) % 50, cache_dtype=cache_dtype)
    if dtype == torch.float32:
        what = "fp32 twin" if cache_dtype == torch.float32 else "rounded cache"
        torch.testing.assert_close(logits, wanted, **near(what))
    else:
        assert_near(logits.float(), wanted.float(), "bf16 decoder")


def test_one_and_two_threads_give_the_same_bits():
    moe = {**BASE, "hidden_size": 300, "intermediate_size": 270, "num_shared_experts": 1}
    decoder = decoder_with(moe, torch.bfloat16, hidden_size=300)
    ids, before = tokens(1, 530) % 50, torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(1)  # for the prompt: PyTorch's own products differ with AMX
        results.append(decoded(decoder, ids, prompt=500, threads=count)[0])
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("length", [511, 512, 513, 1024, 1400])
def test_long_contexts_at_the_edges_of_a_split(length):
    decoder = decoder_with(BASE)
    (logits, _), (wanted, _) = both_ways(decoder, tokens(1, length + 2) % 50, prompt=length - 1, capacity=length)
    torch.testing.assert_close(logits, wanted, **near("fp32 twin"))


def test_a_cache_may_be_cut_back_and_grow_again():
    decoder = decoder_with(BASE)
    first, second = tokens(1, 20) % 50, tokens(1, 20) % 50
    second[:, :9] = first[:, :9]
    cache = KVCache(decoder.config, capacity=3)
    with torch.inference_mode():
        for ids in (first, second[:, 9:]):
            for token in ids.split(1, dim=1):
                logits = decoder(token, cache=cache).logits
            cache.truncate(9) if ids is first else None
        torch.testing.assert_close(logits[0], decoder(second).logits[0, -1:], **near("fp32 twin"))


def test_values_past_the_end_of_the_cache_are_never_read(poisoned):
    decoder = decoder_with(BASE)
    logits, _ = decoded(decoder, tokens(1, 40) % 50, capacity=7)
    assert logits.isfinite().all()


# ---- when the modules run -----------------------------------------------------------------------------------------


def parts(decoder):
    """(attentions, MLPs) that decode in steps."""
    words = decoder.explain().split()
    return int(words[words.index("attention") + 2]), int(words[words.index("MLP") + 2])


def test_hooks_fire_and_change_no_number():
    decoder = decoder_with(BASE)
    ids, seen = tokens(1, 9) % 50, []
    plain, _ = decoded(decoder, ids)
    layer = next(module for module in decoder.modules() if isinstance(module, MoE))
    handle = layer.register_forward_hook(lambda *args: seen.append(args))
    assert parts(decoder) == (2, 1)
    hooked, _ = decoded(decoder, ids)
    assert len(seen) == 1 + 4
    torch.testing.assert_close(hooked, plain, **near("fp32 twin"))
    handle.remove()
    assert parts(decoder) == (2, 2)


def test_what_changes_a_weight_is_seen():
    decoder = decoder_with(BASE)
    ids = tokens(1, 8) % 50
    decoded(decoder, ids)
    with torch.no_grad():
        decoder.layers[0].attn.q_proj.weight.neg_()  # in place
        decoder.layers[1].mlp.router.weight = nn.Parameter(torch.randn(7, 24))  # another parameter
        decoder.layers[0].mlp_norm = copy.deepcopy(decoder.layers[1].mlp_norm)  # another module
        decoder.layers[1].mlp.experts.down_proj.data = torch.randn(7, 24, 20)  # other memory
    (logits, routings), (wanted, wanted_routings) = both_ways(decoder, ids)
    torch.testing.assert_close(logits, wanted, **near("fp32 twin"))
    same_routings(routings, wanted_routings)


def test_another_dtype_is_another_step():
    decoder = decoder_with(BASE)
    ids = tokens(1, 8) % 50
    decoded(decoder, ids)
    (logits, _), (wanted, _) = both_ways(decoder.bfloat16(), ids)
    assert_near(logits.float(), wanted.float(), "bf16 decoder")
    decoder.double()
    assert "float64" in decoder.explain()
    decoded(decoder, ids)


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def test_modules_of_other_kinds_run_as_they_are():
    decoder = decoder_with(BASE)
    ids = tokens(1, 8) % 50
    decoded(decoder, ids)
    decoder.layers[0].attn.v_proj = Doubled(decoder.layers[0].attn.v_proj)
    decoder.layers[1].mlp.experts.forward = lambda rows_RD, counts_E: torch.zeros_like(rows_RD)
    decoder.layers[1].mlp.experts.decode = lambda x_TD, routing: None
    assert parts(decoder) == (1, 1)
    with torch.inference_mode():
        wanted = decoder(ids).logits[0, 5:]
    torch.testing.assert_close(decoded(decoder, ids)[0], wanted, **near("fp32 twin"))


def test_a_record_is_made_and_followed():
    decoder = decoder_with(BASE)
    ids, record = tokens(1, 6) % 50, RoutingRecord()
    with record.recording():
        _, routings = decoded(decoder, ids)
    assert len(record.decisions) == 2 * 2
    with torch.no_grad():
        decoder.layers[0].mlp.router.weight.neg_()
    with record.replaying():
        _, again = decoded(decoder, ids)
    assert torch.equal(routings[0][0].expert_ids_A, again[0][0].expert_ids_A)
    assert not torch.equal(routings[0][0].weights_A, again[0][0].weights_A)


def test_gradients_and_batches_go_through_the_modules(monkeypatch):
    decoder = decoder_with(BASE)
    monkeypatch.setattr(type(decoder._steps), "run", lambda *args: pytest.fail("a step ran"))
    cache = KVCache(decoder.config)
    decoder(tokens(1, 1) % 50, cache=cache).logits.sum().backward()
    with torch.no_grad():
        decoder(tokens(1, 1) % 50)
        decoder(tokens(2, 1) % 50, cache=KVCache(decoder.config, batch=2))
        decoder(tokens(1, 2) % 50, cache=cache)
        with torch.autocast("cpu", torch.bfloat16):
            decoder(tokens(1, 1) % 50, cache=cache)


def test_a_noisy_router_in_training_is_not_replaced():
    decoder = decoder_with({**BASE, "router_options": TopKOptions(noise_std=5.0)}).train()
    ids = tokens(1, 9) % 50
    assert not torch.equal(decoded(decoder, ids)[0], decoded(decoder, ids)[0])
    decoder.eval()
    assert torch.equal(decoded(decoder, ids)[0], decoded(decoder, ids)[0])


def test_a_decoder_that_has_decoded_can_be_copied_and_saved():
    decoder = decoder_with(BASE)
    ids = tokens(1, 7) % 50
    logits, _ = decoded(decoder, ids)
    twin, stored = copy.deepcopy(decoder), io.BytesIO()
    torch.save(decoder, stored)
    stored.seek(0)
    for other in (twin, torch.load(stored, weights_only=False)):
        with torch.no_grad():
            decoder.layers[0].attn.q_proj.weight.zero_()
        assert torch.equal(decoded(other, ids)[0], logits)


def test_two_decoders_and_sizes_do_not_share_angles():
    one, other = decoder_with(BASE), decoder_with(BASE)
    other.config = dataclasses.replace(other.config, rope_theta=77.0)
    for decoder in (one, other):
        (logits, _), (wanted, _) = both_ways(decoder, tokens(1, 9) % 50)
        torch.testing.assert_close(logits, wanted, **near("fp32 twin"))


# ---- packed matrices ----------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    def __init__(self, linear, form):
        super().__init__()
        self.packed, self.bias = pack(linear.weight, form), linear.bias

    def forward(self, x):
        return quant_linear(x, self.packed, self.bias)


class PackedExperts(Experts):
    def __init__(self, experts, forms):
        super().__init__()
        self.in_bias, self.down_bias, self.activation = None, None, experts.activation
        self.gated = isinstance(experts, GroupedSwiGLU)
        parts = 2 if self.gated else 1
        self.gate_up = Matrices([pack(w, f, parts) for w, f in zip(experts.in_proj, forms, strict=True)])
        self.down = Matrices([pack(w, f) for w, f in zip(experts.down_proj, forms, strict=True)])

    def decode(self, x_TD, routing):
        args = (routing.expert_ids_TK, routing.weights_TK, self.gate_up, self.down, self.activation, self.gated)
        return quant_moe(x_TD, *args)


def pack_decoder(decoder, form, expert_forms):
    """Every linear of the blocks, where a matrix stays plain in each of them: the output's or the shared up."""
    decoder.requires_grad_(False)
    for block in decoder.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(block.attn, name, PackedLinear(getattr(block.attn, name), form))
        if isinstance(block.mlp, MoE):
            block.mlp.experts = PackedExperts(block.mlp.experts, expert_forms)
            block.mlp.shared.down_proj = PackedLinear(block.mlp.shared.down_proj, form)
            block.mlp.shared.gate_proj = PackedLinear(block.mlp.shared.gate_proj, form)
        else:
            block.mlp.up_proj = PackedLinear(block.mlp.up_proj, form)
            block.mlp.down_proj = PackedLinear(block.mlp.down_proj, form)
    return decoder


@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("form", ["int8", "int4", "int4-g64-asym", "nf4", "mxfp4"])
def test_packed_matrices_beside_plain_ones(form, isa, threads):
    moe = {**BASE, "hidden_size": 40, "intermediate_size": 50, "num_shared_experts": 1, "shared_gate": True}
    sizes = {"hidden_size": 40, "intermediate_size": 77, "dense_layers": (1,), "attention_bias": True}
    expert_forms = [Format.parse(form), Format.parse("int8-g32")] * 3 + [Format.parse("int4")]
    decoder = pack_decoder(decoder_with(moe, **sizes), Format.parse(form), expert_forms)
    with cpu.forced_isa(isa):
        (logits, _), (wanted, _) = packed_both_ways(decoder, tokens(1, 12) % 50)
    assert_near(logits, wanted, "packed decoder")


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_a_quantised_decoder_takes_its_steps(form):
    decoder = decoder_with({**BASE, "num_shared_experts": 1})
    quantise(decoder, form)
    (logits, routings), (wanted, wanted_routings) = packed_both_ways(decoder, tokens(1, 12) % 50)
    assert_near(logits, wanted, "packed decoder")
    assert [r.expert_ids_A.tolist() for rs in routings for r in rs] == [
        r.expert_ids_A.tolist() for rs in wanted_routings for r in rs
    ]
