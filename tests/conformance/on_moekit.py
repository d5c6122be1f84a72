"""moekit, asked by the traps: routing and losses here, models and life cycle in on_moekit_models.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance.adapter import Adapter, BiasedRouter, Layer, Parts, Routed, Shape
from conformance.judge import Absent, Measured, each, off
from moekit import kernels, losses
from moekit.config import CapacityConfig, GroupLimit, ModelConfig, MoEConfig
from moekit.config.routers import ROUTER_OPTIONS
from moekit.errors import ConfigError
from moekit.moe import ROUTERS, LocalDispatcher, MoE, Router, Routing, RoutingRecord, RoutingTotals

NAMES = {"noisy": "noisy_topk", "biased": "sigmoid", "capacity": "topk", "jitter": "topk"}
JITTER = 0.3


def options_of(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of `MoEConfig` for a kind of router and its options, in the words of the traps."""
    options: dict[str, Any] = {"router": NAMES.get(kind, kind)}
    if kind == "topk" and not given.get("renormalise", True):
        options["gate_order"] = "softmax_topk"
    if kind == "biased":
        groups = GroupLimit(groups=given["groups"], chosen=given["chosen"]) if "groups" in given else None
        options |= {"norm_topk_prob": True, "router_options": {"groups": groups}, "gate_order": "softmax_topk"}
    if kind == "capacity":
        capacity = {name: given[name] for name in ("order", "overflow") if name in given}
        options |= {"gate_order": "softmax_topk", "capacity": CapacityConfig(tokens=given["rows"], **capacity)}
    if kind == "sinkhorn" and not given.get("renormalise", True):
        options["gate_order"] = "softmax_topk"
    if kind == "top_p":
        options["gate_order"] = "softmax_topk"
    if kind == "hierarchical":
        options["router_options"] = {"groups": 2, "groups_per_token": 2}
    if kind == "jitter":
        options["router_options"] = {"jitter": JITTER}
    return options


def router_of(kind: str, gate_ED: Tensor, top_k: int, **given: Any) -> Router:
    """A router with this gate; the rows that a noisy one has beyond it are 0."""
    experts, hidden = gate_ED.shape
    config = MoEConfig(
        hidden_size=hidden, intermediate_size=4, num_experts=experts, top_k=top_k, **options_of(kind, given)
    )
    router = ROUTERS[config.router](config)
    if router.weight is not None:
        rows_ED = torch.zeros(router.weight.shape, dtype=gate_ED.dtype)
        router.weight = nn.Parameter(torch.cat([gate_ED.detach(), rows_ED[experts:]]))
    if "bias_E" in given:
        router.selection_bias.copy_(given["bias_E"])
    return router


def routed(routing: Routing) -> Routed:
    """A `Routing` in the form of the traps."""
    index = (routing.token_ids_A, routing.expert_ids_A)
    weights_TE = torch.zeros(routing.logits_TE.shape, dtype=routing.weights_A.dtype).index_put(index, routing.weights_A)
    chosen_TE = torch.zeros(routing.logits_TE.shape, dtype=torch.bool)
    chosen_TE[index] = True
    return Routed(weights_TE, chosen_TE, routing.logits_TE)


def of_logits(logits_TE: Tensor, top_k: int, mask_T: Tensor | None = None, **options: Any) -> Routing:
    """The routing of a router whose gate is the identity."""
    router = router_of("topk", torch.eye(logits_TE.shape[1]), top_k, renormalise=top_k > 1, **options)
    return router(logits_TE, mask_T)


class Moekit(Adapter):
    name = "moekit"
    backends = ("reference", "blas", "cpu")
    hashed = 705112
    remarks: ClassVar[dict[int, str]] = {
        8: "Reentrant mode through `adapt.to_moe`, non-reentrant through the decoder; pipelines are absent.",
        16: "Sinkhorn chooses by the whole batch in training, as its documentation says; it is left out there.",
    }

    # Losses

    def balance_factor(self, top_k: int) -> float:
        return 1.0

    def balance_loss(self, layers: list[Tensor], top_k: int, mask_T: Tensor | None = None) -> Tensor:
        return losses.load_balancing([of_logits(logits_TE, top_k, mask_T) for logits_TE in layers])

    def biased_balance(self, logits_TE: Tensor, bias_E: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        routing = router_of("biased", torch.eye(logits_TE.shape[1]), top_k, bias_E=bias_E)(logits_TE)
        return losses.load_balancing(routing), routing.probs_TE, routed(routing).chosen_TE

    def limited_balance(self, logits_TE: Tensor, rows: int, count: str) -> Tensor:
        routing = router_of("capacity", torch.eye(logits_TE.shape[1]), 1, rows=rows)(logits_TE)
        return losses.load_balancing(routing, count=count)

    def sequence_loss(self, logits_TE: Tensor, sequence_T: Tensor, top_k: int, mask_T: Tensor | None) -> Tensor:
        return losses.sequence_balancing(of_logits(logits_TE, top_k, mask_T), sequence_T)

    def global_loss(self, parts: list[Tensor], top_k: int) -> Tensor:
        routings = [of_logits(part_TE, top_k) for part_TE in parts]
        counts_E = sum(routing.chosen_counts_E for routing in routings)
        tokens = sum(routing.real_tokens for routing in routings)
        shares = [routing.real_tokens / tokens for routing in routings]
        values = [losses.load_balancing(routing, counts_E=counts_E) for routing in routings]
        return sum(share * value for share, value in zip(shares, values, strict=True))

    def z_loss(self, logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
        return losses.z_loss(of_logits(logits_TE, 2, mask_T))

    def z_logits(self, x_TD: Tensor, gate_ED: Tensor) -> Tensor:
        return router_of("topk", gate_ED, 2)(x_TD).logits_TE

    def loss_inputs(self, x_TD: Tensor, gate_ED: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        logits_TE = x_TD @ gate_ED.T
        scores_TE = logits_TE.sigmoid()
        right = {"softmax": logits_TE.softmax(1), "sigmoid": scores_TE / scores_TE.sum(1, keepdim=True)}
        seen = {}
        for name in ("topk", "noisy", "gumbel", "sinkhorn", "expert_choice", "biased"):
            routing = router_of(name, gate_ED, 2).eval()(x_TD)
            seen[name] = (routing.probs_TE, right[routing.score_function])
        return seen

    # Routing

    def route(
        self,
        kind: str,
        x_TD: Tensor,
        gate_ED: Tensor,
        top_k: int,
        *,
        training: bool = False,
        mask_T: Tensor | None = None,
        **options: Any,
    ) -> Routed:
        router = router_of(kind, gate_ED, top_k, **options).train(training)
        if gate_ED.requires_grad:
            del router.weight
            router.weight = gate_ED
        return routed(router(x_TD, mask_T, options.get("ids_T")))

    def renormalised_top1(self) -> nn.Module:
        config = MoEConfig(
            hidden_size=16, intermediate_size=8, num_experts=4, top_k=1, gate_order="softmax_topk", norm_topk_prob=True
        )
        return MoE(config)

    def biased_router(self, gate_ED: Tensor, bias_E: Tensor, top_k: int) -> BiasedRouter:
        router = router_of("biased", gate_ED, top_k, bias_E=bias_E)

        def step(parts: list[Tensor], mode: str) -> None:
            totals = [RoutingTotals.of(_through(router, part_TD, mode)) for part_TD in parts]
            router.after_step(sum(totals[1:], totals[0]))

        return BiasedRouter(
            router,
            lambda: router.selection_bias,
            lambda x_TD: routed(router(x_TD)),
            step,
            router.options.bias_rate,
        )

    def grouped(self) -> dict[str, Callable[..., Routed]]:
        return {"sigmoid": lambda x_TD, gate_ED, top_k, **given: self.route("biased", x_TD, gate_ED, top_k, **given)}

    def autocast_logits(self, x_TD: Tensor, gate_ED: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return {name: router_of(name, gate_ED, 2).eval()(x_TD).logits_TE for name in ("topk", "biased", "noisy")}

    def dropless(self, gate_ED: Tensor, top_k: int, *, training: bool) -> dict[str, Callable[[Tensor], Routed]]:
        kinds = [name for name in ROUTER_OPTIONS if ROUTER_OPTIONS[name].causal]
        if training:  # a transport plan of the batch, as its documentation says
            assert "of the batch while training" in inspect.getdoc(ROUTER_OPTIONS["sinkhorn"])
            kinds.remove("sinkhorn")
        ids_T = torch.arange(24)
        kind_of = {theirs: ours for ours, theirs in NAMES.items() if ours in ("noisy", "biased")}

        def of(kind: str) -> Callable[[Tensor], Routed]:
            return lambda x_TD: self.route(
                kind_of.get(kind, kind), x_TD, gate_ED, top_k, training=training, ids_T=ids_T
            )

        return {kind: of(kind) for kind in kinds}

    def refuses_causal(self, kind: str) -> bool:
        moe = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, router=kind)
        try:
            ModelConfig(
                arch="mixtral",
                vocab_size=32,
                hidden_size=16,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=32,
                moe=moe,
            )
        except ConfigError:
            return True
        return False

    def capacity_leak_is_said(self, order: str) -> bool:
        said = " ".join(inspect.getsource(CapacityConfig).split())
        return "Except for position with K = 1 and overflow drop, a later token can take the room" in said

    def jittered(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        config = MoEConfig(
            hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, router_options={"jitter": JITTER}
        )
        layer, seen = MoE(config), []
        layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        _, routing = layer(x_BLD)
        rows_RD, _ = LocalDispatcher().dispatch(torch.arange(18.0).unsqueeze(1), routing)
        experts_TD = torch.empty(18, 16).index_copy(0, rows_RD[:, 0].long(), seen[0])
        return x_BLD, experts_TD

    def capacity(self, tokens: int, experts: int, top_k: int, factor: float) -> int:
        return CapacityConfig(factor=factor).of(tokens, experts, top_k)

    def load_TE(self, x_TD: Tensor, gate_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        router = router_of("noisy", gate_ED, top_k)
        record = RoutingRecord()
        with record.recording():
            got_TE = router(x_TD).load_TE
        # The definition (1701.06538 eq 8): only expert i's own noise is drawn again, the others keep theirs.
        seed = record.decisions[0].seed
        noise_TE = torch.randn(got_TE.shape, generator=torch.Generator().manual_seed(seed))
        logits_TE, std = x_TD @ gate_ED.T, nn.functional.softplus(torch.zeros(()))
        noisy_TE = logits_TE + std * noise_TE
        estimate_TE = torch.zeros_like(got_TE)
        for expert in range(gate_ED.shape[0]):
            others_TE = noisy_TE.clone()
            others_TE[:, expert] = -torch.inf
            kth_T = others_TE.topk(top_k, dim=1).values[:, -1]
            drawn_NT = logits_TE[:, expert] + std * torch.randn(4000, x_TD.shape[0])
            estimate_TE[:, expert] = (drawn_NT > kth_T).float().mean(0)
        return got_TE.detach(), estimate_TE

    def replayed(self, layer: Layer, x_BLD: Tensor, change: Callable[[], None]) -> tuple[Routed, Routed]:
        record = RoutingRecord()
        with record.recording():
            first = routed(layer.module(x_BLD)[1])
        change()
        with record.replaying():
            return first, routed(layer.module(x_BLD)[1])

    # Compute

    def layer(self, shape: Shape, dtype: torch.dtype = torch.float32, backend: str = "reference") -> Layer:
        config = MoEConfig(
            hidden_size=shape.hidden, intermediate_size=shape.inner, num_experts=shape.experts, top_k=shape.top_k
        )
        layer = MoE(config).to(dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0, 0.3)

        def run(x_BLD: Tensor) -> Tensor:
            with _backend(backend, x_BLD.dtype):
                return layer(x_BLD)[0]

        def parts() -> Parts:
            return Parts(layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj)

        return Layer(layer, layer.router, run, parts)

    def poisoned_tail(self) -> Measured:
        return each(self.backends, self._tail)

    def _tail(self, backend: str) -> float:
        counts_E, rows_RD = torch.tensor([3, 0, 2]), torch.randn(8, 16)
        rows_RD[5:] = float("nan")
        weight_EFD = torch.randn(3, 8, 16, requires_grad=True)
        tail_RD = rows_RD.clone().requires_grad_()
        with kernels.forced(backend):
            out_RF = kernels.grouped_mm(tail_RD, weight_EFD, counts_E)
            out_RF.square().sum().backward()
        want_EFD = weight_EFD.detach().clone().requires_grad_()
        want_RF = torch.einsum("rd,rfd->rf", rows_RD[:5], want_EFD[torch.tensor([0, 0, 0, 2, 2])])
        want_RF.square().sum().backward()
        tails = torch.cat([out_RF[5:].flatten(), tail_RD.grad[5:].flatten()])
        pairs = ((out_RF[:5], want_RF), (weight_EFD.grad, want_EFD.grad), (tails, torch.zeros_like(tails)))
        return max(off(got, want) for got, want in pairs)

    def down_biased(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], int, int]:
        layer = MoE(MoEConfig(hidden_size=16, intermediate_size=8, num_experts=6, top_k=2, bias=True))

        def run(x_BLD: Tensor, bias_ED: Tensor) -> Tensor:
            with torch.no_grad():
                layer.experts.down_bias.copy_(bias_ED)
            return layer(x_BLD)[0]

        return run, lambda x_BLD: routed(layer.router(x_BLD[0])).weights_TE, 6, 16

    def dtype_layers(self) -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
        def made(**options: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
            config = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, **options)
            return lambda: (MoE(config).bfloat16(), torch.randn(1, 9, 16).bfloat16())

        return {"topk": made(), "sigmoid": made(router="sigmoid"), "mlp": made(expert="mlp", bias=True)}

    def recomputing(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        return RoutingRecord().wrap(layer.run)

    def several_processes(self) -> float:
        raise Absent("no expert parallelism yet")


def _through(router: Router, x_TD: Tensor, mode: str) -> Routing:
    """A forward pass and its backward, under checkpointing or not."""
    if mode == "none":
        return router(x_TD)
    x_TD = x_TD.clone().requires_grad_()
    routing = checkpoint(RoutingRecord().wrap(router), x_TD, use_reentrant=mode == "reentrant")
    if mode == "non-reentrant":
        (routing.weights_A.square().sum()).backward()
    return routing


@contextmanager
def _backend(name: str, dtype: torch.dtype) -> Iterator[None]:
    """Force a backend where it knows the dtype; fp64 is the reference's."""
    with kernels.forced("reference" if dtype == torch.float64 else name):
        yield
