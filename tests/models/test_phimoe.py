"""Phi-3.5-MoE beyond the contract of test_families.py: its sampling in training, and texts past its first context."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.phimoe import modeling_phimoe
from twins import tokens, twin, write

from moekit import MoE, MoEConfig
from moekit.models import load_decoder
from moekit.moe import RoutingRecord
from tolerances import near


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("eps", [0.01, 0.4])
def test_experts_weights_and_gradients_are_transformers_own(eps, training, monkeypatch):
    # The same numbers in the same order for both: an exponential variable is −log u, the last u drawn once.
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: -torch.rand(self.shape).log())
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self: self)
    config = MoEConfig(
        hidden_size=16, intermediate_size=4, num_experts=7, top_k=2, router="sparsemixer", router_options={"eps": eps}
    )
    router = MoE(config).router.train(training)
    x_TD, pull_TK = torch.randn(301, 16), torch.randn(301, 2)
    record = RoutingRecord()
    with record.recording():
        ours = router(x_TD)
    logits_TE = ours.logits_TE.detach().requires_grad_()
    if training:
        torch.manual_seed(record.decisions[0].seed)
    weights_TK, ids_TK = modeling_phimoe.sparsemixer(logits_TE, eps, training)
    assert torch.equal(ours.expert_ids_TK, ids_TK)
    torch.testing.assert_close(ours.weights_TK, weights_TK, **near("fp32 twin"))
    (wanted,) = torch.autograd.grad((weights_TK * pull_TK).sum(), logits_TE)
    (got,) = torch.autograd.grad((ours.weights_TK * pull_TK).sum(), ours.logits_TE)
    torch.testing.assert_close(got, wanted, **near("fp32 twin"))
    best_TK = ours.logits_TE.topk(2, dim=-1).indices
    assert (ours.expert_ids_TK != best_TK).any() == training, "the draw decided nothing: the test shows nothing"


@pytest.fixture
def long_factors(monkeypatch):
    """transformers 5.23 asks for the frequencies without the length and so always gets the short factors, with the long
    magnitude; the published modeling_phimoe.py takes the long ones. Its own function, told the length."""

    def parameters(config, device=None, seq_len=None, layer_type=None):
        return original(config, device, seq_len=length["now"])

    original, length = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["longrope"], {"now": None}
    forward = modeling_phimoe.PhimoeRotaryEmbedding.forward

    def told(self, x, position_ids=None):
        length["now"] = int(position_ids.max()) + 1
        self.rope_init_fn = parameters
        return forward(self, x, position_ids)

    monkeypatch.setattr(modeling_phimoe.PhimoeRotaryEmbedding, "forward", told)


@pytest.mark.usefixtures("long_factors")
@pytest.mark.parametrize("length", [16, 17, 40])
@torch.no_grad()
def test_long_texts_take_the_long_factors_and_magnitude(length, tmp_path):
    theirs, ids = write("phimoe", tmp_path), tokens(2, length)
    torch.testing.assert_close(load_decoder(tmp_path)(ids).logits, theirs(ids).logits, **near("fp32 twin"))


@torch.no_grad()
def test_transformers_takes_the_short_factors_everywhere(monkeypatch):
    """What docs/families.md says of it."""
    theirs, ids = twin("phimoe"), tokens(1, 20)
    before = theirs(ids).logits
    theirs.config.rope_parameters["long_factor"] = [9.0] * 4
    assert torch.equal(theirs(ids).logits, before)
