"""`moekit plan`: what a model costs, before it is downloaded or run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moekit.config import ModelConfig
from moekit.errors import ConfigError
from moekit.machine import available_memory, parse_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.plan import PartBytes, Published

KV_TOKENS = 1000
ADVISED = "int4"
"""The format that advice is given for, unless --quant says another: what `moekit pack` makes by default."""


@dataclass(frozen=True)
class Options:
    """Count a model's parameters, memory and work from its configuration alone; no weight is read."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")]
    """A published model that moekit knows (mixtral-8x7b; a wrong one lists them), a folder in Hugging Face layout, its
    config.json, a .gguf file, or a name on the Hub whose config.json is in the local cache."""
    memory: str | None = None
    """Memory to plan for, as in 16GB or 16GiB; what is free here unless given."""
    quant: str | None = None
    """One format to plan for, as in `moekit pack` (int4-g64-asym), float32 or bfloat16; the usual ones unless given."""
    context: int = 4096
    """Positions a conversation may hold, for the cache's memory and the work of attention."""
    disk_gb_s: float | None = None
    """10⁹ bytes a second that experts come from disk at; of a packed folder's disk as measured unless given."""
    tokens: float | None = None
    """Tokens to train on (2e12), for the cost of training."""
    flops_per_second: float | None = None
    """FLOP/s that training reaches, all devices together; this machine's matrix product unless given."""
    price_per_hour: float | None = None
    """Price of an hour of those devices, for the money."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Print the tables; returns every figure."""
    from moekit.commands import plan_tables
    from moekit.plan import FORMATS, find, parameters, part_bytes

    _check(options)
    memory = available_memory() if options.memory is None else parse_bytes(options.memory)
    config, known = find(options.model)
    count = parameters(config)
    result: dict[str, Any] = {
        "arch": config.arch if isinstance(config, ModelConfig) else "switch_transformers",
        "total_params": count.total,
        "active_params": count.active,
        "total_params_without_embeddings": count.total_without_embeddings,
        "active_params_without_embeddings": count.active_without_embeddings,
        "parts": dict(count.parts),
        "active_parts": dict(count.active_parts),
        "published": None if known is None else _published(known),
        "memory_bytes": memory,
    }
    plan_tables.print_parameters(config, result, console)
    sizes = [part_bytes(config, format) for format in ([options.quant] if options.quant else FORMATS)]
    result |= {
        "weight_bytes": {each.format: each.total for each in sizes},
        "part_bytes": {each.format: dict(each.stored) for each in sizes},
    }
    if isinstance(config, ModelConfig):
        with console.status("measuring this machine"):
            limits = _limits()
            disk = _disk_rate(options, config)
        context = min(options.context, config.max_position_embeddings)
        result |= _run_figures(config, sizes, memory, context, limits)
        result |= {"disk_gb_s": disk and disk / 1e9, "offload": _offload(config, sizes, result, disk)}
        result["advice"] = _advice(config, options.quant or ADVISED, options.tokens, result)
        result |= _training(config, options, limits)
    else:
        result["fits"] = {each.format: each.total <= memory for each in sizes}
    plan_tables.print_costs(config, result, console)
    return result


def _check(options: Options) -> None:
    if options.context < 1:
        raise ConfigError(f"context must be at least 1, not {options.context}")
    for name in ("disk_gb_s", "tokens", "flops_per_second", "price_per_hour"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be above 0, not {value}")
    if options.tokens is None and (options.price_per_hour or options.flops_per_second):
        raise ConfigError("price_per_hour and flops_per_second are for the cost of training: give --tokens too")


def _published(known: Published) -> dict[str, Any]:
    total, active = known.differences
    return {
        "id": known.name,
        "repository": known.repository,
        "total_params": known.total,
        "total_counts": known.total_counts,
        "total_difference": total,
        "active_params": known.active,
        "active_counts": known.active_counts,
        "active_difference": active,
        "source": known.source,
        "note": known.note,
    }


def _limits() -> dict[str, float]:
    """Bytes a second from memory, and FLOP/s of a product, in two seconds: `moekit bench limits` measures longer."""
    import torch

    from moekit.bench import gemm_rate, int8_gemm_rate, read_bandwidth

    return {
        "read": read_bandwidth(1 << 28, repeats=3),
        "float32": gemm_rate(torch.float32, largest=1024, repeats=3),
        "bfloat16": gemm_rate(torch.bfloat16, largest=1024, repeats=3),
        "int8": int8_gemm_rate(largest=1024, repeats=3),
    }


def _run_figures(
    config: ModelConfig, sizes: list[PartBytes], memory: int, context: int, limits: Mapping[str, float]
) -> dict[str, Any]:
    """Cache, work, what fits, and the bounds of speed; those of a format that does not fit are None."""
    from moekit.plan import decode_bound, flops_per_token, kv_cache_bytes, kv_cache_bytes_read, prefill_bound

    cache = {each.format: kv_cache_bytes(config, context, each.cache_value) for each in sizes}
    fits = {each.format: each.total + cache[each.format] <= memory for each in sizes}
    return {
        "context": context,
        "flops_per_token": flops_per_token(config),
        "flops_per_token_at_context": flops_per_token(config, context),
        "training_flops_per_token": 3 * flops_per_token(config),
        "kv_cache_bytes_per_1000_tokens": kv_cache_bytes(config, KV_TOKENS),
        "kv_cache_bytes_read_per_1000_tokens": kv_cache_bytes_read(config, KV_TOKENS),
        "kv_cache_bytes": cache,
        "bytes_read_per_token": {each.format: each.per_token for each in sizes},
        "fits": fits,
        "measured": dict(limits),
        "decode_tokens_per_second_at_most": {
            each.format: decode_bound(config, each, limits["read"], context) if fits[each.format] else None
            for each in sizes
        },
        "prefill_tokens_per_second_at_most": {
            each.format: prefill_bound(config, _rate(limits, each.format), context) if fits[each.format] else None
            for each in sizes
        },
    }


def _disk_rate(options: Options, config: ModelConfig) -> float | None:
    """Bytes a second: as given, or as measured where there are experts to read."""
    if options.disk_gb_s is not None:
        return options.disk_gb_s * 1e9
    from moekit.adapt.expert_probe import probe
    from moekit.adapt.store import Store
    from moekit.models.archs import is_packed

    if config.moe is None or not is_packed(options.model):
        return None
    return 1e9 * probe(Store(options.model)).gb_s


def _offload(
    config: ModelConfig, sizes: list[PartBytes], result: Mapping[str, Any], disk: float | None
) -> dict[str, Any]:
    """Each packed format within the memory as a budget of the whole process."""
    from moekit.plan import offload

    if config.moe is None:
        return {}
    memory, context, bandwidth = result["memory_bytes"], result["context"], result["measured"]["read"]
    found = {
        each.format: offload(config, each, memory, context, bandwidth, disk)
        for each in sizes
        if each.packed and each.stored["experts"]
    }
    return {format: {**dataclasses.asdict(each), "hit_rate": each.hit_rate} for format, each in found.items()}


def _rate(limits: Mapping[str, float], format: str) -> float:
    """Of the product that a format may use: a quantised one the fastest there is."""
    if format in ("float32", "bfloat16"):
        return limits[format]
    return max(limits["float32"], limits["bfloat16"], limits["int8"])


def _advice(config: ModelConfig, format: str, tokens: float | None, result: Mapping[str, Any]) -> dict[str, Any]:
    from moekit.plan import Case, advise, kv_cache_bytes, part_bytes

    sizes = part_bytes(config, format)
    work = result["flops_per_token"]
    resting = result["parts"]["experts"] - result["active_parts"]["experts"]
    moe = config.moe
    case = Case(
        total=result["total_params"],
        active=result["active_params"],
        work=work,
        dense_work=work + 2 * resting,
        weight_bytes=sizes.total,
        cache_bytes=kv_cache_bytes(config, result["context"], sizes.cache_value),
        memory=result["memory_bytes"],
        num_experts=moe.num_experts if moe else 1,
        mean_k=moe.options.mean_k(moe.top_k) if moe else 1,
        tokens=tokens,
    )
    return {"format": format, **dataclasses.asdict(advise(case))}


def _training(config: ModelConfig, options: Options, limits: Mapping[str, float]) -> dict[str, Any]:
    from moekit.plan import training_flops

    if options.tokens is None:
        return {"training": None}
    flops = training_flops(config, options.tokens)
    rate = options.flops_per_second or max(limits["float32"], limits["bfloat16"])
    hours, price = flops / rate / 3600, options.price_per_hour
    return {
        "training": {
            "tokens": options.tokens,
            "flops": flops,
            "flops_per_second": rate,
            "hours": hours,
            "price_per_hour": price,
            "price": None if price is None else hours * price,
        }
    }
