"""Mixtral, Qwen3-MoE and gpt-oss on "moekit": compiled, generating, saved and loaded, and switched in the middle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from integrations.families import build, loss_of, output, tokens
from moekit.integrations.transformers import use_moekit
from tolerances import near, rel

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]
HEAVY = pytest.mark.heavy
COMPILED = [
    ("gpt_oss", "aot_eager"),
    *(pytest.param(family, "aot_eager", marks=HEAVY) for family in FAMILIES[:2]),
    *(pytest.param(family, "inductor", marks=HEAVY) for family in FAMILIES),
]


def pass_of(model, ids, run):
    """(output, gradients by name) of one training pass through `run`, which is the model or made of it."""
    model.zero_grad()
    out = output(run, ids)
    loss_of(out, ids).backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler warns of PyTorch
@pytest.mark.parametrize(("family", "backend"), COMPILED)
def test_compiled_is_one_graph_and_equals_eager(family, backend):
    torch._dynamo.reset()
    counters.clear()
    model, ids = use_moekit(build(family, num_hidden_layers=1)), tokens()
    compiled = torch.compile(model, backend=backend)
    got, got_grads = pass_of(model, ids, compiled)
    with torch.no_grad():
        few = output(compiled, ids[:1, :4])
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    model.set_experts_implementation("eager")
    want, want_grads = pass_of(model, ids, model)
    assert_close(got, want, **near("fp32 twin"))
    assert_close(got_grads, want_grads, **near("fp32 twin"))
    with torch.no_grad():
        assert_close(few, output(model, ids[:1, :4]), **near("fp32 twin"))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_a_cache_says_what_eager_says(family):
    model = use_moekit(build(family)).eval()
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got = model.generate(tokens(2, 9), **options)
    assert got.past_key_values.get_seq_length() > 0
    model.set_experts_implementation("eager")
    want = model.generate(tokens(2, 9), **options)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits, **near("fp32 twin"))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_moekit_trained_loads_on_any_backend(family, tmp_path):
    model, ids = use_moekit(build(family)), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pass_of(model, ids, model)
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        want = output(model, ids)
        for backend in ("moekit", "eager", "grouped_mm"):
            loaded = type(model).from_pretrained(tmp_path, experts_implementation=backend)
            assert_close(output(loaded, ids), want, **near("fp32 twin"))


@pytest.mark.parametrize("family", FAMILIES)
def test_switching_back_and_forth_while_training(family):
    start, ids = build(family), tokens()
    curves = []
    for backends in (["eager"], ["moekit", "eager"]):
        model, losses = copy.deepcopy(start), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(10):
            model.set_experts_implementation(backends[step % len(backends)])
            loss = loss_of(output(model, ids), ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=rel("fp32 loss"))
    assert curves[0][-1] < 0.9 * curves[0][0]
