"""`watch` on transformers models: every family, padding, both kinds of checkpointing, and the models' own numbers."""

from __future__ import annotations

import doctest
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from integrations.families import FAMILIES, build, loss_of, output, tokens
from moekit.config import CapacityConfig, MoEConfig
from moekit.errors import UnsupportedError
from moekit.integrations.monitor import watch
from moekit.integrations.transformers import expert_modules
from moekit.moe import MoE, losses
from tolerances import near, rel

# Their weights are neither softmax nor sigmoid of the logits: √softplus, and the sampled gates of SparseMixer.
OTHER_SCORES = {"deepseek_v4", "phimoe"}
# Counts 5 classes of which one skips: no logit for each expert.
HIDDEN_LOGITS = {"zaya"}


def left_padding(ids: Tensor) -> Tensor:
    """A mask (B, L) whose last row has five tokens of padding on the left."""
    mask = torch.ones_like(ids)
    mask[-1, :5] = 0
    return mask


def loop(calls: list[tuple[Tensor, Tensor]], experts: int, mask: Tensor | None) -> list[int]:
    """The counts of all calls of one experts module, one assignment at a time."""
    counts = [0] * experts
    for ids_TK, weights_TK in calls:
        real = [True] * len(ids_TK) if mask is None else mask.flatten().bool().tolist()
        for keep, ids, weights in zip(real, ids_TK.tolist(), weights_TK.tolist(), strict=True):
            for expert, weight in zip(ids, weights, strict=True):
                counts[expert] += keep and weight != 0
    return counts


def recorded(model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What every experts module is called with from now on, taken by replacing its forward."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path, module in expert_modules(model).items():

        @functools.wraps(module.forward)
        def forward(*args: Any, path: str = path, before: Any = module.forward) -> Any:
            calls.setdefault(path, []).append((args[1].clone(), args[2].detach().clone()))
            return before(*args)

        module.forward = forward
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_as_a_loop_over_its_experts_calls_does(family: str) -> None:
    model, ids = build(family).eval(), tokens()
    modules = expert_modules(model)
    score_function = "softmax" if family in OTHER_SCORES else None
    with watch(model, routings=True, score_function=score_function) as seen, torch.no_grad():
        calls = recorded(model)
        output(model, ids)
    assert set(seen.paths) == set(modules)
    for path, layer in zip(seen.paths, seen.report(), strict=True):
        assert list(layer.counts) == loop(calls.get(path, []), 4, None), path
    if family in HIDDEN_LOGITS:
        with pytest.raises(UnsupportedError, match="does not show its logits"):
            _ = seen.routings
        return
    ran = [path for path in seen.paths if path in calls]
    assert len(ran) == len(modules) // (2 if family == "ernie4_5_vl_moe" else 1), "no image, no experts for images"
    for path, routing in zip(ran, seen.routings, strict=True):
        assert_close(routing.probs_TE.sum(dim=-1), torch.ones(ids.numel()), **near("fp32 scalar"))
        assert torch.equal(routing.expert_ids_TK, calls[path][-1][0])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe"])
def test_equal_to_what_output_router_logits_gives(family: str) -> None:
    model, ids = build(family), tokens()
    mask = left_padding(ids)
    with watch(model, routings=True) as seen:
        shown = model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
    assert len(shown) == len(seen.layers) == 2
    for layer, routing, logits in zip(seen.report(), seen.routings, shown, strict=True):
        assert torch.equal(routing.logits_TE, logits)
        best = logits.topk(2, dim=-1).indices[mask.flatten().bool()]
        assert list(layer.counts) == torch.bincount(best.flatten(), minlength=4).tolist()
        assert layer.mean_k == 2
    assert [total.tokens for total in seen.totals()] == [int(mask.sum())] * 2


def test_a_balance_loss_for_a_model_that_hides_its_logits() -> None:
    """One layer, where pooling layers makes no difference: ours is theirs over K, in every gradient."""
    model, ids = build("mixtral", num_hidden_layers=1), tokens()
    mask = left_padding(ids)
    theirs = model(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True).aux_loss
    want = torch.autograd.grad(theirs, list(model.parameters()), allow_unused=True)
    with watch(model, routings=True) as seen:
        model(input_ids=ids, attention_mask=mask)
        ours = losses.load_balancing(seen.routings)
    got = torch.autograd.grad(2 * ours, list(model.parameters()), allow_unused=True)
    assert_close(2 * ours, theirs, **near("fp32 scalar"))
    assert sum(grad is not None for grad in got) > 5
    for ours_, theirs_ in zip(got, want, strict=True):
        assert (ours_ is None) == (theirs_ is None)
        if ours_ is not None:
            assert_close(ours_, theirs_, **near("fp32 gradients"))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "dots1"])
def test_sigmoid_routers_are_told_from_softmax(family: str) -> None:
    model, ids = build(family), tokens()
    with watch(model, routings=True) as seen:
        output(model, ids)
    for routing in seen.routings:
        scores = routing.logits_TE.sigmoid()
        assert_close(routing.probs_TE, scores / scores.sum(-1, keepdim=True), **near("fp32 scalar"))
        assert routing.logits_TE.requires_grad
    losses.load_balancing(seen.routings).backward()


def test_scores_that_are_neither_are_refused() -> None:
    model = build("phimoe")
    with watch(model, routings=True), pytest.raises(UnsupportedError, match="neither softmax nor sigmoid"):
        output(model, tokens())


CHECKPOINTS = [True, False]


@pytest.mark.parametrize("reentrant", CHECKPOINTS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_recomputation_is_not_counted(family: str, reentrant: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = build(family), tokens()
    with watch(model) as seen:
        output(model, ids, use_cache=False)
    want = seen.report()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = recorded(model)
    with watch(model, routings=True) as seen:
        loss_of(output(model, ids, use_cache=False), ids).backward()
    assert {len(each) for each in calls.values()} == {2}, "every layer ran twice"
    assert seen.report() == want
    assert ("carry no gradient" in caplog.text) == reentrant
    assert all(routing.logits_TE.requires_grad != reentrant for routing in seen.routings)


@pytest.mark.parametrize("reentrant", CHECKPOINTS)
def test_a_whole_model_that_is_checkpointed_is_counted_once(reentrant: bool) -> None:
    model, ids = build("mixtral"), tokens()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with watch(model) as seen:
        logits = checkpoint(lambda x: model(inputs_embeds=x).logits, embedded, use_reentrant=reentrant)
        once = seen.report()
        loss_of(logits, ids).backward()
    assert sum(once[0].counts) == 2 * ids.numel()
    assert seen.report() == once


def test_counts_of_micro_batches_add_up_and_reset() -> None:
    model, ids = build("qwen3_moe"), tokens(4)
    with watch(model) as seen, torch.no_grad():
        model(input_ids=ids)
        whole = seen.report()
        seen.reset()
        assert [sum(layer.counts) for layer in seen.report()] == [0, 0]
        for row in ids:
            model(input_ids=row[None])
    assert seen.report() == whole


def test_with_a_cache_the_mask_covers_the_past() -> None:
    model, ids = build("mixtral").eval(), tokens()
    mask = left_padding(ids)
    with watch(model) as seen, torch.no_grad():
        first = model(input_ids=ids[:, :12], attention_mask=mask[:, :12], use_cache=True)
        model(input_ids=ids[:, 12:], attention_mask=mask, past_key_values=first.past_key_values)
        assert {total.tokens for total in seen.totals()} == {int(mask.sum())}
        seen.reset()
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert {total.tokens for total in seen.totals()} == {int(mask.sum()) + 3 * 2}, "the last token is never read"


def test_after_close_nothing_is_counted_and_no_hook_is_left() -> None:
    model = build("mixtral")
    with watch(model, routings=True) as seen:
        output(model, tokens())
    counted = seen.report()
    output(model, tokens())
    assert seen.report() == counted
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_watching_changes_no_bit() -> None:
    model, ids = build("gpt_oss"), tokens()
    want = output(model, ids)
    with watch(model, routings=True):
        assert torch.equal(output(model, ids), want)


def test_a_pass_that_fails_leaves_no_mask_behind() -> None:
    model, ids = build("mixtral"), tokens()

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    with watch(model) as seen:
        handle = model.model.norm.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(input_ids=ids, attention_mask=left_padding(ids))
        handle.remove()
        seen.reset()
        model.model.layers[0].mlp(torch.randn(2, 17, 32))
    assert seen.totals()[0].tokens == 34


def test_masks_that_tell_nothing_are_said_so(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = build("mixtral"), tokens()
    four = torch.zeros(2, 1, 17, 17)
    with watch(model) as seen:
        for _ in range(2):
            model(input_ids=ids, attention_mask=four)
    assert caplog.text.count("does not say which tokens are padding") == 1
    assert seen.totals()[0].tokens == 2 * ids.numel()


def test_models_without_experts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear has no MoE layer"):
        watch(nn.Linear(2, 2))


def test_routings_must_be_asked_for_and_have_run() -> None:
    model = build("mixtral")
    with pytest.raises(UnsupportedError, match="routings=True"), watch(model) as seen:
        _ = seen.routings
    with pytest.raises(UnsupportedError, match="has not run"):
        _ = watch(model, routings=True).routings


def test_drift_and_similarity_of_transformers_weights() -> None:
    model = build("qwen3_moe")
    experts = expert_modules(model)["model.layers.1.mlp.experts"]
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[3] = parameter[1]
    with watch(model) as seen:
        with torch.no_grad():
            model.model.layers[0].mlp.gate.weight *= 2
        drift, similarity = seen.drift(), seen.similarity()
    assert [(one.layer, one.distance) for one in drift] == [(0, pytest.approx(1.0, rel=rel("fp32 scalar"))), (1, 0.0)]
    assert [(one.layer, one.twins) for one in similarity] == [(0, 0), (1, 1)]
    assert similarity[1].closest == (1, 3)


def llama4(top_k: int) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "intermediate_size_mlp": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = transformers.Llama4TextConfig(
        **sizes, **heads, num_hidden_layers=2, num_experts_per_tok=top_k, interleave_moe_layer_step=1, pad_token_id=0
    )
    return filled(transformers.Llama4ForCausalLM(config))


def filled(model: Any) -> Any:
    """No weight is left as empty memory."""
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.train()


@pytest.mark.parametrize("top_k", [1, 2])
def test_llama4_whose_experts_see_every_token(top_k: int) -> None:
    model, ids = llama4(top_k), tokens()
    mask = left_padding(ids)
    shown: list[Tensor] = []
    for layer in model.model.layers:
        layer.feed_forward.router.register_forward_hook(lambda _, args, out: shown.append(out[1]))
    with watch(model, routings=True) as seen:
        model(input_ids=ids, attention_mask=mask)
    for layer, routing, logits in zip(seen.report(), seen.routings, shown, strict=True):
        best = logits.topk(top_k, dim=-1).indices[mask.flatten().bool()]
        assert list(layer.counts) == torch.bincount(best.flatten(), minlength=4).tolist()
        assert routing.score_function == "sigmoid"


def test_jetmoe_has_two_routers_a_layer() -> None:
    torch.manual_seed(0)
    config = transformers.JetMoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=16,
        num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model, ids = filled(transformers.JetMoeForCausalLM(config)), tokens()
    with watch(model, routings=True) as seen:
        shown = model(input_ids=ids, output_router_logits=True).router_logits
    assert seen.layers == (0, 1, 2, 3)
    assert [path.rpartition(".layers.")[2] for path in seen.paths] == [
        f"{layer}.{part}.router" for layer in (0, 1) for part in ("mlp", "self_attention.experts")
    ]
    assert {sum(layer.counts) for layer in seen.report()} == {2 * ids.numel()}
    # transformers 5.23 shows each attention's router twice (and balances it twice): attention, attention, mlp.
    for ours, theirs in ((seen.routings[0::2], shown[2::3]), (seen.routings[1::2], shown[1::3])):
        for routing, logits in zip(ours, theirs, strict=True):
            assert torch.equal(routing.logits_TE, logits)


def switch(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, num_decoder_layers=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, router_jitter_noise=0.0, decoder_start_token_id=0,
        **changes,
    )  # fmt: skip
    return filled(transformers.SwitchTransformersForConditionalGeneration(config))


def test_switch_counts_what_its_capacity_drops() -> None:
    model, ids = switch(expert_capacity=3), tokens()
    mask = left_padding(ids).flip(1)
    outputs: list[Any] = []
    with watch(model, routings=True) as seen:
        for path in seen.paths:
            model.get_submodule(path).register_forward_hook(lambda _, args, out: outputs.append(out))
        model(input_ids=ids, attention_mask=mask, labels=ids)
    encoders = sum(path.startswith("encoder") for path in seen.paths)
    assert 0 < encoders < len(seen.paths)
    assert seen.layers == tuple(range(len(seen.paths)))
    for number, (layer, total, (places, _, logits)) in enumerate(
        zip(seen.report(), seen.totals(), outputs, strict=True)
    ):
        real = mask.bool() if number < encoders else torch.ones_like(ids, dtype=torch.bool)
        chosen, kept = [0] * 4, [0] * 4
        for row, length in real.nonzero().tolist():
            expert = int(logits[row, length].argmax())
            chosen[expert] += 1
            kept[expert] += int(places[row, length, expert])
        assert (total.chosen_E.tolist(), total.kept_E.tolist()) == (chosen, kept)
        assert layer.drop_rate == pytest.approx(1 - sum(kept) / sum(chosen))
    assert sum(total.dropped for total in seen.totals()) > 0


def test_dbrx_whose_experts_take_rows_of_tokens() -> None:
    torch.manual_seed(0)
    config = transformers.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )  # fmt: skip
    model, ids = filled(transformers.DbrxForCausalLM(config)), tokens()
    mask = left_padding(ids)
    with watch(model, routings=True) as seen:
        shown = model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
    for layer, logits in zip(seen.report(), shown, strict=True):
        best = logits.topk(2, dim=-1).indices[mask.flatten().bool()]
        assert list(layer.counts) == torch.bincount(best.flatten(), minlength=4).tolist()


def test_longcat_whose_last_experts_do_nothing() -> None:
    torch.manual_seed(0)
    config = transformers.LongcatFlashConfig(
        vocab_size=64, hidden_size=32, ffn_hidden_size=48, expert_ffn_hidden_size=16, num_layers=2,
        num_attention_heads=4, n_routed_experts=4, zero_expert_num=2, moe_topk=3, kv_lora_rank=8, q_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, head_dim=4,
    )  # fmt: skip
    model, ids = filled(transformers.LongcatFlashForCausalLM(config)), tokens()
    with watch(model, routings=True) as seen:
        model(input_ids=ids)
    for layer, routing in zip(seen.report(), seen.routings, strict=True):
        best = routing.logits_TE.topk(3, dim=-1).indices
        assert list(layer.counts) == torch.bincount(best.flatten(), minlength=6).tolist()
        assert sum(layer.counts[4:]) > 0


def test_wrapped_by_peft() -> None:
    peft = pytest.importorskip("peft")
    model, ids = build("mixtral"), tokens()
    mask = left_padding(ids)
    with watch(model) as seen, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    before = seen.report()
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj", "mlp.gate.weight"]
    )
    wrapped = peft.get_peft_model(model, config)
    with watch(wrapped, routings=True) as seen, torch.no_grad():
        wrapped(input_ids=ids, attention_mask=mask)
    assert seen.report() == before, "a fresh adapter changes nothing"
    assert len(seen.routings) == 2


class Host(nn.Module):
    """A model of another make with MoE layers of ours in it, as surgery leaves it."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.h = nn.ModuleList(MoE(config) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, depth: int = 2) -> Tensor:
        for layer in self.h[:depth]:
            x = x + layer(x)[0]
        return x


def test_our_own_layers_inside_another_model() -> None:
    torch.manual_seed(0)
    capacity = CapacityConfig(factor=0.5)
    host = Host(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2, capacity=capacity))
    x, mask = torch.randn(2, 9, 8), torch.ones(2, 9)
    mask[0, 3:] = 0
    kept: list[Tensor] = []
    for layer in host.h:
        layer.register_forward_hook(lambda _, args, out: kept.append(out[1]))
    with watch(host, routings=True) as seen:
        host(x, mask)
    assert seen.paths == ("h.0.router", "h.1.router")
    for total, routing, own in zip(seen.totals(), seen.routings, kept, strict=True):
        real = mask.flatten().bool()
        assert total.tokens == 12
        assert total.kept_E.sum() == real[own.token_ids_A].sum()
        assert total.chosen_E.sum() == 2 * 12
        assert routing.mask_T is not None
        assert torch.equal(routing.logits_TE, own.logits_TE)


def test_routings_are_those_of_the_last_pass_alone() -> None:
    torch.manual_seed(0)
    host = Host(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2))
    with watch(host, routings=True) as seen:
        host(torch.randn(1, 5, 8))
        assert len(seen.routings) == 2
        host(torch.randn(1, 3, 8), depth=1)
    assert [routing.num_tokens for routing in seen.routings] == [3]
    assert [total.tokens for total in seen.totals()] == [8, 5]


class Skipping(nn.Module):
    """Experts as transformers calls them, for a router whose last choice may be of weight 0 or elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states


def test_what_is_skipped_or_computed_elsewhere_is_no_choice() -> None:
    experts = Skipping()
    with watch(experts) as seen:
        experts(
            torch.zeros(3, 1),
            top_k_weights=torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]),
            top_k_index=torch.tensor([[0, 1], [1, 0], [2, 3]]),
        )
    assert seen.report()[0].counts == (1, 2, 1)
    assert seen.report()[0].mean_k == pytest.approx(4 / 3)


def test_the_page_shows_what_happens() -> None:
    page = Path(__file__).parents[2] / "docs" / "monitor.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0
