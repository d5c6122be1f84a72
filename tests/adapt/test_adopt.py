"""Switch's and DBRX's own MoE layers on moekit's: beside transformers' in every number, and back in its files."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch

from moekit.adapt import routings, to_moe
from moekit.adapt.adopt import Adopted
from moekit.errors import ConfigError, UnsupportedError
from moekit.integrations.monitor import watch
from tolerances import near

transformers = pytest.importorskip("transformers")

SWITCH = {
    "vocab_size": 61,
    "d_model": 20,
    "d_kv": 8,
    "d_ff": 28,
    "num_heads": 2,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": 5,
    "expert_capacity": 3,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
FFN = {"ffn_hidden_size": 12, "moe_num_experts": 5, "moe_top_k": 3}
DBRX = {
    "d_model": 20,
    "n_heads": 2,
    "n_layers": 2,
    "vocab_size": 61,
    "max_seq_len": 32,
    "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 500.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
CASES = {
    "switch": ("SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", SWITCH),
    "switch with a bias, gelu": (
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        SWITCH | {"router_bias": True, "dense_act_fn": "gelu_new", "router_jitter_noise": 0.3},
    ),
    "dbrx": ("DbrxConfig", "DbrxForCausalLM", DBRX | {"ffn_config": FFN | {"moe_jitter_eps": 0.2}}),
    "dbrx not normalised": (
        "DbrxConfig",
        "DbrxForCausalLM",
        DBRX | {"ffn_config": FFN | {"moe_normalize_expert_weights": None, "ffn_act_fn": {"name": "gelu"}}},
    ),
}


def model_of(case: str, **changes):
    """Every parameter random and not small, so that a wrong expert or weight shows."""
    config, cls, options = CASES[case]
    model = getattr(transformers, cls)(getattr(transformers, config)(**options | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model.eval()


def batch(case: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 61, (3, 13))
    labels = torch.randint(1, 61, (3, 11)) if case.startswith("switch") else ids
    return {"input_ids": ids, "labels": labels, "output_router_logits": True}


def run(model, inputs):
    """The same noise on both sides; gradients by the names of the files, zeros for an expert that nobody chose."""
    torch.manual_seed(5)
    output = model(**inputs)
    output.loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return output, model.state_dict()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_losses_and_every_gradient_are_transformers_own(case, training):
    torch.manual_seed(1)  # 0 draws a Switch model that amplifies rounding: transformers' own fp32 is 2e-5 from its fp64
    theirs = model_of(case).train(training)
    ours, inputs = to_moe(copy.deepcopy(theirs)), batch(case)
    layers = [part for part in ours.modules() if isinstance(part, Adopted)]
    assert len(layers) == (4 if case.startswith("switch") else 2)
    (want, want_grads), (got, got_grads) = run(theirs, inputs), run(ours, inputs)
    torch.testing.assert_close(got.logits, want.logits, **near("fp32 model"))
    torch.testing.assert_close(got.loss, want.loss, **near("fp32 loss"))  # router losses of transformers included
    if case.startswith("switch"):
        assert all(routing.dropped > 0 for routing in routings(ours))
        torch.testing.assert_close(got.encoder_z_loss, want.encoder_z_loss, **near("fp32 loss"))
        torch.testing.assert_close(got.decoder_aux_loss, want.decoder_aux_loss, **near("fp32 loss"))
    assert got_grads.keys() == want_grads.keys()
    for name in want_grads:
        message = partial("{}: {}".format, name)
        torch.testing.assert_close(got_grads[name], want_grads[name], **near("fp32 model"), msg=message)


def layer_of(**changes):
    """transformers' layer in bf16 and ours of it."""
    model = model_of("switch", **changes).bfloat16()
    theirs = model.encoder.block[1].layer[1].mlp
    return theirs, to_moe(copy.deepcopy(model)).encoder.block[1].layer[1].mlp


def test_in_bf16_the_first_of_probabilities_that_round_alike_is_chosen():
    theirs, ours = layer_of(num_experts=64, expert_capacity=2)
    x = torch.randn(4, 50, 20, dtype=torch.bfloat16)
    with torch.no_grad():
        places_BLE, probs_BL1, logits_BLE = theirs.router(x)
        want, got = theirs(x), ours(x)
    (routing,) = ours.routings
    chosen_T = places_BLE.flatten(0, 1).argmax(dim=-1)
    kept_T = places_BLE.flatten(0, 1).any(dim=-1)
    assert torch.equal(routing.token_ids_A, kept_T.nonzero().flatten())
    assert torch.equal(routing.expert_ids_A, chosen_T[kept_T])
    assert torch.equal(routing.weights_A, probs_BL1.flatten()[kept_T].float())
    assert 0 < routing.dropped < 100
    exact_T = logits_BLE.flatten(0, 1).argmax(dim=-1)[kept_T]
    assert not torch.equal(exact_T, chosen_T[kept_T]), "rounding decided for none: the test shows nothing"
    torch.testing.assert_close(got.float(), want.float(), **near("bf16 layer"))


def test_in_bf16_only_the_router_sees_the_jitter(monkeypatch):
    theirs, ours = layer_of(router_jitter_noise=0.4, expert_capacity=50)
    x = torch.randn(2, 40, 20, dtype=torch.bfloat16)
    before = x.clone()
    quiet = ours(x)
    ours.train(), theirs.train()
    monkeypatch.setattr(ours.moe.router, "_seed", lambda: 7)
    torch.manual_seed(7)  # the generators draw the same numbers
    want = theirs(x)
    assert torch.equal(x, before)
    got = ours(x)
    torch.testing.assert_close(got.float(), want.float(), **near("bf16 layer"))
    assert not torch.allclose(got, quiet)


def test_in_fp32_transformers_gives_the_jitter_to_the_experts_too():
    """What docs/surgery.md says of it: the router multiplies the tokens in place."""
    layer = model_of("switch", router_jitter_noise=0.4).encoder.block[1].layer[1].mlp.train()
    x = torch.randn(1, 5, 20)
    before = x.clone()
    layer(x)
    assert not torch.equal(x, before)


def test_transformers_ignores_its_setting_for_padding():
    theirs = model_of("switch", router_ignore_padding_tokens=True)
    ids = torch.randint(1, 61, (1, 13))
    mask = (torch.arange(13) < 7).long().unsqueeze(0)
    plain = copy.deepcopy(theirs)
    for part in plain.modules():
        if type(part).__name__ == "SwitchTransformersTop1Router":
            part.ignore_padding_tokens = False
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    assert torch.equal(theirs(**inputs).logits, plain(**inputs).logits)
    torch.testing.assert_close(to_moe(theirs)(**inputs).logits, plain(**inputs).logits, **near("fp32 model"))


def test_transformers_leaves_the_router_losses_out_where_every_layer_is_sparse():
    every = {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4}
    theirs, inputs = model_of("switch", **every), batch("switch")
    ours = to_moe(copy.deepcopy(theirs))
    for model in (theirs, ours):
        output = model(**inputs)
        assert output.encoder_z_loss == output.decoder_aux_loss == 0
        assert output.loss == model(**inputs | {"output_router_logits": False}).loss
    assert len(routings(ours)) == 8


@pytest.mark.parametrize("case", ["switch", "dbrx"])
def test_files_are_those_of_transformers(case, tmp_path):
    theirs = model_of(case)
    ours = to_moe(copy.deepcopy(theirs))
    want, got = theirs.state_dict(), ours.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    pickled = pickle.dumps(ours)  # before it ran: hooks of transformers cannot be pickled
    ours.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    inputs = batch(case)
    assert torch.equal(again(**inputs).logits, theirs(**inputs).logits)
    other = to_moe(model_of(case))
    other.load_state_dict(want)
    assert torch.equal(other(**inputs).logits, ours(**inputs).logits)
    for twin in (copy.deepcopy(ours), pickle.loads(pickled)):
        assert torch.equal(twin(**inputs).loss, ours(**inputs).loss)


@pytest.mark.parametrize("case", ["switch", "dbrx"])
def test_generation_with_a_cache_is_unchanged(case):
    theirs = model_of(case)
    ours, ids = to_moe(copy.deepcopy(theirs)), torch.randint(1, 61, (2, 9))
    texts = [model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0) for model in (theirs, ours)]
    assert torch.equal(*texts)


def test_the_monitor_counts_the_same():
    theirs, counts = model_of("switch"), []
    inputs = batch("switch")
    for model in (theirs, to_moe(copy.deepcopy(theirs))):
        with watch(model) as seen:
            model(**inputs)
        counts.append([(total.chosen_E.tolist(), total.kept_E.tolist()) for total in seen.totals()])
    assert counts[0] == counts[1]
    assert len(counts[0]) == 4


def test_refusals():
    with pytest.raises(UnsupportedError, match="has no MoE layer of Switch or DBRX"):
        to_moe(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="where says which"):
        to_moe(model_of("dbrx"), num_experts=4)
    with pytest.raises(UnsupportedError, match="without settings keeps its weights"):
        to_moe(model_of("dbrx"), "transformer.blocks.*.ffn", num_experts=4)
    with pytest.raises(UnsupportedError, match=r"computes in torch\.bfloat16"):
        to_moe(model_of("switch", router_dtype="bfloat16"))
    with pytest.raises(UnsupportedError, match=r"2\.0-norm"):
        to_moe(model_of("dbrx", ffn_config=FFN | {"moe_normalize_expert_weights": 2.0}))
    with pytest.raises(UnsupportedError, match="a Mixture of Experts already"):
        to_moe(to_moe(model_of("dbrx")), "transformer.blocks.1.ffn")
    with pytest.warns(UserWarning, match="drop 10% of their inner values"):
        to_moe(model_of("switch", dropout_rate=0.1))
