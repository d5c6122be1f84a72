"""moekit, asked by the traps about whole models: training, upcycling, counting."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from conformance.judge import said
from conformance.on_moekit import Moekit
from moekit import plan
from moekit.adapt import quantise, routings, to_moe, upcycle
from moekit.config import DataConfig, ModelConfig, MoEConfig, TrainConfig, UpcycleConfig
from moekit.errors import UnsupportedError
from moekit.models.decoder import Decoder
from moekit.moe import Router, Routing
from moekit.moe.losses import load_balancing
from moekit.train import Trainer, prepare
from moekit.train.optim import make_optimizer
from tiny import VOCABULARY, byte_tokenizer

IDS_BL = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
CHECKPOINTING = {"none": "none", "non-reentrant": "block"}


def model_config(moe: MoEConfig | None, **changes: Any) -> ModelConfig:
    return ModelConfig(
        arch="mixtral" if moe else "llama",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        moe=moe,
        **changes,
    )


def layer_config(**changes: Any) -> MoEConfig:
    return MoEConfig(**({"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "top_k": 2} | changes))


def made(config: ModelConfig) -> Decoder:
    """Always the same model, its weights large enough for every part to matter."""
    torch.manual_seed(3)
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model


class Foreign(nn.Module):
    """A model that is not ours, whose MLPs `to_moe` replaced; it checkpoints its blocks as PyTorch offers."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.mode = mode
        self.embed = nn.Embedding(32, 16)
        mlps = [nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2)]
        self.mlps = nn.ModuleList(mlps)
        to_moe(self, "mlps.*", num_experts=4, top_k=2, router_init_scale=4.0)

    def forward(self, ids_BL: Tensor) -> Tensor:
        x_BLD = self.embed(ids_BL)
        for mlp in self.mlps:
            again = self.mode != "none"
            y_BLD = checkpoint(mlp, x_BLD, use_reentrant=self.mode == "reentrant") if again else mlp(x_BLD)
            x_BLD = x_BLD + y_BLD
        return x_BLD @ self.embed.weight.T


def forward(model: nn.Module, ids_BL: Tensor, mode: str) -> tuple[Tensor, tuple[Routing, ...]]:
    """(logits, routings)."""
    if isinstance(model, Foreign):
        model.mode = mode
        return model(ids_BL), routings(model)
    features = model.features(ids_BL, checkpointing=CHECKPOINTING[mode])
    return model.logits(features.hidden_BLD), features.routings


def next_token_loss(logits_BLV: Tensor, ids_BL: Tensor) -> Tensor:
    return F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten())


class MoekitModels(Moekit):
    """The decoder has non-reentrant checkpointing; for the other mode a foreign model after `to_moe` answers."""

    def trained(self, coef: float, mode: str, *, micro_batches: int = 1, scaled: bool = False) -> dict[str, Tensor]:
        model = self._model(mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for part_BL in IDS_BL.chunk(micro_batches):
            logits_BLV, seen = forward(model, part_BL, mode)
            loss = next_token_loss(logits_BLV, part_BL) + coef * load_balancing(seen)
            scaler.scale(loss / micro_batches).backward()
        scaler.unscale_(optimizer)
        return {name: p.grad for name, p in gates(model).items()}

    def aux_gradients(self, mode: str, micro_batches: int) -> dict[str, Tensor]:
        model = self._model(mode)
        total = sum(load_balancing(forward(model, part_BL, "none")[1]) for part_BL in IDS_BL.chunk(micro_batches))
        grads = torch.autograd.grad(total / micro_batches, list(gates(model).values()))
        return dict(zip(gates(model), grads, strict=True))

    def _model(self, mode: str) -> nn.Module:
        return Foreign(mode) if mode == "reentrant" else made(model_config(layer_config()))

    def says_switched_off(self) -> list[str]:
        config = model_config(layer_config(), router_aux_loss_coef=0.01)
        decoder = Decoder(dataclasses.replace(config, vocab_size=VOCABULARY))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "text.txt").write_text("The quick brown fox. " * 20)
            rows = DataConfig(train=(f"{folder}/text.txt",), sequence_length=16)
            data = prepare(rows, byte_tokenizer(), Path(folder) / "cache")
            with said("moekit") as lines:
                Trainer(decoder, data, TrainConfig(steps=1, balance_coef=0.0), Path(folder) / "run")
        return [line for line in lines if "balance_coef" in line]

    def counted(self, mode: str) -> tuple[Tensor, Tensor]:
        model, by_hand_E = self._model(mode), torch.zeros(4)
        logits_BLV, seen = forward(model, IDS_BL, mode)
        next_token_loss(logits_BLV, IDS_BL).backward()
        plain = self._model(mode)

        def count(router: Router, args: tuple[Tensor, ...]) -> None:
            by_hand_E.add_(torch.bincount((args[0] @ router.weight.T).topk(2).indices.flatten(), minlength=4))

        for router in (module for module in plain.modules() if isinstance(module, Router)):
            router.register_forward_pre_hook(count)
        forward(plain, IDS_BL, "none")
        return sum(routing.counts_E for routing in seen).float(), by_hand_E

    # Life cycle

    def upcycled(self, form: str) -> tuple[Tensor, Tensor]:
        dense = made(model_config(None)).eval()
        config = UpcycleConfig(num_experts=8, top_k=4, splits=2, **FORMS[form])
        assert config.changes_output is None or config.router_init_scale == 0
        return dense(IDS_BL).logits, upcycle(dense, config)(IDS_BL).logits

    def drop_upcycled(self, ratio: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        mlp = nn.Sequential(nn.Linear(256, 512, bias=False), nn.GELU(), nn.Linear(512, 256, bias=False))
        dense_FD = mlp[0].weight.detach().clone()
        model = to_moe(nn.ModuleDict({"mlp": mlp}), "mlp", num_experts=2, top_k=2, method="drop", drop_fraction=ratio)
        return dense_FD, model["mlp"].moe.experts.in_proj[0].detach()

    def quantised(self) -> float:
        """Expert bytes that the report lacks, as a share; 1 if experts it does not know are skipped without a word."""
        model = Decoder(model_config(layer_config(num_shared_experts=1)))
        by_hand = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
        covered, there = quantise(model, "int4").expert_bytes
        foreign = nn.ModuleDict({"experts": nn.Module(), "proj": nn.Linear(8, 8)})
        foreign["experts"].gate_up_proj = nn.Parameter(torch.randn(4, 16, 8))
        try:
            quantise(foreign, "int4")
        except UnsupportedError as error:
            if "experts.gate_up_proj" in str(error):
                return abs(covered - by_hand) / by_hand + abs(there - by_hand) / by_hand
        return 1.0

    def parameter_counts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        config = model_config(layer_config(num_shared_experts=1))
        model, said = Decoder(config), plan.parameters(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        return (said.total, said.active), (total, total - experts // 4 * 2)

    def decayed(self) -> list[str]:
        model = Decoder(model_config(layer_config(router="sigmoid")))
        config = TrainConfig(steps=1, weight_decay=0.1)
        groups = make_optimizer(model, config).param_groups
        reached = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        biases = {name: value for name, value in model.state_dict(keep_vars=True).items() if "selection_bias" in name}
        assert biases, "the model must have selection biases"
        return [name for name, value in biases.items() if id(value) in reached]


FORMS: dict[str, dict[str, Any]] = {
    "copy": {"method": "copy"},
    "split": {"method": "split"},
    "copy, weights not normalised": {"method": "copy", "gate_order": "softmax_topk", "router_init_scale": 0.0},
    "split, weights not normalised": {"method": "split", "gate_order": "softmax_topk", "router_init_scale": 0.0},
}


def gates(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "router.weight" in name}
