"""The mistakes of moekit's own configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moekit.config import (
    GateOptions,
    GumbelOptions,
    HashOptions,
    ModelConfig,
    MoEConfig,
    NoisyTopKOptions,
    SinkhornOptions,
    TopKOptions,
    TopPOptions,
    TrainConfig,
    UpcycleConfig,
    from_dict,
)
from moekit.errors import ConfigError
from moekit.lint.findings import Finding

__all__ = ["of_layer", "of_run", "of_training", "of_upcycling"]


def of_run(model: Any, train: Any, source: str) -> Iterator[Finding]:
    """The findings of a `ModelConfig` and, if not empty, of the `TrainConfig` it is trained with."""
    try:
        config = from_dict(ModelConfig, model, source=source)
        how = from_dict(TrainConfig, train, source=source)
    except ConfigError as error:
        yield _refused(error)
        return
    if config.moe is None:
        yield Finding("note", "dense", f"{config.arch} without experts", "there is nothing to route", "-")
        return
    yield from _layer(config.moe, causal=True)
    if train:
        yield from _training(config.moe, config, how)


def of_layer(values: Mapping[str, Any], source: str) -> Iterator[Finding]:
    """The findings of an `MoEConfig`."""
    try:
        config = from_dict(MoEConfig, values, source=source)
    except ConfigError as error:
        yield _refused(error)
        return
    yield from _layer(config, causal=False)


def of_training(values: Mapping[str, Any], source: str) -> Iterator[Finding]:
    """The findings of a `TrainConfig` alone."""
    try:
        config = from_dict(TrainConfig, values, source=source)
    except ConfigError as error:
        yield _refused(error)
        return
    if config.balance_coef == 0 and not config.aux_losses:
        cause = "nothing keeps the experts in balance, unless the router does so itself (sigmoid with bias)"
        yield Finding("warning", "aux_off", "balance_coef 0, no other router loss", cause, "0.01")
    yield from _optimisation(config)


def of_upcycling(values: Mapping[str, Any], source: str) -> Iterator[Finding]:
    """The findings of an `UpcycleConfig`."""
    try:
        config = from_dict(UpcycleConfig, values, source=source)
    except ConfigError as error:
        yield _refused(error)
        return
    if config.weights_sum < 1:
        cause = f"the experts' output enters with weights that sum to {config.weights_sum:.3g} instead of 1"
        seen = f"{config.gate_order} without norm_topk_prob"
        yield Finding("warning", "upcycled_weak", seen, cause, "gate_order topk_softmax, or norm_topk_prob true")
    elif config.changes_output is not None:
        cause = f"the output is not the dense model's: {config.changes_output}"
        yield Finding("note", "upcycled_changed", f"method {config.method}", cause, "method split or copy keeps it")
    if config.method == "copy" and not config.changes_output:
        cause = "equal experts become different only through the tokens they get: see the alarm experts_identical"
        yield Finding(
            "note", "upcycled_copies", "method copy", cause, "noise or drop, where they should differ at once"
        )


def _refused(error: ConfigError) -> Finding:
    name = "k1_renormalised" if "renormalised weights" in str(error) else "refused"
    return Finding("error", name, "a value that moekit refuses", str(error), "as the message says")


def _layer(moe: MoEConfig, *, causal: bool) -> Iterator[Finding]:
    """What a layer shows by itself; `causal` when it stands in a model that predicts the next token."""
    capacity, options = moe.capacity, moe.options
    if capacity is not None and capacity.factor is not None and capacity.factor < 1 and capacity.overflow == "drop":
        share = 1 - capacity.factor
        cause = f"even at perfect balance {share:.0%} of the choices are dropped"
        yield Finding(
            "warning",
            "capacity_below_one",
            f"capacity factor {capacity.factor:g}",
            cause,
            "1.25 is usual, or no capacity",
        )
    if (
        capacity is not None
        and causal
        and (capacity.order == "probability" or moe.top_k > 1 or capacity.overflow == "next")
    ):
        cause = "who finds room depends on later tokens too: training sees them, and generation does not"
        yield Finding(
            "warning",
            "capacity_looks_ahead",
            f"capacity by {capacity.order}",
            cause,
            "dropless, or a factor that drops little",
        )
    if moe.top_k == moe.num_experts:
        cause = "every expert works on every token: the cost of all of them, and a router that only weighs"
        yield Finding("note", "all_chosen", f"{moe.top_k} of {moe.num_experts} experts", cause, "fewer, to be sparse")
    if not causal and not options.causal:
        cause = "a token's experts depend on later tokens: for encoders, not for a model that predicts the next token"
        yield Finding("note", "not_causal", f"router {moe.router}", cause, "a router that is causal: docs/routers.md")
    if isinstance(options, HashOptions) and not causal:
        cause = "it chooses by token ids: the layer must be called with them"
        yield Finding("note", "needs_token_ids", "router hash", cause, "layer(x, mask, input_ids)")
    if isinstance(options, SinkhornOptions):
        cause = "training chooses by a balanced plan of the batch and eval by the logits alone: they may differ"
        yield Finding("note", "eval_differs", "router sinkhorn", cause, "look at MaxVio in eval")
    if isinstance(options, GateOptions) and (options.jitter or options.noise_std):
        noise = " and ".join(name for name in ("jitter", "noise_std") if getattr(options, name))
        yield Finding("note", "jitter", noise, "acts in training only: a model for inference has no use for it", "0")
    if isinstance(options, TopKOptions) and options.bias and options.bias_rate == 0:
        yield Finding(
            "warning", "bias_frozen", "bias_rate 0", "the selection bias stays as it is and balances nothing", "0.001"
        )
    if isinstance(options, TopPOptions) and options.target_k is None:
        cause = "how many experts a token gets follows from p and the router's certainty, and drifts while it learns"
        yield Finding("note", "k_unknown", f"top_p with p {options.p:g}", cause, "set target_k")
    if (
        moe.routed_scaling_factor != 1
        and not moe.norm_topk_prob
        and moe.gate_order == "topk_softmax"
        and not options.sigmoid
    ):
        cause = "weights that sum to 1 are scaled: an upcycled model no longer has the dense one's output"
        yield Finding("note", "scaled_weights", f"routed_scaling_factor {moe.routed_scaling_factor:g}", cause, "1")


def _training(moe: MoEConfig, model: ModelConfig, train: TrainConfig) -> Iterator[Finding]:
    """What a layer and the training it is in show together."""
    balance = model.router_aux_loss_coef if train.balance_coef is None else train.balance_coef
    if balance == 0 and not moe.options.balanced and not train.aux_losses:
        yield Finding(
            "warning", "aux_off", "balance_coef 0, no other router loss", "nothing keeps the experts in balance", "0.01"
        )
    if (
        isinstance(moe.options, NoisyTopKOptions)
        and balance == 0
        and not {"importance", "load"} & train.aux_losses.keys()
    ):
        cause = "the load that has a gradient is what this router is for (1701.06538 appendix A)"
        yield Finding(
            "note", "load_unused", "noisy_topk without importance and load losses", cause, "aux_losses importance, load"
        )
    if isinstance(moe.options, GumbelOptions) and moe.options.anneal_steps > train.steps:
        cause = f"the temperature still falls at the end ({train.steps} steps): eval will choose unlike training"
        yield Finding(
            "warning", "anneal_too_long", f"anneal_steps {moe.options.anneal_steps}", cause, f"{train.steps} or fewer"
        )
    if balance > 0 and train.accumulate > 1 and train.balance_over == "micro_batch":
        cause = "balance is asked of every micro-batch, so the loss depends on how the batch is cut (2501.11873)"
        yield Finding("note", "balance_by_micro_batch", f"accumulate {train.accumulate}", cause, "balance_over step")
    if balance > 0.1:
        cause = "a strong balance loss drowns the language model's in the routers (2408.15664 figure 2)"
        yield Finding("note", "balance_strong", f"balance_coef {balance:g}", cause, "0.001 to 0.02")
    yield from _optimisation(train)


def _optimisation(train: TrainConfig) -> Iterator[Finding]:
    """What a training shows whatever it trains."""
    if train.router_lr_scale == 0:
        yield Finding("warning", "router_frozen", "router_lr_scale 0", "the routers stay as they began", "0.1 to 1")
    if train.warmup_steps == 0:
        cause = "the first steps are full ones, before AdamW's moments know the gradients' size"
        yield Finding("note", "no_warmup", "warmup_steps 0", cause, "5 or more")
    if train.warmup_steps > train.steps:
        cause = f"the learning rate never reaches {train.lr:g}: the run ends in its warm-up"
        yield Finding("warning", "only_warmup", f"warmup_steps {train.warmup_steps}", cause, f"below {train.steps}")
    if train.clip_norm == 0:
        yield Finding("note", "no_clipping", "clip_norm 0", "one bad batch may throw the routers off", "1")
