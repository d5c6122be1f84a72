"""`lint`: the silent mistakes that a configuration already shows, each with its cause and its remedy. No torch.

It reads a transformers config.json of any family, or one of our own configurations as JSON (an `MoEConfig`, a
`ModelConfig`, or the state.json of a checkpoint, which also says how the model is trained).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moekit.config import (
    GumbelOptions,
    ModelConfig,
    MoEConfig,
    NoisyTopKOptions,
    SigmoidOptions,
    TopPOptions,
    TrainConfig,
    from_dict,
)
from moekit.errors import ConfigError, FileError, FormatError
from moekit.files import read_json

__all__ = ["Finding", "Level", "lint", "lint_file"]

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One mistake, or one thing worth knowing.

    Attributes:
        level: error: the run would learn nothing or fail; warning: it would learn something else than was meant;
            note: it depends.
        name: the same for the same mistake everywhere.
        seen: what the configuration says.
        cause: what comes of it.
        remedy: what to set instead.
    """

    level: Level
    name: str
    seen: str
    cause: str
    remedy: str


def lint_file(path: str | os.PathLike[str]) -> list[Finding]:
    """The findings of a model folder, or of a JSON file of any kind that `lint` knows.

    Raises:
        FileError: there is no such file, or the folder has no config.json.
        FormatError: it is not JSON, or not a configuration.
    """
    path = Path(path)
    if path.is_dir() and not (path / "config.json").exists():
        raise FileError(f"{path} has no config.json: give a model folder, or a JSON file")
    file = path / "config.json" if path.is_dir() else path
    return lint(read_json(file), source=str(file))


def lint(values: Mapping[str, Any], *, source: str = "configuration") -> list[Finding]:
    """The findings of a configuration, errors first.

    Raises:
        FormatError: the mapping is no configuration of a kind that is known.

    >>> mixtral = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 1}
    >>> [finding.name for finding in lint(mixtral | {"router_aux_loss_coef": 0.02})]
    ['k1_renormalised', 'aux_switched_off']
    """
    if "model_type" in values:
        found = list(_of_transformers(_flat(values)))
    elif {"train", "model"} <= values.keys():
        found = list(_of_run(values["model"], values["train"], source))
    elif "num_hidden_layers" in values and "arch" in values:
        found = list(_of_run(values, {}, source))
    elif {"hidden_size", "num_experts", "top_k"} <= values.keys():
        found = list(_of_layer(values, source))
    else:
        raise FormatError(
            f"{source} is no configuration of transformers, no MoEConfig, ModelConfig or checkpoint state"
        )
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


# transformers

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
_ALWAYS_RENORMALISED = {"mixtral", "gpt_oss", "minimax", "granitemoe", "jetmoe"}
_SWITCHABLE_BIAS = ("e_score_correction_bias", "moe_router_enable_expert_bias", "use_routing_bias", "scoring_func")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a model, with those of the parts that hold its experts (DBRX's ffn_config, a text_config)."""
    flat = dict(values)
    for part in ("text_config", "ffn_config"):
        if isinstance(values.get(part), Mapping):
            flat |= {key: value for key, value in values[part].items() if key != "model_type"}
    return flat


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (values[name] for name in names if isinstance(values.get(name), int))
    return next(found, None)


def _of_transformers(values: Mapping[str, Any]) -> Iterator[Finding]:
    experts, top_k = _first(values, _EXPERTS), _first(values, _TOP_K)
    if experts is None or experts < 2:
        yield Finding("note", "dense", f"{values['model_type']} without experts", "there is nothing to route", "-")
        return
    for check in (_hf_sizes, _hf_renormalised, _hf_aux, _hf_layers, _hf_quantised):
        yield from check(values, experts, top_k)


def _hf_sizes(values: Mapping[str, Any], experts: int, top_k: int | None) -> Iterator[Finding]:
    if top_k is not None and top_k > experts:
        yield Finding("error", "too_many_choices", f"{top_k} of {experts} experts", "there are not so many", "lower it")
    groups, chosen = _first(values, ("n_group",)), _first(values, ("topk_group",))
    if not groups:
        return
    if experts % groups:
        yield Finding(
            "error",
            "uneven_groups",
            f"n_group {groups}, {experts} experts",
            "groups must be of equal size",
            "divide it",
        )
    elif chosen and top_k and chosen * (experts // groups) < top_k:
        room = chosen * (experts // groups)
        cause = f"the chosen groups hold {room} experts: with −∞ outside them the rest of the choice is arbitrary"
        yield Finding("error", "groups_too_small", f"topk_group {chosen}, top_k {top_k}", cause, "raise topk_group")


def _hf_renormalised(values: Mapping[str, Any], experts: int, top_k: int | None) -> Iterator[Finding]:
    renormalised = values.get("norm_topk_prob") or values["model_type"] in _ALWAYS_RENORMALISED
    if top_k == 1 and renormalised:
        cause = "the only weight is 1 whatever the router says, so the router gets no gradient and never learns"
        yield Finding(
            "error",
            "k1_renormalised",
            "one expert a token, weights normalised",
            cause,
            "two experts, or norm_topk_prob false",
        )


def _hf_aux(values: Mapping[str, Any], experts: int, top_k: int | None) -> Iterator[Finding]:
    coef = values.get("router_aux_loss_coef")
    if not isinstance(coef, int | float):
        return
    if coef > 0 and not values.get("output_router_logits"):
        cause = "transformers adds the balance loss only when it returns the router logits: it is silently absent"
        yield Finding(
            "warning",
            "aux_switched_off",
            f"router_aux_loss_coef {coef:g}, output_router_logits false",
            cause,
            "set output_router_logits true for training",
        )
    elif coef > 0 and top_k:
        cause = f"transformers' loss is {top_k} at balance, moekit's and Switch's 1: so it weighs {top_k} times as much"
        yield Finding(
            "note", "aux_convention", f"router_aux_loss_coef {coef:g}", cause, f"{coef * top_k:g} is the same elsewhere"
        )
    elif coef == 0 and not any(values.get(name) for name in _SWITCHABLE_BIAS):
        yield Finding(
            "warning",
            "aux_off",
            "router_aux_loss_coef 0",
            "nothing keeps the experts in balance while training",
            "0.001 to 0.02",
        )


def _hf_layers(values: Mapping[str, Any], experts: int, top_k: int | None) -> Iterator[Finding]:
    layers, only = values.get("num_hidden_layers"), values.get("mlp_only_layers")
    step = values.get("decoder_sparse_step", 1)
    if not isinstance(layers, int) or not isinstance(only, list) or not isinstance(step, int) or step < 1:
        return
    outside = [layer for layer in only if not (isinstance(layer, int) and 0 <= layer < layers)]
    if outside:
        yield Finding(
            "warning", "no_such_layer", f"mlp_only_layers {outside}", f"there are {layers} layers", "count from 0"
        )
    if all(layer in only or (layer + 1) % step for layer in range(layers)):
        yield Finding(
            "error", "all_dense", f"decoder_sparse_step {step}", "no layer is left that has experts", "lower it"
        )


def _hf_quantised(values: Mapping[str, Any], experts: int, top_k: int | None) -> Iterator[Finding]:
    config = values.get("quantization_config")
    if isinstance(config, Mapping) and str(config.get("quant_method", "")).startswith("bitsandbytes"):
        cause = "bitsandbytes replaces nn.Linear alone; fused experts stay as they are (bitsandbytes#1849)"
        yield Finding(
            "warning", "experts_not_quantised", "quant_method bitsandbytes", cause, "check the bytes of the experts"
        )


# our own


def _of_run(model: Any, train: Any, source: str) -> Iterator[Finding]:
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


def _of_layer(values: Mapping[str, Any], source: str) -> Iterator[Finding]:
    try:
        config = from_dict(MoEConfig, values, source=source)
    except ConfigError as error:
        yield _refused(error)
        return
    yield from _layer(config, causal=False)


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
    if isinstance(options, SigmoidOptions) and options.bias and options.bias_rate == 0:
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
    if train.router_lr_scale == 0:
        yield Finding("warning", "router_frozen", "router_lr_scale 0", "the routers stay as they began", "0.1 to 1")
    if balance > 0 and train.accumulate > 1 and train.balance_over == "micro_batch":
        cause = "balance is asked of every micro-batch, so the loss depends on how the batch is cut (2501.11873)"
        yield Finding("note", "balance_by_micro_batch", f"accumulate {train.accumulate}", cause, "balance_over step")
    if balance > 0.1:
        cause = "a strong balance loss drowns the language model's in the routers (2408.15664 figure 2)"
        yield Finding("note", "balance_strong", f"balance_coef {balance:g}", cause, "0.001 to 0.02")
