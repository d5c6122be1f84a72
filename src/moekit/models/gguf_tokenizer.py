"""`tokenizer_metadata`: a tokenizer as the metadata of a GGUF file, for byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM)
and for SentencePiece's BPE (Llama 2, Mixtral).

Of byte-level ones, llama.cpp knows the ways to cut a text into words by name, each a regular expression in its source
(llama-vocab.cpp); a tokenizer whose own is none of those known here would be cut otherwise there, and is refused.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from gguf import TokenType

from moekit.errors import UnsupportedError
from moekit.models.gguf_file import GGUFFile
from moekit.models.gguf_vocabulary import CUTS, cut_of
from moekit.models.tokenizer import Tokenizer, load_tokenizer

__all__ = ["tokenizer_metadata"]


def tokenizer_metadata(model: str | os.PathLike[str], vocab_size: int, cut: str | None = None) -> dict[str, Any]:
    """The keys tokenizer.* for the tokenizer of the model at the path `model`.

    Args:
        model: a folder in Hugging Face layout, or a .gguf file, whose own keys are taken over.
        vocab_size: the model's; ids without a token are named and marked unused.
        cut: llama.cpp's name of the pre-tokenizer, where it is none that this module knows.
    Raises:
        FileError, FormatError: there is no tokenizer, or it cannot be read.
        UnsupportedError: it is neither byte-level BPE nor SentencePiece's, has more tokens than the
            model, or is cut in an unknown way.
    """
    if Path(model).suffix == ".gguf":
        kept = GGUFFile(model).metadata.items()
        return {key: value for key, value in kept if key.startswith("tokenizer.")} | ({_PRE: cut} if cut else {})
    return _metadata(load_tokenizer(model), str(model), vocab_size, cut)


_PRE = "tokenizer.ggml.pre"
_SPACE = "▁"
_ONE_BYTE = re.compile("<0x[0-9A-F]{2}>")


def _metadata(tokenizer: Tokenizer, source: str, vocab_size: int, cut: str | None) -> dict[str, Any]:
    backend = getattr(tokenizer.hf, "backend_tokenizer", None)
    values = json.loads(backend.to_str()) if backend else {"model": {}}
    steps = _steps(values.get("pre_tokenizer"))
    if values["model"].get("type") == "BPE" and steps and steps[-1].startswith("bytes"):
        kind = _byte_level(values["model"]["merges"], steps, source, cut)
    elif values["model"].get("type") == "BPE" and _puts_spaces(values):
        kind = _sentencepiece(values)
    else:
        raise UnsupportedError(
            f"the tokenizer of {source} is neither byte-level BPE nor SentencePiece's; export it with --no-tokenizer"
        )
    tokens, types = _tokens(tokenizer, values, vocab_size, source)
    if kind["model"] == "llama":
        types = [
            _sentencepiece_type(token, kind, tokenizer.hf.unk_token) for token, kind in zip(tokens, types, strict=True)
        ]
        scores, worst = kind["scores"], -float(len(kind["scores"]))
        kind["scores"] = [scores.get(token, worst) for token in tokens]
    hf = tokenizer.hf
    metadata = {
        **kind,
        "tokens": tokens,
        "token_type": types,
        "add_bos_token": tokenizer.encode("")[:1] == [hf.bos_token_id],
        **{f"{name}_token_id": getattr(hf, f"{name}_token_id") for name in ("bos", "eos")},
        "unknown_token_id": hf.unk_token_id,
        "padding_token_id": hf.pad_token_id,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}
    return metadata | ({"tokenizer.chat_template": hf.chat_template} if hf.chat_template else {})


def _byte_level(merges: list[Any], steps: tuple[str, ...], source: str, cut: str | None) -> dict[str, Any]:
    cut = cut or cut_of(steps)
    if cut is None:
        raise UnsupportedError(
            f"the tokenizer of {source} cuts words as {' then '.join(map(repr, steps))}, which is none of "
            f"{', '.join(CUTS)}: give llama.cpp's name for it with --pre-tokenizer, or --no-tokenizer"
        )
    return {"model": "gpt2", "pre": cut, "merges": [" ".join(_pair(merge)) for merge in merges]}


def _sentencepiece(values: dict[str, Any]) -> dict[str, Any]:
    """Scores are the ranks of the merges: all that BPE needs of SentencePiece's own is their order."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(values["model"]["merges"]):
        scores.setdefault("".join(_pair(merge)), -float(rank))
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": _begins_with_space(values)}


def _sentencepiece_type(token: str, kind: int, unknown: str | None) -> int:
    if token == unknown:
        return int(TokenType.UNKNOWN)
    return int(TokenType.BYTE) if _ONE_BYTE.fullmatch(token) else kind


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _puts_spaces(values: dict[str, Any]) -> bool:
    """Whether the only preparation of a text is to write spaces as ▁, as SentencePiece does, in one of the two ways.

    Where Metaspace puts a space before the first word alone, llama.cpp also puts one after each special token, as it
    does in the files of its own converter.
    """
    pre = values.get("pre_tokenizer")
    if pre is not None:
        return values.get("normalizer") is None and pre["type"] == "Metaspace" and not pre.get("split", True)
    known = ({"type": "Prepend", "prepend": _SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    steps = _normalizers(values)
    return known[1] in steps and all(step in known for step in steps)


def _begins_with_space(values: dict[str, Any]) -> bool:
    pre = values.get("pre_tokenizer")
    if pre is not None:
        return bool(pre["prepend_scheme"] != "never")
    return any(step["type"] == "Prepend" for step in _normalizers(values))


def _normalizers(values: dict[str, Any]) -> list[dict[str, Any]]:
    normalizer = values.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps: list[dict[str, Any]] = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return steps


def _steps(pre: dict[str, Any] | None) -> tuple[str, ...]:
    """What a pre-tokenizer does, step by step, in the words of `CUTS`; another step by its type."""
    if pre is None:
        return ()
    kind = pre["type"]
    if kind == "Sequence":
        return tuple(step for inner in pre["pretokenizers"] for step in _steps(inner))
    if kind == "ByteLevel" and not pre["add_prefix_space"]:
        return ("bytes and words" if pre["use_regex"] else "bytes",)
    if kind == "Digits" and pre["individual_digits"]:
        return ("digits",)
    if kind == "Split" and pre["behavior"] == "Isolated" and not pre["invert"]:
        return (pre["pattern"].get("Regex", "a string"),)
    return (kind,)


def _tokens(tokenizer: Tokenizer, values: dict[str, Any], vocab_size: int, source: str) -> tuple[list[str], list[int]]:
    """Every id's token and its type."""
    added = {token["id"]: token["special"] for token in values["added_tokens"]}
    by_id = {number: token for token, number in tokenizer.hf.get_vocab().items()}
    if by_id and max(by_id) >= vocab_size:
        raise UnsupportedError(
            f"the tokenizer of {source} has the id {max(by_id)}, but the model's vocabulary ends at {vocab_size - 1}"
        )
    tokens, types = [], []
    for number in range(vocab_size):
        kind = TokenType.UNUSED if number not in by_id else TokenType.NORMAL
        if number in added:
            kind = TokenType.CONTROL if added[number] else TokenType.USER_DEFINED
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        types.append(int(kind))
    return tokens, types
