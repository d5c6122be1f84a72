"""Surgery on models that are not ours: the output stays, the interface holds, the model trains."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from moekit import losses
from moekit.adapt import routings, to_moe
from moekit.adapt.drop_in import DropIn
from moekit.adapt.surgery import after_step
from moekit.config import CapacityConfig, MoEConfig, SigmoidOptions, SurgeryConfig
from moekit.errors import ConfigError, UnsupportedError
from tolerances import near

transformers = pytest.importorskip("transformers")
BLOCK10 = "transformer.h.10.mlp"


def gpt2(**changes) -> nn.Module:
    """GPT-2 with its 12 blocks, small; every weight random and not small, so that a wrong layer shows."""
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=48, n_embd=16, n_head=2, n_layer=12, bos_token_id=0, eos_token_id=0, **changes
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.normal_(std=0.2)
    return model.eval()


def ids(rows: int = 4, length: int = 20) -> torch.Tensor:
    return torch.randint(61, (rows, length))


@pytest.mark.parametrize(
    "config",
    [
        SurgeryConfig(num_experts=32, capacity=CapacityConfig(tokens=256)),
        SurgeryConfig(method="split", num_experts=8, top_k=4),
        SurgeryConfig(num_experts=4, top_k=1, gate_order="softmax_topk", router_init_scale=0.0),
        SurgeryConfig(num_experts=8, top_k=2, router="sigmoid", norm_topk_prob=True),
        SurgeryConfig(method="split", num_experts=8, top_k=2, router="noisy_topk"),
    ],
    ids=lambda config: f"{config.method} {config.num_experts}/{config.top_k} {config.router}",
)
@pytest.mark.parametrize("where", [BLOCK10, "transformer.h.*.mlp"])
def test_gpt2_keeps_its_logits(config, where):
    model, tokens = gpt2(), ids()
    with torch.no_grad():
        before = model(tokens).logits
        assert to_moe(model, where, config) is model
        after = model(tokens).logits
    torch.testing.assert_close(after, before, **near("fp32 twin"))
    layers = 1 if where == BLOCK10 else 12
    assert [routing.num_experts for routing in routings(model)] == [config.num_experts] * layers
    assert isinstance(model.get_submodule(BLOCK10), DropIn)


def test_generation_with_a_cache_is_unchanged():
    model, prompt = gpt2(), ids(1, 5)
    before = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    to_moe(model, BLOCK10, num_experts=4)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0), before)
    assert routings(model)[0].num_tokens == 1, "the last pass saw one token"


def train(model: nn.Module, steps: int, balance: float = 0.01) -> list[float]:
    """The recipe's optimizer at a rate that shows in few steps; one batch, so that the loss must fall."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens, history = ids(), []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        history.append(loss.item())
        (loss + balance * losses.load_balancing(routings(model))).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(model)
    return history


def test_gpt2_with_block_10_replaced_trains():
    model = to_moe(gpt2(), BLOCK10, num_experts=32, capacity=CapacityConfig(tokens=256)).train()
    moe = model.get_submodule(BLOCK10).moe
    before = {name: value.clone() for name, value in moe.named_parameters()}
    history = train(model, 20)
    assert history[-1] < 0.8 * history[0]
    for name, value in moe.named_parameters():
        assert not torch.equal(value, before[name]), f"{name} did not learn"
    down = moe.experts.down_proj
    assert not torch.allclose(down[0], down[1]), "copies that met different tokens differ"


def test_gpt2s_dropout_after_the_mlp_is_kept():
    model = gpt2(resid_pdrop=0.5)
    x = torch.randn(1, 400, 16)
    dense = model.get_submodule(BLOCK10)
    layer = to_moe(model, BLOCK10, num_experts=4).get_submodule(BLOCK10)
    assert not layer.training
    assert (layer.train()(x) == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(layer.eval()(x), dense.eval()(x), **near("fp32 twin"))


def test_state_survives_a_round_trip():
    config = SurgeryConfig(num_experts=8, router="sigmoid", norm_topk_prob=True, router_options=SigmoidOptions())
    model = to_moe(gpt2(), BLOCK10, config).train()
    train(model, 3)
    assert model.get_submodule(BLOCK10).moe.router.selection_bias.abs().sum() > 0
    state = model.state_dict()
    assert {name.split(".", 4)[4] for name in state if name.startswith(BLOCK10)} == {
        "moe.router.weight",
        "moe.router.selection_bias",
        "moe.experts.up_proj",
        "moe.experts.up_bias",
        "moe.experts.down_proj",
        "moe.experts.down_bias",
    }
    other = to_moe(gpt2(), BLOCK10, config)
    other.load_state_dict(state, strict=True)
    tokens = ids()
    assert torch.equal(other.eval()(tokens).logits, model.eval()(tokens).logits)


def test_a_used_model_can_be_copied_and_pickled():
    model = to_moe(gpt2(), BLOCK10, num_experts=4).train()
    tokens = ids()
    model(tokens, labels=tokens).loss.backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert routings(twin) == ()
        assert torch.equal(twin.eval()(tokens).logits, model.eval()(tokens).logits)
        assert len(routings(twin)) == 1
        twin(tokens)
        assert len(routings(twin)) == 1, "its passes are its own"


def test_padding_is_left_out_of_losses():
    model, tokens = to_moe(gpt2(), BLOCK10, num_experts=4), ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    model(tokens, attention_mask=mask)
    (routing,) = routings(model, mask)
    assert routing.counts_E.sum() == 2 * 19
    assert routings(model)[0].counts_E.sum() == 2 * 24
    with pytest.raises(ConfigError, match="mask has 12 tokens, but a layer saw 24"):
        routings(model, mask[:1])


def test_bf16_keeps_its_dtype():
    model = to_moe(gpt2().bfloat16(), BLOCK10, num_experts=4)
    assert {p.dtype for p in model.get_submodule(BLOCK10).parameters()} == {torch.bfloat16}
    assert model(ids()).logits.dtype == torch.bfloat16


def test_seeds_and_methods():
    def expert(**settings):
        torch.manual_seed(5)
        return to_moe(gpt2(), "transformer.h.*.mlp", num_experts=4, **settings)

    same, again, other = expert(method="drop"), expert(method="drop"), expert(method="drop", seed=1)
    for name, value in same.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        drawn = "router" in name or "experts.up" in name or "experts.down_proj" in name
        assert torch.equal(value, other.state_dict()[name]) != drawn
    routers = [part.moe.router.weight for part in same.modules() if isinstance(part, DropIn)]
    assert not torch.equal(routers[0], routers[1]), "every layer draws its own router"


class Shared(nn.Module):
    """One MLP under two names, and used three times in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.second = self.first

    def forward(self, x):
        for layer in (self.first, self.second, self.first):
            x = x + layer(x)
        return x


def test_a_module_used_in_several_places_stays_one_and_every_use_is_kept():
    model, x = Shared(), torch.randn(2, 5, 8)
    before = model(x)
    to_moe(model, ["first", "second"], num_experts=4)
    assert model.first is model.second
    for _ in range(2):
        torch.testing.assert_close(model(x), before, **near("fp32 twin"))
        assert len(routings(model)) == 3
    for _ in range(2):
        model.first(x)  # outside a pass of the model, the last call alone
        assert len(routings(model)) == 1
    with pytest.raises(ConfigError):
        model(torch.randn(2, 5, 9))
    model.second(x)
    assert len(routings(model)) == 1, "a pass that failed is over too"


def test_t5_and_switch_dense_layers():
    kinds = [
        (transformers.T5Config, transformers.T5ForConditionalGeneration, {}, "*.block.*.layer.*.DenseReluDense"),
        (
            transformers.T5Config,
            transformers.T5ForConditionalGeneration,
            {"feed_forward_proj": "gated-gelu"},
            "*.block.*.layer.*.DenseReluDense",
        ),
        (
            transformers.SwitchTransformersConfig,
            transformers.SwitchTransformersForConditionalGeneration,
            {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2},
            "*.block.0.layer.*.mlp",
        ),
    ]
    for make_config, make, changes, where in kinds:
        config = make_config(
            vocab_size=50, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0, **changes
        )
        model = make(config).eval()
        tokens = {"input_ids": torch.randint(50, (2, 9)), "labels": torch.randint(50, (2, 6))}
        with torch.no_grad():
            before = model(**tokens).logits
            with pytest.warns(UserWarning, match="drops 10% of its inner values"):
                to_moe(model, where, num_experts=4, method="split")
            torch.testing.assert_close(model(**tokens).logits, before, **near("fp32 twin"))
        assert [routing.num_tokens for routing in routings(model)] in ([18, 18, 12, 12], [18, 12])


def dbrx() -> nn.Module:
    config = transformers.DbrxConfig(
        d_model=16,
        n_heads=2,
        n_layers=2,
        max_seq_len=32,
        vocab_size=50,
        ffn_config={"hidden_size": 16, "ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
    )
    return transformers.DbrxForCausalLM(config).eval()


def test_fresh_experts_go_anywhere_that_keeps_a_tensors_shape():
    model = dbrx()
    with pytest.raises(UnsupportedError, match=r"'transformer.blocks.1.ffn' \(DbrxFFN\) cannot become experts"):
        to_moe(model, "transformer.blocks.1.ffn", num_experts=4)
    config = MoEConfig(hidden_size=16, intermediate_size=10, num_experts=6, top_k=2, num_shared_experts=1)
    to_moe(model, "transformer.blocks.1.ffn", config)
    tokens = torch.randint(50, (2, 7))
    model(tokens, labels=tokens).loss.backward()
    assert model.transformer.blocks[1].ffn.moe.experts.down_proj.grad.abs().sum() > 0
    assert routings(model)[0].num_experts == 6


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "transformer.h.10",
            r"'transformer.h.10' \(GPT2Block\) cannot become experts: .* so it is a block, not an MLP; "
            r"name its child 'transformer.h.10.mlp' instead$",
        ),
        ("transformer.h.10.attn", r"\(GPT2Attention\) cannot become experts: .*not an MLP$"),
        ("transformer.h.10.mlp.c_fc", r"\(Conv1D\) cannot become experts: for a tensor of shape .* it returns one of"),
        (["transformer.h.9.mlp", "transformer.h.10.ln_2"], r"\(LayerNorm\) cannot become experts: it has no matrix"),
        ("transformer.h", r"\(ModuleList\) .* container .*; name its child 'transformer.h.0.mlp' instead"),
    ],
)
def test_a_refusal_is_one_line_that_names_what_to_name_and_changes_nothing(where, message):
    model = gpt2()
    with pytest.raises(UnsupportedError, match=message) as refused:
        to_moe(model, where)
    assert "\n" not in str(refused.value)
    assert not any(isinstance(part, DropIn) for part in model.modules())


@pytest.mark.parametrize("child", ["", ".attn", ".mlp.c_fc"])
def test_random_experts_are_refused_where_the_interface_would_break(child):
    config = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2)
    with pytest.raises(UnsupportedError, match="cannot become experts"):
        to_moe(gpt2(), f"transformer.h.10{child}", config)


def test_wrong_calls_are_refused():
    model = gpt2()
    with pytest.raises(UnsupportedError, match="no layer that to_moe made"):
        routings(model)
    for where, message in (
        ("transformer.h.10.mpl", "did you mean 'transformer.h.10.mlp'"),
        ("transformer.*.mlp", "no module of the GPT2LMHeadModel is called"),  # a star is one name, not several
        (["transformer.h.10.mlp", "transformer.h.10.mlp.c_fc"], "which is inside it"),
    ):
        with pytest.raises(ConfigError, match=message):
            to_moe(model, where)
    with pytest.raises(ConfigError, match="unknown key 'num_expert'"):
        to_moe(model, BLOCK10, num_expert=4)
    with pytest.raises(ConfigError, match="not both"):
        to_moe(model, BLOCK10, SurgeryConfig(), num_experts=4)
    with pytest.raises(ConfigError, match=r"splits .* must divide"):
        to_moe(model, BLOCK10, method="split", splits=3, num_experts=6, top_k=3)
    with pytest.raises(UnsupportedError, match="hash router needs token ids"):
        to_moe(model, BLOCK10, router="hash", top_k=2)
    residual = nn.ModuleDict(
        {"ff": nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8)))}
    )
    with pytest.raises(UnsupportedError, match=r"holds an MLP and more than that; name its child 'ff.1' instead"):
        to_moe(residual, "ff", MoEConfig(hidden_size=8, intermediate_size=8, num_experts=4, top_k=2))
    to_moe(model, BLOCK10, num_experts=4)
    with pytest.raises(UnsupportedError, match="already"):
        to_moe(model, BLOCK10)


class WithRouterLoss(transformers.Trainer):
    """What docs/surgery.md shows."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        balance = losses.load_balancing(routings(model, inputs.get("attention_mask")))
        parts = 1 if num_items_in_batch is None else self.args.gradient_accumulation_steps
        loss = loss + 0.01 * balance / parts
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hugging_face_trainer(tmp_path, checkpointing):
    model = to_moe(gpt2(), BLOCK10, num_experts=32, capacity=CapacityConfig(tokens=256))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids(8, 16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        gradient_checkpointing=checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = WithRouterLoss(model=model, args=arguments, train_dataset=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < 0.9 * history[0]
    assert model.get_submodule(BLOCK10).moe.router.weight.grad is None or trainer.state.global_step == 12
