"""`moekit inspect`: what a model is made of, and which experts take which tokens of one text or of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moekit.commands.budget import tell_budget
from moekit.commands.options import DType
from moekit.commands.routes import Routes
from moekit.errors import ConfigError, UnsupportedError
from moekit.machine import readable_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.engine import Model, TraceRow


@dataclass(frozen=True)
class Options:
    """Show a model's shape and, for one text or several, the work of its experts."""

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    """Folder in Hugging Face layout, or a .gguf file."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES")] = ()
    """Text files to route, each PATH or NAME=PATH; files of one NAME are one text, and texts are compared."""
    prompt: str | None = None
    """A text to route, instead of files."""
    max_tokens: int = 4096
    """How much of each text to route."""
    png: Path | None = None
    """Also draw the work of the experts to this file."""
    save_trace: Path | None = None
    """Also write which experts each token took to this file."""
    trace: Path | None = None
    """Show what --save-trace wrote, without a model."""
    dtype: DType | None = None
    """Compute in this format; the stored one when not given."""
    memory: str | None = None
    """What the whole process may take, as in 8GB: the experts of a packed model then come from disk as needed."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Print facts, heat map, texts, pairs and tokens; returns them all."""
    _check(options)
    if options.trace is not None:
        return _show_trace(options.trace, options, console)
    import moekit
    from moekit.engine import TraceHead, TraceWriter

    texts = _texts(options)
    model = moekit.load(str(options.model), dtype=options.dtype, memory=options.memory)
    tell_budget(model, console)
    facts = _facts(model)
    _print_facts(facts, console)
    if not texts:
        return {"facts": facts, "work": None}
    if model.config.moe is None or not model.config.moe_layers:
        if options.png is not None or options.save_trace is not None:
            raise UnsupportedError("this model is dense: it has no experts to draw or to trace")
        console.print("This model is dense: every parameter works on every token.")
        return {"facts": facts, "work": None}
    head = TraceHead(tuple(model.config.moe_layers), model.config.moe.num_experts, tuple(texts), facts)
    routes, pieces = Routes(head), dict[int, str]()
    with ExitStack() as stack:
        writer = None if options.save_trace is None else stack.enter_context(TraceWriter(options.save_trace))
        for number, paths in enumerate(texts.values()):
            for row in _rows(model, number, paths, options):
                routes.add(row)
                for token in set(row.tokens_T.tolist()) - pieces.keys():
                    pieces[token] = model.tokenizer.decode([token])
                if writer is not None:
                    writer.add(row)
        if writer is not None:
            writer.finish(head, pieces)
    return _show(routes, pieces, options, console)


def _show_trace(path: Path, options: Options, console: Console) -> dict[str, Any]:
    from moekit.engine import RoutingTrace

    trace = RoutingTrace(path)
    routes = Routes(trace.head)
    for row in trace.rows():
        routes.add(row)
    _print_facts(trace.head.facts, console)
    return _show(routes, trace.pieces, options, console)


def _show(routes: Routes, pieces: dict[int, str], options: Options, console: Console) -> dict[str, Any]:
    routes.show(pieces, console)
    if options.png is not None:
        from moekit.commands.routes_plot import draw

        draw(routes, options.png)
        console.print(f"drawn to {options.png}", markup=False, highlight=False)
    if options.save_trace is not None:
        console.print(f"trace in {options.save_trace}", markup=False, highlight=False)
    return {"facts": dict(routes.head.facts), "work": routes.as_dict(pieces)}


def _check(options: Options) -> None:
    routed = bool(options.text) or options.prompt is not None
    if options.trace is not None:
        if options.model is not None or routed or options.save_trace is not None or options.dtype is not None:
            raise ConfigError("--trace shows what was saved: give no MODEL, --text, --prompt, --save-trace or --dtype")
        return
    if options.model is None:
        raise ConfigError("give a MODEL, or --trace FILE to see a saved trace")
    if options.text and options.prompt is not None:
        raise ConfigError("give --text or --prompt, not both")
    for flag, path in (("--png", options.png), ("--save-trace", options.save_trace)):
        if path is not None and not routed:
            raise ConfigError(f"{flag} is about the experts' work on a text: give --text or --prompt too")
    if options.max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, not {options.max_tokens}")


def _texts(options: Options) -> dict[str, list[Path]]:
    """Names of texts to their files; a prompt has none."""
    if options.prompt is not None:
        return {"prompt": []}
    texts: dict[str, list[Path]] = {}
    bare: set[str] = set()
    for one in options.text:
        name, equals, path = one.partition("=")
        named = bool(equals) and not Path(one).exists()
        name, path = (name, path) if named else (Path(one).stem, one)
        if name in bare or (not named and name in texts):
            raise ConfigError(f"several texts are called {name}: tell them apart, or make them one, with NAME=PATH")
        bare |= set() if named else {name}
        texts.setdefault(name, []).append(Path(path))
    return texts


def _facts(model: Model) -> dict[str, str | int]:
    from moekit.adapt import packed_formats
    from moekit.plan import parameters

    config, count = model.config, parameters(model.config)
    formats = packed_formats(model.decoder)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.decoder.parameters()} | {*formats.values()})
    tensors = [*model.decoder.parameters(), *(model.decoder.get_buffer(name) for name in formats)]
    stored = sum(tensor.nbytes for tensor in tensors)
    facts: dict[str, str | int] = {
        "architecture": config.arch,
        "parameters": count.total,
        "active parameters": count.active,
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": f"{config.num_attention_heads}, sharing {config.num_key_value_heads} keys and values",
        "context": config.max_position_embeddings,
        "weights": f"{readable_bytes(stored)} of {', '.join(dtypes)}",
        "vocabulary": config.vocab_size,
        "tokenizer": f"{model.tokenizer.vocab_size} tokens, end of text {list(model.tokenizer.eos_ids)}",
        "chat template": "yes" if model.can_chat else "no",
    }
    if config.moe is not None:
        moe = config.moe
        facts["experts"] = f"{moe.num_experts} of width {moe.intermediate_size} in {len(config.moe_layers)} layers"
        facts["experts a token"] = moe.top_k
        facts["shared experts"] = moe.num_shared_experts
    return facts


def _print_facts(facts: Mapping[str, str | int], console: Console) -> None:
    for name, value in facts.items():
        console.print(f"[bold]{name:<18}[/] ", end="")
        console.print(f"{value:,}" if isinstance(value, int) else value, markup=False, highlight=False)


def _rows(model: Model, text: int, paths: list[Path], options: Options) -> Iterator[TraceRow]:
    """Run a text through the model in rows that fit its context; a file begins a new row.

    Raises:
        ConfigError: it is empty.
    """
    from moekit.engine.trace import MAX_ROW
    from moekit.train.data import text_pieces

    size, left = min(MAX_ROW, model.config.max_position_embeddings), options.max_tokens
    for source in map(text_pieces, paths) if paths else [iter([options.prompt or ""])]:
        tokens = islice(chain.from_iterable(map(model.tokenizer.encode, source)), left)
        while ids := list(islice(tokens, size)):
            left -= len(ids)
            yield _row(model, text, ids)
    if left == options.max_tokens:
        raise ConfigError("the text is empty: there is nothing to route")


def _row(model: Model, text: int, ids: list[int]) -> TraceRow:
    import torch

    from moekit.engine.trace import row_of

    with torch.inference_mode():
        return row_of(text, ids, model.decoder.features(torch.tensor([ids])).routings)
