"""`read_tokenizer`: the tokenizer in a GGUF file's metadata, as one of transformers.

Two kinds are known: byte-level BPE (`gpt2` in tokenizer.ggml.model) and SentencePiece's BPE with scores (`llama`). How
a text is cut into words before BPE is named by tokenizer.ggml.pre, with the names and expressions of llama.cpp
(src/llama-vocab.cpp); transformers' own reader ignores that name, and cuts every such model as GPT-2. `gguf_tokenizer`
writes the same keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moekit.errors import FileError, FormatError, UnsupportedError, shown

__all__ = ["CUTS", "cut_of", "read_tokenizer"]

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
CUTS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": ("bytes and words",),
    "smollm": ("digits", "bytes and words"),
    "llama-bpe": (_LETTERS + r"\p{N}{1,3}" + _REST, "bytes"),
    "qwen2": (_LETTERS + r"\p{N}" + _REST, "bytes"),
    "gpt-4o": (_CASED + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+", "bytes"),
}
"""llama.cpp's name to the steps of a pre-tokenizer: "bytes" is byte-level, "bytes and words" cuts as GPT-2 before that,
"digits" takes each by itself, and any other is an expression whose matches stand alone."""
_ALIASES = (
    {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "dbrx": "llama-bpe", "olmo": "gpt-2", "mpt": "gpt-2"}
    | dict.fromkeys(("stablelm2", "hunyuan", "deepseek-r1-qwen"), "qwen2")
    | dict.fromkeys(("starcoder", "refact", "command-r"), "smollm")
    | {"llama4": "gpt-4o"}
)
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3"}
"""Where a word that is a token is taken whole, and where a text begins with a token unless the file says otherwise."""

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPECIAL = ("bos", "eos", "unknown", "padding")
_LONGEST = 256
"""A token of more bytes is no product of merges: SentencePiece's have 16 characters, runs of spaces some more."""


def cut_of(steps: tuple[str, ...]) -> str | None:
    """llama.cpp's name for these steps of a pre-tokenizer."""
    return next((name for name, known in CUTS.items() if known == steps), None)


def read_tokenizer(metadata: Mapping[str, Any], source: str) -> Any:
    """transformers' tokenizer of a GGUF file's metadata, chat template included.

    Raises:
        FileError: the file has none.
        FormatError: its lists contradict each other.
        UnsupportedError: it is of another kind, or is cut into words in a way that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model", "no_vocab")
    if kind == "no_vocab":
        raise FileError(f"{source} has no tokenizer")
    if not isinstance(kind, str) or kind not in _BACKENDS:
        raise UnsupportedError(
            f"{source}: its tokenizer is of the kind {shown(kind)}; moekit reads {' and '.join(_BACKENDS)}"
        )
    fields = _Fields(metadata, source)
    backend = _BACKENDS[kind](fields)
    backend.add_tokens([*_added(fields)])
    special = {name: fields.special(name) for name in _SPECIAL}
    first = special["bos"] if fields.flag("add_bos_token", kind == "llama" or fields.cut() in _WHOLE_WORDS) else None
    if first is not None:
        from tokenizers.processors import TemplateProcessing

        ids = [(first, fields.tokens.index(first))]
        backend.post_processor = TemplateProcessing(f"{first} $A", f"{first} $A {first} $B", ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special["bos"],
        eos_token=special["eos"],
        unk_token=special["unknown"],
        pad_token=special["padding"],
        clean_up_tokenization_spaces=False,
    )
    template = metadata.get("tokenizer.chat_template")
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


class _Fields:
    """The keys tokenizer.ggml.*, checked."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata, self.source = metadata, source
        self.tokens = self.texts("tokens")
        self.types = self.numbers("token_type", np.full(len(self.tokens), _NORMAL))
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for number, token in enumerate(self.tokens) if self.ids[token] != number)
            raise FormatError(f"{source}: the token {shown(twice)} occurs twice in its tokenizer")

    def texts(self, name: str) -> Sequence[str]:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise FormatError(f"{self.source}: tokenizer.ggml.{name} must be a list of texts")
        return value

    def numbers(self, name: str, otherwise: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{name}", otherwise)
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise FormatError(f"{self.source}: tokenizer.ggml.{name} must have a number for each of the tokens")
        return value

    def flag(self, name: str, otherwise: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", otherwise)
        if not isinstance(value, bool):
            raise FormatError(f"{self.source}: tokenizer.ggml.{name} must be true or false, not {shown(value)}")
        return value

    def special(self, name: str) -> str | None:
        number = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is None:
            return None
        if not isinstance(number, int) or not 0 <= number < len(self.tokens):
            raise FormatError(f"{self.source}: tokenizer.ggml.{name}_token_id is {shown(number)}, which is no token")
        return self.tokens[number]

    def cut(self) -> Any:
        return self.metadata.get("tokenizer.ggml.pre")


def _added(fields: _Fields) -> Iterator[Any]:
    """Tokens that are found in a text before it is cut; the special ones have no text of their own."""
    from tokenizers import AddedToken

    for number in np.flatnonzero((fields.types == _CONTROL) | (fields.types == _USER_DEFINED)).tolist():
        special = bool(fields.types[number] == _CONTROL)
        if fields.tokens[number]:
            yield AddedToken(fields.tokens[number], normalized=False, special=special)


def _byte_level(fields: _Fields) -> Any:
    from tokenizers import Tokenizer, decoders, models

    cut = fields.cut()
    steps = CUTS.get(_ALIASES.get(cut, cut)) if isinstance(cut, str) else None
    if steps is None:
        raise UnsupportedError(
            f"{fields.source}: its tokenizer cuts words as {shown(cut)}, which moekit does not know; "
            f"it knows {', '.join(sorted([*CUTS, *_ALIASES]))}"
        )
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields.texts("merges"))]
    for left, right in merges:
        if not {left, right, left + right} <= fields.ids.keys():
            raise FormatError(f"{fields.source}: the merge {shown(f'{left} {right}')} is none of tokens")
    model = models.BPE(vocab=fields.ids, merges=merges, ignore_merges=cut in _WHOLE_WORDS)
    backend = Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(steps: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    named = {
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "bytes and words": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "digits": pre_tokenizers.Digits(individual_digits=True),
    }
    made = [named.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    return made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)


_SPACE = "▁"


def _sentencepiece(fields: _Fields) -> Any:
    """BPE whose merges are ranked by the score of the token they make; what no token holds is spelt in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown, prefix = fields.special("unknown"), fields.flag("add_space_prefix", True)
    model = models.BPE(
        vocab=fields.ids, merges=_merges(fields), unk_token=unknown, fuse_unk=True, byte_fallback="<0x00>" in fields.ids
    )
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(fields: _Fields) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best score first; alike ones in the order of their tokens."""
    scores, ids = fields.numbers("scores"), fields.ids
    found = []
    for number in np.flatnonzero(fields.types == _NORMAL).tolist():
        token = fields.tokens[number]
        if len(token) > _LONGEST:
            raise FormatError(f"{fields.source}: the token {shown(token)} is longer than {_LONGEST} characters")
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                found.append((-float(scores[number]), number, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


_BACKENDS = {"gpt2": _byte_level, "llama": _sentencepiece}
