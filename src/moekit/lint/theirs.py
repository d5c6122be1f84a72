"""The mistakes of transformers' and PEFT's configurations, of any family: keys and numbers alone are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moekit.lint import families
from moekit.lint.findings import Finding

__all__ = ["of_adapter", "of_model"]

_EXPERTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
)
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
    "moe_router_topk",
)
_COEF = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight", "aux_loss_alpha", "moe_aux_loss_coeff")
_JITTER = ("router_jitter_noise", "input_jitter_noise", "moe_jitter_eps", "moe_input_jitter_eps")
_CAPACITY = ("capacity_factor", "moe_capacity_factor", "expert_capacity_factor", "moe_expert_capacity_factor")
_PROCESSES = ("ep_size", "moe_ep_size", "expert_parallel_size", "expert_model_parallel_size")
_LENGTH = ("n_positions", "max_position_embeddings", "max_seq_len")
_BIAS = ("e_score_correction_bias", "moe_router_enable_expert_bias", "use_routing_bias", "scoring_func")
_EXPERT_MATRICES = {"w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
_TOP_1 = {"switch_transformers"}
_NARROW = ("bfloat16", "float16")
_OUR_LOSS = "moekit.integrations.monitor.watch(model, routings=True) and moekit.moe.losses, for any family"


class _Model:
    """A configuration's keys, with those of the part that holds the experts (a text_config, DBRX's ffn_config)."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        part = _part_with_experts(values)
        own = part if part is not None and "model_type" in part and part["model_type"] else values
        self.values = {**values, **(part or {})}
        self.family = families.family_of(str(own["model_type"]))
        self.experts = self.first(_EXPERTS)
        self.top_k = 1 if self.family in _TOP_1 else self.first(_TOP_K)

    def first(self, names: tuple[str, ...]) -> int | None:
        """The first of these keys that holds a whole number."""
        found = (self.values[name] for name in names if type(self.values.get(name)) is int)
        return next(found, None)

    def number(self, names: tuple[str, ...]) -> tuple[str, float] | None:
        """The first of these keys that holds a number, and the number."""
        found = ((name, self.values[name]) for name in names if type(self.values.get(name)) in (int, float))
        return next(found, None)

    @property
    def renormalised(self) -> bool:
        """Whether a token's weights are made to sum to a constant."""
        if self.family in families.ALWAYS_RENORMALISED | families.NEVER_RENORMALISED:
            return self.family in families.ALWAYS_RENORMALISED
        if "moe_normalize_expert_weights" in self.values or self.family == "dbrx":
            return self.values.get("moe_normalize_expert_weights", 1.0) is not None
        return bool(self.values.get("norm_topk_prob", self.family in families.RENORMALISED_UNLESS_TOLD))


def of_model(values: Mapping[str, Any]) -> Iterator[Finding]:
    """The findings of a config.json."""
    model = _Model(values)
    if model.experts is None or model.experts < 2:
        yield Finding("note", "dense", f"{values['model_type']} without experts", "there is nothing to route", "-")
        return
    for check in (_sizes, _groups, _weights, _balance, _layers, _capacity, _noise, _precision, _library):
        yield from check(model, model.experts)


def of_adapter(values: Mapping[str, Any]) -> Iterator[Finding]:
    """The findings of PEFT's adapter_config.json."""
    modules = values.get("target_modules")
    means_experts = modules == "all-linear" or (isinstance(modules, list) and not _EXPERT_MATRICES.isdisjoint(modules))
    if means_experts and not values.get("target_parameters"):
        given = modules if isinstance(modules, str) else ", ".join(sorted(map(str, modules or ())))
        cause = (
            "transformers 5 keeps experts as parameters, not modules: PEFT translates some families' own names (w1 w2 "
            "w3 of Mixtral, gate_proj up_proj down_proj of Qwen) and leaves all other experts frozen without a word"
        )
        remedy = "target_parameters, for example mlp.experts.gate_up_proj and mlp.experts.down_proj"
        yield Finding("note", "experts_frozen", f"target_modules {given}, no target_parameters", cause, remedy)


def _part_with_experts(values: Mapping[str, Any], depth: int = 3) -> Mapping[str, Any] | None:
    """The nearest part of a composite model's configuration that says how many experts there are; None for itself."""
    if any(name in values for name in _EXPERTS) or not depth:
        return None
    for key, part in values.items():
        if key.endswith("_config") and isinstance(part, Mapping):
            if any(name in part for name in _EXPERTS):
                return part
            inside = _part_with_experts(part, depth - 1)
            if inside is not None:
                return inside
    return None


def _sizes(model: _Model, experts: int) -> Iterator[Finding]:
    top_k = model.top_k
    if top_k is not None and top_k > experts:
        yield Finding("error", "too_many_choices", f"{top_k} of {experts} experts", "there are not so many", "lower it")
    elif top_k == experts:
        cause = "every expert works on every token: the cost of all of them, and a router that only weighs"
        yield Finding("note", "all_chosen", f"{top_k} of {experts} experts", cause, "fewer, for a sparse model")
    processes = model.number(_PROCESSES)
    if processes is not None and processes[1] >= 1 and experts % processes[1]:
        cause = f"{experts} experts cannot be shared out evenly to {processes[1]:g} processes"
        yield Finding(
            "error", "uneven_processes", f"{processes[0]} {processes[1]:g}", cause, "a divisor of the experts"
        )


def _groups(model: _Model, experts: int) -> Iterator[Finding]:
    groups, chosen, top_k = model.first(("n_group",)), model.first(("topk_group",)), model.top_k
    if not groups:
        return
    if experts % groups:
        seen = f"n_group {groups}, {experts} experts"
        yield Finding("error", "uneven_groups", seen, "groups must be of equal size", "a divisor of the experts")
    elif chosen and chosen > groups:
        yield Finding("error", "groups_too_small", f"topk_group {chosen} of {groups}", "there are not so many", "less")
    elif chosen and top_k and chosen * (experts // groups) < top_k:
        room = chosen * (experts // groups)
        cause = f"the chosen groups hold {room} experts: with −∞ outside them the rest of the choice is arbitrary"
        yield Finding("error", "groups_too_small", f"topk_group {chosen}, top_k {top_k}", cause, "raise topk_group")


def _weights(model: _Model, experts: int) -> Iterator[Finding]:
    if model.top_k == 1 and model.renormalised:
        cause = "the only weight is 1 whatever the router says, so the router gets no gradient and never learns"
        seen, remedy = "one expert a token, weights normalised", "two experts, or norm_topk_prob false"
        yield Finding("error", "k1_renormalised", seen, cause, remedy)
    asked = model.values.get("norm_topk_prob")
    read = model.family not in families.ALWAYS_RENORMALISED | families.NEVER_RENORMALISED
    if isinstance(asked, bool) and not read and asked != model.renormalised and model.family != "cohere2_moe":
        does = "always" if model.renormalised else "never"
        cause = f"transformers' {model.family} does not read it: it {does} normalises"
        remedy = "nothing to set; do not expect other weights"
        yield Finding("warning", "norm_ignored", f"norm_topk_prob {str(asked).lower()}", cause, remedy)


def _balance(model: _Model, experts: int) -> Iterator[Finding]:
    given = model.number(_COEF)
    if given is None:
        return
    (name, coef), top_k = given, model.top_k
    adds = model.family in families.ADDS_BALANCE
    if coef > 0 and not adds and model.family in families.KNOWN | families.IGNORES_JITTER:
        cause = f"transformers has no balance loss for {model.family}: the key is kept and never read"
        yield Finding("warning", "aux_never_added", f"{name} {coef:g}", cause, _OUR_LOSS)
    elif coef > 0 and not model.values.get("output_router_logits"):
        cause = "transformers adds the balance loss only when it returns the router logits: it is silently absent"
        seen = f"{name} {coef:g}, output_router_logits false"
        yield Finding("warning", "aux_switched_off", seen, cause, "set output_router_logits true for training")
    elif coef > 0 and top_k:
        cause = (
            f"transformers' loss is K = {top_k} at balance, moekit's 1; and it pools the layers, so that two which "
            "collapse on different experts look balanced together"
        )
        yield Finding("note", "aux_convention", f"{name} {coef:g}", cause, f"{coef * top_k:g} is the same elsewhere")
    elif coef == 0 and not any(model.values.get(key) for key in _BIAS):
        cause = "nothing keeps the experts in balance while training"
        yield Finding("warning", "aux_off", f"{name} 0", cause, "0.001 to 0.02")


def _layers(model: _Model, experts: int) -> Iterator[Finding]:
    layers, first = model.first(("num_hidden_layers",)), model.first(("first_k_dense_replace",))
    if layers is not None and first is not None and first >= layers:
        seen = f"first_k_dense_replace {first} of {layers}"
        yield Finding("error", "all_dense", seen, "no layer is left that has experts", "lower it")
    only, step = model.values.get("mlp_only_layers"), model.values.get("decoder_sparse_step", 1)
    if layers is None or not isinstance(only, list) or type(step) is not int or step < 1:
        return
    outside = [layer for layer in only if not (isinstance(layer, int) and 0 <= layer < layers)]
    if outside:
        seen, cause = f"mlp_only_layers {outside}", f"there are {layers} layers"
        yield Finding("warning", "no_such_layer", seen, cause, "count from 0")
    if all(layer in only or (layer + 1) % step for layer in range(layers)):
        cause = "no layer is left that has experts"
        yield Finding("error", "all_dense", f"decoder_sparse_step {step}", cause, "lower it")


def _capacity(model: _Model, experts: int) -> Iterator[Finding]:
    factor, room, length = model.number(_CAPACITY), model.first(("expert_capacity",)), model.first(_LENGTH)
    if factor is not None and 0 < factor[1] < 1:
        cause = f"even at perfect balance {1 - factor[1]:.0%} of the choices are dropped"
        yield Finding("warning", "capacity_below_one", f"{factor[0]} {factor[1]:g}", cause, "1.25 is usual")
    if factor is not None and factor[1] > 0:
        shortest = math.ceil(experts / (factor[1] * (model.top_k or 1)))
        if shortest > 1:
            cause = (
                f"where it is computed as int(factor · k · tokens ÷ experts), {shortest - 1} tokens or fewer get no "
                "room at all"
            )
            remedy = "round up and keep at least 1, as moekit does"
            yield Finding("note", "capacity_zero", f"{factor[0]} {factor[1]:g}, {experts} experts", cause, remedy)
    if room is not None and length is not None and model.top_k and room * experts < model.top_k * length:
        lost = 1 - room * experts / (model.top_k * length)
        cause = f"a row of {length} tokens loses {lost:.0%} of its choices even at perfect balance"
        remedy = f"at least {-(-model.top_k * length // experts)}"
        yield Finding("warning", "capacity_below_one", f"expert_capacity {room}, {experts} experts", cause, remedy)


def _noise(model: _Model, experts: int) -> Iterator[Finding]:
    given = model.number(_JITTER)
    if given is None or given[1] == 0 or model.family == "phimoe":  # whose key is a threshold, also in eval
        return
    seen = f"{given[0]} {given[1]:g}"
    if model.family in families.IGNORES_JITTER:
        cause = f"transformers' {model.family} does not read it"
        yield Finding("warning", "jitter_ignored", seen, cause, "nothing to set; do not expect any noise")
    elif model.family in families.JITTERS_EXPERTS:
        cause = "acts in training only, and there on the hidden states in place: the experts compute on the noise too"
        yield Finding("note", "jitter", seen, cause, "0, where only the router should see noise")
    else:
        yield Finding("note", "jitter", seen, "acts in training only: a model for inference has no use for it", "0")


def _precision(model: _Model, experts: int) -> Iterator[Finding]:
    dtype = str(model.values.get("dtype") or model.values.get("torch_dtype") or "").removeprefix("torch.")
    asked = model.values.get("router_dtype") or model.values.get("moe_router_dtype")
    if asked in _NARROW:
        cause = "logits are rounded to 8 or 11 bits: near ties flip, and large ones lose what tells them apart"
        yield Finding("warning", "router_narrow", f"router_dtype {asked}", cause, "float32 (2101.03961 §2.4)")
    elif dtype in _NARROW and model.family not in families.FP32_ROUTER and not asked:
        cause = f"transformers multiplies the router's weight in {dtype}: near ties flip (moekit does it in float32)"
        yield Finding("note", "router_narrow", f"dtype {dtype}", cause, "keep the router's weight in float32")


def _library(model: _Model, experts: int) -> Iterator[Finding]:
    """What transformers 5.23 gets wrong by itself, or bitsandbytes in it."""
    config = model.values.get("quantization_config")
    if isinstance(config, Mapping) and str(config.get("quant_method", "")).startswith("bitsandbytes"):
        cause = "bitsandbytes replaces nn.Linear alone; fused experts stay as they are (bitsandbytes#1849)"
        remedy = "check the bytes of the experts"
        yield Finding("warning", "experts_not_quantised", "quant_method bitsandbytes", cause, remedy)
    if model.family == "nllb_moe" and experts > 2:
        cause = (
            "transformers 5.23 takes the 0s and 1s of the router's mask for expert numbers: only experts 0 and 1 run"
        )
        yield Finding("error", "experts_unreached", f"nllb-moe with {experts} experts", cause, "another version")
    if model.family == "jetmoe":
        cause = "transformers 5.23 returns the logits of each attention's router twice, and so balances them twice"
        yield Finding("note", "counted_twice", "jetmoe", cause, _OUR_LOSS)
    if model.family == "switch_transformers":
        cause = "padding takes room in the experts and counts in the loss, whatever router_ignore_padding_tokens says"
        yield Finding("note", "padding_counted", "switch_transformers", cause, "rows without padding")
