"""Decode and prefill of a whole decoder: moekit beside llama.cpp and transformers, a format at a time, same weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moekit.bench.decoders import GGUF_TYPES, ModelFiles, bytes_of_file, bytes_of_token, flops_of_prompt
from moekit.bench.peers import LlamaCpp, transformers_decoder
from moekit.config import ModelConfig
from moekit.errors import MissingExtraError
from moekit.models.cache import KVCache
from moekit.models.decoder import Decoder

__all__ = ["FORMATS", "GenerationRow", "Workload", "generation", "llama_name"]

Case = Literal["decode", "prefill"]
FORMATS = ("int4", "int8", "bf16")

_DIFFERENT = 0.05
"""KL in nats of the next token's distribution, above which two programs do not compute the same model; the decoder of
`decoders.FULL` with other random weights is at 0.8."""


@dataclass(frozen=True)
class Workload:
    """How much is measured: tokens of the prompt, tokens decoded in a round, rounds."""

    prompt: int = 512
    tokens: int = 20
    rounds: int = 6

    @property
    def longest(self) -> int:
        """Positions that a cache must hold."""
        return self.prompt + self.tokens * self.rounds

    @property
    def middle(self) -> int:
        """Positions of the past in the middle of decoding."""
        return self.prompt + self.tokens * self.rounds // 2


@dataclass(frozen=True)
class GenerationRow:
    """One contender in one case.

    Attributes:
        case, format, contender: what was measured.
        tokens_per_second: the prompt's, or one sequence's, from the median.
        p50_ms, p99_ms: milliseconds a token when decoding; of the prompt in prefill, where p99 is None.
        of_bound: share of the bound: bandwidth over the bytes a token reads, or the matrix product's rate.
        of_peer: speed over that of the best peer of this format; None where no peer ran.
        kl: of the next token's distribution after the prompt, from moekit's, in nats.
        memory: bytes by which the process grew; None for a model that shares moekit's tensors.
    """

    case: Case
    format: str
    contender: str
    tokens_per_second: float
    p50_ms: float
    p99_ms: float | None
    of_bound: float
    of_peer: float | None
    kl: float
    memory: int | None


class Contender(Protocol):
    """A program with a model in it and the past of one sequence."""

    nbytes: int

    def prompt(self, ids: Sequence[int]) -> Tensor:
        """Forget the past, compute `ids`; the logits (V,) after the last."""

    def step(self, token: int) -> object:
        """Compute one more token."""


def generation(
    files: ModelFiles,
    format: str,
    limits: Mapping[str, float],
    *,
    cases: Sequence[Case] = ("prefill", "decode"),
    work: Workload | None = None,
    missing: Callable[[str], None] = lambda _: None,
) -> list[GenerationRow]:
    """Measure one format: moekit and the peers that have it, in turn.

    Args:
        limits: from `cases.limits`, measured in this process.
        missing: called with the one line that says how to install a peer that is not there; its rows are left out.
    Raises:
        AssertionError: a peer computes another model.
    """
    work = work or Workload()
    ids = torch.randint(files.config.vocab_size, (work.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    with ExitStack() as stack:
        contenders, logits, memory = _contenders(files, format, work, ids, stack, missing)
        kl = _agreement(logits)
        rows: list[GenerationRow] = []
        for case in cases:
            if case == "prefill":
                took = _prefill(contenders, ids, work)
                flops = flops_of_prompt(files.config, work.prompt)
                least = dict.fromkeys(contenders, flops / _fastest(limits, format))
            else:
                took = _decode(contenders, ids, work)
                least = {name: each.nbytes / 1e9 / limits["read_gb_s"] for name, each in contenders.items()}
            rows += _rows(case, format, took, least, work, kl, memory)
    return rows


def _contenders(
    files: ModelFiles,
    format: str,
    work: Workload,
    ids: Sequence[int],
    stack: ExitStack,
    missing: Callable[[str], None],
) -> tuple[dict[str, Contender], dict[str, Tensor], dict[str, int | None]]:
    """Those of a format, the logits that each gives for `ids`, and the memory that each took for them."""
    makers: dict[str, Callable[[], Contender]]
    if format in GGUF_TYPES:
        path = files.gguf(format) if LlamaCpp.installed() else Path()  # where it is missing it says so
        makers = {
            "moekit": lambda: _Ours(files.packed(format), work),
            llama_name(format): lambda: _Llama(path, files.config, work, stack),
        }
    else:
        decoder = files.plain()
        makers = {
            "moekit": lambda: _Ours(decoder, work),
            "transformers grouped_mm": lambda: _Transformers(decoder, "grouped_mm", work),
            "transformers eager": lambda: _Transformers(decoder, "eager", work),
        }
    contenders: dict[str, Contender] = {}
    logits: dict[str, Tensor] = {}
    memory: dict[str, int | None] = {}
    for name, make in makers.items():
        before = _resident()
        try:
            contenders[name] = make()
        except MissingExtraError as error:
            missing(f"{name} is left out: {error}")
            continue
        logits[name] = contenders[name].prompt(ids)
        shared = name.startswith("transformers")
        memory[name] = None if shared or before is None else (_resident() or before) - before
    return contenders, logits, memory


class _Ours:
    def __init__(self, decoder: Decoder, work: Workload) -> None:
        self.decoder = decoder
        self._cache = KVCache(decoder.config, dtype=decoder.cache_dtype, capacity=work.longest)
        self.nbytes = bytes_of_token(decoder, self._cache.dtype, work.middle)

    @torch.inference_mode()
    def prompt(self, ids: Sequence[int]) -> Tensor:
        self._cache.truncate(0)
        return self._run(ids)

    def step(self, token: int) -> object:
        return self._run([token])

    @torch.inference_mode()
    def _run(self, ids: Sequence[int]) -> Tensor:
        output: Tensor = self.decoder(torch.tensor([ids]), cache=self._cache, last_only=True).logits
        return output[0, -1].float()


class _Llama:
    def __init__(self, path: Path, config: ModelConfig, work: Workload, stack: ExitStack) -> None:
        threads, context = torch.get_num_threads(), -(-work.longest // 256) * 256
        peer = LlamaCpp(path, threads=threads, context=context, repack=_may_repack())
        self._peer = stack.enter_context(peer)
        self.nbytes = bytes_of_file(path, config, work.middle)

    def prompt(self, ids: Sequence[int]) -> Tensor:
        self._peer.clear()
        return torch.from_numpy(self._peer.feed(ids).copy())

    def step(self, token: int) -> object:
        return self._peer.feed([token])


def _may_repack() -> bool:
    return not torch.cpu.get_capabilities().get("amx_bf16", False)


def llama_name(format: str) -> str:
    """llama.cpp in this format, as its rows say it."""
    return f"llama.cpp {GGUF_TYPES[format].upper()}{'' if _may_repack() else ', no repacking'}"


class _Transformers:
    def __init__(self, decoder: Decoder, backend: str, work: Workload) -> None:
        self._model: nn.Module = transformers_decoder(decoder, backend)
        self.nbytes = bytes_of_token(decoder, decoder.cache_dtype, work.middle)
        self._past: Any = None

    def prompt(self, ids: Sequence[int]) -> Tensor:
        self._past = None
        return self._run(ids)

    def step(self, token: int) -> object:
        return self._run([token])

    @torch.inference_mode()
    def _run(self, ids: Sequence[int]) -> Tensor:
        output = self._model(torch.tensor([ids]), past_key_values=self._past, use_cache=True, logits_to_keep=1)
        self._past = output.past_key_values
        logits: Tensor = output.logits[0, -1].float()
        return logits


def _prefill(contenders: Mapping[str, Contender], ids: Sequence[int], work: Workload) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(max(2, work.rounds // 2)):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender.prompt(ids)
            took[name].append(time.perf_counter() - start)
    return took


def _decode(contenders: Mapping[str, Contender], ids: Sequence[int], work: Workload) -> dict[str, list[float]]:
    """Seconds of every step after the prompt; two more at the start of a turn, while another program's threads may
    still be looking for work, are not counted."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.prompt(ids)
    for turn in range(work.rounds):
        for name, contender in contenders.items():
            for number in range(work.tokens):
                start = time.perf_counter()
                contender.step(ids[(turn * work.tokens + number) % len(ids)])
                if number > 1:
                    took[name].append(time.perf_counter() - start)
    return took


def _rows(
    case: Case,
    format: str,
    took: Mapping[str, list[float]],
    least: Mapping[str, float],
    work: Workload,
    kl: Mapping[str, float],
    memory: Mapping[str, int | None],
) -> list[GenerationRow]:
    median = {name: statistics.median(seconds) for name, seconds in took.items()}
    peers = [seconds for name, seconds in median.items() if name != "moekit"]
    tokens = work.prompt if case == "prefill" else 1
    return [
        GenerationRow(
            case=case,
            format=format,
            contender=name,
            tokens_per_second=tokens / seconds,
            p50_ms=1e3 * seconds,
            p99_ms=1e3 * sorted(took[name])[int(0.99 * len(took[name]))] if case == "decode" else None,
            of_bound=least[name] / seconds,
            of_peer=min(peers) / seconds if peers else None,
            kl=kl[name],
            memory=memory[name],
        )
        for name, seconds in median.items()
    ]


def _fastest(limits: Mapping[str, float], format: str) -> float:
    """FLOP a second of the best matrix product for this format: int8 activations are allowed where weights are."""
    names = ["gemm_fp32_gflop_s", "gemm_bf16_gflop_s", *(["gemm_int8_gflop_s"] if format in GGUF_TYPES else [])]
    return 1e9 * max(limits[name] for name in names)


def _agreement(logits: Mapping[str, Tensor]) -> dict[str, float]:
    """KL from moekit's distribution to each one's: who computes another model is not faster at this one."""
    ours = logits["moekit"].double().log_softmax(-1)
    found = {name: float((ours.exp() * (ours - each.double().log_softmax(-1))).sum()) for name, each in logits.items()}
    for name, value in found.items():
        assert value < _DIFFERENT, f"{name} computes another model: its next token is {value:.2f} nats away"
    return found


def _resident() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    import resource

    return pages * resource.getpagesize()
